"""What one guest may have at most, so that there is something left for the others."""

from __future__ import annotations

import errno
import resource
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs import locks
from vfsmount.hostd.fs.call import Deferred
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 5


@pytest.fixture
def share(share: Share) -> Share:
    share.open_limit = LIMIT
    return share


@pytest.fixture
def node(guest: DirectGuest, folder: Path) -> int:
    (folder / "file").touch()
    return guest.walk("file")


def test_limits_follow_the_process(folder: Path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Share(folder, ShareOptions()) as share:
        handles, owners, mapped = 2 * share.open_limit, share.open_limit, share.open_limit
        assert handles + owners + mapped + share.node_limit <= soft * 15 // 16


def test_files_and_directories(guest: DirectGuest, share: Share, node: int, folder: Path) -> None:
    handles = [guest.open(node) for _ in range(LIMIT - 2)]
    directories = [guest.opendir() for _ in range(2)]
    for attempt in (
        lambda: guest.open(node),
        lambda: guest.opendir(),
        lambda: guest.create(ROOT, b"file"),
        lambda: guest.create(ROOT, b"new"),
    ):
        with expect_errno("ENFILE"):
            attempt()
    assert not (folder / "new").exists()
    with DirectGuest(share) as other:
        other.init()
        assert other.open(other.walk("file"))
    guest.release(handles[0])
    guest.open(node)
    guest.releasedir(directories[0])
    guest.create(ROOT, b"new")


def set_lock(guest: DirectGuest, fh: int, owner: int, opcode: Opcode = Opcode.SETLK) -> None:
    body = fuse.LK_IN.values(fh, owner, owner, owner, LockType.WRITE, 1, 0)
    guest.call(opcode, ROOT, body)


def test_owners_of_locks(guest: DirectGuest, node: int) -> None:
    fh = guest.open(node, 2)
    for _ in range(3):
        for owner in range(LIMIT):
            set_lock(guest, fh, owner)
        with expect_errno("ENOLCK"):
            set_lock(guest, fh, LIMIT)
        for owner in range(LIMIT):
            guest.call(Opcode.FLUSH, node, fuse.FLUSH_IN.values(fh, owner))


def test_waits_for_locks(guest: DirectGuest, node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring has no more places, but a guest can offer one again and again."""
    monkeypatch.setattr(locks, "_MAX_WAITS", 3)
    fh = guest.open(node, 2)
    set_lock(guest, fh, 0)
    waiting = fuse.LK_IN.values(fh, 1, 0, 0, LockType.WRITE, 1, 0)
    for unique in range(10, 13):
        with pytest.raises(Deferred):
            guest.exchange(fuse.encode_request(Opcode.SETLKW, unique, node, waiting), 16)
    message = fuse.encode_request(Opcode.SETLKW, 13, node, waiting)
    assert fuse.OUT_HEADER.unpack(guest.exchange(message, 16)).error == -errno.ENOLCK
