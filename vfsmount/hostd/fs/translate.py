"""The translation of users and groups, put around the handlers of a server.

Handlers know the host's numbers only. Where a share translates, the requests that carry numbers are
changed on their way in and the replies on their way out; every other share pays nothing for it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.wire.fuse import ATTR_OUT, DIRENT, ENTRY_OUT, STATX_OUT, Opcode, SetattrValid

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.hostd.fs.call import Call, FastHandler, Handler
    from vfsmount.hostd.fs.idmap import IdMap, Translation
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["translated_fast", "translated_plain"]

#: uid and gid, neighbours in ``fuse_attr`` (88 bytes, at 68) and ``fuse_statx`` (256, at 20).
_IDS = struct.Struct("<II")
_IN_ENTRY: Final = ENTRY_OUT.size - 88 + 68
_IN_ATTR: Final = ATTR_OUT.size - 88 + 68
_IN_STATX: Final = STATX_OUT.size - 256 + 20

#: Replies that begin with the attributes of one node: where the numbers lie.
_REPLIES: Final = {
    Opcode.LOOKUP: _IN_ENTRY,
    Opcode.GETATTR: _IN_ATTR,
    Opcode.SETATTR: _IN_ATTR,
    Opcode.STATX: _IN_STATX,
    Opcode.SYMLINK: _IN_ENTRY,
    Opcode.MKNOD: _IN_ENTRY,
    Opcode.MKDIR: _IN_ENTRY,
    Opcode.LINK: _IN_ENTRY,
    Opcode.CREATE: _IN_ENTRY,
    Opcode.TMPFILE: _IN_ENTRY,
}
_CREATING: Final = (Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.CREATE, Opcode.TMPFILE)

_UID, _GID = int(SetattrValid.UID), int(SetattrValid.GID)

_NAME_LENGTH = struct.Struct("<16xI")
_NODEID = struct.Struct("<Q")


def translated_fast(table: dict[int, FastHandler], ids: Translation) -> dict[int, FastHandler]:
    """Return a table of fast handlers whose replies have the guest's numbers."""
    return table | {
        int(opcode): _with_fast_reply(table[opcode], at, ids)
        for opcode, at in _REPLIES.items()
        if opcode in table
    }


def translated_plain(table: dict[int, Handler], ids: Translation) -> dict[int, Handler]:
    """Return a table of handlers that take and give the guest's numbers."""
    table = dict(table)
    for opcode in _CREATING:
        table[opcode] = _with_request(table[opcode], _as_caller, ids)
    table[Opcode.SETATTR] = _with_request(table[Opcode.SETATTR], _as_owner, ids)
    table[Opcode.ACCESS] = _with_request(table[Opcode.ACCESS], _as_asking, ids)
    for opcode, at in _REPLIES.items():
        if opcode in table:
            table[opcode] = _with_reply(table[opcode], at, ids)
    table[Opcode.READDIRPLUS] = _with_listing(table[Opcode.READDIRPLUS], ids)
    return table


# --- requests ------------------------------------------------------------------------------------


def _with_request(
    handler: Handler, change: Callable[[Request, Translation], Request], ids: Translation
) -> Handler:
    def handle(session: Session, request: Request) -> bytes | None:
        return handler(session, change(request, ids))

    return handle


def _as_caller(request: Request, ids: Translation) -> Request:
    """Whoever creates something owns it. Groups that are forbidden give no rights."""
    header, extensions = request.header, request.extensions
    header = header._replace(uid=ids.uid.to_host(header.uid), gid=ids.gid.to_host(header.gid))
    if extensions.groups:
        groups = filter(ids.gid.may_use, extensions.groups)
        extensions = extensions._replace(groups=tuple(map(ids.gid.to_host, groups)))
    return request._replace(header=header, extensions=extensions)


def _as_owner(request: Request, ids: Translation) -> Request:
    args = request.args
    if args.valid & _UID:
        args = args._replace(uid=ids.uid.to_host(args.uid))
    if args.valid & _GID:
        args = args._replace(gid=ids.gid.to_host(args.gid))
    return request._replace(args=args)


def _as_asking(request: Request, ids: Translation) -> Request:
    header = request.header
    uid, gid = _if_allowed(ids.uid, header.uid), _if_allowed(ids.gid, header.gid)
    return request._replace(header=header._replace(uid=uid, gid=gid))


def _if_allowed(ids: IdMap, number: int) -> int:
    """A forbidden user may look, as nobody that the host knows."""
    return ids.to_host(number) if ids.may_use(number) else 0xFFFFFFFF


# --- replies -------------------------------------------------------------------------------------


def _for_guest(body: bytes, at: int, ids: Translation) -> bytes:
    uid, gid = _IDS.unpack_from(body, at)
    shown = _IDS.pack(ids.uid.to_guest(uid), ids.gid.to_guest(gid))
    return body[:at] + shown + body[at + _IDS.size :]


def _with_fast_reply(handler: FastHandler, at: int, ids: Translation) -> FastHandler:
    def handle(session: Session, call: Call) -> bytes | int | None:
        body = handler(session, call)
        return _for_guest(body, at, ids) if isinstance(body, bytes) else body

    return handle


def _with_reply(handler: Handler, at: int, ids: Translation) -> Handler:
    def handle(session: Session, request: Request) -> bytes | None:
        body = handler(session, request)
        return None if body is None else _for_guest(body, at, ids)

    return handle


def _with_listing(handler: Handler, ids: Translation) -> Handler:
    def handle(session: Session, request: Request) -> bytes | None:
        body = handler(session, request)
        return None if body is None else _listing_for_guest(body, ids)

    return handle


def _listing_for_guest(body: bytes, ids: Translation) -> bytes:
    """Change each ``fuse_direntplus``: an entry, a ``fuse_dirent``, a name padded to 8 bytes."""
    records = []
    at = 0
    while at < len(body):
        length = _NAME_LENGTH.unpack_from(body, at + ENTRY_OUT.size)[0]
        end = at + ENTRY_OUT.size + DIRENT.size + (length + 7 & ~7)
        record = body[at:end]
        # Without a node there are no attributes.
        known = _NODEID.unpack_from(record)[0]
        records.append(_for_guest(record, _IN_ENTRY, ids) if known else record)
        at = end
    return b"".join(records)
