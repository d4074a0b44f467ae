"""READDIRPLUS that is sent as READDIR: names alone, where the kernel knows the rest already.

``cache.known_names`` says where. Only the beginning of a listing is changed; how it goes on, the
kernel decides by what was looked at. The reply gets the shape that the kernel has asked for, with
entries of node 0: a name, and nothing about the file.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.wire import fuse

if TYPE_CHECKING:
    import mmap

__all__ = ["names_as_plus", "room_for_names"]

_IN: Final = fuse.IN_HEADER.size
#: fuse_read_in: fh, offset, size.
OFFSET_AT: Final = _IN + 8
SIZE_AT: Final = _IN + 16

_NOTHING: Final = bytes(fuse.ENTRY_OUT.size)
_DIRENT: Final = fuse.DIRENT.size
_NAME_LENGTH: Final = struct.Struct("<16xI").unpack_from
#: The smallest entry, with a name of up to 8 bytes, becomes 5 times as long; others less.
_WIDER: Final = (_DIRENT + 8 + len(_NOTHING)) // (_DIRENT + 8)


def room_for_names(size: int) -> int:
    """Return how many bytes of names fit ``size`` bytes when they have been given their shape."""
    return size // _WIDER


def names_as_plus(memory: mmap.mmap, at: int, length: int) -> bytes:
    """Return a READDIR's reply as one to READDIRPLUS.

    An entry that does not end within the reply ends it, as for the kernel.

    Args:
        memory: Shared memory; read once.
        at: Where the reply begins there.
        length: Its bytes.
    """
    names = memory[at : at + length]
    parts: list[bytes] = []
    start = 0
    while start + _DIRENT <= length:
        end = start + (_DIRENT + _NAME_LENGTH(names, start)[0] + 7 & -8)
        if end > length:
            break
        parts += (_NOTHING, names[start:end])
        start = end
    return b"".join(parts)
