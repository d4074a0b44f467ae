"""vhost-user messages over a trio socket: framing and descriptors, nothing else.

One ``recvmsg`` takes the header and the descriptors, at most 12 bytes of it: reading on could mix
in the descriptors of the next message. The payload follows by plain ``recv``.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket as stdlib_socket
import stat
from typing import TYPE_CHECKING, NamedTuple

import trio

from vfsmount.closer import discard
from vfsmount.errors import ConnectError, WireError
from vfsmount.wire.vhost_user import HEADER, MAX_FDS, Header, decode_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.socket import SocketType

__all__ = ["Message", "MessageSocket", "connect", "receive_now"]

#: Seconds for the rest of a message, where nobody else can be served meanwhile.
_REST_SECONDS = 1.0
_FD_SIZE = array.array("i").itemsize
_ANCILLARY = stdlib_socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)


class Message(NamedTuple):
    """One message as it came; the descriptors belong to whoever received it."""

    header: Header
    payload: bytes
    fds: list[int]


class MessageSocket:
    """A vhost-user connection.

    Args:
        sock: Connected stream socket; this object owns it.
    """

    def __init__(self, sock: SocketType) -> None:
        self._sock = sock

    def close(self) -> None:
        """Close the connection; again is harmless."""
        self._sock.close()

    def duplicate(self) -> stdlib_socket.socket:
        """Return a second socket for the connection, not blocking, the caller's."""
        return stdlib_socket.socket(fileno=os.dup(self._sock.fileno()))

    async def wait_readable(self) -> None:
        """Wait until ``receive`` finds something, be it the end."""
        await trio.lowlevel.wait_readable(self._sock)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message; the descriptors go with its first byte and stay ours.

        Cancelled in the middle, the connection is of no more use.

        Raises:
            OSError: The peer is gone.
        """
        sent = 0
        if fds:
            rights = (stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, array.array("i", fds))
            sent = await self._sock.sendmsg([data], [rights])
        while sent < len(data):
            sent += await self._sock.send(data[sent:])

    async def receive(self) -> Message | None:
        """Return the next message, or None at the end of the connection.

        Cancelled in the middle, the connection is of no more use.

        Raises:
            WireError: What came is no message.
            OSError: The connection broke, perhaps in the middle of a message.
        """
        data, ancillary, _, _ = await self._sock.recvmsg(
            HEADER.size, _ANCILLARY, stdlib_socket.MSG_CMSG_CLOEXEC
        )
        fds = _descriptors(ancillary)
        try:
            if not data:
                return None
            data += await self._receive_exactly(HEADER.size - len(data))
            header = decode_header(data)
            payload = await self._receive_exactly(header.size)
        except BaseException:
            discard(fds)
            raise
        return Message(header, payload, fds)

    async def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self._sock.recv(size - len(data))
            if not more:
                raise ConnectionResetError("the connection ended in the middle of a message")
            data += more
        return data


def receive_now(sock: stdlib_socket.socket) -> Message | None:
    """Return the message that has come on a socket that does not block; None at the end.

    Raises:
        BlockingIOError: There is none.
        WireError: What came is no message, or the rest of it does not.
        OSError: The connection broke.
    """
    data, ancillary, _, _ = sock.recvmsg(HEADER.size, _ANCILLARY, stdlib_socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    try:
        if not data:
            return None
        data += _receive_rest(sock, HEADER.size - len(data))
        header = decode_header(data)
        return Message(header, _receive_rest(sock, header.size), fds)
    except BaseException:
        discard(fds)
        raise


def _receive_rest(sock: stdlib_socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            more = sock.recv(size - len(data))
        except BlockingIOError:
            if not select.select([sock], [], [], _REST_SECONDS)[0]:
                raise WireError(f"half a message, and no more in {_REST_SECONDS} s") from None
            continue
        if not more:
            raise ConnectionResetError("the connection ended in the middle of a message")
        data += more
    return data


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == stdlib_socket.SOL_SOCKET and kind == stdlib_socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return list(fds)


async def connect(path: str | os.PathLike[str], timeout: float) -> MessageSocket:
    """Connect to the back-end that listens at ``path``.

    Raises:
        ConnectError: There is nobody to talk to; the text tells why.
    """
    sock = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        with trio.fail_after(timeout):
            await _connect_when_accepted(sock, os.fspath(path))
    except trio.TooSlowError:
        sock.close()
        cure = "the daemon may be stopped, or busy with another connection"
        raise ConnectError(f"{path} did not accept within {timeout:g} s", cure) from None
    except OSError as error:
        sock.close()
        raise _connect_error(os.fspath(path), error) from error
    except BaseException:
        sock.close()
        raise
    return MessageSocket(trio.socket.from_stdlib_socket(sock))


async def _connect_when_accepted(sock: stdlib_socket.socket, path: str) -> None:
    """Connect, or try again while the listener's queue is full.

    A local connection is made at once or not at all. EAGAIN means that the queue is full and not,
    as trio's own ``connect`` takes it, that the connection is being made.
    """
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            await trio.sleep(0.02)


def _connect_error(path: str, error: OSError) -> ConnectError:
    """Say in one line why ``path`` could not be connected to."""
    if "too long" in str(error):  # raised by Python itself, without an errno
        return ConnectError(
            f"socket path {path} is too long", "107 bytes is the limit of the system"
        )
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return ConnectError(f"no such socket: {path}", "start the daemon first, or check the path")
    if error.errno in {errno.EACCES, errno.EPERM}:
        cure = "run as the daemon's user, or change the socket's mode"
        return ConnectError(f"permission denied: {path}", cure)
    if error.errno == errno.ECONNREFUSED:
        if not _is_socket(path):
            return ConnectError(f"not a socket: {path}", "name the daemon's vhost-user socket")
        cure = "the daemon has ended or has a guest (most serve only one, once): start another"
        return ConnectError(f"nobody listens on {path}", cure)
    if error.errno == errno.EPROTOTYPE:
        return ConnectError(f"not a stream socket: {path}", "name the daemon's vhost-user socket")
    return ConnectError(f"cannot connect to {path}: {error.strerror or error}")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True
