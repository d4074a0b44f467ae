"""IOCTL: the inode flags of files and directories, as the host's filesystem has them.

Only commands with a known effect on the file alone are passed on (chattr(1), lsattr(1), and what
xfs_io calls ``chattr``); every other is ENOTTY, which is what an application understands. Project
ids, and whether a directory hands its own down, can be seen but not changed: the host would let the
owner of a file do that, and a guest could leave the quota that bounds the share. The size of the
argument is ours, not the guest's: Linux sends 4 bytes for commands whose number says 8, which is
right, because the host takes an ``int``.
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
        asks: For one that changes the file: the command that asks for the same, else 0.
        kept: Bits of the argument, as a number, that it may not change.
    """

    size: int
    host: int
    asks: int = 0
    kept: int = 0


_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_INT, _FSXATTR = 4, 28

#: FS_PROJINHERIT_FL; FS_XFLAG_PROJINHERIT in the first word, and fsx_projid, which is the fourth.
_PROJECT_FLAG: Final = 0x20000000
_PROJECT: Final = 0x200 | 0xFFFFFFFF << 96

_COMMANDS: Final = {
    _GETFLAGS: _Command(_INT, _GETFLAGS),
    0x80046601: _Command(_INT, _GETFLAGS),  # FS_IOC32_GETFLAGS
    _SETFLAGS: _Command(_INT, _SETFLAGS, _GETFLAGS, _PROJECT_FLAG),
    0x40046602: _Command(_INT, _SETFLAGS, _GETFLAGS, _PROJECT_FLAG),  # FS_IOC32_SETFLAGS
    _FSGETXATTR: _Command(_FSXATTR, _FSGETXATTR),
    _FSSETXATTR: _Command(_FSXATTR, _FSSETXATTR, _FSGETXATTR, _PROJECT),
}

#: Most bytes that are returned: those of the largest argument, and what an old guest makes of 4.
_MAX_OUT: Final = 32


def ioctl(session: Session, request: Request) -> bytes:
    """IOCTL: get or set the flags of an open file or directory.

    Raises:
        OSError: ENOTTY: not one of ours, or the host's filesystem has no such thing; EROFS; EINVAL:
            too few bytes came along, or have room; EPERM: the host does not let us, or the project
            would change.
    """
    args = request.args
    command = _COMMANDS.get(args.cmd)
    if command is None:
        raise OSError(errno.ENOTTY, "not served")
    fd = (session.dirs if args.flags & _DIR else session.files).get(args.fh).fd
    if not command.asks:
        if not command.size <= args.out_size <= _MAX_OUT:
            raise OSError(errno.EINVAL, "no room for the flags")
        found = fcntl.ioctl(fd, command.host, bytes(command.size))
        return IOCTL_OUT.values(0, 0, 0, 0) + found.ljust(args.out_size, b"\0")
    if session.share.options.readonly:
        raise OSError(errno.EROFS, "shared read-only")
    if min(args.in_size, request.data.nbytes) < command.size:
        raise OSError(errno.EINVAL, "no flags came along")
    wanted = bytes(request.data[: command.size])
    found = fcntl.ioctl(fd, command.asks, bytes(command.size))
    if (_number(wanted) ^ _number(found)) & command.kept:
        raise OSError(errno.EPERM, "the project is the host's affair")
    fcntl.ioctl(fd, command.host, wanted)
    return IOCTL_OUT.values(0, 0, 0, 0)


def _number(argument: bytes) -> int:
    """Of a machine that is little-endian, as all of FUSE here."""
    return int.from_bytes(argument, "little")
