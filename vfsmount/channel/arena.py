"""Which bytes of the arena are whose: a buddy allocator that joins its free blocks only when asked.

Requests and replies live in blocks of shared memory. Blocks are powers of two, aligned to their own
size, so a block of 4 KiB or more is whole pages. Rules:

* A freed block goes on top of the free list of its size and is the next to be handed out: under a
  steady load the same few blocks, hot in the cache and already backed by memory, go round.
* Free buddies are joined only when an allocation would fail otherwise, or by ``free_extents``; so
  both ``allocate`` and ``free`` are a dict operation and a list operation (0.4 us together).
* The allocator hands out numbers. That the memory behind them grows by use and shrinks by
  ``free_extents`` is ``memory.py``'s work.

Powers of two waste addresses, not memory: pages of a block that are never touched never exist.
"""

from __future__ import annotations

__all__ = ["MAX_BLOCK", "MIN_BLOCK", "Arena"]

_MIN_ORDER = 9
_MAX_ORDER = 24

#: Bytes of the smallest block; a GETATTR takes one of these.
MIN_BLOCK = 1 << _MIN_ORDER
#: Bytes of the largest block, and what the arena's size must be a multiple of.
MAX_BLOCK = 1 << _MAX_ORDER


class Arena:
    """The allocator.

    Invariants: free and used blocks and the untouched rest tile the arena; every block is aligned
    to its size.

    Args:
        size: Bytes, a multiple of ``MAX_BLOCK``.
        base: What offset the arena starts at; all offsets given out include it.

    Attributes:
        used_bytes: Sum of the blocks handed out.
    """

    __slots__ = ("_base", "_free", "_frontier", "_size", "_used", "used_bytes")

    def __init__(self, size: int, base: int = 0) -> None:
        if size <= 0 or size % MAX_BLOCK:
            raise ValueError(f"arena of {size} bytes is not a multiple of {MAX_BLOCK}")
        self._base = base
        self._size = size
        #: Offset behind the largest blocks taken into use so far.
        self._frontier = base
        self._free: list[list[int]] = [[] for _ in range(_MAX_ORDER + 1)]
        self._used: dict[int, int] = {}
        self.used_bytes = 0

    def allocate(self, size: int) -> int:
        """Return the offset of a block of at least ``size`` bytes, or -1 when there is no room now.

        Raises:
            ValueError: No block is that large.
        """
        order = max(_MIN_ORDER, (size - 1).bit_length())
        if order > _MAX_ORDER:
            raise ValueError(f"{size} bytes do not fit a block of {MAX_BLOCK}")
        free = self._free[order]
        offset = free.pop() if free else self._carve(order)
        if offset >= 0:
            self._used[offset] = order
            self.used_bytes += 1 << order
        return offset

    def free(self, offset: int) -> None:
        """Take a block back. KeyError when it is not one that was handed out: our bug."""
        order = self._used.pop(offset)
        self._free[order].append(offset)
        self.used_bytes -= 1 << order

    def free_extents(self, minimum: int) -> list[tuple[int, int]]:
        """Join what can be joined; return (offset, size) of the free blocks of ``minimum`` bytes.

        The caller may take the memory behind them away.
        """
        self._join()
        orders = range(max(_MIN_ORDER, (minimum - 1).bit_length()), _MAX_ORDER + 1)
        return [(offset, 1 << order) for order in orders for offset in self._free[order]]

    def _carve(self, order: int) -> int:
        """Split a larger block, or take new ground, or join free blocks and try again."""
        offset = self._split(order)
        if offset < 0 and self._frontier < self._base + self._size:
            self._free[_MAX_ORDER].append(self._frontier)
            self._frontier += MAX_BLOCK
            offset = self._split(order)
        if offset < 0:
            self._join()
            offset = self._split(order)
        return offset

    def _split(self, order: int) -> int:
        """Take the smallest free block that holds ``order``; its upper parts become free."""
        for larger in range(order, _MAX_ORDER + 1):
            if self._free[larger]:
                offset = self._free[larger].pop()
                for half in range(larger - 1, order - 1, -1):
                    self._free[half].append(offset + (1 << half))
                return offset
        return -1

    def _join(self) -> None:
        """Join free buddies, smallest first; lists end up with the lowest offset on top."""
        for order in range(_MIN_ORDER, _MAX_ORDER):
            left = set(self._free[order])
            alone = []
            for offset in self._free[order]:
                buddy = ((offset - self._base) ^ (1 << order)) + self._base
                if buddy not in left:
                    alone.append(offset)
                elif offset < buddy:
                    self._free[order + 1].append(offset)
            self._free[order] = alone
        for offsets in self._free:
            offsets.sort(reverse=True)

    def check_invariants(self) -> None:
        """Raise AssertionError unless free and used blocks tile what has been taken into use."""
        blocks = [(offset, order) for offset, order in self._used.items()]
        blocks += [
            (offset, order) for order in range(_MAX_ORDER + 1) for offset in self._free[order]
        ]
        expected = self._base
        for offset, order in sorted(blocks):
            assert offset == expected, f"gap or overlap at {expected}"
            assert (offset - self._base) % (1 << order) == 0, "not aligned to its size"
            expected += 1 << order
        assert expected == self._frontier <= self._base + self._size
        assert self.used_bytes == sum(1 << order for order in self._used.values())
