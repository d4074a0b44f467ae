"""Dirty ranges against the plainest model there is: a dictionary of bytes by offset."""

from __future__ import annotations

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vfsmount.cache.dirty import DirtyFile, DirtyFiles, Piece

OFFSETS = st.integers(0, 60)


class DirtyMachine(RuleBasedStateMachine):
    """Random writes, takes and failures."""

    def __init__(self) -> None:
        super().__init__()
        self.file = DirtyFile()
        self.model: dict[int, int] = {}
        self.taken: list[Piece] = []
        self.owed: dict[int, int] = {}
        self.writers: set[int] = set()
        self.now = 0.0

    @rule(handle=st.integers(1, 3), start=OFFSETS, data=st.binary(max_size=20))
    def write(self, handle: int, start: int, data: bytes) -> None:
        self.now += 1
        self.file.write(handle, start, data, self.now)
        self.writers.add(handle)
        self.model |= {start + at: byte for at, byte in enumerate(data)}

    @precondition(lambda self: not self.taken)
    @rule(limit=st.integers(1, 30))
    def take(self, limit: int) -> None:
        self.taken = self.file.take(limit)
        assert all(0 < len(piece.data) <= limit for piece in self.taken)
        found = {
            piece.start + at: byte for piece in self.taken for at, byte in enumerate(piece.data)
        }
        assert found == self.model
        assert not self.file
        self.model = {}

    @rule(written=st.integers(0, 5))
    def fail(self, written: int) -> None:
        back, self.taken = self.taken[written:], []
        self.file.failed(back, errno.ENOSPC, self.now)
        for piece in back:
            for at, byte in enumerate(piece.data):
                self.model.setdefault(piece.start + at, byte)
        self.owed |= dict.fromkeys(self.writers, errno.ENOSPC)

    @precondition(lambda self: not self.taken)
    @rule(size=OFFSETS)
    def truncate(self, size: int) -> None:
        self.file.truncate(size)
        self.model = {at: byte for at, byte in self.model.items() if at < size}

    @rule()
    def succeed(self) -> None:
        self.taken = []

    @rule(handle=st.integers(1, 3))
    def ask(self, handle: int) -> None:
        assert self.file.owed(handle) == self.owed.pop(handle, 0)
        assert self.file.owed(handle) == 0

    @rule(handle=st.integers(1, 3))
    def close(self, handle: int) -> None:
        self.writers.discard(handle)
        self.owed.pop(handle, None)
        assert self.file.close(handle) == bool(self.writers)

    @rule(start=OFFSETS, size=st.integers(0, 20))
    def overlap(self, start: int, size: int) -> None:
        dirty = any(at in self.model for at in range(start, start + size))
        assert self.file.overlaps(start, size) == dirty

    @invariant()
    def same(self) -> None:
        self.file.check_invariants()
        found = {
            start + at: byte for start, data in self.file.ranges() for at, byte in enumerate(data)
        }
        assert found == self.model
        assert self.file.end == max(self.model, default=-1) + 1


TestDirty = DirtyMachine.TestCase
TestDirty.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_small_writes_in_order_become_one_piece() -> None:
    file = DirtyFile()
    for at in range(0, 1 << 20, 4096):
        file.write(1, at, bytes(4096), 0.0)
    assert [len(piece.data) for piece in file.take(1 << 20)] == [1 << 20]


def test_what_is_given_up_is_counted() -> None:
    file = DirtyFile()
    file.write(1, 5, b"abc", 0.0)
    file.write(1, 10, b"de", 0.0)
    assert file.abandon() == 5
    assert not file


def test_age_counts_from_the_oldest_write() -> None:
    files = DirtyFiles(age=30)
    files.of(7).write(1, 0, b"a", 100.0)
    files.of(7).write(1, 5, b"b", 120.0)
    files.of(8).write(2, 0, b"c", 110.0)
    assert files.next_due() == 130
    assert files.due(129.9) == []
    assert files.due(130) == [7]
    files.of(7).take(1 << 20)
    assert files.next_due() == 140


def test_too_much_is_too_much_in_all() -> None:
    files = DirtyFiles(limit=10)
    files.of(7).write(1, 0, bytes(6), 0.0)
    assert not files.is_too_much()
    files.of(8).write(1, 0, bytes(6), 0.0)
    assert files.is_too_much()
