"""Listings: how long the kernel keeps them, how it is given names alone, and what is in them.

READDIRPLUS is sent as READDIR where the kernel knows the rest already (``cache.known_names``). Only
the beginning of a listing is changed; how it goes on, the kernel decides by what was looked at.
Anywhere in a listing READDIR is sent after a READDIRPLUS that has failed with ENOENT (``known``).
The reply gets the shape that the kernel has asked for, with entries of node 0: a name, and nothing
about the file.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.cache.policy import FOREVER
from vfsmount.wire import fuse
from vfsmount.wire.fuse import OpenOutFlag

if TYPE_CHECKING:
    import mmap

    from vfsmount.cache.policy import CachePolicy

__all__ = ["ListingAges", "find_sentinel", "names_as_plus", "room_for_names"]

_IN: Final = fuse.IN_HEADER.size
#: fuse_read_in: fh, offset, size.
OFFSET_AT: Final = _IN + 8
SIZE_AT: Final = _IN + 16

_NOTHING: Final = bytes(fuse.ENTRY_OUT.size)
_DIRENT: Final = fuse.DIRENT.size
_NAME_LENGTH: Final = struct.Struct("<16xI").unpack_from
#: The smallest entry, with a name of up to 8 bytes, becomes 5 times as long; others less.
_WIDER: Final = (_DIRENT + 8 + len(_NOTHING)) // (_DIRENT + 8)
#: Of fuse_direntplus: nodeid, the byte of mode that has the type, namelen.
_LISTED: Final = struct.Struct("<Q93xB42xI").unpack_from
_REGULAR: Final = stat.S_IFREG >> 12
_DIRENTPLUS: Final = fuse.ENTRY_OUT.size + _DIRENT
#: Files that a listing has at least, if it is to tell whether anybody looks at them: a GETATTR more
#: for fewer would be a cost that can be seen.
_FILES: Final = 8


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


def find_sentinel(memory: mmap.mmap, at: int, length: int) -> int | None:
    """Return where the first file begins in a READDIRPLUS's reply, None if that has few.

    Args:
        memory: Shared memory; each entry is read once.
        at: Where the reply begins there.
        length: Its bytes.
    """
    found, files, last = at, 0, at + length - _DIRENTPLUS
    while at <= last:
        nodeid, kind, name_length = _LISTED(memory, at)
        if nodeid and kind >> 4 == _REGULAR:
            found = found if files else at
            files += 1
            if files == _FILES:
                return found
        at += (_DIRENTPLUS + name_length + 7) & -8
    return None


class ListingAges:
    """When the kernel began to keep the listing of each directory; bounded."""

    __slots__ = ("_since",)
    _LIMIT: Final = 1 << 14

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def flags(self, nodeid: int, policy: CachePolicy, now: float) -> int:
        """Return the open flags of a directory that is opened at ``now`` seconds."""
        if not policy.dir_timeout:
            return 0
        if policy.dir_timeout == FOREVER:
            return OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE
        since = self._since.get(nodeid)
        if policy.keeps_listing(None if since is None else now - since):
            return OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE
        self._since.pop(nodeid, None)
        self._since[nodeid] = now
        if len(self._since) > self._LIMIT:
            del self._since[next(iter(self._since))]
        return OpenOutFlag.CACHE_DIR
