"""The relay's end of ``/dev/fuse``: one message a read, one a write, and answers without a body.

The kernel does not care who reads and who writes; the relay's thread does both.
"""

from __future__ import annotations

import errno
import io
import os
import select
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["ENDED", "KernelPort"]

#: The connection has ended: unmounted, or aborted.
ENDED: Final = frozenset((errno.ENODEV, errno.ECONNABORTED))

_OUT: Final = fuse.OUT_HEADER.size
_OUT_HEADER: Final = struct.Struct("<IiQ").pack
_PUT_OUT_HEADER: Final = struct.Struct("<IiQ").pack_into


class KernelPort:
    """The device.

    Args:
        device: The connected, initialised ``/dev/fuse``; becomes non-blocking, stays the caller's.

    Attributes:
        readinto: Reads a request into memory; returns its bytes, None when there is none.
        write: Writes one message, whole.
        look: With 0 and 1 as arguments, returns whether there is something to read; a list.
    """

    __slots__ = ("_file", "_header", "_watch", "look", "readinto", "write")

    def __init__(self, device: int) -> None:
        os.set_blocking(device, False)
        self._file = io.FileIO(device, "r+", closefd=False)
        self.readinto: Callable[[memoryview], int | None] = self._file.readinto
        self.write: Callable[[Buffer], int | None] = self._file.write
        self._watch = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._watch.register(device, select.EPOLLIN)
        self.look = self._watch.poll
        self._header = bytearray(_OUT)

    def close(self) -> None:
        """Let go of the device."""
        self._watch.close()

    def answer(self, unique: int, number: int = 0) -> None:
        """Answer a request with a positive errno, or with 0 and no body."""
        _PUT_OUT_HEADER(self._header, 0, _OUT, -number, unique)
        try:  # contextlib.suppress takes 0.25 us
            self.write(self._header)
        except OSError:
            return  # ENOENT: nobody waits any more; ENODEV: the read that comes next will tell

    def answer_body(self, unique: int, body: bytes) -> None:
        """Answer a request with a body of our own."""
        try:
            self.write(_OUT_HEADER(_OUT + len(body), 0, unique) + body)
        except OSError:
            return  # as above
