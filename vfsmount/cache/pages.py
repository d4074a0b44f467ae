"""Contents of files that may be believed, in blocks; bounded in bytes, the longest unused go first.

A block that is shorter than the others is the end of its file, and an empty one says that the file
ends before it. So nobody needs to know the file's size to read from here.

When contents may be believed is not decided here: who opens a file finds out (``freshness``), and
drops what is old. What is on its way meanwhile is not to be kept: whoever reads at the host does so
below ``fetching``, which tells.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BLOCK", "Fetch", "Pages"]

#: Bytes of one block.
BLOCK: Final = 1 << 17
#: Bytes that a block takes beside its contents: two table entries and an object, measured.
_OVERHEAD: Final = 300


class Fetch:
    """Something that is being read at the host.

    Attributes:
        is_true: The file has neither been dropped nor written to since it was asked for.
    """

    __slots__ = ("is_true",)

    def __init__(self) -> None:
        self.is_true = True


class Pages:
    """Blocks of all files.

    Args:
        limit: Bytes in all.
    """

    __slots__ = ("_blocks", "_fetches", "_files", "_limit", "_size")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: dict[tuple[int, int], bytes] = {}
        self._files: dict[int, set[int]] = {}
        self._fetches: dict[int, list[Fetch]] = {}
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes taken."""
        return self._size

    def __contains__(self, nodeid: int) -> bool:
        """Whether anything of a file is kept, or on its way."""
        return nodeid in self._files or nodeid in self._fetches

    @contextmanager
    def fetching(self, nodeid: int) -> Iterator[Fetch]:
        """To be entered before the host is asked; what is found may be put while it ``is_true``."""
        fetch = Fetch()
        self._fetches.setdefault(nodeid, []).append(fetch)
        try:
            yield fetch
        finally:
            left = self._fetches[nodeid]
            left.remove(fetch)
            if not left:
                del self._fetches[nodeid]

    def _spoil(self, nodeid: int) -> None:
        for fetch in self._fetches.get(nodeid, ()):
            fetch.is_true = False

    def read(self, nodeid: int, start: int, size: int) -> bytes | None:
        """Return up to ``size`` bytes from ``start``, fewer at the end; None: not known."""
        pieces = []
        for index in range(start // BLOCK, -(-(start + size) // BLOCK)):
            block = self._blocks.pop((nodeid, index), None)
            if block is None:
                return None
            self._blocks[nodeid, index] = block
            at = index * BLOCK
            pieces.append(block[max(0, start - at) : start + size - at])
            if len(block) < BLOCK:
                break
        return b"".join(pieces)

    def put(self, nodeid: int, start: int, data: bytes, *, ends: bool) -> None:
        """Keep what was read from ``start``, a multiple of BLOCK; the file ``ends`` behind it.

        Bytes behind the last whole block are of no use unless the file ends there.
        """
        for at in range(0, len(data) + ends, BLOCK):
            block = data[at : at + BLOCK]
            if len(block) == BLOCK or ends:
                self._put(nodeid, (start + at) // BLOCK, block)
        while self._size > self._limit:
            self._remove(*next(iter(self._blocks)))

    def _put(self, nodeid: int, index: int, block: bytes) -> None:
        before = self._blocks.pop((nodeid, index), None)
        if before is None:
            self._files.setdefault(nodeid, set()).add(index)
        else:
            self._size -= len(before) + _OVERHEAD
        self._blocks[nodeid, index] = block
        self._size += len(block) + _OVERHEAD

    def _remove(self, nodeid: int, index: int) -> None:
        self._size -= len(self._blocks.pop((nodeid, index))) + _OVERHEAD
        indices = self._files[nodeid]
        indices.discard(index)
        if not indices:
            del self._files[nodeid]

    def wrote(self, nodeid: int, start: int, size: int) -> None:
        """Some bytes were written: their blocks are old, and so is what is known of the end."""
        self._spoil(nodeid)
        first, last = start // BLOCK, (start + size) // BLOCK
        for index in list(self._files.get(nodeid, ())):
            if first <= index <= last or len(self._blocks[nodeid, index]) < BLOCK:
                self._remove(nodeid, index)

    def drop(self, nodeid: int) -> None:
        """Nothing of the file is to be believed any more."""
        self._spoil(nodeid)
        for index in list(self._files.get(nodeid, ())):
            self._remove(nodeid, index)

    def clear(self) -> None:
        """Nothing of any file is to be believed any more."""
        for nodeid in {*self._files, *self._fetches}:
            self.drop(nodeid)

    def check_invariants(self) -> None:
        """Raise AssertionError unless all is counted and within bounds."""
        assert self._size == sum(len(block) + _OVERHEAD for block in self._blocks.values())
        assert self._size <= self._limit
        indexed = {(nodeid, index) for nodeid, of in self._files.items() for index in of}
        assert indexed == set(self._blocks)
        assert all(self._files.values())
        assert all(self._fetches.values())
        assert all(len(block) <= BLOCK for block in self._blocks.values())
