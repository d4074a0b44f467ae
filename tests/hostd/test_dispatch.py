"""Requests that make no sense: an errno, or the guest's end, and never anything else."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.faults import GuestFault
from vfsmount.hostd.fs import dispatch
from vfsmount.wire import fuse
from vfsmount.wire.fuse import OPERATIONS, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

UNSERVED = {
    "BMAP",
    "POLL",
}
#: Opcodes that begin with a struct, and its size; INIT has a shorter form.
WITH_STRUCT: dict[Opcode, int] = {
    opcode: operation.args.size
    for opcode, operation in OPERATIONS.items()
    if operation.args is not None and opcode != Opcode.INIT
}
#: Opcodes whose reply has more than a header.
WITH_REPLY = [opcode for opcode, operation in OPERATIONS.items() if operation.reply]


def errno_of(guest: DirectGuest, message: bytes, room: int = 4096) -> int:
    """Send raw bytes; returns the positive errno of the reply."""
    reply = fuse.OUT_HEADER.unpack(guest.exchange(message, room))
    assert reply.len == 16
    return -reply.error


def header(length: int, opcode: int = Opcode.LOOKUP, nodeid: int = ROOT, extlen: int = 0) -> bytes:
    return fuse.IN_HEADER.values(length, opcode, 2, nodeid, 0, 0, 0, extlen)


@pytest.mark.parametrize("size", range(40))
def test_no_whole_header(guest: DirectGuest, size: int) -> None:
    with pytest.raises(GuestFault, match=f"request of {size} bytes"):
        guest.exchange(bytes(size), 4096)


@pytest.mark.parametrize("room", range(16))
def test_no_room_for_an_answer(guest: DirectGuest, room: int) -> None:
    with pytest.raises(GuestFault, match="room"):
        guest.exchange(fuse.encode_request(Opcode.GETATTR, 2, ROOT, bytes(16)), room)


@pytest.mark.parametrize("length", [0, 1, 39, 43, 2**31, 2**32 - 1])
def test_lengths_that_lie(
    guest: DirectGuest, length: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("malformed LOOKUP: header says")
    assert errno_of(guest, header(length) + b"a\0") == errno.EINVAL


def test_bytes_behind_the_message_are_ignored(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").touch()
    message = header(42) + b"a\0" + b"more\0"

    assert fuse.OUT_HEADER.unpack(guest.exchange(message, 4096)).error == 0


@pytest.mark.parametrize("body", [b"", b"a", b"a\0b", b"a\0b\0", b"\0", b"\0a", b"a\0\0"])
def test_names_that_are_not_one_name(guest: DirectGuest, body: bytes) -> None:
    with expect_errno("EINVAL"):
        guest.call(Opcode.LOOKUP, ROOT, body)


@pytest.mark.parametrize("opcode", [0, 7, 19, 54, 99, 4096, 436207616, 2**32 - 1])
def test_unknown_opcodes(guest: DirectGuest, opcode: int) -> None:
    assert errno_of(guest, header(40, opcode)) == errno.ENOSYS


@pytest.mark.parametrize("opcode", WITH_STRUCT, ids=lambda opcode: opcode.name)
def test_structs_cut_short(
    guest: DirectGuest, opcode: Opcode, expect_log: Callable[[str], None]
) -> None:
    struct_size = WITH_STRUCT[opcode]
    message = fuse.encode_request(opcode, 2, ROOT, bytes(struct_size - 1))

    written = guest.exchange(message, 4096)

    if written:
        assert fuse.OUT_HEADER.unpack(written).error in (-errno.EINVAL, -errno.ENOSYS)
    if opcode.name not in UNSERVED:
        expect_log(f"malformed {opcode.name}")


@pytest.mark.parametrize("opcode", WITH_REPLY, ids=lambda opcode: opcode.name)
def test_replies_that_would_not_fit_do_nothing(
    guest: DirectGuest, folder: Path, opcode: Opcode, expect_log: Callable[[str], None]
) -> None:
    operation = OPERATIONS[opcode]
    expect_log("room for")
    body = (bytes(operation.args.size) if operation.args else b"") + b"new\0" * operation.names
    room = 16 + sum(codec.size for codec in operation.reply) - 1

    assert errno_of(guest, fuse.encode_request(opcode, 2, ROOT, body), room) == errno.EINVAL
    assert list(folder.iterdir()) == []


def test_target_that_does_not_fit(guest: DirectGuest) -> None:
    entry = guest.symlink(ROOT, b"link", b"t" * 100)
    with expect_errno("ERANGE"):
        guest.call(Opcode.READLINK, entry.nodeid, room=16 + 99)
    assert guest.call(Opcode.READLINK, entry.nodeid, room=16 + 100).data == b"t" * 100


def test_batch_forget_that_lies(guest: DirectGuest, expect_log: Callable[[str], None]) -> None:
    expect_log("malformed BATCH_FORGET")
    body = fuse.BATCH_FORGET_IN.values(2**32 - 1) + bytes(64)
    assert guest.exchange(fuse.encode_request(Opcode.BATCH_FORGET, 2, 0, body), 0) == b""


def test_extensions_that_lie(guest: DirectGuest, expect_log: Callable[[str], None]) -> None:
    expect_log("malformed MKDIR")
    body = fuse.MKDIR_IN.values(0o755, 0) + b"new\0"
    for ext in (b"\xff" * 8, fuse.EXT_HEADER.values(16, 32), fuse.EXT_HEADER.values(0, 32)):
        with expect_errno("EINVAL"):
            guest.call(Opcode.MKDIR, ROOT, body, ext=ext)
    message = header(40 + len(body), Opcode.MKDIR, extlen=0xFFFF) + body
    assert errno_of(guest, message) == errno.EINVAL


def test_message_of_more_than_a_megabyte(
    guest: DirectGuest, expect_log: Callable[[str], None]
) -> None:
    expect_log("malformed LOOKUP: message of")
    with expect_errno("EINVAL"):
        guest.call(Opcode.LOOKUP, ROOT, b"n" * (2 << 20) + b"\0")


def test_long_messages_are_read_in_full(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").touch()
    nodeid = guest.walk("a")
    for _ in range(4):
        guest.lookup(ROOT, b"a")

    guest.batch_forget(*[(12345, 1)] * 1000, (nodeid, 5))

    assert len(guest.session.inodes) == 1


def test_the_log_is_not_filled(guest: DirectGuest, expect_log: Callable[[str], None]) -> None:
    expect_log("no more of these are logged")
    expect_log("malformed LOOKUP")
    for _ in range(1000):
        errno_of(guest, header(39))
    assert guest.server._complaints == 1000


def test_a_bug_of_ours_is_eio(
    guest: DirectGuest, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_session: Session, _request: Request) -> bytes:
        raise KeyError("a bug")

    expect_log("STATFS failed")
    monkeypatch.setitem(guest.server._plain, int(Opcode.STATFS), broken)
    with expect_errno("EIO"):
        guest.call(Opcode.STATFS, ROOT)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (OSError(524, "ENOTSUPP"), errno.EIO),
        (OSError("no number"), errno.EIO),
        (OSError(errno.ENOSPC, ""), errno.ENOSPC),
        (OverflowError(), errno.EINVAL),
        (ValueError(), errno.EINVAL),
        (MemoryError(), errno.ENOMEM),
    ],
)
def test_errors_as_errnos(
    guest: DirectGuest, error: Exception, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_session: Session, _request: Request) -> bytes:
        raise error

    monkeypatch.setitem(guest.server._plain, int(Opcode.STATFS), failing)
    assert errno_of(guest, fuse.encode_request(Opcode.STATFS, 2, ROOT)) == answer


def test_every_opcode_is_served_refused_or_known_to_be_neither() -> None:
    served = set(dispatch._FAST) | set(dispatch._PLAIN) | set(dispatch._XATTR)
    assert {opcode.name for opcode in Opcode} - {Opcode(op).name for op in served} == UNSERVED


# --- anything -------------------------------------------------------------------------------------

_u64 = st.one_of(st.integers(0, 8), st.integers(0, 2**64 - 1), st.just(2**63), st.just(2**64 - 1))
_names = st.one_of(
    st.sampled_from([b"file", b"dir", b"..", b"../canary", b"/etc/passwd", b"", b"up", b"out"]),
    st.binary(max_size=300),
)


@pytest.mark.slow
@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    opcode=st.sampled_from([int(opcode) for opcode in Opcode if opcode != Opcode.DESTROY]),
    nodeid=_u64,
    words=st.lists(_u64, max_size=12),
    names=st.lists(_names, max_size=3),
    tail=st.binary(max_size=64),
    extlen=st.one_of(st.just(0), st.integers(0, 0xFFFF)),
    room=st.sampled_from([16, 100, 4096]),
    ids=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_nothing_that_a_guest_says_hurts(
    guest: DirectGuest,
    folder: Path,
    opcode: int,
    nodeid: int,
    words: list[int],
    names: list[bytes],
    tail: bytes,
    extlen: int,
    room: int,
    ids: tuple[int, int],
) -> None:
    """The canary is next to the folder, and links lead to it; see the fixture."""
    if not (folder / "file").exists():
        (folder / "file").write_bytes(b"text")
    if not (folder / "up").is_symlink():
        (folder / "up").symlink_to("..")
    if guest.session.agreed is None:
        guest.init()
    guest.server._complaints = 100  # the log is not what this is about
    body = b"".join(struct.pack("<Q", word) for word in words)
    body += b"".join(name + b"\0" for name in names) + tail
    length = 40 + len(body)
    message = fuse.IN_HEADER.values(length, opcode, 2, nodeid, *ids, 0, extlen) + body

    written = guest.exchange(message, room)

    if written:
        reply = fuse.OUT_HEADER.unpack(written)
        assert reply.len == len(written)
        assert reply.unique == 2
        assert -512 < reply.error <= 0


@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.binary(min_size=40, max_size=200))
def test_noise(guest: DirectGuest, message: bytes) -> None:
    guest.server._complaints = 100
    guest.exchange(message, 4096)


def test_the_thread_is_still_itself_afterwards() -> None:
    assert os.geteuid() == os.getuid()
