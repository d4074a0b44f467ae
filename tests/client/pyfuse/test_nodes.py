"""The node table: numbers, counts, and a state machine against a naive model."""

from __future__ import annotations

import tracemalloc

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.client.pyfuse.nodes import FIRST_MADE_UP, NodeTable
from vfsmount.wire.fuse import ATTR, ENTRY_OUT, ROOT_ID, Attr, EntryOut


def attr(ino: int) -> Attr:
    return ATTR.unpack(bytes(ATTR.size))._replace(ino=ino, mode=0o100644)


def test_inode_is_the_hosts_own() -> None:
    table = NodeTable()
    assert table.enter(7, attr(4711)).inode == 4711


def test_same_number_on_two_file_systems_gets_another() -> None:
    table = NodeTable()
    first, second = table.enter(7, attr(4711)), table.enter(8, attr(4711))
    assert (first.inode, second.inode) == (4711, FIRST_MADE_UP)
    table.check_invariants()


def test_a_node_numbered_like_the_root_gets_another() -> None:
    assert NodeTable().enter(7, attr(ROOT_ID)).inode == FIRST_MADE_UP


def test_numbers_that_the_kernel_cannot_take_are_replaced() -> None:
    table = NodeTable()
    assert table.enter(7, attr(0)).inode == FIRST_MADE_UP
    assert table.enter(8, attr(FIRST_MADE_UP + 5)).inode == FIRST_MADE_UP + 1


def test_last_forget_gives_all_lookups_back() -> None:
    table = NodeTable()
    table.enter(7, attr(10))
    table.enter(7, attr(10))
    assert table.forget([(10, 1)]) == []
    assert table.forget([(10, 1)]) == [(7, 2)]
    assert len(table) == 1


def test_root_is_never_forgotten() -> None:
    table = NodeTable()
    assert table.forget([(ROOT_ID, 99)]) == []
    assert table[ROOT_ID].nodeid == ROOT_ID


def test_leave_takes_one_enter_back() -> None:
    table = NodeTable()
    table.enter(7, attr(10))
    table.leave(7)
    assert len(table) == 1
    table.enter(7, attr(10))
    table.enter(7, attr(10))
    table.leave(7)
    assert table.forget([(10, 1)]) == [(7, 1)]


def test_a_million_nodes_leave_room_for_the_rest_in_400_mib() -> None:
    """An interpreter with everything loaded takes 45 MiB, listings as many as may be kept 50."""
    table = NodeTable()
    many = 16_000  # tables of Python fill in steps: as full here as with a million
    tracemalloc.start()
    try:
        for number in range(many):
            # As the session makes them: each with numbers of its own.
            entry = ENTRY_OUT.unpack(
                ENTRY_OUT.pack(EntryOut(1000 + number, 0, 0, 0, 0, 0, attr(10**9)))
            )
            table.enter(entry.nodeid, entry.attr._replace(ino=10**9 + number)).saw(entry.attr)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / many < ((400 - 45 - 50) << 20) / 1_000_000


def test_held_nodes_stay() -> None:
    table = NodeTable()
    table.enter(7, attr(10))
    table.hold(7)
    assert table.forget([(10, 1)]) == []
    table.check_invariants()
    assert table.release(7) == [(7, 1)]
    assert 7 not in table


class NodeTableMachine(RuleBasedStateMachine):
    """Enter, leave and forget at random; a dict of counts is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = NodeTable()
        self.counts: dict[int, int] = {}

    @rule(nodeid=st.integers(2, 9), ino=st.integers(0, 6))
    def enter(self, nodeid: int, ino: int) -> None:
        self.table.enter(nodeid, attr(ino))
        self.counts[nodeid] = self.counts.get(nodeid, 0) + 1

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.counts:
            nodeid = data.draw(st.sampled_from(sorted(self.counts)))
            self.table.leave(nodeid)
            self._drop(nodeid, 1)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.counts:
            nodeid = data.draw(st.sampled_from(sorted(self.counts)))
            nlookup = data.draw(st.integers(1, self.counts[nodeid]))
            inode = next(node.inode for node in self.table.nodes() if node.nodeid == nodeid)
            owed = self.table.forget([(inode, nlookup)])
            gone = self._drop(nodeid, nlookup)
            assert [one for one, _ in owed] == ([nodeid] if gone else [])

    def _drop(self, nodeid: int, nlookup: int) -> bool:
        self.counts[nodeid] -= nlookup
        if self.counts[nodeid]:
            return False
        del self.counts[nodeid]
        return True

    @invariant()
    def agrees(self) -> None:
        self.table.check_invariants()
        upper = {node.nodeid: node.upper for node in self.table.nodes() if node.nodeid != ROOT_ID}
        assert upper == self.counts


TestNodeTable = NodeTableMachine.TestCase
