"""Listing directories: OPENDIR, READDIR, READDIRPLUS and their end.

Cookies are the host filesystem's own (``d_off``), so a listing that goes on later, or somewhere
else, is as stable as on the host, names that come and go meanwhile included; nothing is collected
in advance. A handle keeps the names of the last getdents64 that no reply had room for; asking for
another cookie than the next one drops them and seeks.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.hostd import syscalls
from vfsmount.hostd.fs.attributes import dirent, direntplus, direntplus_unknown
from vfsmount.hostd.fs.handles import make_durable
from vfsmount.wire.fuse import DIRENT, ENTRY_OUT
from vfsmount.wire.fuse_structs import OPEN_OUT

if TYPE_CHECKING:
    import ctypes

    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["DirHandle", "fsyncdir", "opendir", "readdir", "readdirplus", "releasedir"]

#: Start of ``struct linux_dirent64``: d_ino, d_off, d_reclen, d_type; then the name and a NUL.
_DIRENT64: Final = struct.Struct("<QQHB")

_DIR_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_DOTS: Final = frozenset((b".", b".."))
_PLUS_SIZE: Final = ENTRY_OUT.size + DIRENT.size


class _Name(NamedTuple):
    """One entry as the host gives it; ``cookie`` leads on *behind* it."""

    ino: int
    cookie: int
    kind: int
    name: bytes


def _parse(records: bytes) -> list[_Name]:
    """Split what getdents64 returned."""
    names = []
    at = 0
    while at < len(records):
        ino, cookie, length, kind = _DIRENT64.unpack_from(records, at)
        start = at + _DIRENT64.size
        at += length
        names.append(_Name(ino, cookie, kind, records[start : records.index(0, start)]))
    return names


class DirHandle:
    """An open directory.

    Attributes:
        fd: Its descriptor; the host's read position is behind ``_names``.
        inode: Its node, of which only the numbers count: the guest may have forgotten it.
    """

    __slots__ = ("_at", "_cookie", "_names", "fd", "inode")

    def __init__(self, fd: int, inode: Inode) -> None:
        self.fd = fd
        self.inode = inode
        self._names: list[_Name] = []
        self._at = 0
        self._cookie = 0

    def go_to(self, cookie: int) -> None:
        """Continue behind the entry with this cookie; 0 is the start.

        Raises:
            OSError: EINVAL for a cookie that the host does not know.
        """
        if cookie == self._cookie and cookie:
            return
        # The start is always read anew: rewinddir(3) must see what has changed.
        os.lseek(self.fd, cookie, os.SEEK_SET)
        self._names, self._at, self._cookie = [], 0, cookie

    def peek(self, buffer: ctypes.Array[ctypes.c_char]) -> _Name | None:
        """Return the next entry without taking it; None at the end."""
        if self._at == len(self._names):
            self._names, self._at = _parse(syscalls.getdents64(self.fd, buffer)), 0
            if not self._names:
                return None
        return self._names[self._at]

    def take(self) -> None:
        """Take the entry that ``peek`` showed."""
        self._cookie = self._names[self._at].cookie
        self._at += 1


def opendir(session: Session, request: Request) -> bytes:
    """OPENDIR: open a directory for listing."""
    inode = session.inodes.get(request.header.nodeid)
    if inode.kind != stat.S_IFDIR:
        raise OSError(errno.ENOTDIR, "not a directory")
    handle = DirHandle(session.reopen(inode, _DIR_FLAGS), inode)
    return OPEN_OUT.values(session.dirs.add(handle), session.policy.dir_flags, 0)


def releasedir(session: Session, request: Request) -> bytes:
    """RELEASEDIR: the last close."""
    session.dirs.release(request.args.fh)
    return b""


def fsyncdir(session: Session, request: Request) -> bytes:
    """FSYNCDIR: make the directory's entries durable."""
    make_durable(session.dirs.get(request.args.fh).fd, request)
    return b""


def readdir(session: Session, request: Request) -> bytes:
    """READDIR: names, inode numbers and types, as many as fit whole."""
    args = request.args
    handle = session.dirs.get(args.fh)
    handle.go_to(args.offset)
    records: list[bytes] = []
    room = args.size
    while (entry := handle.peek(session.dirent_buffer)) is not None:
        record = dirent(_shown_ino(handle, entry), entry.cookie, entry.kind, entry.name)
        room -= len(record)
        if room < 0:
            break
        records.append(record)
        handle.take()
    return _listed(records, entry)


def readdirplus(session: Session, request: Request) -> bytes:
    """READDIRPLUS: the same with a lookup of each name, which the guest owes us.

    Room is checked before the lookup, so no entry is ever looked up and left out.
    """
    args = request.args
    handle = session.dirs.get(args.fh)
    handle.go_to(args.offset)
    records: list[bytes] = []
    room = args.size
    while (entry := handle.peek(session.dirent_buffer)) is not None:
        room -= _PLUS_SIZE + (len(entry.name) + 7 & ~7)
        if room < 0:
            break
        records.append(_plus(session, handle, entry))
        handle.take()
        session.inodes.trim()  # a large reply has thousands of nodes, and no use for one before
    return _listed(records, entry)


def _listed(records: list[bytes], left: _Name | None) -> bytes:
    """An empty reply would mean the end, so where nothing fits that is an error."""
    if not records and left is not None:
        raise OSError(errno.EINVAL, "no room for one entry")
    return b"".join(records)


def _plus(session: Session, handle: DirHandle, entry: _Name) -> bytes:
    """One record. A name that cannot be looked up is listed without a node: never lost.

    That happens when it has just been removed, or when no descriptor is left to hold it.
    """
    if entry.name not in _DOTS:
        try:
            nodeid, found, place = session.inodes.look_up(handle.fd, entry.name, entry.ino)
        except OSError:
            pass
        else:
            flags = session.attr_flags(found, place, handle.inode)
            valid = session.policy.valid
            return direntplus(nodeid, found, valid, flags, entry.cookie, entry.name)
    return direntplus_unknown(_shown_ino(handle, entry), entry.cookie, entry.kind, entry.name)


def _shown_ino(handle: DirHandle, entry: _Name) -> int:
    """What lies above the shared directory is no business of the guest."""
    if entry.name == b".." and handle.inode.nodeid == 1:
        return handle.inode.number
    return entry.ino
