"""Who lists and looks at nothing."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.cache.walkers import Plan, Sentinel, Walkers

ME, OTHER = 100, 200
ATTRIBUTES = bytes(88)


def sentinel(pid: int, now: float) -> Sentinel:
    return Sentinel(pid, now + 1, ATTRIBUTES, 0, now)


def listed(walkers: Walkers, directory: int, pid: int = ME, now: float = 10.0) -> Plan:
    """Begin a listing, and have it hold a sentinel where there is to be one."""
    plan = walkers.begins(pid, directory, now)
    if plan is Plan.WATCHED:
        walkers.placed(directory + 1000, sentinel(pid, now))
    return plan


def plans(walkers: Walkers, count: int, pid: int = ME, start: int = 1) -> list[Plan]:
    return [listed(walkers, directory, pid) for directory in range(start, start + count)]


def test_names_are_enough_for_who_looks_at_nothing() -> None:
    assert plans(Walkers(1.0), 6) == [Plan.WATCHED] * 2 + [Plan.NAMES] * 4


def test_small_listings_tell_nothing() -> None:
    walkers = Walkers(1.0)

    assert {walkers.begins(ME, directory, 10.0) for directory in range(9)} == {Plan.WATCHED}


def test_who_looks_is_not_watched_for_long() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 1)
    assert walkers.asked(1001, 10.5) is not None

    assert plans(walkers, 67) == [Plan.ALL] * 64 + [Plan.WATCHED] * 2 + [Plan.NAMES]


def test_a_late_look_counts() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 3)
    assert walkers.asked(1001, 10.5) is not None

    assert plans(walkers, 1) == [Plan.ALL]


def test_a_look_counts_once_and_in_its_time() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 2)
    assert walkers.asked(1001, 11.0) is None, "the kernel would ask for any file by now"
    assert walkers.asked(1001, 10.5) is None
    assert walkers.asked(77, 10.5) is None

    assert plans(walkers, 1) == [Plan.NAMES]


def test_names_that_are_looked_up_tell_of_looks() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 3)
    walkers.looked_up(2, 10.5)  # listed in full
    walkers.looked_up(2, 10.5)
    walkers.looked_up(3, 10.5)
    walkers.looked_up(3, 11.0)  # its entries would have to be asked for again by now
    assert plans(walkers, 1) == [Plan.NAMES]
    walkers.looked_up(3, 10.5)

    assert plans(walkers, 65) == [Plan.ALL] * 64 + [Plan.WATCHED]


def test_lookups_count_by_the_listing() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 2)
    for directory in range(3, 20):
        assert listed(walkers, directory) is Plan.NAMES
        walkers.looked_up(directory, 10.0)


def test_walkers_know_nothing_of_each_other() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 3)
    assert plans(walkers, 1, OTHER, start=50) == [Plan.WATCHED]
    assert walkers.asked(1050, 10.0) is not None

    assert plans(walkers, 1) == [Plan.NAMES]
    assert plans(walkers, 1, OTHER) == [Plan.ALL]


def test_names_are_enough_for_the_next_walker_too() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 3)
    assert not walkers.is_enough(OTHER, 3, 10.5), "nobody knows yet"
    plans(walkers, 2, OTHER, start=50)
    assert walkers.is_enough(OTHER, 3, 10.9)
    assert not walkers.is_enough(OTHER, 2, 10.5), "which has been listed in full"
    assert not walkers.is_enough(OTHER, 3, 11.0), "as long as they may be believed"
    for _ in range(2):
        walkers.looked_up(3, 10.5)

    assert plans(walkers, 1, ME) == [Plan.NAMES]
    assert plans(walkers, 1, OTHER) == [Plan.ALL], "who has had them last is who looks"
    assert not walkers.is_enough(OTHER, 1, 10.5)


def test_threads_from_elsewhere_get_all() -> None:
    assert set(plans(Walkers(1.0), 6, pid=0)) == {Plan.ALL}


def test_all_get_all_where_nothing_is_valid() -> None:
    walkers = Walkers(0.0)

    assert set(plans(walkers, 6)) == {Plan.ALL}
    assert not walkers.told


def test_what_is_forgotten_tells_nothing() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 3)
    walkers.forget(1001)
    walkers.forget(3)
    for _ in range(2):
        walkers.looked_up(3, 10.5)
    assert walkers.asked(1001, 10.5) is None

    assert plans(walkers, 1) == [Plan.NAMES]


def test_a_look_may_be_before_the_note_of_it() -> None:
    walkers = Walkers(1.0)
    plans(walkers, 1)
    walkers.begins(ME, 2, 10.0)
    walkers.asked(1001, 10.0)
    walkers.placed(1002, sentinel(ME, 10.0))

    walkers.check_invariants()
    assert plans(walkers, 1) == [Plan.ALL]


class Anything(RuleBasedStateMachine):
    """Whatever happens, memory is bounded and counters mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.walkers = Walkers(1.0, limit=4, directories=6)
        self.now = 10.0

    @rule(pid=st.integers(0, 8), directory=st.integers(1, 9), sets=st.booleans())
    def lists(self, pid: int, directory: int, sets: bool) -> None:
        if self.walkers.begins(pid, directory, self.now) is Plan.WATCHED and sets:
            self.walkers.placed(directory + 10, sentinel(pid, self.now))

    @rule(nodeid=st.integers(1, 19))
    def looks(self, nodeid: int) -> None:
        self.walkers.asked(nodeid, self.now)
        self.walkers.looked_up(nodeid, self.now)

    @rule(pid=st.integers(0, 8), directory=st.integers(1, 9))
    def opens(self, pid: int, directory: int) -> None:
        self.walkers.is_enough(pid, directory, self.now)

    @rule(nodeid=st.integers(1, 19))
    def forgets(self, nodeid: int) -> None:
        self.walkers.forget(nodeid)

    @rule(seconds=st.floats(0, 2))
    def waits(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds(self) -> None:
        self.walkers.check_invariants()


TestAnything = Anything.TestCase
