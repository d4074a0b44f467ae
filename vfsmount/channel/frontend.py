"""The vhost-user front-end: what is said on the connection, in which order, with which patience.

One task reads the connection for as long as it lasts (``read_replies``). ``call`` sends a request
and waits for that task to hand over the answer, for a bounded time. There is no correlation id, so
one request is outstanding at a time; a message that nobody asked for is a violation.

The order of the handshake is the one that real daemons accept: features, protocol features,
questions, acknowledgement of features, memory, rings. Set-up messages ask for an acknowledgement
whenever REPLY_ACK has been negotiated, so that trouble shows at the message that made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import trio

from vfsmount.channel.negotiation import ack_protocol_features, ack_virtio_features
from vfsmount.channel.trace import trace_message
from vfsmount.closer import discard
from vfsmount.errors import (
    ChannelBroken,
    FeatureMissing,
    HandshakeError,
    ProtocolViolation,
    WireError,
)
from vfsmount.wire import virtio_fs
from vfsmount.wire.vhost_user import (
    ACK_OK,
    FRONTEND_MESSAGES,
    ConfigRange,
    FdWord,
    FrontendRequest,
    MemoryTable,
    Payload,
    ProtocolFeature,
    ShmemConfig,
    VirtioFeature,
    VirtioStatus,
    VringAddr,
    VringState,
    decode_reply,
    encode_message,
    missing_features,
)

if TYPE_CHECKING:
    import socket as stdlib_socket
    from collections.abc import Callable, Mapping, Sequence

    from vfsmount.channel.memory import SharedMemory
    from vfsmount.channel.options import ChannelOptions
    from vfsmount.channel.rings import DriverQueue
    from vfsmount.channel.socket import Message, MessageSocket

__all__ = ["DeviceOffer", "Frontend"]

_REQ = FrontendRequest
_PF = ProtocolFeature
_SEE_LOG = "the daemon's own log may tell why"

T = TypeVar("T")


class DeviceOffer(NamedTuple):
    """What a daemon says about itself before any ring runs.

    Attributes:
        features: Virtio features offered.
        protocol_features: Protocol features offered; 0 when it has none.
        num_queues: Queues of all kinds, or None when it does not say (no MQ).
        max_mem_slots: Memory regions, or None when it does not say (no CONFIGURE_MEM_SLOTS).
        config: Config space, or None when it has none.
        shmem: Sizes in bytes of its shared memory regions by shmid; asked only by who has a window.
    """

    features: int
    protocol_features: int
    num_queues: int | None
    max_mem_slots: int | None
    config: virtio_fs.Config | None
    shmem: Mapping[int, int]

    @property
    def num_request_queues(self) -> int:
        """Request queues: as the config space says, else as the number of queues tells, else 1."""
        if self.config is not None:
            return self.config.num_request_queues
        return max((self.num_queues or 2) - virtio_fs.first_request_queue(False), 1)


class Frontend:
    """One vhost-user connection, from our end.

    Args:
        sock: The connection; this object owns it.
        timeout: Seconds to wait for each answer.

    Attributes:
        features: Virtio features acked; what is offered until they have been.
        protocol_features: Protocol features acked.
        on_lost: Called once when the connection ends or turns to garbage.
    """

    def __init__(self, sock: MessageSocket, timeout: float) -> None:
        self.features = 0
        self.protocol_features = 0
        self.on_lost: Callable[[ChannelBroken], None] | None = None
        self._socket = sock
        self._timeout = timeout
        self._turn = trio.Lock()
        self._asking: FrontendRequest | None = None
        self._answered = trio.Event()
        self._answer: Message | None = None
        self._lost: ChannelBroken | None = None

    def close(self) -> None:
        """Close the connection and what came over it; again is harmless."""
        self._socket.close()
        if self._answer is not None:
            discard(self._answer.fds)
            self._answer = None

    # --- one request ---

    async def call(
        self, request: FrontendRequest, record: Payload = None, fds: Sequence[int] = ()
    ) -> Payload:
        """Send a request; wait for its reply, or for an acknowledgement where those are negotiated.

        Returns:
            The payload of the reply; None for an acknowledgement. Descriptors of replies are
            closed.

        Raises:
            FeatureMissing: The request needs a feature that is not negotiated; nothing was sent.
            HandshakeError: No answer in time, the connection ended, a refusal, or not vhost-user.
        """
        kind = FRONTEND_MESSAGES[request]
        missing = missing_features(kind, self.protocol_features, self.features)
        if missing:
            raise FeatureMissing(f"{request.name} needs {' and '.join(missing)}")
        need_ack = kind.reply is None and bool(self.protocol_features & _PF.REPLY_ACK)
        data = encode_message(request, record, need_reply=need_ack)
        async with self._turn:
            expected = kind.reply is not None or need_ack
            message = await self._exchange(request, data, fds, expected)
        answer = None if message is None else self._accept(request, message)
        trace_message(request, record, answer)
        return answer

    async def _exchange(
        self, request: FrontendRequest, data: bytes, fds: Sequence[int], expected: bool
    ) -> Message | None:
        self._raise_if_lost(request)
        if expected:
            self._asking, self._answer, self._answered = request, None, trio.Event()
        with trio.move_on_after(self._timeout) as patience:
            try:
                await self._socket.send(data, fds)
            except OSError:
                # The reader finds the reason; it may be an answer that came before the end.
                await self._answered.wait()
            if expected:
                await self._answered.wait()
        self._asking = None
        if patience.cancelled_caught:
            raise HandshakeError(
                f"the daemon did not answer {request.name} within {self._timeout:g} s",
                "it may hang or be busy with another connection: start a fresh one",
            )
        answer, self._answer = self._answer, None
        if answer is None:
            self._raise_if_lost(request)
        return answer

    def _raise_if_lost(self, request: FrontendRequest) -> None:
        lost = self._lost
        if isinstance(lost, ProtocolViolation):
            raise HandshakeError(
                f"the peer speaks something else than vhost-user (at {request.name}): {lost}",
                "name the vhost-user socket of a virtio-fs daemon",
            ) from lost
        if lost is not None:
            raise HandshakeError(
                f"the daemon closed the connection during {request.name}", _SEE_LOG
            ) from lost

    def _accept(self, request: FrontendRequest, message: Message) -> Payload:
        try:
            if message.header.request != request or not message.header.is_reply:
                raise WireError(f"message {message.header.request} came instead of the answer")
            record = decode_reply(request, message.payload)
        except WireError as error:
            raise HandshakeError(f"bad answer to {request.name}: {error}", _SEE_LOG) from error
        finally:
            discard(message.fds)
        if FRONTEND_MESSAGES[request].reply is not None:
            return record
        if record != ACK_OK:
            raise HandshakeError(f"the daemon refused {request.name} (error {record!r})", _SEE_LOG)
        return None

    async def ask(self, request: FrontendRequest, answer: type[T], record: Payload = None) -> T:
        """Send a request whose reply is an ``answer``. Raises as ``call``."""
        reply = await self.call(request, record)
        assert isinstance(reply, answer)
        return reply

    async def read_replies(self) -> None:
        """Read the connection until it ends; run as a task.

        It returns when the connection has ended, and has told ``on_lost`` then.
        """
        while True:
            try:
                message = await self._socket.receive()
            except WireError as error:
                return self._lose(ProtocolViolation(f"garbage on the vhost-user socket: {error}"))
            except (OSError, trio.ClosedResourceError) as error:
                return self._lose(ChannelBroken(f"the vhost-user connection broke: {error}"))
            if message is None:
                return self._lose(ChannelBroken("the daemon closed the vhost-user connection"))
            if self._asking is None or self._answer is not None:
                discard(message.fds)
                what = f"message {message.header.request} that nobody asked for"
                return self._lose(ProtocolViolation(f"the daemon sent {what}"))
            self._answer = message
            self._answered.set()

    def _lose(self, error: ChannelBroken) -> None:
        self._lost = error
        self._answered.set()
        if self.on_lost is not None:
            self.on_lost(error)

    # --- the handshake, in order ---

    async def introduce(self, window: bool = False) -> DeviceOffer:
        """Take possession, negotiate protocol features and ask what there is to ask.

        Args:
            window: Whether we have a window for what the back-end maps.

        Raises:
            HandshakeError: As ``call``.
        """
        await self.call(_REQ.SET_OWNER)
        self.features = offered = await self.ask(_REQ.GET_FEATURES, int)
        offered_protocol = 0
        if offered & VirtioFeature.PROTOCOL_FEATURES:
            offered_protocol = await self.ask(_REQ.GET_PROTOCOL_FEATURES, int)
            acked = ack_protocol_features(offered_protocol, window)
            await self.call(_REQ.SET_PROTOCOL_FEATURES, acked)
            self.protocol_features = acked
        num_queues = await self._ask_if(_PF.MQ, _REQ.GET_QUEUE_NUM)
        slots = await self._ask_if(_PF.CONFIGURE_MEM_SLOTS, _REQ.GET_MAX_MEM_SLOTS)
        config, shmem = await self._ask_config(), await self._ask_shmem()
        return DeviceOffer(offered, offered_protocol, num_queues, slots, config, shmem)

    async def _ask_if(self, feature: ProtocolFeature, request: FrontendRequest) -> int | None:
        return await self.ask(request, int) if self.protocol_features & feature else None

    async def _ask_config(self) -> virtio_fs.Config | None:
        if not self.protocol_features & _PF.CONFIG:
            return None
        dummy = ConfigRange(0, 0, bytes(virtio_fs.CONFIG_SIZE))
        reply = await self.call(_REQ.GET_CONFIG, dummy)
        if not isinstance(reply, ConfigRange):
            return None  # an empty payload: it has no config space after all
        try:
            return virtio_fs.decode_config(reply.data)
        except WireError as error:
            raise HandshakeError(f"bad answer to GET_CONFIG: {error}", _SEE_LOG) from error

    async def _ask_shmem(self) -> Mapping[int, int]:
        if not self.protocol_features & _PF.SHMEM:
            return {}
        return (await self.ask(_REQ.GET_SHMEM_CONFIG, ShmemConfig)).sizes

    async def set_backend_channel(self, theirs: stdlib_socket.socket) -> None:
        """Give the back-end its end of the channel on which it asks us. Raises as ``call``."""
        await self.call(_REQ.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    async def accept_features(self, offer: DeviceOffer, options: ChannelOptions) -> None:
        """Acknowledge virtio features and lead the device status up to FEATURES_OK.

        Raises:
            HandshakeError: As ``call``; or the device is too old or does not agree.
        """
        acked = ack_virtio_features(offer.features, options)
        status = VirtioStatus.ACKNOWLEDGE | VirtioStatus.DRIVER
        await self._set_status(VirtioStatus.ACKNOWLEDGE)
        await self._set_status(status)
        await self.call(_REQ.SET_FEATURES, acked)
        self.features = acked
        await self._set_status(status | VirtioStatus.FEATURES_OK)
        accepted = await self._ask_if(_PF.STATUS, _REQ.GET_STATUS)
        if accepted is not None and not accepted & VirtioStatus.FEATURES_OK:
            raise HandshakeError(f"the device does not accept the features {acked:#x}")

    async def _set_status(self, status: VirtioStatus) -> None:
        if self.protocol_features & _PF.STATUS:
            await self.call(_REQ.SET_STATUS, int(status))

    async def share(self, memory: SharedMemory) -> None:
        """Give the device the memory. Raises as ``call``."""
        if self.protocol_features & _PF.CONFIGURE_MEM_SLOTS:
            await self.call(_REQ.ADD_MEM_REG, memory.region, [memory.fd])
        else:
            await self.call(_REQ.SET_MEM_TABLE, MemoryTable((memory.region,)), [memory.fd])

    async def start_queue(self, queue: DriverQueue, user_base: int) -> None:
        """Set one ring up. Fresh eventfds, CALL before KICK; no kick before ``finish``.

        Raises:
            HandshakeError: As ``call``.
        """
        index, layout = queue.index, queue.layout
        addr = VringAddr(
            index, 0, user_base + layout.desc, user_base + layout.used, user_base + layout.avail, 0
        )
        await self.call(_REQ.SET_VRING_NUM, VringState(index, layout.queue_size))
        await self.call(_REQ.SET_VRING_BASE, VringState(index, 0))
        await self.call(_REQ.SET_VRING_ADDR, addr)
        await self.call(_REQ.SET_VRING_CALL, FdWord(index), [queue.call_fd])
        await self.call(_REQ.SET_VRING_KICK, FdWord(index), [queue.kick_fd])
        if self.features & VirtioFeature.PROTOCOL_FEATURES:
            await self.call(_REQ.SET_VRING_ENABLE, VringState(index, 1))

    async def finish(self) -> None:
        """Make sure that everything said so far has been done; kicks are allowed afterwards.

        A kick that comes before the ring is enabled is lost on some daemons.

        Raises:
            HandshakeError: As ``call``.
        """
        status = VirtioStatus.ACKNOWLEDGE | VirtioStatus.DRIVER | VirtioStatus.FEATURES_OK
        await self._set_status(status | VirtioStatus.DRIVER_OK)
        if not self.protocol_features & _PF.REPLY_ACK:
            await self.call(_REQ.GET_FEATURES)  # handled in order, so this is a barrier

    # --- the orderly end ---

    async def stop(self, indices: Sequence[int]) -> None:
        """Stop the rings: the device finishes what it has fetched. Raises as ``call``."""
        for index in indices:
            await self.call(_REQ.GET_VRING_BASE, VringState(index, 0))
        if self.protocol_features & _PF.RESET_DEVICE:
            await self.call(_REQ.RESET_DEVICE)
