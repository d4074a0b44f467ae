"""Handles closed here and not at the daemon: which opens may have them, and for how long."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.client.pyfuse.fake_session import attributes
from vfsmount.cache.freshness import signature_of
from vfsmount.cache.kept_handles import KeptHandles, Opener

SECOND = 1_000_000_000
ME: Opener = (1000, 1000, 0)
ROOT: Opener = (0, 1000, 0)
NODE, FH = 7, 3
RAW = signature_of(attributes(size=5, ctime=1))


def kept_one(valid: float = 1.0, limit: int = 8) -> KeptHandles:
    """Keep one handle, closed at 0."""
    kept = KeptHandles(valid, limit)
    kept.opened(NODE, FH, ME, RAW, 0)
    assert kept.keep(NODE, FH, 0)
    return kept


def test_the_next_open_gets_it_once() -> None:
    kept = kept_one()
    assert kept.take(NODE, ME, 1) == FH
    assert kept.take(NODE, ME, 1) is None


def test_only_an_open_like_the_first_gets_it() -> None:
    kept = kept_one()
    for other in (ROOT, (1000, 0, 0), (1000, 1000, 0o4000)):
        assert kept.take(NODE, other, 1) is None
    assert kept.take(NODE + 1, ME, 1) is None
    assert kept.take(NODE, ME, 1) == FH


def test_for_a_second_at_most() -> None:
    assert kept_one().take(NODE, ME, SECOND) is None
    assert kept_one(600.0).take(NODE, ME, SECOND) is None
    assert kept_one(0.5).take(NODE, ME, SECOND // 2) is None
    kept = KeptHandles(0.0)
    kept.opened(NODE, FH, ME, RAW, 0)
    assert not kept.keep(NODE, FH, 0)


def test_what_is_due_is_given_back_oldest_first() -> None:
    kept = kept_one()
    kept.opened(8, 4, ME, RAW, 10)
    assert kept.keep(8, 4, 20)
    assert kept.due() == SECOND
    assert kept.pop_due(SECOND - 1) is None
    assert kept.pop_due(SECOND) == (NODE, FH)
    assert kept.pop_due(SECOND) is None
    assert kept.due() == SECOND + 10


def test_too_many_are_given_back_before_their_time() -> None:
    kept = kept_one(limit=1)
    kept.opened(8, 4, ME, RAW, 0)
    assert kept.keep(8, 4, 1)
    assert kept.pop_due(1) == (NODE, FH)
    assert kept.pop_due(1) is None


def test_one_for_each_file_the_last_that_was_closed() -> None:
    kept = kept_one()
    kept.opened(NODE, 4, ROOT, RAW, 0)
    assert kept.keep(NODE, 4, 1)
    assert kept.due() == 0
    assert kept.pop_due(1) == (NODE, FH)
    assert kept.pop_due(1) is None
    assert kept.take(NODE, ROOT, 1) == 4


def test_the_second_begins_when_the_daemon_opens_it() -> None:
    kept = kept_one()
    assert kept.take(NODE, ME, SECOND - 2) == FH
    assert kept.keep(NODE, FH, SECOND - 1)
    assert kept.take(NODE, ME, SECOND) is None
    assert kept.pop_due(SECOND) == (NODE, FH)
    kept.opened(NODE, 4, ME, RAW, 0)
    assert not kept.keep(NODE, 4, SECOND)


def test_what_the_file_was_like_is_remembered() -> None:
    kept = kept_one()
    assert not kept.is_as_opened(FH, RAW)  # nobody has it
    assert kept.take(NODE, ME, 1) == FH
    assert kept.is_as_opened(FH, RAW)
    assert not kept.is_as_opened(FH, signature_of(attributes(size=5, ctime=2)))
    assert not kept.is_as_opened(4, RAW)


def test_handles_that_nobody_has_told_of_are_not_kept() -> None:
    kept = KeptHandles(1.0)
    assert not kept.keep(NODE, FH, 0)
    kept.opened(NODE, FH, ME, RAW, 0)
    kept.released(FH)
    assert not kept.keep(NODE, FH, 0)
    kept.opened(NODE, FH, ME, RAW, 0)
    assert not kept.keep(NODE + 1, FH, 0)


def test_a_forgotten_node_gives_its_handle_back() -> None:
    kept = kept_one()
    assert kept.forget(NODE) == FH
    assert kept.forget(NODE) is None
    assert kept.take(NODE, ME, 1) is None


def test_after_the_end_all_is_due() -> None:
    kept = kept_one()
    kept.stop()
    assert kept.take(NODE, ME, 1) is None
    assert kept.pop_due(0) == (NODE, FH)
    kept.opened(NODE, FH, ME, RAW, 0)
    assert not kept.keep(NODE, FH, 0)


class Model(RuleBasedStateMachine):
    """A daemon that counts: each handle is in use, kept, or back, and never two of these."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = KeptHandles(1.0, limit=3)
        self.now = 0
        self.next_fh = 1
        self.in_use: dict[int, int] = {}
        self.asleep: dict[int, int] = {}

    @rule(node=st.integers(0, 4), uid=st.integers(0, 1))
    def open(self, node: int, uid: int) -> None:
        opener = (uid, uid, 0)
        fh = self.kept.take(node, opener, self.now)
        if fh is None:
            fh, self.next_fh = self.next_fh, self.next_fh + 1
            self.kept.opened(node, fh, opener, RAW, self.now)
        else:
            assert self.asleep.pop(fh) == node
        self.in_use[fh] = node

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if not self.in_use:
            return
        fh = data.draw(st.sampled_from(sorted(self.in_use)))
        node = self.in_use.pop(fh)
        if self.kept.keep(node, fh, self.now):
            self.asleep[fh] = node
        else:
            self.kept.released(fh)

    @rule(passed=st.integers(0, SECOND))
    def wait(self, passed: int) -> None:
        self.now += passed
        while (due := self.kept.pop_due(self.now)) is not None:
            node, fh = due
            assert self.asleep.pop(fh) == node

    @rule(node=st.integers(0, 4))
    def forget(self, node: int) -> None:
        fh = self.kept.forget(node)
        if fh is not None:
            assert self.asleep.pop(fh) == node

    @invariant()
    def agree(self) -> None:
        self.kept.check_invariants()
        assert len(self.kept) == len(self.asleep)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
