"""Open files and directories of one guest: fh → descriptor.

Handles are numbered upwards and never used again, so that a stale one is EBADF and never somebody
else's file. Files and directories have tables of their own: a handle of one is EBADF to the other.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from vfsmount.hostd.syscalls import close_quietly
from vfsmount.wire.fuse import FsyncFlag

if TYPE_CHECKING:
    from vfsmount.hostd.fs.inodes import Inode, InodeTable
    from vfsmount.wire.fuse import Request

__all__ = ["FileHandle", "HandleTable", "make_durable"]

_FDATASYNC = int(FsyncFlag.FDATASYNC)


class _Handle(Protocol):
    @property
    def fd(self) -> int: ...
    @property
    def inode(self) -> Inode: ...


H = TypeVar("H", bound=_Handle)


class FileHandle:
    """An open regular file.

    Attributes:
        fd: Its descriptor.
        inode: Its node.
        flags: What it was opened with, as for open(2).
    """

    __slots__ = ("fd", "flags", "inode")

    def __init__(self, fd: int, inode: Inode, flags: int) -> None:
        self.fd = fd
        self.inode = inode
        self.flags = flags

    @property
    def writable(self) -> bool:
        """Whether it may be written and truncated."""
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


class HandleTable(Generic[H]):
    """Handles by number. It owns their descriptors, and keeps their nodes open.

    Args:
        inodes: Where the nodes are.
    """

    __slots__ = ("_handles", "_inodes", "_next")

    def __init__(self, inodes: InodeTable) -> None:
        self._handles: dict[int, H] = {}
        self._inodes = inodes
        self._next = 1

    def __len__(self) -> int:
        return len(self._handles)

    def __contains__(self, fh: int) -> bool:
        return fh in self._handles

    def add(self, handle: H) -> int:
        """Take a handle in; returns its fh."""
        fh = self._next
        self._next += 1
        self._handles[fh] = handle
        self._inodes.pin(handle.inode)
        return fh

    def get(self, fh: int) -> H:
        """Return an open handle.

        Raises:
            OSError: EBADF: never given out, or released.
        """
        handle = self._handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, "no such file handle")
        return handle

    def release(self, fh: int) -> None:
        """Close a handle.

        Raises:
            OSError: EBADF: never given out, or released already.
        """
        handle = self._handles.pop(fh, None)
        if handle is None:
            raise OSError(errno.EBADF, "no such file handle")
        self._inodes.unpin(handle.inode)
        close_quietly(handle.fd)

    def clear(self) -> None:
        """Close all."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            self._inodes.unpin(handle.inode)
            close_quietly(handle.fd)


def make_durable(fd: int, request: Request) -> None:
    """Carry out an FSYNC or FSYNCDIR on the handle's descriptor."""
    if request.args.fsync_flags & _FDATASYNC:
        os.fdatasync(fd)
    else:
        os.fsync(fd)
