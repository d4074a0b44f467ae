"""FS_MAP and FS_UNMAP: how daemons mapped files before SHMEM_MAP was standardised.

They came in the development trees of QEMU and of the Rust daemons, under several numbers and in two
layouts. The layouts can be told apart by their size:

    eight entries   256 bytes: ``fd_offset`` u64[8], ``cache_offset`` u64[8], ``len`` u64[8],
                    ``flags`` u64[8]; what is not used has a ``len`` of 0
    counted         ``flags`` u32, ``count`` u16, padding u16, then ``count`` (at most 32) entries
                    of 32 bytes: ``fd_offset``, ``cache_offset``, ``len``, ``flags``, u64 each

Numbers that mean SHARED_OBJECT_* today (6, 7) are these where that feature was not negotiated.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from vfsmount.errors import WireError

__all__ = ["FS_MAP_NUMBERS", "FS_UNMAP_NUMBERS", "WHOLE_WINDOW", "FsMapEntry", "decode_fs_map"]

#: Rust vhost crate until 0.11 and QEMU's DAX tree (6, 7), the crate until 0.12 (1000, 1001).
FS_MAP_NUMBERS: Final = (6, 1000)
FS_UNMAP_NUMBERS: Final = (7, 1001)
#: ``len`` of an FS_UNMAP that means everything.
WHOLE_WINDOW: Final = (1 << 64) - 1

_EIGHT: Final = struct.Struct("=8Q8Q8Q8Q")
_HEAD: Final = struct.Struct("=IHH")
_ENTRY: Final = struct.Struct("=4Q")
_MOST: Final = 32
_KNOWN_FLAGS: Final = 3


class FsMapEntry(NamedTuple):
    """One entry (``VhostUserFSSlaveMsgEntry``, 32 bytes).

    Attributes:
        fd_offset: Where in the file, bytes.
        cache_offset: Where in the window, bytes.
        length: Bytes.
        flags: 1 readable, 2 writable.
    """

    fd_offset: int
    cache_offset: int
    length: int
    flags: int

    @property
    def writable(self) -> bool:
        """Whether stores are allowed."""
        return bool(self.flags & 2)


def decode_fs_map(data: bytes) -> list[FsMapEntry]:
    """Return the entries of an FS_MAP or FS_UNMAP that are used.

    Raises:
        WireError: The bytes are neither layout, or have unknown flags.
    """
    if len(data) == _EIGHT.size:
        values = _EIGHT.unpack(data)
        found = [FsMapEntry(*values[at::8]) for at in range(8)]
    else:
        found = _counted(data)
    if any(entry.flags & ~_KNOWN_FLAGS for entry in found):
        raise WireError("FS_MAP entry with unknown flags")
    return [entry for entry in found if entry.length]


def _counted(data: bytes) -> list[FsMapEntry]:
    if len(data) < _HEAD.size:
        raise WireError(f"FS_MAP of {len(data)} bytes")
    _, count, _ = _HEAD.unpack_from(data)
    if count > _MOST or len(data) != _HEAD.size + count * _ENTRY.size:
        raise WireError(f"FS_MAP of {count} entries in {len(data)} bytes")
    return [FsMapEntry(*values) for values in _ENTRY.iter_unpack(data[_HEAD.size :])]
