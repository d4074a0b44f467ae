from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfsmount.channel.arena import MAX_BLOCK, MIN_BLOCK, Arena


def test_blocks_are_powers_of_two_aligned_to_themselves() -> None:
    arena = Arena(MAX_BLOCK)

    for size in (1, 512, 513, 4096, 4097, 1 << 20):
        offset = arena.allocate(size)
        block = max(MIN_BLOCK, 1 << (size - 1).bit_length())
        assert offset % block == 0
    arena.check_invariants()


def test_alignment_counts_from_the_base() -> None:
    arena = Arena(MAX_BLOCK, base=4096 * 3)

    offset = arena.allocate(1 << 20)

    assert (offset - 4096 * 3) % (1 << 20) == 0
    arena.check_invariants()


def test_last_freed_is_next_used() -> None:
    arena = Arena(MAX_BLOCK)
    blocks = [arena.allocate(4096) for _ in range(3)]

    arena.free(blocks[1])
    arena.free(blocks[0])

    assert arena.allocate(4000) == blocks[0]
    assert arena.allocate(4000) == blocks[1]


def test_full_arena_says_so_and_recovers() -> None:
    arena = Arena(MAX_BLOCK)
    blocks = [arena.allocate(MAX_BLOCK // 4) for _ in range(4)]
    assert arena.allocate(1) == -1

    for block in blocks:
        arena.free(block)

    # The four quarters are joined again, because somebody needs the whole.
    assert arena.allocate(MAX_BLOCK) == 0
    arena.check_invariants()


def test_what_one_size_has_used_is_there_for_another() -> None:
    arena = Arena(2 * MAX_BLOCK)
    small = [arena.allocate(512) for _ in range(2 * MAX_BLOCK // 512)]
    assert arena.allocate(512) == -1
    for block in small:
        arena.free(block)

    assert {arena.allocate(MAX_BLOCK), arena.allocate(MAX_BLOCK)} == {0, MAX_BLOCK}


def test_too_large_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Arena(MAX_BLOCK).allocate(MAX_BLOCK + 1)


def test_freeing_twice_is_our_bug() -> None:
    arena = Arena(MAX_BLOCK)
    block = arena.allocate(1)
    arena.free(block)
    with pytest.raises(KeyError):
        arena.free(block)


@pytest.mark.parametrize("size", [0, MAX_BLOCK - 1, MAX_BLOCK + 512])
def test_sizes_that_an_arena_cannot_have(size: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        Arena(size)


def test_free_extents_are_free_and_large() -> None:
    arena = Arena(MAX_BLOCK)
    low = arena.allocate(64 << 10)
    high = arena.allocate(64 << 10)
    arena.free(low)

    extents = arena.free_extents(64 << 10)

    assert (low, 64 << 10) in extents
    assert sum(size for _, size in extents) == MAX_BLOCK - (64 << 10)
    assert all(not start <= high < start + size for start, size in extents)


class ArenaMachine(RuleBasedStateMachine):
    """The allocator against a list of what has been handed out."""

    @initialize(base=st.sampled_from([0, 4096, 12288]), blocks=st.integers(1, 2))
    def begin(self, base: int, blocks: int) -> None:
        self.base = base
        self.size = blocks * MAX_BLOCK
        self.arena = Arena(self.size, base)
        self.taken: dict[int, int] = {}

    @rule(order=st.integers(0, 24), less=st.integers(0, 300))
    def allocate(self, order: int, less: int) -> None:
        size = max((1 << order) - less, 1)
        offset = self.arena.allocate(size)
        if offset < 0:
            # There really is no aligned free place: the buddy rule makes that exact.
            block = max(MIN_BLOCK, 1 << (size - 1).bit_length())
            for start in range(self.base, self.base + self.size, block):
                assert self._overlaps(start, block), "there was room"
            return
        assert not self._overlaps(offset, size)
        assert self.base <= offset
        assert offset + size <= self.base + self.size
        self.taken[offset] = size

    def _overlaps(self, start: int, size: int) -> bool:
        return any(o < start + size and start < o + s for o, s in self.taken.items())

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.arena.free(offset)
        del self.taken[offset]

    @rule(minimum=st.sampled_from([1, 4096, 65536]))
    def extents(self, minimum: int) -> None:
        for start, size in self.arena.free_extents(minimum):
            assert size >= minimum
            assert not self._overlaps(start, size)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_invariants()


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestArena = pytest.mark.slow(ArenaMachine.TestCase)
