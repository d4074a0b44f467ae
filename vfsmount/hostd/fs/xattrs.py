"""Extended attributes, through the ``xattr`` package.

An O_PATH descriptor cannot be asked for attributes, but its name in ``/proc/self/fd`` can: that
link leads to the node itself, so this works for every kind of node with nothing opened, and a
symlink's own attributes are meant, never its target's. Names and values are bytes.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, cast

from xattr import XATTR_CREATE, XATTR_REPLACE, pyxattr_compat

from vfsmount.hostd import procfd
from vfsmount.wire.fuse import GETXATTR_OUT, XATTR_NAME_MAX, XATTR_SIZE_MAX, SetxattrFlag

if TYPE_CHECKING:
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["getxattr", "listxattr", "removexattr", "setxattr"]

#: XATTR_CREATE and XATTR_REPLACE on the wire, as the package numbers them.
_FLAGS = {0: 0, 1: XATTR_CREATE, 2: XATTR_REPLACE}
_ACL_KILL_SGID = int(SetxattrFlag.ACL_KILL_SGID)

# The byte-for-byte half of the package: the other one wants names to be UTF-8.
_host: Any = pyxattr_compat


def getxattr(session: Session, request: Request) -> bytes:
    """GETXATTR: a value, or with size 0 its length."""
    try:
        name = _host_name(session, request)
    except PermissionError:
        raise OSError(errno.ENODATA, "hidden") from None
    value: bytes = _host.getxattr(_path(session, request), name)
    return _sized(value, request.args.size)


def listxattr(session: Session, request: Request) -> bytes:
    """LISTXATTR: names, each with its NUL, or with size 0 the length of them all."""
    names = cast("list[bytes]", _host.listxattr(_path(session, request)))
    if (rules := session.share.options.xattrmap) is not None:
        names = [shown for name in names if (shown := rules.to_guest(name))]
    return _sized(b"".join(name + b"\0" for name in names), request.args.size)


def setxattr(session: Session, request: Request) -> bytes:
    """SETXATTR: set a value, or only create or only replace it."""
    path = _path(session, request)
    name, args = _host_name(session, request), request.args
    if args.size != request.data.nbytes or args.flags not in _FLAGS:
        raise OSError(errno.EINVAL, "value of another length, or unknown flags")
    if args.size > XATTR_SIZE_MAX:
        raise OSError(errno.E2BIG, "value too long")
    kill = bool(getattr(args, "setxattr_flags", 0) & _ACL_KILL_SGID)
    with session.credentials.without_fsetid(kill):
        _host.setxattr(path, name, bytes(request.data), _FLAGS[args.flags])
    return b""


def removexattr(session: Session, request: Request) -> bytes:
    """REMOVEXATTR: remove one."""
    _host.removexattr(_path(session, request), _host_name(session, request))
    return b""


def _path(session: Session, request: Request) -> bytes:
    return procfd.path(session.inodes.get(request.header.nodeid).proc_name)


def _host_name(session: Session, request: Request) -> bytes:
    name = _checked(request.names[0])
    rules = session.share.options.xattrmap
    return name if rules is None else rules.to_host(name)


def _checked(name: bytes) -> bytes:
    if not 0 < len(name) <= XATTR_NAME_MAX:
        raise OSError(errno.ERANGE, "no name of an attribute")
    return name


def _sized(data: bytes, room: int) -> bytes:
    if not room:
        return GETXATTR_OUT.values(len(data))
    if len(data) > room:
        raise OSError(errno.ERANGE, "larger than the guest's buffer")
    return data
