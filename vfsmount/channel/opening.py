"""From a socket to a running channel: who opens what, in which order, and who closes it.

Order of the end, on every path: the channel stops the rings, its tasks are cancelled, and only then
descriptors and memory go, so that nothing waits on a descriptor that has become another file.
"""

from __future__ import annotations

import socket as stdlib_socket
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from vfsmount.channel.arena import MAX_BLOCK, Arena
from vfsmount.channel.backend_requests import BackendRequestServer
from vfsmount.channel.device import Channel
from vfsmount.channel.frontend import DeviceOffer, Frontend
from vfsmount.channel.memory import GUEST_BASE, SharedMemory
from vfsmount.channel.nursery import open_helpers
from vfsmount.channel.options import ChannelOptions
from vfsmount.channel.rings import DriverQueue
from vfsmount.channel.shmem import older_handlers, region_size, window_handlers
from vfsmount.channel.socket import MessageSocket, connect
from vfsmount.errors import HandshakeError, ProtocolViolation
from vfsmount.wire import virtio_fs
from vfsmount.wire.vhost_user import BackendRequest, Payload, ProtocolFeature, VirtioFeature
from vfsmount.wire.vring import vring_layout

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from vfsmount.channel.backend_requests import BackendHandler, OlderHandler
    from vfsmount.channel.shmem import Window
    from vfsmount.wire.vring import VringLayout

__all__ = ["open_channel", "probe"]

#: Bytes of addresses for requests and replies. They cost nothing until used; this is room for 600
#: requests of 1 MiB at once, or for a full queue of the relay's, which come 15 to a block.
ARENA_SIZE = 80 * MAX_BLOCK
#: FORGETs come in batches; a queue of this size holds 4000.
_HIPRIO_SIZE = 128
_PAGE = 4096
_DEFAULT_OPTIONS = ChannelOptions()


class _Background:
    """Tasks that outlive a cancellation of the caller, until ``stop``.

    The orderly end needs them: somebody has to read the daemon's answers and reap the rings while
    a cancelled caller sends its last requests.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """Start one; it must not raise."""
        scope = trio.CancelScope(shield=True)
        self._scopes.append(scope)
        self._nursery.start_soon(self._run, scope, task)

    @staticmethod
    async def _run(scope: trio.CancelScope, task: Callable[[], Awaitable[object]]) -> None:
        with scope:
            await task()

    def stop(self) -> None:
        """Cancel them all."""
        for scope in self._scopes:
            scope.cancel()


class _Connection(NamedTuple):
    """A front-end whose reader runs, more tasks, and what to close after them."""

    frontend: Frontend
    background: _Background
    closing: ExitStack


@asynccontextmanager
async def _connection(
    path: str | os.PathLike[str] | None,
    sock: stdlib_socket.socket | None,
    options: ChannelOptions,
) -> AsyncIterator[_Connection]:
    if (path is None) == (sock is None):
        raise ValueError("either a socket path or a connected socket")
    if sock is not None:
        messages = MessageSocket(trio.socket.from_stdlib_socket(sock))
    else:
        assert path is not None
        messages = await connect(path, options.connect_timeout)
    frontend = Frontend(messages, options.connect_timeout)
    with ExitStack() as closing:
        closing.callback(frontend.close)
        async with open_helpers() as nursery:
            background = _Background(nursery)
            background.start(frontend.read_replies)
            try:
                yield _Connection(frontend, background, closing)
            finally:
                background.stop()


@asynccontextmanager
async def open_channel(
    path: str | os.PathLike[str] | None = None,
    options: ChannelOptions = _DEFAULT_OPTIONS,
    *,
    sock: stdlib_socket.socket | None = None,
    handlers: Mapping[BackendRequest, BackendHandler] | None = None,
    window: Window | None = None,
) -> AsyncIterator[Channel]:
    """Connect to a virtio-fs daemon and start its queues; close everything at the end.

    Args:
        path: The daemon's vhost-user socket.
        options: See ChannelOptions.
        sock: A connected stream socket instead of ``path``; ours from now on.
        handlers: Who serves the daemon's own requests, besides CONFIG_CHANGE_MSG.
        window: Who takes what the daemon maps; cleared at the end.

    Raises:
        ConnectError: Nobody there.
        HandshakeError: Somebody is there, but it does not work out.
        UsageError: The shared memory file is there already.
    """
    async with _connection(path, sock, options) as (frontend, background, closing):
        offer = await frontend.introduce(window is not None)
        _check_offer(offer)
        table, older = dict(handlers or {}), {}
        if window is not None:
            table |= window_handlers(window)
            closing.callback(window.clear)
            window.offered(region_size(frontend.protocol_features, offer.shmem))
            older = older_handlers(window)
        server = await _open_backend_channel(frontend, closing, table, older)
        await frontend.accept_features(offer, options)
        memory, arena, queues = _allocate(frontend.features, options, closing)
        await frontend.share(memory)
        for queue in queues:
            await frontend.start_queue(queue, GUEST_BASE)
        await frontend.finish()
        channel = Channel(frontend, offer, options, memory, arena, *queues)
        channel.backend_requests = server
        closing.callback(channel.release)
        for task in (channel.reap_on_calls, channel.send_in_time, channel.look_after):
            background.start(task)
        if server is not None:
            background.start(partial(_serve, server, channel))
        try:
            yield channel
        finally:
            await channel.aclose()


async def probe(
    path: str | os.PathLike[str] | None = None,
    options: ChannelOptions = _DEFAULT_OPTIONS,
    *,
    sock: stdlib_socket.socket | None = None,
) -> DeviceOffer:
    """Ask a daemon what it offers, without memory or rings. Most daemons exit afterwards.

    Raises:
        ConnectError: Nobody there.
        HandshakeError: Somebody is there, but does not answer as a vhost-user back-end.
    """
    async with _connection(path, sock, options) as connection:
        return await connection.frontend.introduce()


def _check_offer(offer: DeviceOffer) -> None:
    if offer.num_queues is not None and offer.num_queues < 2:
        raise HandshakeError(
            f"the device has {offer.num_queues} queues; a virtio-fs device has two at least",
            "name the vhost-user socket of a virtio-fs daemon",
        )
    if offer.max_mem_slots == 0:
        raise HandshakeError("the device takes no memory at all (0 memory slots)")


def _allocate(
    features: int, options: ChannelOptions, closing: ExitStack
) -> tuple[SharedMemory, Arena, tuple[DriverQueue, DriverQueue]]:
    """Make the shared memory, with the rings on pages of their own and the arena behind them."""
    hiprio_layout = vring_layout(min(options.queue_size, _HIPRIO_SIZE))
    request_layout = vring_layout(options.queue_size, _page_up(hiprio_layout.end))
    arena_base = _page_up(request_layout.end)
    memory = SharedMemory(arena_base + ARENA_SIZE, options.shm_file)
    closing.callback(memory.close)
    arena = Arena(ARENA_SIZE, arena_base)

    def queue(index: int, layout: VringLayout) -> DriverQueue:
        made = DriverQueue(
            index,
            memory,
            arena,
            layout,
            event_idx=bool(features & VirtioFeature.RING_EVENT_IDX),
            indirect=bool(features & VirtioFeature.RING_INDIRECT_DESC),
        )
        closing.callback(made.close)
        return made

    hiprio = queue(virtio_fs.HIPRIO_QUEUE, hiprio_layout)
    return memory, arena, (hiprio, queue(virtio_fs.first_request_queue(False), request_layout))


def _page_up(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE


async def _open_backend_channel(
    frontend: Frontend,
    closing: ExitStack,
    handlers: Mapping[BackendRequest, BackendHandler],
    older: Mapping[int, OlderHandler],
) -> BackendRequestServer | None:
    if not frontend.protocol_features & ProtocolFeature.BACKEND_REQ:
        return None
    ours, theirs = stdlib_socket.socketpair()
    server = BackendRequestServer(
        MessageSocket(trio.socket.from_stdlib_socket(ours)),
        frontend,
        {BackendRequest.CONFIG_CHANGE_MSG: _ignore_config_change, **handlers},
        older,
    )
    closing.callback(server.close)
    with theirs:
        await frontend.set_backend_channel(theirs)
    return server


def _ignore_config_change(_payload: Payload, _fds: list[int]) -> int:
    """Tag and number of queues do not change while we are connected."""
    return 0


async def _serve(server: BackendRequestServer, channel: Channel) -> None:
    try:
        await server.serve()
    except ProtocolViolation as violation:
        channel.fail(violation)
