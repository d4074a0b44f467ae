"""From a socket to a running channel: who opens what, in which order, and who closes it.

Order of the end, on every path: the channel stops the rings, its tasks are cancelled, and only then
descriptors and memory go, so that nothing waits on a descriptor that has become another file.
"""

from __future__ import annotations

import socket as stdlib_socket
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from vfsmount.channel.arena import MAX_BLOCK, Arena
from vfsmount.channel.backend_requests import BackendRequestServer
from vfsmount.channel.device import Channel
from vfsmount.channel.frontend import DeviceOffer, Frontend
from vfsmount.channel.memory import GUEST_BASE, SharedMemory
from vfsmount.channel.options import ChannelOptions
from vfsmount.channel.rings import DriverQueue
from vfsmount.channel.socket import MessageSocket, connect
from vfsmount.errors import HandshakeError, ProtocolViolation
from vfsmount.wire.vhost_user import BackendRequest, Payload, ProtocolFeature, VirtioFeature
from vfsmount.wire.vring import VringLayout, vring_layout

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Mapping

    from vfsmount.channel.backend_requests import BackendHandler

__all__ = ["open_channel", "probe"]

#: Bytes of addresses for requests and replies. They cost nothing until used; this is room for 500
#: requests of 1 MiB at once, or for a full queue of 512 KiB ones.
ARENA_SIZE = 64 * MAX_BLOCK
#: FORGETs come in batches; a queue of this size holds 4000.
_HIPRIO_SIZE = 128
_PAGE = 4096
_DEFAULT_OPTIONS = ChannelOptions()


class _Connection(NamedTuple):
    """A front-end whose reader runs, a nursery for more tasks, and what to close after them."""

    frontend: Frontend
    nursery: trio.Nursery
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
    caught: BaseException | None = None
    with ExitStack() as closing:
        closing.callback(frontend.close)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(frontend.read_replies)
            try:
                yield _Connection(frontend, nursery, closing)
            except BaseException as error:
                # Raised again below, outside the nursery, which would wrap it in a group: our
                # tasks raise nothing, so the caller's own exception is all there is.
                caught = error
            nursery.cancel_scope.cancel()
    if caught is not None:
        raise caught


@asynccontextmanager
async def open_channel(
    path: str | os.PathLike[str] | None = None,
    options: ChannelOptions = _DEFAULT_OPTIONS,
    *,
    sock: stdlib_socket.socket | None = None,
    handlers: Mapping[BackendRequest, BackendHandler] | None = None,
) -> AsyncIterator[Channel]:
    """Connect to a virtio-fs daemon and start its queues; close everything at the end.

    Args:
        path: The daemon's vhost-user socket.
        options: See ChannelOptions.
        sock: A connected stream socket instead of ``path``; ours from now on.
        handlers: Who serves the daemon's own requests, besides CONFIG_CHANGE_MSG.

    Raises:
        ConnectError: Nobody there.
        HandshakeError: Somebody is there, but it does not work out.
        UsageError: The shared memory file is there already.
    """
    async with _connection(path, sock, options) as (frontend, nursery, closing):
        offer = await frontend.introduce()
        _check_queues(offer)
        server = await _open_backend_channel(frontend, closing, handlers or {})
        await frontend.accept_features(offer, options)
        layouts, arena_base = _plan(min(options.queue_size, _HIPRIO_SIZE), options.queue_size)
        memory = SharedMemory(arena_base + ARENA_SIZE, options.shm_file)
        closing.callback(memory.close)
        arena = Arena(ARENA_SIZE, arena_base)
        hiprio, requests = (
            DriverQueue(
                index,
                memory,
                arena,
                layout,
                event_idx=bool(frontend.features & VirtioFeature.RING_EVENT_IDX),
                indirect=bool(frontend.features & VirtioFeature.RING_INDIRECT_DESC),
            )
            for index, layout in enumerate(layouts)
        )
        for queue in (hiprio, requests):
            closing.callback(queue.close)
        await frontend.share_inflight(len(layouts), options.queue_size)
        await frontend.share(memory)
        for queue in (hiprio, requests):
            await frontend.start_queue(queue, GUEST_BASE)
        await frontend.finish()
        channel = Channel(frontend, offer, options, memory, arena, hiprio, requests)
        closing.callback(channel.release)
        for task in (channel.reap_on_calls, channel.flush_forgets_in_time, channel.look_after):
            nursery.start_soon(task)
        if server is not None:
            nursery.start_soon(_serve, server, channel)
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


def _check_queues(offer: DeviceOffer) -> None:
    if offer.num_queues is not None and offer.num_queues < 2:
        raise HandshakeError(
            f"the device has {offer.num_queues} queues; a virtio-fs device has two at least",
            "name the vhost-user socket of a virtio-fs daemon",
        )
    if offer.max_mem_slots == 0:
        raise HandshakeError("the device takes no memory at all (0 memory slots)")


def _plan(*queue_sizes: int) -> tuple[list[VringLayout], int]:
    """Lay the rings out, each on pages of its own; return also where the arena starts."""
    layouts: list[VringLayout] = []
    base = 0
    for size in queue_sizes:
        layout = vring_layout(size, base)
        layouts.append(layout)
        base = -(-layout.end // _PAGE) * _PAGE
    return layouts, base


async def _open_backend_channel(
    frontend: Frontend, closing: ExitStack, handlers: Mapping[BackendRequest, BackendHandler]
) -> BackendRequestServer | None:
    if not frontend.protocol_features & ProtocolFeature.BACKEND_REQ:
        return None
    ours, theirs = stdlib_socket.socketpair()
    server = BackendRequestServer(
        MessageSocket(trio.socket.from_stdlib_socket(ours)),
        frontend,
        {BackendRequest.CONFIG_CHANGE_MSG: _ignore_config_change, **handlers},
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
