"""What an open concludes from attributes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.pyfuse.fake_session import attributes
from vfsmount.cache.freshness import NOTHING_KNOWN, Freshness, signature_of

OLD = signature_of(attributes(size=1, mtime=2, mtimensec=3, ctime=4, ctimensec=5))


def changed(**fields: Any) -> bytes:
    usual = {"size": 1, "mtime": 2, "mtimensec": 3, "ctime": 4, "ctimensec": 5}
    return signature_of(attributes(**usual)._replace(**fields))


def test_first_open_keeps_no_pages() -> None:
    assert not Freshness().open(7, OLD).keep_pages


def test_unchanged_keeps_everything() -> None:
    fresh = Freshness()
    fresh.gave(7, OLD)
    fresh.open(7, OLD)
    assert fresh.open(7, changed(atime=9, blocks=9, mode=0o100600)) == (True, True, False)


@pytest.mark.parametrize("field", ["size", "mtime", "mtimensec", "ctime", "ctimensec"])
def test_each_sign_of_change_counts(field: str) -> None:
    fresh = Freshness()
    fresh.gave(7, OLD)
    fresh.open(7, OLD)
    assert fresh.open(7, changed(**{field: 77})) == (False, False, False)


def test_what_the_kernel_saw_says_nothing_of_its_pages() -> None:
    """It may have seen a new ctime while its pages are older: it does not compare that."""
    fresh = Freshness()
    fresh.open(7, OLD)
    new = changed(ctime=77)
    fresh.gave(7, new)
    assert fresh.open(7, new) == (False, True, False)


def test_a_node_without_links_is_replaced_once() -> None:
    fresh = Freshness()
    assert fresh.open(7, changed(nlink=0)).replaced
    assert not fresh.open(7, changed(nlink=0)).replaced
    fresh.forget(7)
    assert fresh.open(7, changed(nlink=0)).replaced


def test_without_attributes_nothing_is_known() -> None:
    fresh = Freshness()
    fresh.open(7, OLD)
    assert fresh.open(7, None) == NOTHING_KNOWN
    assert not fresh.open(7, OLD).keep_pages


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.booleans())))
def test_bounded_memory_never_keeps_what_changed(steps: list[tuple[int, int, bool]]) -> None:
    fresh = Freshness(limit=3)
    pages: dict[int, int] = {}
    for nodeid, size, opens in steps:
        raw = changed(size=size)
        if not opens:
            fresh.gave(nodeid, raw)
        elif fresh.open(nodeid, raw).keep_pages:
            assert pages[nodeid] == size
        if opens:
            pages[nodeid] = size
        fresh.check_invariants()


def test_several_are_given_up_at_once() -> None:
    """Each look for the oldest goes past all that were given up before."""
    fresh = Freshness(limit=1000)
    for nodeid in range(1, 1002):
        fresh.gave(nodeid, changed())
    kept = [nodeid for nodeid in range(1, 1002) if fresh.open(nodeid, changed()).keep_attributes]
    assert kept == list(range(17, 1002))
