"""Listings that are kept while their directories are what they were."""

from __future__ import annotations

import pytest

from tests.client.pyfuse.fake_session import attributes
from vfsmount.cache.freshness import signature_of
from vfsmount.cache.kept_listings import KeptListings

SECOND = 1_000_000_000
NOW = 1_000 * SECOND


def folder(mtime: int = 900 * SECOND + 1, ctime: int = 900 * SECOND + 1) -> bytes:
    """The signature of a directory; times in nanoseconds."""
    times = {"mtime": mtime // SECOND, "mtimensec": mtime % SECOND}
    times |= {"ctime": ctime // SECOND, "ctimensec": ctime % SECOND}
    return signature_of(attributes()._replace(**times))


def test_what_was_never_listed_is_not_known() -> None:
    assert not KeptListings().is_unchanged(7, folder())


def test_an_unchanged_directory_has_the_same_names() -> None:
    listings = KeptListings()

    assert listings.begin(7, folder(), NOW)
    assert listings.is_unchanged(7, folder())
    assert not listings.is_unchanged(8, folder())


@pytest.mark.parametrize("later", [folder(mtime=901 * SECOND), folder(ctime=900 * SECOND + 2)])
def test_either_time_tells_of_a_change(later: bytes) -> None:
    listings = KeptListings()
    listings.begin(7, folder(), NOW)

    assert not listings.is_unchanged(7, later)


@pytest.mark.parametrize(
    ("ctime", "kept"),
    [
        (NOW - SECOND + 1, True),
        (NOW - 50_000_001, True),
        (NOW - 10_000_000, False),
        (NOW + 5 * SECOND + 1, False),  # the host's clock is ahead, or it is not the host's
        (NOW - 4 * SECOND, True),
        (NOW - 2 * SECOND, False),  # whole seconds: the filesystem counts no smaller
    ],
)
def test_a_change_a_moment_ago_may_hide_another(ctime: int, kept: bool) -> None:
    listings = KeptListings()
    listings.begin(7, folder(), NOW)
    fresh = folder(mtime=0, ctime=ctime)

    assert listings.begin(7, fresh, NOW) == kept
    assert listings.is_unchanged(7, fresh) == kept
    assert not listings.is_unchanged(7, folder())


def test_what_the_kernel_has_forgotten_is_forgotten() -> None:
    listings = KeptListings()
    listings.begin(7, folder(), NOW)
    listings.forget(7)
    listings.forget(8)

    assert not listings.is_unchanged(7, folder())


def test_it_is_bounded() -> None:
    listings = KeptListings(limit=10)
    for nodeid in range(1, 100):
        listings.begin(nodeid, folder(), NOW)
        listings.check_invariants()

    assert listings.is_unchanged(99, folder())
