"""Names against the plainest model: a dictionary by (parent, name), and references counted."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.cache.names import ABSENT, Names

FOREVER = 1e9
NODES = st.integers(0, 6)  # 0 is ABSENT
PARENTS = st.integers(1, 6)
NAMES = st.sampled_from([b"a", b"b", b"c", b"d"])


class NamesMachine(RuleBasedStateMachine):
    """Random names, some of which lead to directories with names of their own, even to themselves.

    What is found must be what was put last, unless it was given up; each reference that came in is
    given back once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[int] = Counter()
        self.names = Names(12, self.forget)
        self.model: dict[tuple[int, bytes], tuple[int, float]] = {}
        self.listings: dict[int, tuple[list[bytes], float]] = {}
        self.now = 0.0

    def forget(self, nodeid: int, gone: bool) -> None:
        assert gone or self.held[nodeid] > 1
        self.held[nodeid] -= 1
        assert self.held[nodeid] >= 0

    @rule(seconds=st.floats(0.5, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(parent=PARENTS, name=NAMES, nodeid=NODES, seconds=st.sampled_from([0, 1, 5, FOREVER]))
    def put(self, parent: int, name: bytes, nodeid: int, seconds: float) -> None:
        if nodeid:
            self.held[nodeid] += 1
        self.names.put(parent, name, nodeid, self.now + seconds)
        self.model[parent, name] = nodeid, self.now + seconds

    @rule(parent=PARENTS, name=NAMES)
    def drop(self, parent: int, name: bytes) -> None:
        self.names.drop(parent, name)
        self.model.pop((parent, name), None)
        self.listings.pop(parent, None)
        assert self.names.find(parent, name, self.now) is None
        assert self.names.listing(parent, self.now) is None

    @rule(parent=PARENTS, names=st.lists(NAMES, unique=True), seconds=st.sampled_from([0, 2]))
    def list(self, parent: int, names: list[bytes], seconds: float) -> None:
        self.names.list(parent, names, self.now + seconds)
        self.listings[parent] = names, self.now + seconds

    @rule(parent=PARENTS, name=NAMES)
    def find(self, parent: int, name: bytes) -> None:
        found = self.names.find(parent, name, self.now)
        if found is not None:
            nodeid, until = self.model[parent, name]
            assert found == nodeid
            assert self.now < until
            assert found == ABSENT or self.held[found]

    @rule(parent=PARENTS)
    def listing(self, parent: int) -> None:
        found = self.names.listing(parent, self.now)
        if found is not None:
            names, until = self.listings[parent]
            assert list(found) == names
            assert self.now < until

    @rule()
    def clear(self) -> None:
        self.names.clear()
        assert len(self.names) == 0
        assert not +self.held
        self.model.clear()

    @invariant()
    def counted(self) -> None:
        self.names.check_invariants()

    def teardown(self) -> None:
        self.names.clear()
        assert not +self.held


TestNames = NamesMachine.TestCase
TestNames.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def names_of(limit: int = 100) -> tuple[Names, list[int]]:
    forgotten: list[int] = []
    return Names(limit, lambda nodeid, _: forgotten.append(nodeid)), forgotten


def test_a_name_is_believed_until_its_time() -> None:
    names, _ = names_of()
    names.put(1, b"x", 7, until=10.0)
    assert names.find(1, b"x", 9.9) == 7
    assert names.find(1, b"x", 10.0) is None


def test_a_name_holds_one_reference() -> None:
    names, forgotten = names_of()
    names.put(1, b"x", 7, FOREVER)
    names.put(1, b"x", 7, FOREVER)
    assert forgotten == [7]
    names.drop(1, b"x")
    assert forgotten == [7, 7]


def test_with_a_directory_goes_what_is_below_it() -> None:
    names, forgotten = names_of()
    names.put(1, b"d", 2, FOREVER)
    names.put(2, b"e", 3, FOREVER)
    names.put(3, b"f", 4, FOREVER)
    names.list(3, [b"f"], FOREVER)
    names.put(1, b"d", 5, FOREVER)
    assert sorted(forgotten) == [2, 3, 4]
    assert names.find(3, b"f", 0) is None
    assert names.listing(3, 0) is None
    assert len(names) == 1


def test_the_longest_unused_go_first() -> None:
    names, forgotten = names_of(limit=4)
    for nodeid, name in enumerate((b"a", b"b", b"c", b"d"), 2):
        names.put(1, name, nodeid, FOREVER)
    names.find(1, b"a", 0)
    names.put(1, b"e", 6, FOREVER)
    assert forgotten == [3]
    assert names.find(1, b"a", 0) == 2


def test_a_listing_that_is_too_long_is_not_kept() -> None:
    names, _ = names_of(limit=4)
    names.list(1, [b"%d" % number for number in range(5)], FOREVER)
    assert names.listing(1, 0) is None
    names.check_invariants()
