"""Directories whose names the kernel knows."""

from __future__ import annotations

from vfsmount.cache.known_names import KnownNames


def test_a_listing_counts_for_three_quarters_of_its_validity() -> None:
    known = KnownNames(2.0)
    known.listed(7, 10.0)

    assert known.is_known(7, 11.4)
    assert not known.is_known(8, 11.4)
    assert not known.is_known(7, 11.5)


def test_many_names_one_by_one_are_a_listing() -> None:
    known = KnownNames(2.0)
    for number in range(16):
        assert not known.is_known(7, 10.1)
        known.named(7, 10 + number / 1000)

    assert known.is_known(7, 11.4)
    assert not known.is_known(7, 11.5), "the oldest of them decides"


def test_names_told_long_ago_do_not_count() -> None:
    known = KnownNames(2.0)
    for _ in range(15):
        known.named(7, 10.0)
    known.named(7, 12.0)

    assert not known.is_known(7, 12.0)


def test_names_after_a_listing_do_not_make_it_younger() -> None:
    known = KnownNames(2.0)
    known.listed(7, 10.0)
    for _ in range(40):
        known.named(7, 11.0)

    assert not known.is_known(7, 11.5)


def test_what_the_kernel_gives_up_may_be_of_any_directory() -> None:
    known = KnownNames(2.0)
    known.listed(7, 10.0)
    known.clear()

    assert not known.is_known(7, 10.0)


def test_nothing_is_known_where_nothing_is_valid() -> None:
    known = KnownNames(0.0)
    known.listed(7, 10.0)
    known.named(7, 10.0)

    assert not known.is_known(7, 10.0)
    assert len(known) == 0


def test_directories_are_bounded() -> None:
    known = KnownNames(2.0, limit=100)
    for number in range(1000):
        known.listed(number, 10.0)
        assert known.is_known(number, 10.0)
        assert len(known) <= 100
