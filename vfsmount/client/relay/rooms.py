"""How much room each message needs: what is read at once, and the reply that a request may have."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    import mmap

__all__ = ["largest_request", "named_rooms", "room_for_reply", "small_rooms"]

PAGE_SIZE: Final = 4096
_IN: Final = fuse.IN_HEADER.size
_OUT: Final = fuse.OUT_HEADER.size

#: Codes in ``ROOMS`` for replies whose size the request names: it is at this offset of the body.
_NAMED_SIZE: Final = {
    Opcode.READ: 16,
    Opcode.READDIR: 16,
    Opcode.READDIRPLUS: 16,
    Opcode.GETXATTR: 0,
    Opcode.LISTXATTR: 0,
    Opcode.IOCTL: 28,
}
#: What a request without known reply gets: room for the largest struct and then some. A kernel
#: newer than this file sends such opcodes; the daemon judges them.
_UNKNOWN_ROOM: Final = _OUT + PAGE_SIZE
_SIZE: Final = struct.Struct("<I").unpack_from


def _rooms() -> list[int]:
    """Bytes of reply, header included, by opcode; negative: the offset where the size stands."""
    rooms = [_UNKNOWN_ROOM] * (max(Opcode.COPY_FILE_RANGE_64, 63) + 1)
    for opcode, operation in fuse.OPERATIONS.items():
        room = _OUT + sum(codec.size for codec in operation.reply)
        if not operation.has_reply:
            room = 0
        elif opcode in _NAMED_SIZE:
            room = -(_IN + _NAMED_SIZE[opcode])
        elif opcode == Opcode.READLINK:
            room += fuse.PATH_MAX
        rooms[opcode] = room
    return rooms


_ROOMS: Final = _rooms()
#: What is in the reply besides the bytes that the request names.
_FIXED: Final = {int(Opcode.IOCTL): _OUT + fuse.IOCTL_OUT.size}


def small_rooms(limit: int) -> dict[int, int]:
    """Return the room of each opcode whose reply is always the same and at most ``limit`` bytes."""
    return {opcode: room for opcode, room in enumerate(_ROOMS) if 0 < room <= limit}


def named_rooms() -> dict[int, int]:
    """Return where READs of all kinds say how much they ask for, from the request's beginning."""
    opcodes = (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS)
    return {int(opcode): -_ROOMS[opcode] for opcode in opcodes}


def room_for_reply(opcode: int, memory: mmap.mmap, at: int) -> int:
    """Return the bytes that the reply may have, its header included; 0 when there is none.

    READ gets exactly 16 more than it asks for: virtiofsd (Rust) refuses anything else, the C one
    fills whatever there is.

    Args:
        opcode: FUSE opcode.
        memory: Shared memory.
        at: Where the request begins there.
    """
    room = _ROOMS[opcode] if opcode < len(_ROOMS) else _UNKNOWN_ROOM
    if room >= 0:
        return room
    size: int = _SIZE(memory, at - room)[0]
    if size == 0 and opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        return _OUT + fuse.GETXATTR_OUT.size
    return size + _FIXED.get(opcode, _OUT)


def largest_request(max_write: int) -> int:
    """Return the bytes that a read(2) of the device must have room for (``fuse_dev_do_read``)."""
    return max(_IN + fuse.WRITE_IN.size + max_write, 2 * PAGE_SIZE)
