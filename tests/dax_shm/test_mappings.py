"""The table of what the back-end has mapped, against an array of pages."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.dax_shm.mappings import PAGE, Mapping, MappingTable, check_place

PAGES = 16
SIZE = PAGES * PAGE

pages = st.integers(-1, PAGES + 1)
lengths = st.integers(0, 6)


class Tables(RuleBasedStateMachine):
    """The model: for each page of the window, which mapping it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.table: MappingTable[int] = MappingTable(SIZE)
        self.model: list[int | None] = [None] * PAGES
        self.count = 0

    @rule(at=pages, length=lengths, foffset=st.sampled_from([0, PAGE, 1 << 40]))
    def add(self, at: int, length: int, foffset: int) -> None:
        self.count += 1
        result = self.table.add(Mapping(at * PAGE, length * PAGE, foffset, True, self.count))
        if length < 1 or at < 0 or at + length > PAGES:
            assert result == errno.EINVAL
        elif any(self.model[at : at + length]):
            assert result == errno.EEXIST
        else:
            assert result == 0
            self.model[at : at + length] = [self.count] * length

    @rule(at=pages, length=lengths)
    def remove(self, at: int, length: int) -> None:
        inside = at >= 0 and 0 < length <= PAGES - at
        owners = set(self.model[at : at + length]) if inside else {None}
        owner = owners.pop()
        whole = not owners and owner is not None and self.model.count(owner) == length
        gone = self.table.remove(at * PAGE, length * PAGE)
        assert (gone is not None) == whole
        if gone is not None:
            assert gone.file == owner
            self.model[at : at + length] = [None] * length

    @rule()
    def clear(self) -> None:
        assert {one.file for one in self.table.clear()} == set(self.model) - {None}
        self.model = [None] * PAGES

    @invariant()
    def same(self) -> None:
        self.table.check_invariants()
        found = [self.table.at(at * PAGE, PAGE) for at in range(PAGES)]
        assert [None if one is None else one.file for one in found] == self.model


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("moffset", "length", "foffset"),
    [
        (0, 0, 0),
        (0, SIZE + PAGE, 0),
        (SIZE, PAGE, 0),
        (-PAGE, PAGE, 0),
        (PAGE, SIZE, 0),
        (1, PAGE, 0),
        (0, PAGE - 1, 0),
        (0, PAGE, 1),
        (0, PAGE, -PAGE),
        (0, PAGE, (1 << 63) - PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, 0),
        (0, (1 << 64) - PAGE, 0),
    ],
)
def test_places_that_cannot_be(moffset: int, length: int, foffset: int) -> None:
    assert check_place(SIZE, moffset, length, foffset) == errno.EINVAL


def test_the_largest_place() -> None:
    assert check_place(SIZE, 0, SIZE, (1 << 63) - SIZE - PAGE) == 0
    assert check_place(0, 0, 0, 0) == errno.EINVAL
