"""Pages of files against their contents: what is read from here is what the file holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfsmount.cache import pages as module
from vfsmount.cache.pages import Pages

#: Bytes of a block in these tests.
BLOCK = 16
FILES = st.integers(1, 3)
PLACES = st.integers(0, 100)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)


class PagesMachine(RuleBasedStateMachine):
    """Files that are read through the cache, written, truncated and changed elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "BLOCK", BLOCK)
        self.pages = Pages(2000)
        self.files = {number: random.Random(number).randbytes(70) for number in (1, 2, 3)}

    def teardown(self) -> None:
        self.patch.undo()

    @rule(file=FILES, block=st.integers(0, 6), blocks=st.integers(1, 3))
    def fetch(self, file: int, block: int, blocks: int) -> None:
        start, size = block * BLOCK, blocks * BLOCK
        data = self.files[file][start : start + size]
        self.pages.put(file, start, data, ends=len(data) < size)

    @rule(file=FILES, block=st.integers(0, 6), changed=st.booleans())
    def fetch_late(self, file: int, block: int, changed: bool) -> None:
        """What was there when the host was asked may be something else by now."""
        start, size = block * BLOCK, 2 * BLOCK
        with self.pages.fetching(file) as fetch:
            assert file in self.pages
            data = self.files[file][start : start + size]
            if changed:
                self.write(file, start, b"newer")
            assert fetch.is_true is not changed
            if fetch.is_true:
                self.pages.put(file, start, data, ends=len(data) < size)

    @rule(file=FILES, start=PLACES, size=st.integers(0, 50))
    def read(self, file: int, start: int, size: int) -> None:
        found = self.pages.read(file, start, size)
        if found is not None:
            assert found == self.files[file][start : start + size]

    @rule(file=FILES, start=PLACES, data=st.binary(min_size=1, max_size=40))
    def write(self, file: int, start: int, data: bytes) -> None:
        old = self.files[file].ljust(start, b"\0")
        self.files[file] = old[:start] + data + old[start + len(data) :]
        self.pages.wrote(file, start, len(data))

    @rule(file=FILES, size=PLACES)
    def change(self, file: int, size: int) -> None:
        self.files[file] = bytes(size)
        self.pages.drop(file)

    @invariant()
    def bounded(self) -> None:
        self.pages.check_invariants()


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_whole_file_is_read_from_here_with_its_end() -> None:
    pages = Pages(10_000)
    pages.put(7, 0, bytes(40), ends=True)
    assert pages.read(7, 0, 1000) == bytes(40)
    assert pages.read(7, 30, 1000) == bytes(10)


def test_a_file_of_whole_blocks_ends_too() -> None:
    pages = Pages(10_000)
    pages.put(7, 0, bytes(2 * BLOCK), ends=True)
    assert pages.read(7, 0, 1000) == bytes(2 * BLOCK)


def test_what_may_be_cut_short_is_no_end() -> None:
    pages = Pages(10_000)
    pages.put(7, 0, bytes(40), ends=False)
    assert pages.read(7, 0, 2 * BLOCK) == bytes(2 * BLOCK)
    assert pages.read(7, 0, 40) is None


def test_an_empty_file_is_known_to_be_empty() -> None:
    pages = Pages(10_000)
    pages.put(7, 0, b"", ends=True)
    assert pages.read(7, 0, 1000) == b""


def test_the_longest_unused_go_first() -> None:
    pages = Pages(3 * (BLOCK + 300))
    for file in (1, 2, 3):
        pages.put(file, 0, bytes(BLOCK), ends=False)
    pages.read(1, 0, BLOCK)
    pages.put(4, 0, bytes(BLOCK), ends=False)
    assert [file for file in (1, 2, 3, 4) if pages.read(file, 0, BLOCK)] == [1, 3, 4]
