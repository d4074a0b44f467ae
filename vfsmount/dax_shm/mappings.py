"""What the back-end has mapped where in the window, as it told us. Pure.

The rules are vhost-user's ("SHMEM_MAP", "SHMEM_UNMAP"): a mapping lies inside the window on page
boundaries, overlaps no other, and is taken away as a whole. Whatever breaks them is refused with an
errno and changes nothing.

Offsets: ``moffset`` is in the window, ``foffset`` in the file; bytes.

Invariants (``check_invariants``): mappings are sorted by ``moffset``, disjoint, not empty, aligned
to pages, and inside the window.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PAGE", "Mapping", "MappingTable", "OpenFile", "check_place"]

PAGE: Final = 4096
_MAX_OFFSET: Final = (1 << 63) - 1

F = TypeVar("F")


class OpenFile:
    """A descriptor that the back-end sent, shared by the mappings of one file.

    Attributes:
        fd: The descriptor; -1 once the last mapping is gone.
        key: Device, inode number and flags of open(2).
        mappings: How many mappings it has.
    """

    __slots__ = ("fd", "key", "mappings")

    def __init__(self, fd: int, key: tuple[int, int, int]) -> None:
        self.fd = fd
        self.key = key
        self.mappings = 0


class Mapping(NamedTuple, Generic[F]):
    """One mapping.

    Attributes:
        moffset: Where in the window.
        length: Bytes.
        foffset: Where in the file.
        writable: Whether the back-end lets us write there.
        file: What is mapped; the table does not look at it.
    """

    moffset: int
    length: int
    foffset: int
    writable: bool
    file: F

    @property
    def end(self) -> int:
        """First byte of the window behind it."""
        return self.moffset + self.length


def check_place(size: int, moffset: int, length: int, foffset: int) -> int:
    """Check numbers from the other side against a window of ``size`` bytes; return 0 or EINVAL."""
    inside = 0 < length <= size and 0 <= moffset <= size - length
    in_file = 0 <= foffset <= _MAX_OFFSET - length
    aligned = not (moffset | length | foffset) % PAGE
    return 0 if inside and in_file and aligned else errno.EINVAL


class MappingTable(Generic[F]):
    """All mappings of a window.

    Args:
        size: Bytes of the window, a multiple of PAGE.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._mappings: list[Mapping[F]] = []

    def __len__(self) -> int:
        return len(self._mappings)

    def __iter__(self) -> Iterator[Mapping[F]]:
        return iter(tuple(self._mappings))

    def overlapping(self, moffset: int, length: int) -> list[Mapping[F]]:
        """Return the mappings that share a byte with a part of the window, in order."""
        first = bisect_right(self._mappings, moffset, key=lambda one: one.end)
        behind = bisect_left(self._mappings, moffset + length, key=lambda one: one.moffset)
        return self._mappings[first:behind]

    def add(self, new: Mapping[F]) -> int:
        """Add a mapping.

        Returns:
            0; EINVAL: it cannot be; EEXIST: something is mapped there.
        """
        if error := check_place(self.size, new.moffset, new.length, new.foffset):
            return error
        if self.overlapping(new.moffset, new.length):
            return errno.EEXIST
        at = bisect_left(self._mappings, new.moffset, key=lambda one: one.moffset)
        self._mappings.insert(at, new)
        return 0

    def remove(self, moffset: int, length: int) -> Mapping[F] | None:
        """Take a mapping away, named exactly; None when there is none like that."""
        for one in self.overlapping(moffset, length):
            if (one.moffset, one.length) == (moffset, length):
                self._mappings.remove(one)
                return one
        return None

    def at(self, moffset: int, length: int = 1) -> Mapping[F] | None:
        """Return the mapping that holds a part of the window in full; None when none does."""
        found = self.overlapping(moffset, length)
        if len(found) == 1 and found[0].moffset <= moffset and moffset + length <= found[0].end:
            return found[0]
        return None

    def clear(self) -> list[Mapping[F]]:
        """Take all away and return them."""
        gone, self._mappings = self._mappings, []
        return gone

    def check_invariants(self) -> None:
        """Raise AssertionError unless the table is as the module says."""
        at = 0
        for one in self._mappings:
            assert at <= one.moffset < one.end <= self.size, one
            assert not (one.moffset | one.length | one.foffset) % PAGE, one
            at = one.end
