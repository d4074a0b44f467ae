"""vhost-user messages on a blocking socket: whole ones in, replies out.

A message's header is read by itself, because its descriptors come with the first byte, and a read
beyond the message would mix them up with the next one's. Whoever receives a message owns its
descriptors. A front-end that begins a message must finish it within the socket's timeout.
"""

from __future__ import annotations

import array
import socket
from typing import TYPE_CHECKING, NamedTuple

from vfsmount.closer import discard
from vfsmount.hostd.faults import GuestFault
from vfsmount.hostd.syscalls import close_quietly
from vfsmount.wire.vhost_user import HEADER, MAX_FDS, decode_header, encode_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfsmount.wire.vhost_user import Header

__all__ = ["Message", "close_all", "receive", "send_reply"]

_FD_SIZE = array.array("i").itemsize


class Message(NamedTuple):
    """One message as it came.

    Attributes:
        header: Checked as far as a header can be by itself.
        payload: All of it.
        fds: Descriptors that came along; the receiver's.
    """

    header: Header
    payload: bytes
    fds: list[int]


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that were found to be harmless, and are done with."""
    for fd in fds:
        close_quietly(fd)


def receive(sock: socket.socket) -> Message | None:
    """Receive one message.

    Returns:
        None when the front-end has closed the connection between messages.

    Raises:
        WireError: The header cannot be.
        GuestFault: The connection ended inside a message, or too many descriptors came.
        OSError: The socket failed, or the message took longer than the socket's timeout.
    """
    first, fds = _receive_with_fds(sock, HEADER.size)
    try:
        if not first:
            return None
        header = decode_header(first + _receive_exactly(sock, HEADER.size - len(first)))
        return Message(header, _receive_exactly(sock, header.size), fds)
    except BaseException:
        discard(fds)
        raise


def _receive_with_fds(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(MAX_FDS * _FD_SIZE)
    data, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) // _FD_SIZE * _FD_SIZE
            fds += array.array("i", content[:whole])
    if flags & socket.MSG_CTRUNC:
        discard(fds)
        raise GuestFault(f"more than {MAX_FDS} descriptors in one message")
    return data, fds


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise GuestFault("the connection ended inside a message")
        data += piece
    return data


def send_reply(sock: socket.socket, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
    """Send the reply to a request; its descriptors stay the caller's.

    Raises:
        OSError: The front-end does not read, or has gone.
    """
    data = encode_header(request, len(payload), reply=True) + payload
    if fds:
        sent = socket.send_fds(sock, [data], fds)
        data = data[sent:]
    sock.sendall(data)
