"""IOCTL: the inode flags of files and directories, as the host's filesystem has them.

Only commands with a known effect on the file alone are passed on (chattr(1), lsattr(1), and what
xfs_io calls ``chattr``, project ids included); every other is ENOTTY, which is what an application
understands. The size of the argument is ours, not the guest's: Linux sends 4 bytes for commands
whose number says 8, which is right, because the host takes an ``int``.
"""

from __future__ import annotations

import errno
import fcntl
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.wire.fuse import IOCTL_OUT, IoctlFlag

if TYPE_CHECKING:
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["ioctl"]

_DIR = int(IoctlFlag.DIR)


class _Command(NamedTuple):
    """A command that is passed on (``linux/fs.h``).

    Attributes:
        size: Bytes of its argument.
        host: The command for a machine of this kind: a guest's 32-bit program has other numbers.
        sets: Whether it changes the file; else it asks.
    """

    size: int
    host: int
    sets: bool


_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_INT, _FSXATTR = 4, 28

_COMMANDS: Final = {
    _GETFLAGS: _Command(_INT, _GETFLAGS, sets=False),
    0x80046601: _Command(_INT, _GETFLAGS, sets=False),  # FS_IOC32_GETFLAGS
    _SETFLAGS: _Command(_INT, _SETFLAGS, sets=True),
    0x40046602: _Command(_INT, _SETFLAGS, sets=True),  # FS_IOC32_SETFLAGS
    _FSGETXATTR: _Command(_FSXATTR, _FSGETXATTR, sets=False),
    _FSSETXATTR: _Command(_FSXATTR, _FSSETXATTR, sets=True),
}

#: Most bytes that are returned: those of the largest argument, and what an old guest makes of 4.
_MAX_OUT: Final = 32


def ioctl(session: Session, request: Request) -> bytes:
    """IOCTL: get or set the flags of an open file or directory.

    Raises:
        OSError: ENOTTY: not one of ours, or the host's filesystem has no such thing; EROFS; EINVAL:
            too few bytes came along, or have room; EPERM: the host does not let us.
    """
    args = request.args
    command = _COMMANDS.get(args.cmd)
    if command is None:
        raise OSError(errno.ENOTTY, "not served")
    fd = (session.dirs if args.flags & _DIR else session.files).get(args.fh).fd
    if not command.sets:
        if not command.size <= args.out_size <= _MAX_OUT:
            raise OSError(errno.EINVAL, "no room for the flags")
        found = fcntl.ioctl(fd, command.host, bytes(command.size))
        return IOCTL_OUT.values(0, 0, 0, 0) + found.ljust(args.out_size, b"\0")
    if session.share.options.readonly:
        raise OSError(errno.EROFS, "shared read-only")
    if min(args.in_size, request.data.nbytes) < command.size:
        raise OSError(errno.EINVAL, "no flags came along")
    fcntl.ioctl(fd, command.host, bytes(request.data[: command.size]))
    return IOCTL_OUT.values(0, 0, 0, 0)
