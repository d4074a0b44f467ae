"""What was not written, and is owed to who does not know."""

from __future__ import annotations

import pytest

from vfsmount.cache.shortages import Shortages

NODE = 5


@pytest.fixture
def shortages() -> Shortages:
    shortages = Shortages()
    shortages.missed(NODE, 100, 200)
    return shortages


def test_told_once(shortages: Shortages) -> None:
    assert not shortages.take(NODE + 1)
    assert shortages
    assert shortages.take(NODE)
    assert not shortages.take(NODE)
    assert not shortages


@pytest.mark.parametrize(
    ("pieces", "left"),
    [
        ([(100, 200)], False),
        ([(0, 300)], False),
        ([(100, 150), (150, 200)], False),
        ([(100, 150), (100, 150)], True),
        ([(150, 200)], True),
        ([(200, 300)], True),
        ([(0, 100)], True),
    ],
)
def test_who_goes_on_where_it_was_cut_off(
    shortages: Shortages, pieces: list[tuple[int, int]], left: bool
) -> None:
    for start, end in pieces:
        shortages.wrote(NODE, start, end)
    assert shortages.take(NODE) is left


@pytest.mark.parametrize(("size", "left"), [(0, False), (100, False), (101, True), (500, True)])
def test_who_cuts_the_file(shortages: Shortages, size: int, left: bool) -> None:
    shortages.truncate(NODE, size)
    assert shortages.take(NODE) is left
