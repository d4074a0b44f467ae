"""Listings that the kernel has kept, and that the host has not changed since.

Close-to-open for directories: an open asks the daemon for the directory's attributes. Where mtime
and ctime are what they were when the listing was read, the names are the same, and need not be sent
again. Two things are not what they seem:

* A time stands for all changes within a tick of the host's clock. A listing that was read so soon
  after a change may lack another one of the same time. So it is kept only where ctime, which nobody
  can set, was old enough then.
* Some filesystems do not stamp a directory whose names come and go (/proc, /sys). So a listing is
  believed for a time only; whoever asks here knows for how long.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["KeptListings"]

#: A signature of ``freshness``: mtime and ctime, u64 at 24, their nanoseconds u32 at 44.
_TIMES: Final = struct.Struct("<24xQQ4xII8x")
_TICK_NS: Final = 50_000_000  # ext4, xfs, btrfs, tmpfs: 10 ms at most
#: Where there are no nanoseconds: FAT counts in steps of 2 s.
_COARSE_TICK_NS: Final = 3_000_000_000


class KeptListings:
    """What directories looked like when their listings were read; bounded.

    Args:
        limit: Most directories.
    """

    __slots__ = ("_limit", "_listed")

    def __init__(self, limit: int = 1 << 14) -> None:
        self._limit = limit
        self._listed: dict[int, tuple[int, ...]] = {}

    def is_unchanged(self, nodeid: int, raw: bytes) -> bool:
        """Whether the listing that was read last is what one read now would be.

        Args:
            nodeid: A directory that is opened.
            raw: Its attributes as the daemon has just said them, a signature of ``freshness``.
        """
        return self._listed.get(nodeid) == _TIMES.unpack(raw)

    def begin(self, nodeid: int, raw: bytes, wall_ns: int) -> bool:
        """A listing is about to be read; return whether it can be kept.

        Args:
            nodeid: Its directory.
            raw: As above, asked for before the first name.
            wall_ns: The host's time then, nanoseconds since 1970.
        """
        self._listed.pop(nodeid, None)
        times = _TIMES.unpack(raw)
        _, ctime, mtime_ns, ctime_ns = times
        tick = _TICK_NS if mtime_ns or ctime_ns else _COARSE_TICK_NS
        if wall_ns - (ctime * 1_000_000_000 + ctime_ns) < tick:
            return False
        if len(self._listed) >= self._limit:
            self._listed.clear()  # among so many, hardly any is listed twice in time
        self._listed[nodeid] = times
        return True

    def forget(self, nodeid: int) -> None:
        """The kernel knows the node no more; its number may come back as another's."""
        self._listed.pop(nodeid, None)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the memory keeps within its bounds."""
        assert len(self._listed) <= self._limit
