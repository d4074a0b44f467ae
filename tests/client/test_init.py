"""What we make of a daemon's INIT reply, and how SETATTR arguments are built."""

from __future__ import annotations

import pytest

from vfsmount.client.session import GUEST_FLAGS, decode_init, setattr_in
from vfsmount.errors import HandshakeError
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, SetattrValid


def reply(**changes: int) -> bytes:
    """virtiofsd 1.13's reply to everything offered, with ``changes``."""
    out = fuse.InitOut(
        major=7,
        minor=38,
        max_readahead=1 << 20,
        flags=0x4844F829,
        max_background=65535,
        congestion_threshold=49149,
        max_write=1 << 20,
        time_gran=1,
        max_pages=256,
        map_alignment=0,
        flags2=0x104,
        max_stack_depth=0,
        request_timeout=0,
    )
    return fuse.INIT_OUT.pack(out._replace(**changes))


def test_rust_daemons_reply() -> None:
    facts = decode_init(reply(), GUEST_FLAGS)
    assert facts.minor == 38
    assert facts.max_write == facts.max_read == 1 << 20
    assert InitFlag.CREATE_SUPP_GROUP in facts.flags
    # Accepted although not offered: means nothing.
    assert InitFlag.ALLOW_IDMAP not in facts.flags


def test_second_word_needs_init_ext() -> None:
    flags = 0x4844F829 & ~InitFlag.INIT_EXT
    assert InitFlag.CREATE_SUPP_GROUP not in decode_init(reply(flags=flags), GUEST_FLAGS).flags


def test_without_max_pages_requests_are_128_kib() -> None:
    flags = 0x4844F829 & ~InitFlag.MAX_PAGES
    facts = decode_init(reply(flags=flags), GUEST_FLAGS)
    assert facts.max_write == facts.max_read == 128 * 1024


def test_a_newer_daemon_is_taken_at_our_version() -> None:
    assert decode_init(reply(minor=99), GUEST_FLAGS).minor == fuse.KERNEL_MINOR_VERSION


def test_oldest_minor_is_handled() -> None:
    assert decode_init(reply(minor=27), GUEST_FLAGS).minor == 27


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"major": 8}, "speaks FUSE 8"),
        ({"major": 6}, "speaks FUSE 6"),
        ({"minor": 26}, "too old"),
        ({"max_write": 0}, "max_write 0"),
    ],
)
def test_refused_with_a_reason(changes: dict[str, int], words: str) -> None:
    with pytest.raises(HandshakeError, match=words):
        decode_init(reply(**changes), GUEST_FLAGS)


def test_short_reply() -> None:
    with pytest.raises(HandshakeError, match="too short"):
        decode_init(reply()[:24], GUEST_FLAGS)


def test_setattr_in_names_what_changes() -> None:
    changes = setattr_in(mode=0o600, mtime_ns=1_000_000_007, atime_now=True, fh=3)
    assert changes.valid == (
        SetattrValid.MODE
        | SetattrValid.MTIME
        | SetattrValid.ATIME
        | SetattrValid.ATIME_NOW
        | SetattrValid.FH
    )
    assert (changes.mode, changes.mtime, changes.mtimensec, changes.fh) == (0o600, 1, 7, 3)


def test_setattr_in_before_1970() -> None:
    changes = setattr_in(mtime_ns=-1)
    assert (changes.mtime, changes.mtimensec) == (-1, 999_999_999)


def test_setattr_in_zero_is_a_value() -> None:
    assert setattr_in(size=0, uid=0, gid=0, mode=0).valid == (
        SetattrValid.SIZE | SetattrValid.UID | SetattrValid.GID | SetattrValid.MODE
    )
