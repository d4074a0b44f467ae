"""One request on its way through the server, and the two shapes that its handler may have.

Most opcodes are decoded by ``wire`` and have a ``Handler``. The few that make up nearly all traffic
have a ``FastHandler``: it unpacks its own struct, and READ and WRITE let the kernel copy between
the file and guest memory. Decoding a READ in full would cost as much (4 us) as serving it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = [
    "HEADER_SIZE",
    "REPLY_SIZE",
    "Call",
    "Deferred",
    "FastHandler",
    "Handler",
    "window",
]

#: Bytes of ``fuse_in_header`` and ``fuse_out_header``.
HEADER_SIZE = 40
REPLY_SIZE = 16


class Call(NamedTuple):
    """A request as it lies in the chain.

    Attributes:
        nodeid: From its header.
        message: Private copy of its first bytes: all of it, except that data of a WRITE may be cut.
        length: Bytes of the whole message; the readable buffers hold at least as many.
        readable: Buffers in guest memory, which the guest may change at any time.
        writable: Buffers in guest memory for the reply, header included.
        room: Bytes of them.
    """

    nodeid: int
    message: bytes
    length: int
    readable: list[memoryview]
    writable: list[memoryview]
    room: int


class Deferred(Exception):
    """No error: a request is put aside, and its reply comes later.

    Attributes:
        unique: The request's.
    """

    def __init__(self, unique: int) -> None:
        super().__init__(unique)
        self.unique = unique


#: Returns the reply's body; None when there is no reply at all; raises OSError for an errno.
Handler: TypeAlias = Callable[["Session", "Request"], "bytes | None"]
#: The same, or the number of body bytes that it has put in place itself.
FastHandler: TypeAlias = Callable[["Session", Call], "bytes | int | None"]


def window(buffers: list[memoryview], skip: int, size: int) -> list[memoryview]:
    """Return views of ``size`` bytes behind the first ``skip``; fewer where the buffers end."""
    if len(buffers) == 1:
        return [buffers[0][skip : skip + size]]
    views = []
    for buffer in buffers:
        if skip >= buffer.nbytes:
            skip -= buffer.nbytes
            continue
        view = buffer[skip : skip + size]
        skip = 0
        size -= view.nbytes
        views.append(view)
        if not size:
            break
    return views
