"""SETUPMAPPING and REMOVEMAPPING: parts of files in the guest's DAX window.

Which file is opened how is decided here; what is mapped where is ``hostd.window``'s. The descriptor
that the front-end gets is opened for the mapping alone: readable always, as mmap(2) demands, and
writable only where the guest asks to write.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from vfsmount.wire.fuse import SetupmappingFlag, decode_removemappings

if TYPE_CHECKING:
    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.session import Session
    from vfsmount.hostd.window import DaxWindow
    from vfsmount.wire.fuse import Request

__all__ = ["removemapping", "setupmapping"]

_WRITE: Final = int(SetupmappingFlag.WRITE)
_FLAGS: Final = int(SetupmappingFlag.WRITE | SetupmappingFlag.READ)
#: ``fh`` of a guest that maps by node, as Linux always does.
_NO_FH: Final = (1 << 64) - 1


def setupmapping(session: Session, request: Request) -> bytes:
    """SETUPMAPPING: map a part of a regular file into the window.

    Raises:
        OSError: EBADF: no such node, or handle of it; ENODEV: no regular file; EACCES: to write by
            a handle that may not; EROFS; EINVAL: not in the window; ENOSYS: there is none; ENFILE:
            it has as many files as a guest may have there.
    """
    window, args = _window(session), request.args
    if args.flags & ~_FLAGS or not args.flags:
        raise OSError(errno.EINVAL, f"mapping with flags {args.flags:#x}")
    write = bool(args.flags & _WRITE)
    inode = session.inodes.get(request.header.nodeid)
    if args.fh != _NO_FH:
        _check_handle(session, inode, args.fh, write)
    if inode.kind != stat.S_IFREG:
        raise OSError(errno.ENODEV, "only regular files are mapped")
    if write and session.share.options.readonly:
        raise OSError(errno.EROFS, "shared read-only")

    def open_file() -> int:
        if window.open_files >= session.share.open_limit:
            raise OSError(errno.ENFILE, "too many mapped files of one guest")
        return session.reopen(inode, os.O_RDWR if write else os.O_RDONLY)

    window.set_up((inode.nodeid, write), args.foffset, args.len, args.moffset, open_file)
    return b""


def _check_handle(session: Session, inode: Inode, fh: int, write: bool) -> None:
    handle = session.files.get(fh)
    if handle.inode is not inode:
        raise OSError(errno.EBADF, "the handle is of another node")
    if write and not handle.writable:
        raise OSError(errno.EACCES, "the handle is read-only")


def removemapping(session: Session, request: Request) -> bytes:
    """REMOVEMAPPING: unmap parts of the window, whatever is mapped there.

    Raises:
        OSError: EINVAL: not in the window; those before it are unmapped. ENOSYS: there is none.
    """
    window = _window(session)
    for moffset, length in decode_removemappings(request):
        window.remove(moffset, length)
    return b""


def _window(session: Session) -> DaxWindow:
    if session.window is None or session.window.channel is None:
        raise OSError(errno.ENOSYS, "there is no DAX window")
    return session.window
