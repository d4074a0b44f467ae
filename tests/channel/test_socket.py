"""Framing on the vhost-user socket."""

from __future__ import annotations

import os
import select
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.channel.support import DEADLINE
from vfsmount.channel.socket import Message, MessageSocket
from vfsmount.errors import WireError
from vfsmount.wire.vhost_user import FrontendRequest, Header, encode_header, encode_message

if TYPE_CHECKING:
    from collections.abc import Iterator

PING = encode_message(FrontendRequest.SET_FEATURES, 7)
PING_HEADER = Header(FrontendRequest.SET_FEATURES, 1, 8)


@contextmanager
def pair() -> Iterator[tuple[MessageSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    messages = MessageSocket(trio.socket.from_stdlib_socket(ours))
    with theirs:
        yield messages, theirs
        messages.close()
        messages.close()


async def has_no_reader(write_end: int) -> None:
    """Wait until the other end of a pipe is closed, which a thread does."""
    watch = select.poll()
    watch.register(write_end, select.POLLERR)
    assert await trio.to_thread.run_sync(watch.poll, DEADLINE * 1000)


async def test_send_and_receive() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        await messages.send(PING)
        assert theirs.recv(100) == PING
        theirs.sendall(PING)
        assert await messages.receive() == Message(PING_HEADER, PING[12:], [])


async def test_message_that_comes_byte_by_byte() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in PING:
                    theirs.send(bytes([byte]))
                    await trio.testing.wait_all_tasks_blocked()

            nursery.start_soon(drip)
            assert await messages.receive() == Message(PING_HEADER, PING[12:], [])


async def test_several_messages_at_once_keep_their_descriptors_apart() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(theirs, [PING], [pipes[0][0], pipes[1][0]])
        socket.send_fds(theirs, [PING], [pipes[2][0]])
        first, second = await messages.receive(), await messages.receive()
        assert first is not None
        assert second is not None
        assert (len(first.fds), len(second.fds)) == (2, 1)
        for fd in [*first.fds, *second.fds]:
            assert not os.get_inheritable(fd)
        os.write(pipes[2][1], b"third")
        assert os.read(second.fds[0], 10) == b"third"
        for fd in [*first.fds, *second.fds, *(fd for pipe in pipes for fd in pipe)]:
            os.close(fd)


async def test_descriptors_are_sent() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        read_end, write_end = os.pipe()
        await messages.send(PING, [write_end])
        data, fds, _, _ = socket.recv_fds(theirs, 100, 4)
        assert data == PING
        os.write(fds[0], b"x")
        assert os.read(read_end, 1) == b"x"
        for fd in [*fds, read_end, write_end]:
            os.close(fd)


async def test_end_of_the_connection() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        theirs.close()
        assert await messages.receive() is None
        with pytest.raises(OSError, match="pipe"):
            await messages.send(PING)


@pytest.mark.parametrize("length", [1, 11, 12, 19])
async def test_end_in_the_middle_of_a_message(length: int) -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        theirs.sendall(PING[:length])
        theirs.close()
        with pytest.raises(ConnectionError, match="middle"):
            await messages.receive()


@pytest.mark.parametrize("data", [b"\0" * 12, encode_header(1, 5000), b"GET / HTTP/1.1\r\n"])
async def test_garbage_gives_its_descriptors_back(data: bytes) -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        read_end, write_end = os.pipe()
        socket.send_fds(theirs, [data], [read_end])
        os.close(read_end)
        with pytest.raises(WireError):
            await messages.receive()
        await has_no_reader(write_end)
        os.close(write_end)


async def test_cancelled_in_the_middle_gives_its_descriptors_back() -> None:
    with pair() as (messages, theirs), trio.fail_after(DEADLINE):
        read_end, write_end = os.pipe()
        socket.send_fds(theirs, [PING[:5]], [read_end])
        os.close(read_end)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(messages.receive)
            await trio.testing.wait_all_tasks_blocked()  # it has what there is, and wants more
            nursery.cancel_scope.cancel()
        await has_no_reader(write_end)
        os.close(write_end)
