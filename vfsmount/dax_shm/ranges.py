"""The window cut into ranges of one size, and which part of which file each range is for. Pure.

A range is *free*, *reserved* (somebody else's, not ours to look at), *leaving* (its file has gone,
its mapping is being taken away), *lost* (nobody knows if something is about to be mapped there), or
in the table under its key: the node, and which part of the
file, in ranges. All parts begin at multiples of the range size, so finding one is one look-up.

Ranges in the table are ordered by their last use. When none is free the coldest is given to
somebody else, unless it is pinned: pinned ranges are in use, or being set up.

Invariants (``check_invariants``): each range of the window is in exactly one of the five states;
only ranges in the table are pinned; keys are unique.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.dax_shm.mappings import OpenFile

__all__ = ["RANGE_SIZE", "Range", "RangeTable"]

#: Bytes; what a Linux guest uses. Smaller ranges cost more messages, larger ones more room.
RANGE_SIZE: Final = 2 << 20


class Range:
    """A range of the window that is for a part of a file.

    Attributes:
        moffset: Where it begins in the window, bytes.
        nodeid: The daemon's number of the file.
        index: Which part of the file: it begins at ``index`` times the range size.
        ready: Whether it has been set up; else nobody but who sets it up may use it.
        writable: Whether it was set up for writing.
        pins: How many need it as it is just now.
        file: What is mapped there, once it is ready.
        generation: The window's when that was looked up last.
        shown: The window's and its memory's counts when it was mapped into memory.
        used: The user's count of accesses when it was used last.
    """

    __slots__ = (
        "file",
        "generation",
        "index",
        "moffset",
        "nodeid",
        "pins",
        "ready",
        "shown",
        "used",
        "writable",
    )

    def __init__(self, moffset: int, nodeid: int, index: int) -> None:
        self.moffset = moffset
        self.nodeid = nodeid
        self.index = index
        self.ready = False
        self.writable = False
        self.pins = 0
        self.file: OpenFile | None = None
        self.generation = -1
        self.shown: tuple[int, int] | None = None
        self.used = 0

    def __repr__(self) -> str:
        return f"<Range {self.moffset:#x} of node {self.nodeid}[{self.index}]>"


class RangeTable:
    """All ranges of a window.

    Args:
        size: Bytes of the window; what is left over at its end is not used.
        range_size: Bytes of one range.
    """

    def __init__(self, size: int, range_size: int = RANGE_SIZE) -> None:
        self.range_size = range_size
        self._count = size // range_size
        # What has been used before, and behind it what never was: a window may have millions.
        self._free: list[int] = []
        self._fresh = range(0, self._count * range_size, range_size)
        self._table: OrderedDict[tuple[int, int], Range] = OrderedDict()
        self._of_node: dict[int, set[int]] = {}
        self._reserved: set[int] = set()
        self._leaving: set[int] = set()
        self._lost: list[int] = []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Range]:
        """Iterate over the ranges in the table, coldest first."""
        return iter(tuple(self._table.values()))

    @property
    def used(self) -> int:
        """How many are in the table."""
        return len(self._table)

    def find(self, nodeid: int, index: int) -> Range | None:
        """Return the range of a part of a file, which counts as a use, or None."""
        found = self._table.get((nodeid, index))
        if found is not None:
            self._table.move_to_end((nodeid, index))
        return found

    @property
    def lost(self) -> int:
        """How many are lost."""
        return len(self._lost)

    @property
    def full(self) -> bool:
        """Whether none is free."""
        return not self._free and not self._fresh

    def parts(self, nodeid: int) -> list[Range]:
        """Return the ranges of a node."""
        return [self._table[nodeid, index] for index in self._of_node.get(nodeid, ())]

    def coldest(self) -> Range | None:
        """Return who would have to go for a new one: None if one is free, or none may go."""
        if not self.full:
            return None
        return next((one for one in self._table.values() if not one.pins), None)

    def claim(self, nodeid: int, index: int) -> Range | None:
        """Take a free range, or the coldest, for a part of a file that has none.

        Returns:
            The range, pinned once and not ready; None when all are pinned.
        """
        assert (nodeid, index) not in self._table
        moffset = self._take_free()
        if moffset is None:
            victim = self.coldest()
            if victim is None:
                return None
            self._take_out(victim)
            moffset = victim.moffset
        one = Range(moffset, nodeid, index)
        one.pins = 1
        self._table[nodeid, index] = one
        self._of_node.setdefault(nodeid, set()).add(index)
        return one

    def drop(self, one: Range) -> None:
        """Free a range: nothing is mapped there, or whatever is may be replaced."""
        if self._table.get((one.nodeid, one.index)) is one:
            self._take_out(one)
            self._free.append(one.moffset)

    def leave(self, nodeid: int) -> list[int]:
        """Take the ranges of a node out that nobody needs just now.

        Returns:
            Where they begin. They are free once ``left`` says so.
        """
        going = [one for one in self.parts(nodeid) if not one.pins]
        for one in going:
            self._take_out(one)
            self._leaving.add(one.moffset)
        return [one.moffset for one in going]

    def left(self, moffset: int) -> None:
        """The mapping of a range that is leaving has been taken away."""
        self._leaving.remove(moffset)
        self._free.append(moffset)

    def lose(self, one: Range) -> None:
        """Do not use a range before ``recover``: something may get mapped there at any time."""
        if self._table.get((one.nodeid, one.index)) is one:
            self._take_out(one)
            self._lost.append(one.moffset)

    def recover(self) -> None:
        """Free what is lost: it is as it is there now, and may be replaced."""
        self._free += self._lost
        self._lost.clear()

    def has_node(self, nodeid: int) -> bool:
        """Whether a node has ranges."""
        return nodeid in self._of_node

    def reserve(self) -> int | None:
        """Take a free range out for good, for somebody else; returns where it begins, or None."""
        moffset = self._take_free()
        if moffset is not None:
            self._reserved.add(moffset)
        return moffset

    def give_back(self, moffset: int) -> None:
        """Return a reserved range."""
        self._reserved.remove(moffset)
        self._free.append(moffset)

    def clear(self) -> None:
        """Free all but the reserved ones: nothing is mapped any more."""
        taken = [one.moffset for one in self._table.values()]
        self._free += [*taken, *self._leaving, *self._lost]
        self._table.clear()
        self._of_node.clear()
        self._leaving.clear()
        self._lost.clear()

    def _take_free(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._fresh:
            return None
        moffset, self._fresh = self._fresh[0], self._fresh[1:]
        return moffset

    def _take_out(self, one: Range) -> None:
        del self._table[one.nodeid, one.index]
        parts = self._of_node[one.nodeid]
        parts.remove(one.index)
        if not parts:
            del self._of_node[one.nodeid]

    def check_invariants(self) -> None:
        """Raise AssertionError unless the table is as the module says."""
        places = [one.moffset for one in self._table.values()]
        untaken = [*self._free, *self._fresh]
        everywhere = [*untaken, *places, *self._reserved, *self._leaving, *self._lost]
        assert sorted(everywhere) == [at * self.range_size for at in range(self._count)]
        for key, one in self._table.items():
            assert key == (one.nodeid, one.index)
            assert one.pins >= 0
            assert one.ready or one.pins, one
        keys = {(nodeid, at) for nodeid, parts in self._of_node.items() for at in parts}
        assert keys == set(self._table)
