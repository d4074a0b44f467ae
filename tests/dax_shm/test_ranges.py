"""The ranges of a window, against a list in order of use."""

from __future__ import annotations

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.dax_shm.ranges import RANGE_SIZE, Range, RangeTable

COUNT = 5

nodes = st.integers(1, 3)
parts = st.integers(0, 3)


class Ranges(RuleBasedStateMachine):
    """The model: keys in order of their last use, and how often each is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RangeTable(COUNT * RANGE_SIZE + 4096)
        self.order: list[tuple[int, int]] = []
        self.pinned: dict[tuple[int, int], Range] = {}
        self.leaving: list[int] = []
        self.reserved: list[int] = []
        self.lost = 0

    def free(self) -> int:
        return COUNT - len(self.order) - len(self.leaving) - len(self.reserved) - self.lost

    @rule(node=nodes, part=parts)
    def use(self, node: int, part: int) -> None:
        key = node, part
        one = self.table.find(node, part)
        assert (one is not None) == (key in self.order)
        if one is not None:
            self.order.remove(key)
            self.order.append(key)
            return
        free = self.free()
        victims = [other for other in self.order if other not in self.pinned]
        coldest = self.table.coldest()
        if free or not victims:
            assert coldest is None
        else:
            assert coldest is not None
            assert (coldest.nodeid, coldest.index) == victims[0]
        claimed = self.table.claim(node, part)
        assert (claimed is not None) == bool(free or victims)
        if claimed is None:
            return
        if not free:
            self.order.remove(victims[0])
        self.order.append(key)
        self.pinned[key] = claimed

    @rule()
    def set_up(self) -> None:
        for one in self.pinned.values():
            one.ready, one.pins = True, 0
        self.pinned.clear()

    @rule()
    def fail(self) -> None:
        for key, one in self.pinned.items():
            self.table.drop(one)
            self.table.drop(one)  # again is harmless
            self.order.remove(key)
        self.pinned.clear()

    @rule()
    def lose(self) -> None:
        if self.lost or not self.pinned:
            return
        key, one = self.pinned.popitem()
        self.table.lose(one)
        self.order.remove(key)
        self.lost += 1
        assert self.table.lost == self.lost

    @rule()
    def recover(self) -> None:
        self.table.recover()
        self.lost = 0

    @rule(node=nodes)
    def leave(self, node: int) -> None:
        going = [key for key in self.order if key[0] == node and key not in self.pinned]
        gone = self.table.leave(node)
        assert len(gone) == len(going)
        self.order = [key for key in self.order if key not in going]
        self.leaving += gone
        assert self.table.has_node(node) == any(key[0] == node for key in self.order)

    @rule()
    def left(self) -> None:
        if self.leaving:
            self.table.left(self.leaving.pop())

    @rule()
    def reserve(self) -> None:
        free = self.free()
        moffset = self.table.reserve()
        assert (moffset is not None) == bool(free)
        if moffset is not None:
            self.reserved.append(moffset)

    @rule()
    def give_back(self) -> None:
        if self.reserved:
            self.table.give_back(self.reserved.pop())

    @invariant()
    def same(self) -> None:
        self.table.check_invariants()
        assert [(one.nodeid, one.index) for one in self.table] == self.order
        assert self.table.used == len(self.order)


TestRanges = Ranges.TestCase
TestRanges.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_cleared_but_for_what_is_reserved() -> None:
    table = RangeTable(3 * RANGE_SIZE)
    reserved = table.reserve()
    assert table.claim(1, 0) is not None
    lost = table.claim(1, 1)
    assert lost is not None
    table.lose(lost)
    table.clear()
    table.check_invariants()
    assert table.used == 0
    assert {table.reserve(), table.reserve(), reserved} == {0, RANGE_SIZE, 2 * RANGE_SIZE}


def test_a_huge_window_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        table = RangeTable(1 << 40)
        assert [table.reserve(), table.reserve()] == [0, RANGE_SIZE]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == 1 << 19
    assert peak < 100_000  # bytes; it was 16 MB
