"""What a late reply hands out is given back, each thing exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.client.relay.undo import Undo, undo_late_reply
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

ATTR = fuse.Attr(7, 100, 8, 1, 2, 3, 4, 5, 6, 0o100644, 1, 0, 0, 0, 4096, 0)
ENTRY = fuse.EntryOut(42, 0, 1, 1, 0, 0, ATTR)
ENTRY_BYTES = fuse.ENTRY_OUT.pack(ENTRY)
OPENED = fuse.OPEN_OUT.values(99, 0, 0)
RELEASE = fuse.RELEASE_IN.values(99, 0, 0, 0)


@pytest.mark.parametrize(
    "opcode", [Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK]
)
def test_a_reference_is_forgotten(opcode: Opcode) -> None:
    assert undo_late_reply(opcode, 1, b"", ENTRY_BYTES) == Undo((42,))


def test_nothing_was_found() -> None:
    absent = fuse.ENTRY_OUT.pack(ENTRY._replace(nodeid=0))

    assert undo_late_reply(Opcode.LOOKUP, 1, b"", absent) == Undo()


def test_handles_are_released() -> None:
    undo = undo_late_reply
    assert undo(Opcode.OPEN, 5, b"", OPENED) == Undo((), ((Opcode.RELEASE, 5, RELEASE),))
    assert undo(Opcode.OPENDIR, 5, b"", OPENED) == Undo((), ((Opcode.RELEASEDIR, 5, RELEASE),))
    assert undo(Opcode.CREATE, 5, b"", ENTRY_BYTES + OPENED) == Undo(
        (42,), ((Opcode.RELEASE, 42, RELEASE),)
    )


def test_a_listing_is_forgotten_record_by_record() -> None:
    listing = b"".join(
        fuse.encode_direntplus(ENTRY._replace(nodeid=node), 9, node, 8, b"n%d" % node)
        for node in (0, 3, 4)
    )

    assert undo_late_reply(Opcode.READDIRPLUS, 1, b"", listing) == Undo((3, 4))


def test_a_lock_is_unlocked_for_its_owner() -> None:
    lock = fuse.LkIn(99, 1234, 10, 19, LockType.WRITE, 77, 1)

    undo = undo_late_reply(Opcode.SETLKW, 5, fuse.LK_IN.pack(lock), b"")

    ((opcode, nodeid, body),) = undo.requests
    assert (opcode, nodeid) == (Opcode.SETLK, 5)
    assert fuse.LK_IN.unpack(body) == lock._replace(type=LockType.UNLOCK)


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.WRITE, Opcode.UNLINK, Opcode.SETLK])
def test_other_replies_hand_nothing_out(opcode: Opcode) -> None:
    assert undo_late_reply(opcode, 1, bytes(48), bytes(200)) == Undo()


@given(st.integers(0, 60), st.binary(max_size=60), st.binary(max_size=400))
def test_any_bytes(opcode: int, args: bytes, reply: bytes) -> None:
    undo_late_reply(opcode, 1, args, reply)
