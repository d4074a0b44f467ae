"""What has been written here and is not at the host yet: one file's dirty ranges, and all files'.

Rules:

* Ranges are sorted, do not overlap and do not touch: neighbours are merged, a later write wins.
* ``take`` hands pieces out to be written; they come back with ``failed`` or are forgotten with
  ``written``. What was written over meanwhile stays as the newer write has it.
* Each failure is owed once to every handle that has written, as an errno, and the data stay dirty:
  the next attempt may do better. They are given up only with the last handle (``abandon``).

The clock is passed in. Nothing here waits: who takes pieces sees to it that one at a time writes
one file, so that writes reach the host in their order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

__all__ = ["DirtyFile", "DirtyFiles", "Piece"]


class Piece(NamedTuple):
    """Bytes to be written at ``start`` of the file."""

    start: int
    data: bytes


class DirtyFile:
    """Dirty ranges of one file.

    Attributes:
        since: When the oldest of them was written, clock seconds; None when there are none.
        size: Bytes in them.
    """

    __slots__ = ("_data", "_owed", "_starts", "_writers", "since", "size")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._data: list[bytearray] = []
        self._writers: set[int] = set()
        self._owed: dict[int, int] = {}
        self.since: float | None = None
        self.size = 0

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._starts)

    @property
    def end(self) -> int:
        """Where the last range ends: the file is at least that long. 0 without ranges."""
        return self._starts[-1] + len(self._data[-1]) if self._starts else 0

    def ranges(self) -> list[tuple[int, bytes]]:
        """Return (start, bytes) of each range, in order."""
        return [(start, bytes(data)) for start, data in zip(self._starts, self._data, strict=True)]

    def write(self, handle: int, start: int, data: bytes | memoryview, now: float) -> None:
        """Keep what a handle writes."""
        self._writers.add(handle)
        if data:
            if self.since is None:
                self.since = now
            self._put(start, data, over=True)

    def _put(self, start: int, data: bytes | bytearray | memoryview, *, over: bool) -> None:
        """Merge bytes in; where ranges are already, the new bytes win if ``over``."""
        end = start + len(data)
        starts, ranges = self._starts, self._data
        # Appending to a range that ends right here is what a program that writes in order does.
        last = bisect_right(starts, start) - 1
        if last >= 0 and starts[last] + len(ranges[last]) == start:
            following = starts[last + 1] if last + 1 < len(starts) else end + 1
            if following > end:
                ranges[last] += data
                self.size += len(data)
                return
        first = last if last >= 0 and starts[last] + len(ranges[last]) >= start else last + 1
        stop = bisect_right(starts, end)
        if first >= stop:
            starts.insert(first, start)
            ranges.insert(first, bytearray(data))
            self.size += len(data)
            return
        base = min(start, starts[first])
        merged = bytearray(max(end, starts[stop - 1] + len(ranges[stop - 1])) - base)
        old = zip(starts[first:stop], ranges[first:stop], strict=True)
        for at, content in (*old, (start, data)) if over else ((start, data), *old):
            merged[at - base : at - base + len(content)] = content
        self.size += len(merged) - sum(len(one) for one in ranges[first:stop])
        starts[first:stop] = [base]
        ranges[first:stop] = [merged]

    def overlaps(self, start: int, size: int) -> bool:
        """Whether any of ``size`` bytes from ``start`` are dirty."""
        index = bisect_left(self._starts, start + size) - 1
        return size > 0 <= index and self._starts[index] + len(self._data[index]) > start

    def take(self, limit: int) -> list[Piece]:
        """Hand everything out, in pieces of ``limit`` bytes at most; nothing is dirty then."""
        pieces = [
            Piece(start + at, bytes(data[at : at + limit]))
            for start, data in zip(self._starts, self._data, strict=True)
            for at in range(0, len(data), limit)
        ]
        self._starts.clear()
        self._data.clear()
        self.size = 0
        self.since = None
        return pieces

    def truncate(self, size: int) -> None:
        """The file was cut or lengthened to ``size`` bytes: what was written behind is void."""
        keep = bisect_left(self._starts, size)
        if keep and (over := self._starts[keep - 1] + len(self._data[keep - 1]) - size) > 0:
            del self._data[keep - 1][-over:]
        del self._starts[keep:], self._data[keep:]
        self.size = sum(map(len, self._data))
        if not self._starts:
            self.since = None

    def failed(self, pieces: list[Piece], errno: int, now: float) -> None:
        """Some pieces could not be written: they are dirty again, under what came since."""
        for piece in pieces:
            self._put(piece.start, piece.data, over=False)
        if pieces and self.since is None:
            self.since = now
        self._owed.update(dict.fromkeys(self._writers, errno))

    def owed(self, handle: int) -> int:
        """Return the errno that a handle has to be told, once; 0 for none."""
        return self._owed.pop(handle, 0)

    def close(self, handle: int) -> bool:
        """The handle is gone; return whether another that wrote is still there."""
        self._writers.discard(handle)
        self._owed.pop(handle, None)
        return bool(self._writers)

    def abandon(self) -> int:
        """Give up what is dirty; return how many bytes are lost."""
        lost = self.size
        self.take(1 << 30)
        return lost

    def check_invariants(self) -> None:
        """Raise AssertionError unless the ranges are as the module says."""
        ends = [start + len(data) for start, data in zip(self._starts, self._data, strict=True)]
        assert all(self._data)
        assert all(end < start for end, start in zip(ends, self._starts[1:], strict=False))
        assert self.size == sum(map(len, self._data))
        assert (self.since is None) == (not self._starts)
        assert set(self._owed) <= self._writers


class DirtyFiles:
    """All dirty files of a mount, and when they have to be written.

    Args:
        limit: Bytes in all above which a writer writes its file out itself.
        age: Seconds after which a file is written, whoever closes it or not.
    """

    __slots__ = ("_age", "_files", "_limit")

    def __init__(self, limit: int = 16 << 20, age: float = 30.0) -> None:
        self._limit = limit
        self._age = age
        self._files: dict[int, DirtyFile] = {}

    def __len__(self) -> int:
        """Files that have been written to and not closed."""
        return len(self._files)

    def get(self, nodeid: int) -> DirtyFile | None:
        """Return a node's file if there is one."""
        return self._files.get(nodeid)

    def of(self, nodeid: int) -> DirtyFile:
        """Return a node's file, made where there was none."""
        return self._files.setdefault(nodeid, DirtyFile())

    def drop(self, nodeid: int) -> None:
        """The last handle that wrote to it is gone."""
        self._files.pop(nodeid, None)

    @property
    def size(self) -> int:
        """Dirty bytes in all."""
        return sum(file.size for file in self._files.values())

    def is_too_much(self) -> bool:
        """Whether more is dirty than may be."""
        return self.size > self._limit

    def nodes(self) -> list[int]:
        """Nodes with something to write."""
        return [nodeid for nodeid, file in self._files.items() if file]

    def due(self, now: float) -> list[int]:
        """Nodes whose oldest dirty byte is too old."""
        return [
            nodeid
            for nodeid, file in self._files.items()
            if file.since is not None and now - file.since >= self._age
        ]

    def next_due(self) -> float | None:
        """When the next file will be too old, clock seconds; None when nothing is dirty."""
        oldest = [file.since for file in self._files.values() if file.since is not None]
        return min(oldest) + self._age if oldest else None
