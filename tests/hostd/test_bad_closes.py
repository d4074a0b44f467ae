"""File systems whose close(2) fails, and other errors in between: no descriptor is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import connected
from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.faults import Refused
from vfsmount.hostd.requests import RequestChannel
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from pathlib import Path

    from vfsmount.hostd.fs.share import Share


@pytest.fixture
def closes_badly(share: Share, monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """Have each close of an open file fail, as over NFS with a full server.

    The file is closed all the same. Returns the threads to which this does not happen. It begins
    after the share does, and ends before it.
    """
    close = os.close
    spared: set[threading.Thread] = set()

    def fail(fd: int) -> None:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        usable = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        close(fd)
        if regular and usable and threading.current_thread() not in spared:
            raise OSError(errno.EDQUOT, "written too much before")

    monkeypatch.setattr(os, "close", fail)
    return spared


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("closes_badly")
@pytest.mark.parametrize("end", ["destroy", "close", "release"])
def test_a_guest_that_goes(share: Share, folder: Path, end: str) -> None:
    for name in ("one", "two", "three"):
        (folder / name).write_bytes(b"")
    before = descriptors()
    guest = DirectGuest(share)
    guest.init()
    handles = [guest.open(guest.walk(name), os.O_RDWR) for name in ("one", "two", "three")]
    for owner, fh in enumerate(handles):
        body = fuse.LK_IN.values(fh, owner, 0, 9, LockType.WRITE, 1, 0)
        guest.call(Opcode.SETLK, ROOT, body)
    if end == "destroy":
        guest.destroy()
    elif end == "release":
        for fh in handles:
            guest.release(fh)
    guest.session.close()
    assert descriptors() == before


def test_descriptors_that_came_with_a_message(
    share: Share, closes_badly: set[threading.Thread]
) -> None:
    closes_badly.add(threading.main_thread())
    with connected(share) as frontend:
        frontend.handshake()
        frontend.init()
        assert frontend.getattr(ROOT).ino


def test_create_of_what_is_there_and_cannot_be_looked_at(
    guest: DirectGuest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    before, fstat = descriptors(), os.fstat

    def stale(fd: int) -> os.stat_result:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            raise OSError(errno.ESTALE, "gone")
        return fstat(fd)

    with monkeypatch.context() as patches:
        patches.setattr(os, "fstat", stale)
        with expect_errno("ESTALE"):
            guest.create(ROOT, b"file")
    assert descriptors() == before


def test_a_request_channel_that_is_refused_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such option")

    monkeypatch.setattr(socket.socket, "setsockopt", refuse)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(Refused):
            RequestChannel(theirs.fileno())
        theirs.send(b"still open")
