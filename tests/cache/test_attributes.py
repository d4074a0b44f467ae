"""Attributes against a dictionary, and how much memory names and attributes take together."""

from __future__ import annotations

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.cache.attributes import Attributes
from vfsmount.cache.names import Names
from vfsmount.wire.fuse import ATTR, Attr

NODES = st.integers(1, 9)
BLANK = ATTR.unpack(bytes(ATTR.size))
#: Names and attributes that are made, and bytes that each of them may take: 400 MiB per million.
MANY = 16_000  # tables of Python fill in steps: as full here as with a million
MOST = (400 << 20) / 1_000_000


def attributes(number: int) -> Attr:
    """Attributes with numbers as large as real ones: small ones are shared between objects."""
    times = {"mtime": 1_700_000_000 + number, "mtimensec": 10**8 + number}
    return BLANK._replace(ino=10**9 + number, mode=0o100644, size=number << 20, **times)


class AttributesMachine(RuleBasedStateMachine):
    """What is believed is what was put last, and not for longer than was said."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Attributes(5)
        self.model: dict[int, tuple[Attr, float]] = {}
        self.now = 0.0

    @rule(seconds=st.floats(0.1, 2))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(nodeid=NODES, number=st.integers(0, 1000), seconds=st.integers(0, 3))
    def put(self, nodeid: int, number: int, seconds: int) -> None:
        self.model[nodeid] = attributes(number), self.now + seconds
        self.cache.put(nodeid, *self.model[nodeid])
        assert (self.cache.get(nodeid, self.now) is None) == (seconds == 0)

    @rule(nodeid=NODES)
    def drop(self, nodeid: int) -> None:
        self.cache.drop(nodeid)
        assert self.cache.get(nodeid, self.now) is None

    @rule(nodeid=NODES)
    def get(self, nodeid: int) -> None:
        found = self.cache.get(nodeid, self.now)
        if found is not None:
            attr, until = self.model[nodeid]
            assert found == attr
            assert self.now < until

    @invariant()
    def bounded(self) -> None:
        self.cache.check_invariants()


TestAttributes = AttributesMachine.TestCase
TestAttributes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_longest_unused_go_first() -> None:
    cache = Attributes(3)
    for nodeid in (1, 2, 3):
        cache.put(nodeid, attributes(nodeid), 1e9)
    cache.get(1, 0)
    cache.put(4, attributes(4), 1e9)
    assert [nodeid for nodeid in (1, 2, 3, 4) if cache.get(nodeid, 0)] == [1, 3, 4]


def test_a_million_names_and_attributes_fit_into_400_mib() -> None:
    names, cache = Names(MANY, lambda *_: None), Attributes(MANY)
    tracemalloc.start()
    try:
        for number in range(MANY):
            nodeid = (1 << 40) + number
            names.put(1 + number // 1000, b"a-name-of-%06d" % number, nodeid, 1e9 + number)
            cache.put(nodeid, attributes(number), 1e9 + number)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(names) == len(cache) == MANY
    assert taken / MANY < MOST
