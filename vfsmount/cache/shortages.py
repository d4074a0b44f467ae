"""What the host did not take of a write: for who writes by mapped memory, whom nobody tells.

A program that calls write(2) is told how much was written. The kernel, when it writes pages of a
shared map, heeds errors alone, and pyfuse3 does not say whose a write is. So the part that is
missing is remembered, and owed to the next fsync or close of the file. A program that was told
goes on where it was cut off, or cuts the file: then nothing is missing any more.
"""

from __future__ import annotations

__all__ = ["Shortages"]


class Shortages:
    """The first missing range of each file; nearly always there is none. False when empty."""

    __slots__ = ("_missing",)

    def __init__(self) -> None:
        self._missing: dict[int, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        """Whether anything is missing."""
        return bool(self._missing)

    def missed(self, nodeid: int, start: int, end: int) -> None:
        """Bytes from ``start`` to ``end`` were to be written and were not."""
        self._missing[nodeid] = start, end

    def wrote(self, nodeid: int, start: int, end: int) -> None:
        """These were written after all."""
        missing = self._missing.get(nodeid)
        if missing is not None and start <= missing[0] < end:
            self._missing[nodeid] = end, missing[1]
            self.truncate(nodeid, missing[1])

    def truncate(self, nodeid: int, size: int) -> None:
        """The file has ``size`` bytes now: nothing is missing behind."""
        missing = self._missing.get(nodeid)
        if missing is not None and missing[0] >= size:
            del self._missing[nodeid]

    def take(self, nodeid: int) -> bool:
        """Whether something of a file is missing; who asks tells of it."""
        return self._missing.pop(nodeid, None) is not None
