"""A virtio-fs back-end in a thread, on one end of a socketpair, as good or bad as a test wants it.

    with FakeDevice(lambda request: request.reply(b"hello")) as device:
        async with open_channel(sock=device.guest_socket()) as channel: ...

By default it negotiates, serves both queues and answers every request with an empty success. Two
places to misbehave: ``reactions`` (to vhost-user messages) and ``serve`` (for each chain). A served
request need not be answered in ``serve``: keep it and answer it later, from any thread.
"""

from __future__ import annotations

import array
import contextlib
import enum
import mmap
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, TypeAlias

from vfsmount.errors import WireError
from vfsmount.testing.device_ring import Chain, DeviceRing
from vfsmount.wire import virtio_fs
from vfsmount.wire.fuse import IN_HEADER, OUT_HEADER, InHeader, Opcode
from vfsmount.wire.vhost_user import (
    FRONTEND_MESSAGES,
    HEADER,
    MAX_FDS,
    BackendRequest,
    ConfigRange,
    FdWord,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    ShmemConfig,
    VirtioFeature,
    VringAddr,
    VringState,
    check_fds,
    decode_header,
    decode_payload,
    encode_ack,
    encode_header,
    encode_message,
    encode_reply,
    kind_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

__all__ = ["ALL_FEATURES", "ALL_PROTOCOL_FEATURES", "DeviceRequest", "FakeDevice", "Reaction"]

_REQ = FrontendRequest
_PF = ProtocolFeature
_VF = VirtioFeature

#: What the fake offers unless told otherwise: all that it has.
ALL_FEATURES = int(
    _VF.VERSION_1 | _VF.PROTOCOL_FEATURES | _VF.RING_EVENT_IDX | _VF.RING_INDIRECT_DESC
)
ALL_PROTOCOL_FEATURES = int(
    _PF.MQ
    | _PF.REPLY_ACK
    | _PF.BACKEND_REQ
    | _PF.CONFIG
    | _PF.BACKEND_SEND_FD
    | _PF.RESET_DEVICE
    | _PF.CONFIGURE_MEM_SLOTS
    | _PF.STATUS
)
_NO_REPLY = {int(Opcode.FORGET), int(Opcode.BATCH_FORGET)}
_STOP_PATIENCE = 20.0
_DEFAULT_CONFIG = virtio_fs.Config(b"fake")


class Reaction(enum.Enum):
    """What to do instead of handling a vhost-user message."""

    CLOSE = "close the connection"
    IGNORE = "never answer"
    REFUSE = "answer with a u64 of 1, which is a refusal where an acknowledgement is due"
    GARBAGE = "answer with bytes that are no message"
    CUT = "answer with half a message and close"


Serve: TypeAlias = "Callable[[DeviceRequest], object]"


class DeviceRequest:
    """One chain, in the device's hands.

    Attributes:
        device: The device.
        queue: Ring index.
        chain: The descriptors.
        data: All device-readable bytes, copied.
        room: Bytes that may be written.
    """

    def __init__(self, device: FakeDevice, queue: int, chain: Chain) -> None:
        self.device = device
        self.queue = queue
        self.chain = chain
        self.data = b"".join(device.read(addr, length) for addr, length in chain.readable)
        self.room = sum(length for _, length in chain.writable)

    @property
    def header(self) -> InHeader:
        """The FUSE header."""
        return IN_HEADER.unpack(self.data)

    @property
    def body(self) -> bytes:
        """What follows the FUSE header."""
        return self.data[IN_HEADER.size :]

    def reply(
        self,
        body: bytes = b"",
        error: int = 0,
        *,
        unique: int | None = None,
        length: int | None = None,
        written: int | None = None,
        head: int | None = None,
    ) -> None:
        """Answer with a FUSE reply; every keyword is a way to lie.

        Args:
            body: Reply body.
            error: ``error`` of the header, 0 or a negated errno.
            unique: Instead of the request's.
            length: ``len`` of the header, instead of the true one.
            written: Used length, instead of the true one.
            head: Used id, instead of the chain's.
        """
        size = OUT_HEADER.size + len(body)
        unique = self.header.unique if unique is None else unique
        self.write(OUT_HEADER.values(size if length is None else length, error, unique) + body)
        self.use(size if written is None else written, head)

    def write(self, data: bytes) -> None:
        """Write into the device-writable part, as far as there is one."""
        for addr, length in self.chain.writable:
            self.device.write(addr, data[:length])
            data = data[length:]

    def use(self, written: int = 0, head: int | None = None) -> None:
        """Return the chain to the driver, and call if it wants that."""
        self.device.use(self.queue, self.chain.head if head is None else head, written)


def _answer_empty(request: DeviceRequest) -> None:
    if request.header.opcode in _NO_REPLY:
        request.use()
    else:
        request.reply()


class _Ring:
    """What is known of one ring before and after it runs."""

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addr: VringAddr | None = None
        self.kick_fd = -1
        self.call_fd = -1
        self.enabled = False
        self.ring: DeviceRing | None = None


class FakeDevice:
    """The device and its thread; a context manager.

    Args:
        serve: Called for each chain, in the device's thread; the default answers with success.
        reactions: What to do about which message instead of handling it.
        features: Virtio features to offer.
        protocol_features: Protocol features to offer.
        num_queues: Answer to GET_QUEUE_NUM.
        config: Config space; None answers GET_CONFIG with an empty payload.
        mute: Never look at the rings.
        shmem: Bytes of the shared memory region to offer; 0 for none.

    Attributes:
        requests: Names of the messages received, in order.
        acked: Virtio features that the front-end accepted.
        acked_protocol: Protocol features that it accepted.
        status: Last device status.
        served: Chains taken so far.
        calls: Calls made so far.
        backend_channel: Our end of the back-end request channel, when the front-end gave one.
    """

    def __init__(
        self,
        serve: Serve = _answer_empty,
        *,
        reactions: Mapping[FrontendRequest, Reaction] | None = None,
        features: int = ALL_FEATURES,
        protocol_features: int = ALL_PROTOCOL_FEATURES,
        num_queues: int = 2,
        config: virtio_fs.Config | None = _DEFAULT_CONFIG,
        mute: bool = False,
        shmem: int = 0,
    ) -> None:
        self.serve = serve
        self.requests: list[str] = []
        self.acked = 0
        self.acked_protocol = 0
        self.status = 0
        self.served = 0
        self.calls = 0
        self.backend_channel: socket.socket | None = None
        self._reactions = dict(reactions or {})
        self._features = features
        self._protocol_features = protocol_features | (int(_PF.SHMEM) if shmem else 0)
        self._shmem = shmem
        self._num_queues = num_queues
        self._config = config
        self._mute = mute
        self._guest, self._sock = socket.socketpair()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rings = [_Ring() for _ in range(num_queues)]
        self._regions: list[tuple[MemoryRegion, mmap.mmap]] = []
        self._fds: list[int] = []
        self._lock = threading.RLock()  # rings may be used from the test's thread as well
        self._stopping = False
        self._hung_up = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fake device", daemon=True)

    def __enter__(self) -> FakeDevice:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if error is None and self._failure is not None:
            raise self._failure

    def guest_socket(self) -> socket.socket:
        """The front-end's end of the connection; give it to ``open_channel``, which closes it."""
        return self._guest

    def stop(self) -> None:
        """End the thread and close everything; what the driver did wrong is raised on exit."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(_STOP_PATIENCE)
        assert not self._thread.is_alive(), "the fake device hangs"
        self.hang_up()
        self._sock.close()
        self._guest.close()
        with self._lock:
            for _, mapping in self._regions:
                mapping.close()
            for fd in [*self._fds, self._wake]:
                os.close(fd)
            self._regions, self._fds, self._rings = [], [], []
        if self.backend_channel is not None:
            self.backend_channel.close()

    def hang_up(self) -> None:
        """End the connection, as a daemon that dies does; callable from any thread.

        The descriptor is closed by the device's thread, which may be about to use it.
        """
        self._hung_up = True
        with contextlib.suppress(OSError):  # it is gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def connected(self) -> bool:
        """Whether the device still serves: neither end has closed the connection."""
        return self._thread.is_alive()

    def send(self, data: bytes) -> None:
        """Send bytes to the front-end that it did not ask for."""
        self._sock.sendall(data)

    def send_with_fds(self, data: bytes, fds: Sequence[int]) -> None:
        """The same, with descriptors."""
        socket.send_fds(self._sock, [data], list(fds))

    def paused(self) -> contextlib.AbstractContextManager[bool]:
        """Keep the device's thread off the rings while a test plays the device by hand."""
        return self._lock

    def ask(
        self, request: BackendRequest, record: Payload = None, fds: tuple[int, ...] = ()
    ) -> int:
        """Send a request on the back-end channel and return the front-end's answer (u64)."""
        return self.ask_raw(encode_message(request, record, need_reply=True), fds)

    def ask_raw(self, message: bytes, fds: tuple[int, ...] = ()) -> int:
        """The same with any bytes that ask for an answer."""
        channel = self.backend_channel
        assert channel is not None, "no back-end channel"
        channel.settimeout(_STOP_PATIENCE)
        socket.send_fds(channel, [message], list(fds))
        data = channel.recv(HEADER.size + 8, socket.MSG_WAITALL)
        assert decode_header(data).is_reply
        return int.from_bytes(data[HEADER.size :], "little")

    def send_backend(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes on the back-end channel, and expect no answer."""
        assert self.backend_channel is not None, "no back-end channel"
        if fds:
            socket.send_fds(self.backend_channel, [data], list(fds))
        else:
            self.backend_channel.sendall(data)

    # --- memory and rings, for DeviceRequest and for tests ---

    def ring(self, queue: int) -> DeviceRing:
        """The device's side of a running ring."""
        ring = self._rings[queue].ring
        assert ring is not None, f"ring {queue} does not run"
        return ring

    def read(self, guest_addr: int, length: int) -> bytes:
        """Read guest memory; AssertionError outside of it."""
        mapping, offset = self._locate(guest_addr, length, by_user_addr=False)
        return mapping[offset : offset + length]

    def write(self, guest_addr: int, data: bytes) -> None:
        """Write guest memory; AssertionError outside of it."""
        mapping, offset = self._locate(guest_addr, len(data), by_user_addr=False)
        mapping[offset : offset + len(data)] = data

    def use(self, queue: int, head: int, written: int) -> None:
        """Put an element into the used ring, and call if the driver wants that."""
        with self._lock:
            if self.ring(queue).use(head, written):
                self.call(queue)

    def call(self, queue: int) -> None:
        """Call the driver."""
        self.calls += 1
        if self._rings[queue].call_fd >= 0:
            os.eventfd_write(self._rings[queue].call_fd, 1)

    def _locate(self, addr: int, length: int, *, by_user_addr: bool) -> tuple[mmap.mmap, int]:
        for region, mapping in self._regions:
            start = region.user_addr if by_user_addr else region.guest_addr
            if start <= addr and addr + length <= start + region.size:
                return mapping, addr - start + region.mmap_offset
        raise AssertionError(f"{length} bytes at {addr:#x} are outside of guest memory")

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._stopping and not self._hung_up and self._turn():
                pass
        except BaseException as error:  # the top of a thread: kept for the test to raise
            self._failure = error
        if not self._stopping:
            self.hang_up()
            self._sock.close()

    def _turn(self) -> bool:
        """Wait for something and handle it; return whether to go on."""
        poller = select.poll()
        kicks = {ring.kick_fd: index for index, ring in enumerate(self._rings) if ring.kick_fd >= 0}
        for fd in (self._sock.fileno(), self._wake, *kicks):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll():
            if fd in kicks:
                os.read(fd, 8)
                if not self._mute:
                    self._serve_ring(kicks[fd])
            elif fd == self._sock.fileno() and (self._hung_up or not self._handle_message()):
                return False
        return True

    def _serve_ring(self, index: int) -> None:
        assert self._rings[index].enabled, f"kick of ring {index} before it was enabled"
        ring = self.ring(index)
        more = True
        while more and not self._stopping:
            with self._lock:
                chain = ring.take()
                more = chain is not None or ring.want_kick()
            if chain is not None:
                self.served += 1
                self.serve(DeviceRequest(self, index, chain))

    # --- messages ---

    def _handle_message(self) -> bool:
        """Handle one message; return whether the connection goes on."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, HEADER.size, MAX_FDS)
        except ConnectionResetError:  # the front-end left with something of ours unread
            return False
        if len(data) < HEADER.size:
            return False
        header = decode_header(data)
        payload = self._sock.recv(header.size, socket.MSG_WAITALL) if header.size else b""
        kind_of(FRONTEND_MESSAGES, header.request)
        request = FrontendRequest(header.request)
        self.requests.append(request.name)
        self._fds += fds
        record = decode_payload(request, payload)
        check_fds(request, record, len(fds))
        reaction = self._reactions.get(request)
        if reaction is not None:
            return self._misbehave(request, reaction)
        reply, reply_fds = self._handle(request, record, list(fds))
        if FRONTEND_MESSAGES[request].reply is not None or header.needs_reply:
            self._send_reply(request, reply, reply_fds)
        return True

    def _send_reply(self, request: FrontendRequest, record: Payload, fds: list[int]) -> None:
        if record is None and FRONTEND_MESSAGES[request].reply is None:
            record = 0
        payload = encode_reply(request, record)
        message = encode_header(request, len(payload), reply=True) + payload
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self._sock.sendmsg([message], [rights] if fds else [])

    def _misbehave(self, request: FrontendRequest, reaction: Reaction) -> bool:
        if reaction is Reaction.REFUSE:
            payload = encode_ack(1)
            self._sock.sendall(encode_header(request, len(payload), reply=True) + payload)
        elif reaction is Reaction.GARBAGE:
            self._sock.sendall(b"220 mail.example.org ESMTP ready\r\n")
        elif reaction is Reaction.CUT:
            self._sock.sendall(encode_header(request, 8, reply=True)[:10])
        return reaction not in {Reaction.CLOSE, Reaction.CUT}

    def _handle(
        self, request: FrontendRequest, record: Payload, fds: list[int]
    ) -> tuple[Payload, list[int]]:
        """Return the payload of the reply, and its descriptors."""
        match request, record:
            case _REQ.GET_FEATURES, _:
                return self._features, []
            case _REQ.SET_FEATURES, int():
                self.acked = record
                if not record & _VF.PROTOCOL_FEATURES:
                    for ring in self._rings:
                        ring.enabled = True
            case _REQ.GET_PROTOCOL_FEATURES, _:
                return self._protocol_features, []
            case _REQ.SET_PROTOCOL_FEATURES, int():
                self.acked_protocol = record
            case _REQ.GET_QUEUE_NUM, _:
                return self._num_queues, []
            case _REQ.GET_MAX_MEM_SLOTS, _:
                return 32, []
            case _REQ.SET_STATUS, int():
                self.status = record
            case _REQ.GET_STATUS, _:
                return self.status, []
            case _REQ.GET_SHMEM_CONFIG, _:
                return ShmemConfig({virtio_fs.DAX_SHMID: self._shmem}), []
            case _REQ.GET_CONFIG, ConfigRange():
                return self._config_reply(record), []
            case _REQ.SET_BACKEND_REQ_FD, _:
                self.backend_channel = socket.socket(fileno=os.dup(fds[0]))
            case _REQ.SET_MEM_TABLE, MemoryTable():
                for region, fd in zip(record.regions, fds, strict=True):
                    self._map(region, fd)
            case _REQ.ADD_MEM_REG, MemoryRegion():
                self._map(record, fds[0])
            case _:
                return self._handle_vring(request, record, fds), []
        return None, []

    def _config_reply(self, wanted: ConfigRange) -> ConfigRange | None:
        if self._config is None:
            return None
        space = virtio_fs.encode_config(self._config)
        end = wanted.offset + len(wanted.data)
        return ConfigRange(wanted.offset, 0, space[wanted.offset : end])

    def _map(self, region: MemoryRegion, fd: int) -> None:
        self._regions.append((region, mmap.mmap(fd, region.size + region.mmap_offset)))

    def _handle_vring(self, request: FrontendRequest, record: Payload, fds: list[int]) -> Payload:
        match request, record:
            case _REQ.SET_VRING_NUM, VringState(index, num):
                self._rings[index].size = num
            case _REQ.SET_VRING_BASE, VringState(index, num):
                self._rings[index].base = num
            case _REQ.SET_VRING_ADDR, VringAddr():
                self._rings[record.ring].addr = record
            case _REQ.SET_VRING_KICK, FdWord(index, _):
                self._rings[index].kick_fd = fds[0]
                self._start(self._rings[index])
            case _REQ.SET_VRING_CALL, FdWord(index, _):
                self._rings[index].call_fd = fds[0]
            case _REQ.SET_VRING_ENABLE, VringState(index, num):
                self._rings[index].enabled = bool(num)
            case _REQ.GET_VRING_BASE, VringState(index, _):
                self._rings[index].kick_fd = -1
                return VringState(index, self.ring(index).last_avail)
            case ((_REQ.SET_OWNER | _REQ.RESET_DEVICE), _):
                pass
            case _:
                raise WireError(f"the fake device does not know {request.name}")
        return None

    def _start(self, state: _Ring) -> None:
        addr = state.addr
        assert addr is not None, "SET_VRING_KICK before SET_VRING_ADDR"
        mapping, desc = self._locate(addr.desc_user_addr, 16 * state.size, by_user_addr=True)
        _, avail = self._locate(addr.avail_user_addr, 6 + 2 * state.size, by_user_addr=True)
        _, used = self._locate(addr.used_user_addr, 6 + 8 * state.size, by_user_addr=True)
        state.ring = DeviceRing(
            mapping,
            state.size,
            desc,
            avail,
            used,
            event_idx=bool(self.acked & _VF.RING_EVENT_IDX),
            offset_of=lambda guest: self._locate(guest, 16, by_user_addr=False)[1],
            start=state.base,
        )
