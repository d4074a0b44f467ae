from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.channel.inflight import Pending, check_reply, place
from vfsmount.errors import ProtocolViolation
from vfsmount.wire.fuse import Opcode


def pending(opcode: int = Opcode.READ, reply_size: int = 100) -> Pending:
    one = Pending(opcode, 5, b"", None, reply_size, 0, 0, 0, 0, None)
    one.unique = 42
    return one


sizes = st.one_of(st.integers(0, 300), st.integers(4000, 4200), st.just(1 << 20))


@given(sizes, sizes, st.just(-1) | sizes)
def test_parts_fit_and_do_not_overlap(body: int, payload: int, reply: int) -> None:
    readable_at, writable_at, size = place(body, payload, reply)

    assert readable_at >= 64, "there is a table of two descriptors before it"
    end = readable_at + 40 + body + payload
    assert writable_at >= end
    if reply >= 0:
        assert size == writable_at + 16 + reply
    else:
        assert size == writable_at == end


@given(st.integers(0, 4000), st.integers(4096, 1 << 20))
def test_large_data_is_aligned_to_pages(body: int, data: int) -> None:
    _, writable_at, _ = place(body, 0, data)
    assert (writable_at + 16) % 4096 == 0
    if body <= 4096 - 64 - 40:
        readable_at, _, _ = place(body, data, 8)
        assert (readable_at + 40 + body) % 4096 == 0


def test_a_read_of_4_kib_takes_a_block_of_two_pages() -> None:
    assert place(40, 0, 4096) == (64, 4080, 8192)


def test_good_reply() -> None:
    one = pending()
    check_reply(one, 116, 116, 0, 42)
    assert (one.length, one.errno) == (100, 0)


@pytest.mark.parametrize("errno", [1, 2, 511])
def test_error_reply(errno: int) -> None:
    one = pending()
    check_reply(one, 16, 16, -errno, 42)
    assert (one.length, one.errno) == (0, errno)


def test_no_bytes_at_all_is_an_io_error_but_not_for_destroy() -> None:
    one = pending()
    check_reply(one, 0, 999, 7, 7)  # what lies there is old
    assert one.errno == 5

    one = pending(Opcode.DESTROY)
    check_reply(one, 0, 999, 7, 7)
    assert one.errno == 0


@pytest.mark.parametrize(
    ("written", "size", "error", "unique", "complaint"),
    [
        (1, 1, 0, 42, "of 1 bytes is shorter than its header"),
        (15, 15, 0, 42, "shorter"),
        (116, 115, 0, 42, "says 115 bytes, 116 were written"),
        (116, 117, 0, 42, "says 117 bytes"),
        (16, 2**32 - 1, 0, 42, "says 4294967295"),
        (16, 0, 0, 42, "says 0 bytes"),
        (116, 116, 0, 43, "carries unique 43"),
        (16, 16, 0, 0, "carries unique 0"),
        (16, 16, 2, 42, "error 2, which is not"),
        (16, 16, -512, 42, "error -512, which is not"),
        (16, 16, -(2**31), 42, "which is not a negated errno"),
        (20, 20, -5, 42, "error -5 and 4 bytes of body"),
        (20, 20, 5, 42, "error 5, which is not"),
    ],
)
def test_bad_replies(written: int, size: int, error: int, unique: int, complaint: str) -> None:
    with pytest.raises(ProtocolViolation, match=complaint) as caught:
        check_reply(pending(), written, size, error, unique)
    assert "READ of node 5" in str(caught.value)


@given(
    st.integers(0, 200), st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0)
)
def test_any_header_is_accepted_in_bounds_or_refused(
    written: int, size: int, error: int, unique: int
) -> None:
    one = pending()
    try:
        check_reply(one, written, size, error, unique)
    except ProtocolViolation:
        return
    assert 0 <= one.length <= max(written - 16, 0)
    assert 0 <= one.errno < 512
