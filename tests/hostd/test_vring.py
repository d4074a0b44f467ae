"""The device's side of a ring: what sound drivers get, and that no driver gets more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostd.driver import Buffer, DriverRing
from vfsmount.hostd.faults import RingFault
from vfsmount.hostd.vring import Chain, DeviceRing
from vfsmount.wire.vring import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

ADDR = 0x10000
MEMORY = 1 << 16
DATA = ADDR + 0x8000
TABLE = ADDR + 0x4000


class Pair:
    """Both sides of one ring on one bytearray."""

    def __init__(
        self, size: int = 8, *, event_idx: bool = True, indirect: bool = True, start: int = 0
    ) -> None:
        self.memory = memoryview(bytearray(MEMORY))
        self.driver = DriverRing(self.memory, size, addr=ADDR)
        self.driver.set_avail_idx(start)
        self.driver.used_seen = start
        self.driver.used[2:4] = start.to_bytes(2, "little")
        self.event_idx = event_idx
        self.device = DeviceRing(
            size,
            self.driver.desc,
            self.driver.avail,
            self.driver.used,
            next_avail=start,
            translate=self.translate,
            event_idx=event_idx,
            indirect=indirect,
        )

    def translate(self, addr: int, length: int) -> memoryview:
        start = addr - ADDR
        if not 0 <= start <= MEMORY - length:
            raise RingFault("unmapped")
        return self.memory[start : start + length]

    def pop(self) -> Chain:
        chain = self.device.pop()
        assert chain is not None
        return chain

    def shape(self) -> tuple[list[int], list[int]]:
        """Pop a chain; returns the lengths of its buffers."""
        chain = self.pop()
        return [v.nbytes for v in chain.readable], [v.nbytes for v in chain.writable]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_empty_ring_has_nothing(pair: Pair) -> None:
    assert not pair.device.pending()
    assert pair.device.pop() is None


def test_direct_chain(pair: Pair) -> None:
    pair.driver.put_chain([Buffer(DATA, 40), Buffer(DATA + 64, 8), Buffer(DATA + 128, 16, True)])
    pair.driver.offer(0)

    assert pair.device.pending()
    assert pair.shape() == ([40, 8], [16])
    assert not pair.device.pending()


def test_buffers_are_the_memory_itself(pair: Pair) -> None:
    pair.translate(DATA, 5)[:] = b"hello"
    pair.driver.offer(pair.driver.put_chain([Buffer(DATA, 5), Buffer(DATA + 16, 3, True)]))

    chain = pair.pop()
    chain.writable[0][:] = b"abc"

    assert bytes(chain.readable[0]) == b"hello"
    assert bytes(pair.translate(DATA + 16, 3)) == b"abc"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_indirect_chain(pair: Pair, count: int) -> None:
    buffers = [Buffer(DATA + 16 * i, i + 1) for i in range(count)]
    pair.driver.offer(pair.driver.put_indirect(3, TABLE, [*buffers, Buffer(DATA, 32, True)]))

    chain = pair.pop()

    assert chain.head == 3
    assert [v.nbytes for v in chain.readable] == [i + 1 for i in range(count)]
    assert [v.nbytes for v in chain.writable] == [32]


def test_direct_chain_may_end_in_an_indirect_table(pair: Pair) -> None:
    pair.driver.put_indirect(1, TABLE, [Buffer(DATA + 64, 7), Buffer(DATA + 128, 9, True)])
    pair.driver.put(0, DATA, 5, DESC_F_NEXT, 1)
    pair.driver.offer(0)

    assert pair.shape() == ([5, 7], [9])


def test_write_flag_on_an_indirect_descriptor_is_ignored(pair: Pair) -> None:
    pair.driver.put_indirect(0, TABLE, [Buffer(DATA, 7), Buffer(DATA + 64, 9, True)])
    pair.driver.put(0, TABLE, 2 * DESC.size, DESC_F_INDIRECT | DESC_F_WRITE)
    pair.driver.offer(0)

    assert pair.shape() == ([7], [9])


@pytest.mark.parametrize("indirect", [False, True])
def test_empty_buffers_are_left_out_wherever_they_point(pair: Pair, indirect: bool) -> None:
    buffers = [Buffer(0xDEAD0000, 0), Buffer(DATA, 4), Buffer(1, 0, True), Buffer(DATA, 8, True)]
    put = pair.driver.put_indirect if indirect else None
    head = put(0, TABLE, buffers) if put else pair.driver.put_chain(buffers)
    pair.driver.offer(head)

    assert pair.shape() == ([4], [8])


def test_pair_with_an_empty_buffer_is_walked(pair: Pair) -> None:
    pair.driver.put_indirect(0, TABLE, [Buffer(DATA, 4), Buffer(1, 0, True)])
    pair.driver.offer(0)

    assert pair.shape() == ([4], [])


def test_longest_chain(pair: Pair) -> None:
    pair.driver.put_chain([Buffer(DATA + i, 1) for i in range(8)])
    pair.driver.offer(0)

    assert pair.shape() == ([1] * 8, [])


# --- returning chains -----------------------------------------------------------------------------


def test_used_elements(pair: Pair) -> None:
    pair.device.push(5, 16)
    pair.device.push(2, 0)

    assert pair.driver.collect() == [(5, 16), (2, 0)]


def test_indices_wrap() -> None:
    pair = Pair(start=65533)
    for turn in range(10):
        pair.driver.put_chain([Buffer(DATA, turn + 1)])
        pair.driver.offer(0)
        chain = pair.pop()
        assert chain.readable[0].nbytes == turn + 1
        pair.device.push(chain.head, turn)
        assert pair.driver.collect() == [(0, turn)]
    assert pair.device.next_avail == 7


def test_used_index_goes_on_where_memory_says() -> None:
    pair = Pair(start=100)
    pair.device.push(1, 1)

    assert pair.driver.used_idx == 101


# --- notifications --------------------------------------------------------------------------------


def test_call_when_the_driver_waits_for_the_next_one(pair: Pair) -> None:
    pair.driver.set_used_event(0)
    pair.device.push(0, 0)

    assert pair.device.must_call()
    assert not pair.device.must_call(), "nothing new since"


def test_no_call_while_the_driver_polls(pair: Pair) -> None:
    pair.driver.set_used_event(0xFFFF)
    pair.device.push(0, 0)

    assert not pair.device.must_call()


def test_one_call_for_a_batch_that_passes_the_event(pair: Pair) -> None:
    pair.driver.set_used_event(1)
    pair.device.push(0, 0)
    assert not pair.device.must_call()
    pair.device.push(1, 0)
    pair.device.push(2, 0)

    assert pair.device.must_call()


@pytest.mark.parametrize(("flags", "calls"), [(0, True), (1, False)])
def test_call_without_event_idx_follows_the_flag(flags: int, calls: bool) -> None:
    pair = Pair(event_idx=False)
    pair.driver.set_avail_flags(flags)
    pair.device.push(0, 0)

    assert pair.device.must_call() is calls


def test_kicks_are_asked_for_at_the_next_index(pair: Pair) -> None:
    pair.driver.offer(pair.driver.put_chain([Buffer(DATA, 1)]))
    pair.pop()

    assert not pair.device.enable_kicks()
    assert pair.driver.avail_event == 1


def test_no_sleep_when_something_came_meanwhile(pair: Pair) -> None:
    pair.driver.offer(pair.driver.put_chain([Buffer(DATA, 1)]))

    assert pair.device.enable_kicks()


def test_kicks_without_event_idx() -> None:
    pair = Pair(event_idx=False)
    assert pair.driver.used_flags == 1
    pair.device.enable_kicks()
    assert pair.driver.used_flags == 0
    pair.device.disable_kicks()
    assert pair.driver.used_flags == 1


# --- drivers that break the rules -----------------------------------------------------------------


def test_loop(pair: Pair) -> None:
    pair.driver.put(0, DATA, 1, DESC_F_NEXT, 1)
    pair.driver.put(1, DATA, 1, DESC_F_NEXT, 0)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="loop"):
        pair.device.pop()


def test_descriptor_that_leads_to_itself(pair: Pair) -> None:
    pair.driver.put(0, DATA, 0, DESC_F_NEXT, 0)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="loop"):
        pair.device.pop()


@pytest.mark.parametrize("head", [8, 9, 0xFFFF])
def test_head_out_of_range(pair: Pair, head: int) -> None:
    pair.driver.offer(head)

    with pytest.raises(RingFault, match="head"):
        pair.device.pop()


def test_next_out_of_range(pair: Pair) -> None:
    pair.driver.put(0, DATA, 1, DESC_F_NEXT, 8)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="descriptor 8"):
        pair.device.pop()


@pytest.mark.parametrize("ahead", [9, 100, 0x8000, 0xFFFF])
def test_avail_index_more_than_a_queue_ahead(pair: Pair, ahead: int) -> None:
    pair.driver.set_avail_idx(ahead)

    with pytest.raises(RingFault, match="ahead"):
        pair.device.pop()


@pytest.mark.parametrize("indirect", [False, True])
def test_readable_behind_writable(pair: Pair, indirect: bool) -> None:
    buffers = [Buffer(DATA, 8, True), Buffer(DATA + 64, 8)]
    if indirect:
        pair.driver.put_indirect(0, TABLE, buffers)
    else:
        pair.driver.put_chain(buffers)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="behind a writable"):
        pair.device.pop()


@pytest.mark.parametrize(
    ("addr", "length"),
    [(0, 8), (ADDR - 1, 2), (ADDR + MEMORY - 1, 2), (ADDR, MEMORY + 1), (2**64 - 1, 2**32 - 1)],
)
@pytest.mark.parametrize("indirect", [False, True])
def test_buffer_outside_of_memory(pair: Pair, addr: int, length: int, indirect: bool) -> None:
    buffers = [Buffer(addr, length), Buffer(DATA, 8, True)]
    if indirect:
        pair.driver.put_indirect(0, TABLE, buffers)
    else:
        pair.driver.put_chain(buffers)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="unmapped"):
        pair.device.pop()


def test_indirect_table_outside_of_memory(pair: Pair) -> None:
    pair.driver.put(0, 0, 32, DESC_F_INDIRECT)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="unmapped"):
        pair.device.pop()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 33, 16 * 1025, 0xFFFFFFF0])
def test_indirect_table_of_a_length_that_cannot_be(pair: Pair, length: int) -> None:
    pair.driver.put(0, TABLE, length, DESC_F_INDIRECT)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="indirect table"):
        pair.device.pop()


def test_indirect_in_indirect(pair: Pair) -> None:
    table = DESC.values(TABLE + 64, 16, DESC_F_INDIRECT, 0)
    pair.translate(TABLE, 16)[:] = table
    pair.driver.put(0, TABLE, 16, DESC_F_INDIRECT)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="in an indirect"):
        pair.device.pop()


def test_indirect_in_a_pair(pair: Pair) -> None:
    table = DESC.values(DATA, 16, DESC_F_NEXT, 1) + DESC.values(DATA, 16, DESC_F_INDIRECT, 0)
    pair.translate(TABLE, 32)[:] = table
    pair.driver.put(0, TABLE, 32, DESC_F_INDIRECT)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="in an indirect"):
        pair.device.pop()


def test_indirect_with_next(pair: Pair) -> None:
    pair.driver.put(0, TABLE, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="next"):
        pair.device.pop()


def test_indirect_that_was_not_negotiated() -> None:
    pair = Pair(indirect=False)
    pair.driver.put_indirect(0, TABLE, [Buffer(DATA, 8), Buffer(DATA, 8, True)])
    pair.driver.offer(0)

    with pytest.raises(RingFault, match="not negotiated"):
        pair.device.pop()


@pytest.mark.parametrize(("following", "match"), [(0, "loop"), (2, "descriptor 2")])
def test_bad_next_in_a_table(pair: Pair, following: int, match: str) -> None:
    entry = DESC.values(DATA, 4, DESC_F_NEXT, 1) + DESC.values(DATA, 4, DESC_F_NEXT, following)
    pair.translate(TABLE, 32)[:] = entry
    pair.driver.put(0, TABLE, 32, DESC_F_INDIRECT)
    pair.driver.offer(0)

    with pytest.raises(RingFault, match=match):
        pair.device.pop()


# --- any driver -----------------------------------------------------------------------------------

_indices = st.integers(0, 9)
_addresses = st.one_of(
    st.integers(ADDR - 32, ADDR + MEMORY + 32),
    st.integers(0, 2**64 - 1),
    st.just(TABLE),
)
_lengths = st.one_of(st.integers(0, 256), st.integers(0, 2**32 - 1))
_descriptors = st.tuples(_addresses, _lengths, st.integers(0, 0xFFFF), _indices)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(_descriptors, min_size=8, max_size=8),
    indirect=st.lists(_descriptors, max_size=12),
    heads=st.lists(_indices, max_size=10),
    ahead=st.integers(0, 12),
    negotiated=st.booleans(),
)
def test_no_driver_gets_beyond_its_memory(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    ahead: int,
    negotiated: bool,
) -> None:
    pair = Pair(indirect=negotiated)
    for index, descriptor in enumerate(table):
        pair.driver.put(index, *descriptor)
    data = b"".join(DESC.values(*descriptor) for descriptor in indirect)
    pair.translate(TABLE, len(data))[:] = data
    for head in heads[:8]:
        pair.driver.offer(head)
    pair.driver.set_avail_idx(ahead)
    total = 0
    try:
        while (chain := pair.device.pop()) is not None:
            assert all(v.nbytes for v in chain.readable + chain.writable)
            assert len(chain.readable) + len(chain.writable) <= 8 + 1024
            pair.device.push(chain.head, sum(v.nbytes for v in chain.writable))
            total += 1
    except RingFault:
        pass
    assert total <= 8


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 64), min_size=1, max_size=4),
            st.lists(st.integers(1, 64), max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 0xFFFF),
)
def test_sound_chains_come_out_as_they_went_in(
    chains: list[tuple[list[int], list[int], bool]], start: int
) -> None:
    pair = Pair(start=start)
    for number, (readable, writable, indirect) in enumerate(chains):
        buffers = [Buffer(DATA + 256 * i, n) for i, n in enumerate(readable)]
        buffers += [Buffer(DATA + 2048 + 256 * i, n, True) for i, n in enumerate(writable)]
        if indirect:
            head = pair.driver.put_indirect(number % 8, TABLE, buffers)
        else:
            head = pair.driver.put_chain(buffers)
        pair.driver.offer(head)

        assert pair.shape() == (readable, writable)
        pair.device.push(head, number)
        assert pair.driver.collect() == [(head, number)]
