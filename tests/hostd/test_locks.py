"""Locks of guests on the host's own: ranges, owners, waits, interrupts, deadlocks, and the end."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import DirectGuest, expect_errno
from tests.support.wait import wait_until
from vfsmount.hostd.fs import lockboard
from vfsmount.hostd.fs.call import Deferred
from vfsmount.hostd.fs.lockboard import TURN
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode, ReleaseFlag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ, WRITE, UNLOCK = LockType.READ, LockType.WRITE, LockType.UNLOCK
END = (1 << 63) - 1
EINTR, EDEADLK, EBADF = 4, 35, 9


class Process:
    """A process of a guest that has a file open: one lock owner, one handle.

    Args:
        guest: Its machine.
        owner: What its kernel calls it.
    """

    uniques = iter(range(100, 10_000, 2))

    def __init__(self, guest: DirectGuest, owner: int, name: str = "file") -> None:
        self.guest = guest
        self.owner = owner
        self.nodeid = guest.walk(name)
        self.fh = guest.open(self.nodeid, os.O_RDWR)

    def _body(self, kind: int, start: int, end: int, flags: int) -> bytes:
        return fuse.LK_IN.values(self.fh, self.owner, start, end, kind, 1000 + self.owner, flags)

    def lock(self, kind: int, start: int = 0, end: int = END, flags: int = 0) -> None:
        self.guest.call(Opcode.SETLK, self.nodeid, self._body(kind, start, end, flags))

    def flock(self, kind: int) -> None:
        self.lock(kind, flags=fuse.LockFlag.FLOCK)

    def test(self, kind: int, start: int = 0, end: int = END) -> fuse.LkOut:
        body = self._body(kind, start, end, 0)
        found: fuse.LkOut = self.guest.record(Opcode.GETLK, self.nodeid, body)
        return found

    def wait(self, kind: int, start: int = 0, end: int = END, flags: int = 0) -> int:
        """Ask for a lock that somebody else has; returns the number of the request."""
        unique = next(self.uniques)
        body = self._body(kind, start, end, flags)
        message = fuse.encode_request(Opcode.SETLKW, unique, self.nodeid, body)
        with pytest.raises(Deferred) as deferred:
            _raise(fuse.decode_reply(Opcode.SETLKW, self.guest.exchange(message, 100)))
        assert deferred.value.unique == unique
        return unique

    def flush(self) -> None:
        self.guest.call(Opcode.FLUSH, self.nodeid, fuse.FLUSH_IN.values(self.fh, self.owner))

    def close(self) -> None:
        body = fuse.RELEASE_IN.values(self.fh, 0, ReleaseFlag.FLOCK_UNLOCK, self.owner)
        self.guest.call(Opcode.RELEASE, self.nodeid, body)

    def interrupt(self, unique: int) -> None:
        body = fuse.INTERRUPT_IN.values(unique)
        message = fuse.encode_request(Opcode.INTERRUPT, unique + 1, 0, body)
        assert self.guest.exchange(message, 0) == b""


def _raise(reply: fuse.Reply) -> None:
    raise OSError(-reply.header.error, "not put aside")


def settled(guest: DirectGuest) -> list[tuple[int, int]]:
    """What the connection would answer now, because it was woken; nothing if it was not."""
    locks = guest.session.locks
    try:
        locks.wake()
    except BlockingIOError:
        return []
    return locks.retry()


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(b"0123456789")
    return path


@pytest.fixture
def other(share: Share, file: Path) -> Iterator[DirectGuest]:
    """A second guest on the same share."""
    with DirectGuest(share) as guest:
        guest.init()
        yield guest


@pytest.fixture
def pair(guest: DirectGuest, other: DirectGuest) -> tuple[Process, Process]:
    """Two processes on two machines, which their kernels happen to call by the same number."""
    return Process(guest, 7), Process(other, 7)


@pytest.fixture
def mates(guest: DirectGuest, file: Path) -> tuple[Process, Process]:
    """Two processes on one machine."""
    return Process(guest, 7), Process(guest, 8)


@pytest.mark.parametrize("which", ["pair", "mates"])
def test_owners_exclude_each_other_where_ranges_meet(
    request: pytest.FixtureRequest, which: str
) -> None:
    one, two = request.getfixturevalue(which)
    one.lock(WRITE, 10, 19)

    two.lock(WRITE, 0, 9)
    two.lock(READ, 20)
    for kind, start, end in ((WRITE, 19, 19), (READ, 10, 10), (WRITE, 0, END)):
        with expect_errno("EAGAIN"):
            two.lock(kind, start, end)
    one.lock(UNLOCK, 15, 19)
    two.lock(WRITE, 15, 19)
    with expect_errno("EAGAIN"):
        one.lock(READ, 0, END)


def test_readers_share(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(READ)
    two.lock(READ)
    with expect_errno("EAGAIN"):
        two.lock(WRITE)
    one.lock(UNLOCK)
    two.lock(WRITE)
    two.lock(READ)
    one.lock(READ)


def test_a_lock_belongs_to_its_owner_not_to_the_handle(guest: DirectGuest, file: Path) -> None:
    parent = Process(guest, 7)
    child, again = Process(guest, 8), Process(guest, 7)
    child.fh = parent.fh  # inherited
    parent.lock(WRITE)
    again.lock(WRITE)
    with expect_errno("EAGAIN"):
        child.lock(WRITE)
    again.lock(UNLOCK)
    child.lock(WRITE)


def test_getlk_tells_who(guest: DirectGuest, pair: tuple[Process, Process]) -> None:
    one, two = pair
    assert one.test(WRITE, 5, 10) == (5, 10, UNLOCK, 0)
    one.lock(WRITE, 2)
    assert one.test(WRITE) == (0, END, UNLOCK, 0)
    assert two.test(READ) == (2, END, WRITE, 0)  # a process of another machine has no number here
    assert Process(guest, 9).test(READ) == (2, END, WRITE, 1007)
    one.lock(READ, 2, 8)
    assert Process(guest, 9).test(WRITE, 0, 8) == (2, 8, READ, 1007)
    assert Process(guest, 9).test(READ, 0, 8) == (0, 8, UNLOCK, 0)


@contextmanager
def first_gives_up(guest: DirectGuest, third: Process) -> Iterator[Process]:
    """One of two that have a lock each; after the block its lock is free, the other's is not."""
    one, two = Process(guest, 7), Process(guest, 8)
    one.lock(WRITE, 0, 4)
    two.lock(WRITE, 5, 9)
    yield one
    third.lock(WRITE, 0, 4)
    with expect_errno("EAGAIN"):
        third.lock(WRITE, 5, 9)


@pytest.mark.usefixtures("file")
def test_flush_gives_up_what_the_owner_has_and_nobody_elses(guest: DirectGuest) -> None:
    with first_gives_up(guest, Process(guest, 9)):
        duplicate = Process(guest, 7)
        duplicate.flush()


@pytest.mark.usefixtures("file")
def test_a_handle_takes_its_own_locks_along(guest: DirectGuest, other: DirectGuest) -> None:
    """Open file descriptions are owners, of whose end nothing but RELEASE tells."""
    with first_gives_up(guest, Process(other, 9)) as one:
        one.close()


@pytest.mark.usefixtures("file")
def test_an_owner_that_goes_on_with_another_handle(guest: DirectGuest, other: DirectGuest) -> None:
    one, again = Process(guest, 7), Process(guest, 7)
    one.lock(WRITE)
    one.flush()
    again.lock(WRITE)
    one.close()
    with expect_errno("EAGAIN"):
        Process(other, 9).lock(READ)


@pytest.mark.parametrize("end", ["destroy", "init", "close"])
def test_a_guest_that_goes_frees_its_locks(share: Share, other: DirectGuest, end: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    guest = DirectGuest(share)
    guest.init()
    one, two = Process(guest, 7), Process(other, 8)
    one.lock(WRITE, 0, 4)
    one.flock(WRITE)
    waits = [two.wait(WRITE), two.wait(WRITE, flags=fuse.LockFlag.FLOCK)]

    getattr(guest.session if end == "close" else guest, end)()

    assert settled(other) == [(unique, 0) for unique in waits]
    if end != "close":
        guest.session.close()
    two.close()
    other.forget(two.nodeid)
    assert len(os.listdir("/proc/self/fd")) == before


def test_processes_of_the_host_take_part(pair: tuple[Process, Process], file: Path) -> None:
    one, two = pair
    one.lock(WRITE, 0, 4)
    one.flock(WRITE)
    with file.open("r+b") as mine:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5)
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)
        with expect_errno("EAGAIN"):
            two.lock(READ, 9, 9)
        with pytest.raises(BlockingIOError):
            fcntl.flock(mine, fcntl.LOCK_SH | fcntl.LOCK_NB)
        unique = two.wait(READ, 9, 9)
    locks = two.guest.session.locks
    while not (over := locks.retry()):  # nobody tells, so it is looked at now and then
        pass
    assert over == [(unique, 0)]


def test_flock_belongs_to_the_handle(pair: tuple[Process, Process]) -> None:
    one, two = pair
    child = Process(one.guest, 8)
    child.fh = one.fh
    one.flock(WRITE)
    child.flock(WRITE)
    with expect_errno("EAGAIN"):
        two.flock(READ)
    two.lock(WRITE)  # the other kind of locks
    one.flock(READ)
    two.flock(READ)
    child.flock(UNLOCK)
    two.flock(WRITE)
    one.flush()
    with expect_errno("EAGAIN"):
        one.flock(READ)
    two.close()
    one.flock(WRITE)


@pytest.mark.parametrize("flags", [0, fuse.LockFlag.FLOCK])
@pytest.mark.parametrize("how", ["unlock", "downgrade", "close"])
def test_a_wait_ends_when_the_lock_is_given_up(
    pair: tuple[Process, Process], flags: int, how: str
) -> None:
    one, two = pair
    one.lock(WRITE, flags=flags)
    unique = two.wait(READ, flags=flags)
    assert settled(two.guest) == []

    if how == "close":
        one.flush()
        one.close()
    else:
        one.lock(UNLOCK if how == "unlock" else READ, flags=flags)

    assert settled(two.guest) == [(unique, 0)]
    assert settled(two.guest) == []
    if how != "downgrade":
        with expect_errno("EAGAIN"):
            Process(one.guest, 9).lock(WRITE, flags=flags)


def test_a_wait_that_tries_again_wakes_nobody(pair: tuple[Process, Process]) -> None:
    """Two who wait must not keep each other busy."""
    one, two = pair
    one.flock(WRITE)
    for guest in (one.guest, two.guest):
        Process(guest, 9).wait(WRITE, flags=fuse.LockFlag.FLOCK)
    one.guest.session.locks.notify()
    for _ in range(3):
        for guest in (one.guest, two.guest):
            assert settled(guest) == []
    for guest in (one.guest, two.guest):
        with pytest.raises(BlockingIOError):
            os.eventfd_read(guest.session.locks.wake_fd)


@pytest.fixture
def third(share: Share, file: Path) -> Iterator[DirectGuest]:
    """One more guest on the same share."""
    with DirectGuest(share) as guest:
        guest.init()
        yield guest


@pytest.fixture
def no_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, nobody has waited too long for the turn of another."""
    monkeypatch.setattr(lockboard, "TURN", 1000.0)


@pytest.mark.usefixtures("no_turn_ends")
@pytest.mark.parametrize("flags", [0, fuse.LockFlag.FLOCK])
def test_who_came_first_is_tried_first(
    pair: tuple[Process, Process], third: DirectGuest, flags: int
) -> None:
    one, two = pair
    three = Process(third, 7)
    one.lock(WRITE, flags=flags)
    first, second = two.wait(WRITE, flags=flags), three.wait(READ, flags=flags)
    one.lock(UNLOCK, flags=flags)
    assert settled(third) == []  # its thread was faster
    assert settled(two.guest) == [(first, 0)]
    assert settled(third) == []
    two.lock(UNLOCK, flags=flags)
    assert settled(third) == [(second, 0)]


@pytest.mark.usefixtures("no_turn_ends")
@pytest.mark.parametrize("flags", [0, fuse.LockFlag.FLOCK])
def test_who_has_its_lock_wakes_the_next(
    pair: tuple[Process, Process], third: DirectGuest, flags: int
) -> None:
    one, two = pair
    three = Process(third, 7)
    one.lock(WRITE, flags=flags)
    first, second = two.wait(READ, flags=flags), three.wait(READ, flags=flags)
    one.lock(UNLOCK, flags=flags)
    assert settled(third) == []
    assert settled(two.guest) == [(first, 0)]
    assert settled(third) == [(second, 0)]


@pytest.mark.usefixtures("no_turn_ends")
@pytest.mark.parametrize("flags", [0, fuse.LockFlag.FLOCK])
def test_who_comes_again_does_not_overtake(pair: tuple[Process, Process], flags: int) -> None:
    one, two = pair
    one.lock(WRITE, flags=flags)
    waiting = two.wait(WRITE, flags=flags)
    one.lock(UNLOCK, flags=flags)
    again = one.wait(WRITE, flags=flags)
    assert settled(one.guest) == []
    assert settled(two.guest) == [(waiting, 0)]
    two.lock(UNLOCK, flags=flags)
    assert settled(one.guest) == [(again, 0)]


@pytest.mark.usefixtures("no_turn_ends")
def test_who_cannot_have_its_lock_keeps_nobody_back(
    pair: tuple[Process, Process], third: DirectGuest
) -> None:
    one, two = pair
    three = Process(third, 7)
    one.lock(WRITE, 0, 0)
    two.lock(WRITE, 9, 9)
    all_of_it = three.wait(WRITE)
    more = one.wait(WRITE, 9, 9)  # three waits for this one
    two.lock(UNLOCK, 9, 9)
    assert settled(one.guest) == []
    assert settled(third) == []
    assert settled(one.guest) == [(more, 0)]
    one.flush()
    assert settled(third) == [(all_of_it, 0)]


@pytest.mark.usefixtures("no_turn_ends")
def test_in_order_of_arrival_when_the_host_gives_a_lock_up(
    pair: tuple[Process, Process], file: Path
) -> None:
    one, two = pair
    with file.open("r+b") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        first = one.wait(WRITE, flags=fuse.LockFlag.FLOCK)
        second = two.wait(WRITE, flags=fuse.LockFlag.FLOCK)
        for _ in range(2):
            settled(one.guest), settled(two.guest)
    locks = two.guest.session.locks
    wait_until(lambda: not locks.patience(), 1, "it to be time for a look")
    assert locks.retry() == []
    assert settled(one.guest) == [(first, 0)]
    assert settled(two.guest) == []
    one.flock(UNLOCK)
    assert settled(two.guest) == [(second, 0)]


def test_nobody_waits_long_for_the_turn_of_a_guest_that_is_busy(
    pair: tuple[Process, Process], third: DirectGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    three = Process(third, 7)
    one.lock(WRITE)
    first, second = two.wait(WRITE), three.wait(WRITE)
    with monkeypatch.context() as patch:
        patch.setattr(lockboard, "TURN", 1000.0)  # else it may have passed by now
        one.lock(UNLOCK)
        assert settled(third) == []
    patience = third.session.locks.patience()
    assert patience is not None
    assert patience <= TURN
    assert wait_until(third.session.locks.retry, 1, "its own turn") == [(second, 0)]
    three.lock(UNLOCK)
    assert settled(two.guest) == [(first, 0)]


@pytest.mark.usefixtures("no_turn_ends")
def test_a_circle_with_one_that_has_yet_to_be_tried(
    pair: tuple[Process, Process], third: DirectGuest, folder: Path
) -> None:
    (folder / "second").touch()
    one, two = pair
    beyond = Process(one.guest, 7, "second")
    beyond.lock(WRITE)
    two.lock(WRITE)
    Process(third, 7, "second").wait(WRITE)
    beyond.lock(UNLOCK, 9, 9)
    Process(two.guest, 7, "second").wait(WRITE)  # is put aside at once
    with expect_errno("EDEADLK"):
        one.wait(WRITE)


def test_an_interrupt_ends_a_wait(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE)
    unique = two.wait(WRITE)
    two.interrupt(unique)
    assert settled(two.guest) == [(unique, EINTR)]
    one.lock(UNLOCK)
    assert settled(two.guest) == []
    one.lock(WRITE)


def test_an_interrupt_that_overtakes_its_request(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE)
    two.uniques = iter((50, 52))
    two.interrupt(50)
    with expect_errno("EINTR"):
        two.wait(WRITE)
    two.wait(WRITE)


def test_interrupts_for_nothing_are_forgotten(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE)
    two.uniques = iter((2,))
    for unique in range(2, 2000, 2):
        two.interrupt(unique)
    two.wait(WRITE)


def test_a_wait_on_a_handle_that_is_closed(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE)
    unique = two.wait(WRITE)
    two.close()
    one.lock(UNLOCK)
    assert settled(two.guest) == [(unique, EBADF)]


def test_two_requests_with_one_number(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE)
    two.uniques = iter((50, 50))
    two.wait(WRITE)
    with expect_errno("EINVAL"):
        two.wait(WRITE)


def test_a_circle_of_two(pair: tuple[Process, Process]) -> None:
    one, two = pair
    one.lock(WRITE, 0, 0)
    two.lock(WRITE, 1, 1)
    unique = one.wait(WRITE, 1, 1)
    with expect_errno("EDEADLK"):
        two.wait(WRITE, 0, 0)
    two.lock(UNLOCK)
    assert settled(one.guest) == [(unique, 0)]


def test_a_circle_of_three_over_two_files(
    guest: DirectGuest, other: DirectGuest, folder: Path
) -> None:
    (folder / "second").touch()
    one, two, three = Process(guest, 1), Process(other, 2), Process(guest, 3)
    beyond = Process(other, 2, "second")
    one.lock(WRITE, 0, 0)
    two.lock(WRITE, 1, 1)
    Process(guest, 3, "second").lock(WRITE)
    one.wait(WRITE, 1, 1)
    with expect_errno("EAGAIN"):
        beyond.lock(WRITE)
    beyond.wait(WRITE)
    with expect_errno("EDEADLK"):
        three.wait(READ, 0, 0)


def test_a_queue_is_no_circle(guest: DirectGuest, file: Path) -> None:
    holder, *queue = (Process(guest, owner) for owner in range(1, 8))
    holder.lock(WRITE, 0, 9)
    for process in queue:
        process.lock(WRITE, 100 + process.owner, 100 + process.owner)
        process.wait(WRITE, 0, 9)
    with expect_errno("EDEADLK"):
        holder.wait(WRITE, 103, 103)


@pytest.mark.parametrize(
    ("kind", "start", "end", "flags"),
    [(3, 0, 0, 0), (WRITE, 5, 4, 0), (WRITE, 0, 1 << 63, 0), (READ, END, 1 << 64, 0), (9, 0, 0, 1)],
)
def test_locks_that_cannot_be(
    pair: tuple[Process, Process], kind: int, start: int, end: int, flags: int
) -> None:
    with expect_errno("EINVAL"):
        pair[0].lock(kind, start, min(end, (1 << 64) - 1), flags)


def test_the_last_byte_of_all(pair: tuple[Process, Process], file: Path) -> None:
    one, two = pair
    one.lock(WRITE, END - 1, END)
    assert two.test(READ, END) == (END - 1, END, WRITE, 0)
    one.lock(WRITE, END - 1, END - 1)
    with file.open("rb") as mine:
        asked = struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, END - 1, 0, 0)
        assert struct.unpack("hhqqi0q", fcntl.fcntl(mine, fcntl.F_GETLK, asked))[4] == -1


def test_a_handle_that_is_none(pair: tuple[Process, Process]) -> None:
    one, _ = pair
    one.fh = 99
    for call in (one.lock, one.flock, one.wait, one.test):
        with expect_errno("EBADF"):
            call(WRITE)


def test_of_flock_locks_nobody_can_ask(pair: tuple[Process, Process]) -> None:
    one, _ = pair
    body = fuse.LK_IN.values(one.fh, 1, 0, END, WRITE, 1, fuse.LockFlag.FLOCK)
    with expect_errno("EINVAL"):
        one.guest.call(Opcode.GETLK, one.nodeid, body)
    with expect_errno("EINVAL"):
        one.test(UNLOCK)


def test_a_read_only_share_has_read_locks(folder: Path) -> None:
    (folder / "file").touch()
    with (
        Share(folder, ShareOptions(readonly=True)) as share,
        DirectGuest(share) as guest,
        (folder / "file").open("r+b") as mine,
    ):
        guest.init()
        nodeid = guest.walk("file")
        fh = guest.open(nodeid, os.O_RDONLY)
        for kind, errors in ((READ, ()), (WRITE, ("EBADF",))):
            body = fuse.LK_IN.values(fh, 1, 0, END, kind, 1, 0)
            if errors:
                with expect_errno(*errors):
                    guest.call(Opcode.SETLK, nodeid, body)
            else:
                guest.call(Opcode.SETLK, nodeid, body)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
