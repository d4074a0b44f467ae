"""Operations on one node: what it is, what may be changed about it, and forgetting it."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.hostd import syscalls
from vfsmount.hostd.fs.attributes import attr_out
from vfsmount.hostd.fs.call import HEADER_SIZE
from vfsmount.wire.fuse import KSTATFS, STATX_OUT, GetattrFlag, SetattrValid, decode_forgets

if TYPE_CHECKING:
    from vfsmount.hostd.fs.call import Call
    from vfsmount.hostd.fs.handles import FileHandle
    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request
    from vfsmount.wire.fuse_structs import SetattrIn

__all__ = [
    "access",
    "batch_forget",
    "forget",
    "getattr_",
    "readlink",
    "setattr_",
    "statfs",
    "statx",
]

_GETATTR_IN = struct.Struct("<IIQ")
_FORGET_IN = struct.Struct("<Q")
_GETATTR_FH = int(GetattrFlag.FH)

#: As plain numbers: operators of IntFlag take microseconds.
_MODE = int(SetattrValid.MODE)
_UID = int(SetattrValid.UID)
_GID = int(SetattrValid.GID)
_SIZE = int(SetattrValid.SIZE)
_ATIME = int(SetattrValid.ATIME)
_MTIME = int(SetattrValid.MTIME)
_FH = int(SetattrValid.FH)
_ATIME_NOW = int(SetattrValid.ATIME_NOW)
_MTIME_NOW = int(SetattrValid.MTIME_NOW)
_KILL_SUIDGID = int(SetattrValid.KILL_SUIDGID)
_OWNER = _UID | _GID
_TIMES = _ATIME | _MTIME

_NO_ID: Final = 0xFFFFFFFF
_NANO: Final = 1_000_000_000
_OMIT: Final = (0, syscalls.UTIME_OMIT)
_NOW: Final = (0, syscalls.UTIME_NOW)

#: Where the part of ``struct statx`` ends that ``fuse_statx`` has too; spare words follow.
_STATX_COMMON: Final = 144
_STATX_HEAD: Final = STATX_OUT.size - syscalls.STATX_SIZE
#: statx(2)'s AT_STATX_SYNC_TYPE; other flags are about paths.
_STATX_SYNC: Final = 0x6000


def forget(session: Session, call: Call) -> None:
    """FORGET: take lookups back. Never answered."""
    session.inodes.forget(call.nodeid, _FORGET_IN.unpack_from(call.message, HEADER_SIZE)[0])


def batch_forget(session: Session, request: Request) -> None:
    """BATCH_FORGET: many at once. Never answered."""
    for nodeid, nlookup in decode_forgets(request):
        session.inodes.forget(nodeid, nlookup)


def getattr_(session: Session, call: Call) -> bytes:
    """GETATTR: by handle where one is given, because its node may be forgotten already."""
    flags, _, fh = _GETATTR_IN.unpack_from(call.message, HEADER_SIZE)
    if flags & _GETATTR_FH and fh in session.files:
        found = os.fstat(session.files.get(fh).fd)
    else:
        found = os.fstat(session.inodes.get(call.nodeid).fd)
    return attr_out(found, session.policy.valid, session.attr_flags(found))


def statx(session: Session, request: Request) -> bytes:
    """STATX: ``struct statx`` is passed on, cut to what ``fuse_statx`` knows."""
    args = request.args
    inode = session.inodes.get(request.header.nodeid)
    found = syscalls.statx(inode.fd, args.sx_flags & _STATX_SYNC, args.sx_mask & 0x7FFFFFFF)
    head = struct.pack("<QI", session.policy.valid, 0)
    tail = bytes(syscalls.STATX_SIZE - _STATX_COMMON)
    return head.ljust(_STATX_HEAD, b"\0") + found[:_STATX_COMMON] + tail


def setattr_(session: Session, request: Request) -> bytes:
    """SETATTR: mode, owner, size and times, each if asked for, in this order.

    Changing the owner clears set-id bits, so a new mode must come with it or later; Linux sends
    them apart. A size comes before times because it changes them.
    """
    args: SetattrIn = request.args
    inode = session.inodes.get(request.header.nodeid)
    handle = session.files.get(args.fh) if args.valid & _FH else None
    proc_fd, name = session.share.proc_fd, inode.proc_name
    if args.valid & _MODE:
        os.chmod(name, stat.S_IMODE(args.mode), dir_fd=proc_fd)
    if args.valid & _OWNER:
        uid = _given_id(args.uid) if args.valid & _UID else -1
        gid = _given_id(args.gid) if args.valid & _GID else -1
        os.chown(name, uid, gid, dir_fd=proc_fd)
    if args.valid & _SIZE:
        with session.credentials.without_fsetid(bool(args.valid & _KILL_SUIDGID)):
            _truncate(session, inode, handle, args.size)
    if args.valid & _TIMES:
        atime, mtime = _times(args)
        syscalls.utimensat(proc_fd, name, atime, mtime)
    found = os.fstat(inode.fd)
    return attr_out(found, session.policy.valid, session.attr_flags(found))


def _given_id(number: int) -> int:
    if number == _NO_ID:  # to chown(2) this is "leave it"
        raise OSError(errno.EINVAL, "no such id")
    return number


def _truncate(session: Session, inode: Inode, handle: FileHandle | None, size: int) -> None:
    if handle is not None and handle.writable:
        os.ftruncate(handle.fd, size)
        return
    if inode.kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, "a directory has no size to set")
    fd = session.reopen(inode, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _times(args: SetattrIn) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return atime and mtime for utimensat(2), which sets both or leaves one alone."""
    atime = mtime = _OMIT
    if args.valid & _ATIME:
        atime = _NOW if args.valid & _ATIME_NOW else _given_time(args.atime, args.atimensec)
    if args.valid & _MTIME:
        mtime = _NOW if args.valid & _MTIME_NOW else _given_time(args.mtime, args.mtimensec)
    return atime, mtime


def _given_time(seconds: int, nanoseconds: int) -> tuple[int, int]:
    # Two values beyond a second mean "now" and "omit" to the kernel; the guest has flags for that.
    if nanoseconds >= _NANO:
        raise OSError(errno.EINVAL, "not a time")
    return seconds, nanoseconds


def readlink(session: Session, request: Request) -> bytes:
    """READLINK: the target as it stands; nobody follows it here."""
    inode = session.inodes.get(request.header.nodeid)
    if inode.kind != stat.S_IFLNK:
        raise OSError(errno.EINVAL, "not a symlink")
    return os.readlink(b"", dir_fd=inode.fd)


def access(session: Session, request: Request) -> bytes:
    """ACCESS: judged by the mode bits, the caller's user and its one group.

    Guests check themselves and do not send this; supplementary groups are not known here.
    """
    header, mask = request.header, request.args.mask & 7
    found = os.fstat(session.inodes.get(header.nodeid).fd)
    if mask & os.W_OK and session.share.options.readonly:
        raise OSError(errno.EROFS, "shared read-only")
    if header.uid == 0:
        executable = stat.S_ISDIR(found.st_mode) or found.st_mode & 0o111
        granted = 7 if executable else 6
    elif header.uid == found.st_uid:
        granted = found.st_mode >> 6
    else:
        granted = found.st_mode >> 3 if header.gid == found.st_gid else found.st_mode
    if mask & ~granted:
        raise OSError(errno.EACCES, "not permitted")
    return b""


def statfs(session: Session, request: Request) -> bytes:
    """STATFS: of the filesystem that the node lies on."""
    found = os.fstatvfs(session.inodes.get(request.header.nodeid).fd)
    return KSTATFS.values(
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
        found.f_bsize & 0xFFFFFFFF,
        found.f_namemax & 0xFFFFFFFF,
        found.f_frsize & 0xFFFFFFFF,
    )
