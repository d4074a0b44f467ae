"""File capabilities under another name are removed here when a file changes.

The kernel removes ``security.capability`` itself wherever a file is written, truncated or given to
another owner. Where ``--xattrmap`` has the host know it by another name, nobody would: whoever may
write to a program could then change one that its owner had trusted. So the handlers of those
requests are wrapped, on such shares alone, and the attribute goes first.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from xattr import pyxattr_compat

from vfsmount.hostd import procfd
from vfsmount.hostd.fs.call import HEADER_SIZE
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from vfsmount.hostd.fs.call import Call, FastHandler, Handler
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["guard"]

_FH = struct.Struct("<Q")
_FLAGS = struct.Struct("<I")
_OWNER_OR_SIZE: Final = int(SetattrValid.UID | SetattrValid.GID | SetattrValid.SIZE)

# The byte-for-byte half of the package, as in ``xattrs``.
_host: Any = pyxattr_compat


def guard(fast: dict[int, FastHandler], plain: dict[int, Handler], name: bytes) -> None:
    """Wrap the handlers of what changes a file.

    Args:
        fast: Table of handlers; changed.
        plain: The same.
        name: The host's name of ``security.capability``.
    """
    write, open_ = fast[Opcode.WRITE], fast[Opcode.OPEN]

    def guarded_write(session: Session, call: Call) -> bytes | int | None:
        _remove_by_handle(session, _FH.unpack_from(call.message, HEADER_SIZE)[0], name)
        return write(session, call)

    def guarded_open(session: Session, call: Call) -> bytes | int | None:
        if _FLAGS.unpack_from(call.message, HEADER_SIZE)[0] & os.O_TRUNC:
            _remove(session, session.inodes.get(call.nodeid).proc_name, name)
        return open_(session, call)

    fast[Opcode.WRITE], fast[Opcode.OPEN] = guarded_write, guarded_open
    plain[Opcode.SETATTR] = _guarded_setattr(plain[Opcode.SETATTR], name)
    plain[Opcode.CREATE] = _guarded_create(plain[Opcode.CREATE], name)
    for opcode in (Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64):
        plain[opcode] = _guarded_change(plain[opcode], name)


def _guarded_setattr(handler: Handler, name: bytes) -> Handler:
    def handle(session: Session, request: Request) -> bytes | None:
        if request.args.valid & _OWNER_OR_SIZE:
            _remove(session, session.inodes.get(request.header.nodeid).proc_name, name)
        return handler(session, request)

    return handle


def _guarded_create(handler: Handler, name: bytes) -> Handler:
    """CREATE may open and truncate what is there; only then it is known what that was."""

    def handle(session: Session, request: Request) -> bytes | None:
        body = handler(session, request)
        if body is not None and request.args.flags & os.O_TRUNC:
            nodeid = _FH.unpack_from(body)[0]
            _remove(session, session.inodes.get(nodeid).proc_name, name)
        return body

    return handle


def _guarded_change(handler: Handler, name: bytes) -> Handler:
    def handle(session: Session, request: Request) -> bytes | None:
        args = request.args
        _remove_by_handle(session, args.fh if hasattr(args, "fh") else args.fh_out, name)
        return handler(session, request)

    return handle


def _remove_by_handle(session: Session, fh: int, name: bytes) -> None:
    _remove(session, b"%d" % session.files.get(fh).fd, name)


def _remove(session: Session, proc_name: bytes, name: bytes) -> None:
    try:
        _host.removexattr(procfd.path(proc_name), name)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            raise
