"""What a reply has handed out that nobody took: references to give back, handles to release.

A reply comes too late when its request has been answered meanwhile (interrupted, timed out). The
daemon counts it all the same: a lookup must be forgotten, a handle released, a granted lock undone.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.errors import WireError
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Undo", "undo_late_reply"]

_ENTRY: Final = fuse.ENTRY_OUT.size
_FH: Final = struct.Struct("<Q").unpack_from
_LOCK_TYPE_AT: Final = 32  # lk_in: fh, owner, start, end, type
_LK_IN: Final = fuse.LK_IN.size


class Undo(NamedTuple):
    """What to do.

    Attributes:
        forgets: Nodes of which to give one reference back.
        requests: (opcode, nodeid, body) to send.
    """

    forgets: tuple[int, ...] = ()
    requests: tuple[tuple[int, int, bytes], ...] = ()


_NOTHING: Final = Undo()


def _release(opcode: Opcode, nodeid: int, opened: bytes) -> tuple[int, int, bytes]:
    return int(opcode), nodeid, fuse.RELEASE_IN.values(_FH(opened)[0], 0, 0, 0)


def _entry(_nodeid: int, _args: bytes, reply: bytes) -> Undo:
    nodeid = fuse.ENTRY_OUT.unpack(reply).nodeid
    return Undo((nodeid,)) if nodeid else _NOTHING


def _created(_nodeid: int, _args: bytes, reply: bytes) -> Undo:
    nodeid = fuse.ENTRY_OUT.unpack(reply).nodeid
    fuse.OPEN_OUT.unpack(reply, _ENTRY)
    return Undo((nodeid,), (_release(Opcode.RELEASE, nodeid, reply[_ENTRY:]),))


def _opened(nodeid: int, _args: bytes, reply: bytes) -> Undo:
    fuse.OPEN_OUT.unpack(reply)
    return Undo((), (_release(Opcode.RELEASE, nodeid, reply),))


def _opened_dir(nodeid: int, _args: bytes, reply: bytes) -> Undo:
    fuse.OPEN_OUT.unpack(reply)
    return Undo((), (_release(Opcode.RELEASEDIR, nodeid, reply),))


def _listed(_nodeid: int, _args: bytes, reply: bytes) -> Undo:
    found = [record.entry.nodeid for record in fuse.iter_direntplus(reply)]
    return Undo(tuple(nodeid for nodeid in found if nodeid))


def _locked(nodeid: int, args: bytes, _reply: bytes) -> Undo:
    unlock = bytearray(args[:_LK_IN])
    struct.pack_into("<I", unlock, _LOCK_TYPE_AT, LockType.UNLOCK)
    return Undo((), ((int(Opcode.SETLK), nodeid, bytes(unlock)),))


_UNDO: Final[dict[int, Callable[[int, bytes, bytes], Undo]]] = {
    **dict.fromkeys(
        map(int, (Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK)), _entry
    ),
    **dict.fromkeys(map(int, (Opcode.CREATE, Opcode.TMPFILE)), _created),
    int(Opcode.OPEN): _opened,
    int(Opcode.OPENDIR): _opened_dir,
    int(Opcode.READDIRPLUS): _listed,
    int(Opcode.SETLKW): _locked,
}


def undo_late_reply(opcode: int, nodeid: int, args: bytes, reply: bytes) -> Undo:
    """Return what takes a successful reply back.

    Args:
        opcode: Of the request.
        nodeid: Node that it named.
        args: Its body, or as much of it as the in-struct takes.
        reply: Body of the reply.
    """
    undo = _UNDO.get(opcode)
    if undo is None:
        return _NOTHING
    try:
        return undo(nodeid, args, reply)
    except (WireError, struct.error):
        return _NOTHING  # it makes no sense, so there is nothing in it to give back
