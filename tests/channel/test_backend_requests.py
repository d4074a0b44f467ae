"""The channel on which the daemon asks us."""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.channel.support import DEADLINE, getattr_request, opened
from tests.support.silent_fuse import answered_within, silent_file
from tests.support.wait import wait_until_async
from vfsmount.channel import open_channel
from vfsmount.channel.backend_requests import BackendRequestServer, LentRequests
from vfsmount.channel.socket import Message, MessageSocket
from vfsmount.errors import ProtocolViolation
from vfsmount.testing import FakeDevice
from vfsmount.wire.vhost_user import (
    HEADER,
    BackendRequest,
    Payload,
    ProtocolFeature,
    ShmemMap,
    decode_header,
    encode_message,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from vfsmount.channel import Channel

MAP = ShmemMap(0, 0, 0, 4096, 1)
REFUSED = (1 << 64) - errno.EOPNOTSUPP


@asynccontextmanager
async def asked(device: FakeDevice) -> AsyncIterator[Channel]:
    async with opened(device) as channel:
        yield channel


async def ask(
    device: FakeDevice, request: BackendRequest, record: Payload = None, fds: tuple[int, ...] = ()
) -> int:
    return await trio.to_thread.run_sync(device.ask, request, record, fds)


async def test_config_change_is_acknowledged() -> None:
    device = FakeDevice()
    async with asked(device) as channel:
        assert await ask(device, BackendRequest.CONFIG_CHANGE_MSG) == 0
        await getattr_request(channel)


@pytest.mark.parametrize(
    ("request_", "record"),
    [
        (BackendRequest.SHMEM_MAP, MAP),
        (BackendRequest.SHMEM_UNMAP, MAP._replace(flags=0)),
        (BackendRequest.SHARED_OBJECT_ADD, bytes(16)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
async def test_what_was_not_negotiated_is_refused(
    request_: BackendRequest, record: Payload, expect_log: Callable[[str], None]
) -> None:
    expect_log(f"refused the daemon's {request_.name}")
    device = FakeDevice()
    async with asked(device) as channel:
        assert await ask(device, request_, record) == REFUSED
        await getattr_request(channel)


async def test_descriptors_of_refused_requests_are_closed(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("refused")
    device = FakeDevice()
    async with asked(device):
        read_end, write_end = os.pipe()
        assert await ask(device, BackendRequest.SHMEM_MAP, MAP, (read_end,)) == REFUSED
        os.close(read_end)
        closed = select.poll()
        closed.register(write_end, select.POLLERR)
        await wait_until_async(lambda: closed.poll(0), DEADLINE, "the other end to be closed")
        os.close(write_end)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n",
        encode_message(BackendRequest.CONFIG_CHANGE_MSG)[:4] + b"\x05" + bytes(7),
        b"\x63\0\0\0\x01\0\0\0\0\0\0\0",
        b"\x02\0\0\0\x01\0\0\0\x01\0\0\0x",
    ],
    ids=["text", "a reply", "unknown request", "wrong size"],
)
async def test_garbage_ends_the_channel(data: bytes, expect_log: Callable[[str], None]) -> None:
    expect_log("garbage on the back-end request channel")
    device = FakeDevice()
    async with asked(device) as channel:
        assert device.backend_channel is not None
        device.backend_channel.sendall(data)
        assert isinstance(await channel.wait_ended(), ProtocolViolation)


async def test_wrong_number_of_descriptors_ends_the_channel(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("CONFIG_CHANGE_MSG with 1 descriptors")
    device = FakeDevice()
    async with asked(device) as channel:
        assert device.backend_channel is not None
        read_end, write_end = os.pipe()
        message = encode_message(BackendRequest.CONFIG_CHANGE_MSG)
        socket.send_fds(device.backend_channel, [message], [read_end])
        os.close(read_end)
        await channel.wait_ended()
        closed = select.poll()
        closed.register(write_end, select.POLLERR)
        await wait_until_async(lambda: closed.poll(0), DEADLINE, "the other end to be closed")
        os.close(write_end)


async def test_closing_it_alone_means_nothing() -> None:
    device = FakeDevice()
    async with asked(device) as channel:
        assert device.backend_channel is not None
        device.backend_channel.shutdown(socket.SHUT_RDWR)
        await getattr_request(channel)
        with trio.move_on_after(0.05) as scope:
            await channel.wait_ended()
        assert scope.cancelled_caught


class Negotiated:
    """As if SHMEM had been negotiated."""

    features = 0
    protocol_features = int(
        ProtocolFeature.SHMEM
        | ProtocolFeature.BACKEND_SEND_FD
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.REPLY_ACK
    )


async def served(
    message: bytes, fds: list[int], handler: Callable[[Payload, list[int]], int]
) -> bytes:
    """Send one request to a server with a handler for SHMEM_MAP, and return the answer."""
    ours, theirs = socket.socketpair()
    server = BackendRequestServer(
        MessageSocket(trio.socket.from_stdlib_socket(ours)),
        Negotiated(),
        {BackendRequest.SHMEM_MAP: handler},
    )
    with theirs, trio.fail_after(DEADLINE):
        socket.send_fds(theirs, [message], fds)
        theirs.shutdown(socket.SHUT_WR)
        await server.serve()
        server.close()
        return theirs.recv(100)


async def test_handlers_are_given_payload_and_descriptors() -> None:
    seen: list[tuple[Payload, str]] = []

    def handle(payload: Payload, fds: list[int]) -> int:
        os.pwrite(fds[0], b"seen", 0)
        seen.append((payload, str(len(fds))))
        return 0

    fd = os.memfd_create("passed")
    message = encode_message(BackendRequest.SHMEM_MAP, MAP, need_reply=True)
    answer = await served(message, [fd], handle)
    assert seen == [(MAP, "1")]
    assert os.pread(fd, 4, 0) == b"seen"
    os.close(fd)
    assert answer.hex() == "090000000500000008000000" + "00" * 8


async def test_failures_are_answered_as_negated_errnos() -> None:
    message = encode_message(BackendRequest.SHMEM_MAP, MAP, need_reply=True)
    fd = os.memfd_create("passed")
    answer = await served(message, [fd], lambda _payload, _fds: errno.EEXIST)
    os.close(fd)
    assert int.from_bytes(answer[12:], "little", signed=True) == -errno.EEXIST


@pytest.mark.needs_fuse
async def test_refused_descriptors_are_closed_without_waiting(tmp_path: Path) -> None:
    """To close a file of a FUSE mount means a FLUSH there, which nobody may answer."""
    with silent_file(tmp_path / "mnt") as fd:
        ours, theirs = socket.socketpair()
        server = BackendRequestServer(
            MessageSocket(trio.socket.from_stdlib_socket(ours)),
            Negotiated(),
            {BackendRequest.SHMEM_MAP: lambda _payload, _fds: errno.EOPNOTSUPP},
        )
        encoded = encode_message(BackendRequest.SHMEM_MAP, MAP, need_reply=True)
        header = decode_header(encoded[: HEADER.size])
        message = Message(header, encoded[HEADER.size :], [os.dup(fd)])
        assert answered_within(DEADLINE, lambda: server.answer(message))
        server.close()
        theirs.close()


async def test_no_answer_unless_asked_for() -> None:
    message = encode_message(BackendRequest.SHMEM_MAP, MAP)
    fd = os.memfd_create("passed")
    assert await served(message, [fd], lambda _payload, _fds: 0) == b""
    os.close(fd)


async def test_handlers_reach_the_server(expect_log: Callable[[str], None]) -> None:
    """Without the feature, a handler alone is not enough."""
    expect_log("refused the daemon's SHMEM_MAP: .*SHMEM")
    device = FakeDevice()
    handlers = {BackendRequest.SHMEM_MAP: lambda _payload, _fds: 0}
    with trio.fail_after(DEADLINE), device:
        async with open_channel(sock=device.guest_socket(), handlers=handlers):
            assert await ask(device, BackendRequest.SHMEM_MAP, MAP) == REFUSED


async def test_refusals_are_told_once(
    expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("refused the daemon's SHMEM_MAP")
    device = FakeDevice()
    async with asked(device):
        for _ in range(3):
            assert await ask(device, BackendRequest.SHMEM_MAP, MAP) == REFUSED
    assert caplog.text.count("refused the daemon's") == 1


def test_a_daemon_that_reads_no_answer_is_not_served_any_more() -> None:
    """An answer that is dropped in silence would have the daemon wait for ever."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        requests = LentRequests(ours, lambda _: bytes(4096))
        message = encode_message(BackendRequest.CONFIG_CHANGE_MSG)
        for _ in range(1000):
            theirs.sendall(message)
            requests.serve()
            if requests.ended:
                break
        else:
            pytest.fail("it is still being served")
        requests.close()


def test_a_daemon_that_asks_without_end_does_not_hold_the_thread() -> None:
    ours, theirs = socket.socketpair()
    message = encode_message(BackendRequest.CONFIG_CHANGE_MSG)
    with theirs:
        ours.setblocking(False)

        def answer(_: Message) -> bytes:
            theirs.sendall(message)
            return b""

        requests = LentRequests(ours, answer)
        theirs.sendall(message)
        answered_within(DEADLINE, requests.serve)
        assert not requests.ended
        requests.close()
