from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.errors import WireError
from vfsmount.wire import vring
from vfsmount.wire.vring import DESC, USED_ELEM, Desc, UsedElem, need_event, vring_layout

queue_sizes = st.integers(0, 15).map(lambda order: 1 << order)
indices = st.integers(0, 0xFFFF)


def test_layout_of_128_entries() -> None:
    # Worked out by hand: 2048 + 262 + 58 to the next cache line + 1030.
    layout = vring_layout(128)

    assert (layout.desc, layout.avail, layout.used, layout.end) == (0, 2048, 2368, 3398)


@given(queue_sizes, st.integers(0, 1000).map(lambda n: 64 * n))
def test_parts_are_aligned_and_do_not_overlap(size: int, base: int) -> None:
    layout = vring_layout(size, base)

    assert layout.desc == base
    assert layout.desc % vring.DESC_ALIGN == 0
    assert layout.avail % vring.AVAIL_ALIGN == 0
    assert layout.used % 64 == 0
    assert layout.avail == layout.desc + 16 * size
    assert layout.used >= layout.avail + 6 + 2 * size
    assert layout.end == layout.used + 6 + 8 * size


@pytest.mark.parametrize("size", [0, 3, 127, 65536, -2])
def test_sizes_that_are_none(size: int) -> None:
    assert not vring.is_queue_size(size)
    with pytest.raises(ValueError, match="power of two"):
        vring_layout(size)


def test_base_must_be_aligned() -> None:
    with pytest.raises(ValueError, match="aligned"):
        vring_layout(4, 32)


def test_event_words_lie_behind_the_slots() -> None:
    assert vring.used_event_offset(4) == 12
    assert vring.avail_event_offset(4) == 36
    assert vring.avail_ring_size(4) == 14
    assert vring.used_ring_size(4) == 38


def test_golden_structs() -> None:
    data = bytes.fromhex("88776655443322110010000003000700")
    assert DESC.unpack(data) == Desc(0x1122334455667788, 0x1000, 3, 7)
    assert DESC.pack(Desc(0x1122334455667788, 0x1000, 3, 7)) == data
    assert USED_ELEM.pack(UsedElem(5, 16)) == bytes.fromhex("0500000010000000")
    with pytest.raises(WireError):
        DESC.unpack(data[:15])


@given(indices, indices, st.integers(0, 0x7FFF))
def test_need_event_is_whether_the_event_was_passed(event: int, old: int, count: int) -> None:
    passed = {(old + i) & 0xFFFF for i in range(count)}

    assert need_event(event, (old + count) & 0xFFFF, old) is (event in passed)
