"""The daemon as a process with several real sessions on it at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

import vfsmount
from tests.support.daemons import start_daemon
from tests.support.wait import wait_until_async
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockFlag, LockType

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemons import Daemon

pytestmark = pytest.mark.slow

GUESTS = 4
ROUNDS = 40
DEADLINE = 20.0


async def busy_guest(daemon: Daemon, number: int, started: trio.Event) -> None:
    """Make, write, move, read, list and remove in a folder of its own and in one for all."""
    async with vfsmount.connect(daemon.socket) as guest:
        started.set()
        mine = await guest.mkdir(1, b"guest%d" % number, 0o755)
        shared = await guest.lookup(1, b"shared")
        for turn in range(ROUNDS):
            name = b"%d-%d" % (number, turn)
            data = os.urandom(1 + 5000 * (turn % 7))
            entry, opened, *_ = await guest.create(mine.nodeid, name, os.O_RDWR, 0o644)
            assert await guest.write(entry.nodeid, opened.fh, 0, data) == len(data)
            await guest.rename(mine.nodeid, name, shared.nodeid, name)
            assert bytes(await guest.read(entry.nodeid, opened.fh, 0, 40_000)) == data
            await guest.release(entry.nodeid, opened.fh)
            again = await guest.lookup(shared.nodeid, name)
            assert again.nodeid == entry.nodeid
            guest.forget(entry.nodeid, 2)
            with pytest.raises(RemoteErrno):
                await guest.lookup(mine.nodeid, name)
            if turn % 2:
                await guest.unlink(shared.nodeid, name)


async def test_many_guests_at_once(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    with start_daemon("bundled", tmp_path) as daemon:
        before = daemon.fd_count()
        async with trio.open_nursery() as nursery:
            for number in range(GUESTS):
                nursery.start_soon(busy_guest, daemon, number, trio.Event())

        await wait_until_async(
            lambda: daemon.fd_count() == before, DEADLINE, "all descriptors to be given back"
        )
        assert daemon.is_running()
        assert "WARNING" not in daemon.stderr
    left = {path.name for path in (tmp_path / "shared").iterdir()}
    assert left == {f"{n}-{turn}" for n in range(GUESTS) for turn in range(0, ROUNDS, 2)}


async def test_a_guest_that_is_cut_off_harms_no_other(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    with start_daemon("bundled", tmp_path) as daemon:
        async with trio.open_nursery() as nursery:
            started = trio.Event()
            nursery.start_soon(busy_guest, daemon, 0, started)
            await started.wait()
            for number in range(1, 4):
                cut_off, begun = trio.CancelScope(), trio.Event()

                async def doomed(
                    number: int = number,
                    scope: trio.CancelScope = cut_off,
                    begun: trio.Event = begun,
                ) -> None:
                    with scope:
                        await busy_guest(daemon, number, begun)

                nursery.start_soon(doomed)
                await begun.wait()
                cut_off.cancel()
        assert daemon.is_running()
    assert len(list((tmp_path / "shared").glob("0-*"))) == ROUNDS // 2


# --- locks ----------------------------------------------------------------------------------------

INCREMENTS = 50
END_OF_FILE = (1 << 63) - 1


def whole(fh: int, owner: int, kind: int = LockType.WRITE, flags: int = 0) -> fuse.LkIn:
    return fuse.LkIn(fh, owner, 0, END_OF_FILE, kind, 1, flags)


async def counting_guest(daemon: Daemon, owners: int, flags: int) -> None:
    """Count in a shared file, with two lock owners at once, each under the lock."""
    async with vfsmount.connect(daemon.socket) as guest, trio.open_nursery() as nursery:
        node = (await guest.lookup(1, b"counter")).nodeid

        async def count(owner: int) -> None:
            fh = (await guest.open(node, os.O_RDWR)).fh
            for _ in range(INCREMENTS):
                await guest.setlk(node, whole(fh, owner, flags=flags), wait=True)
                number = int(await guest.read(node, fh, 0, 100))
                await trio.lowlevel.checkpoint()
                await guest.write(node, fh, 0, b"%d" % (number + 1))
                await guest.setlk(node, whole(fh, owner, LockType.UNLOCK, flags))
            await guest.release(node, fh)

        for owner in range(owners):
            nursery.start_soon(count, owner)


@pytest.mark.parametrize("flags", [0, LockFlag.FLOCK])
async def test_no_count_is_lost_under_a_lock(tmp_path: Path, flags: int) -> None:
    (tmp_path / "counter").write_bytes(b"0")
    with start_daemon("bundled", tmp_path) as daemon:
        before = daemon.fd_count()
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                for _ in range(GUESTS):
                    nursery.start_soon(counting_guest, daemon, 2, flags)
        await wait_until_async(
            lambda: daemon.fd_count() == before, DEADLINE, "all descriptors to be given back"
        )
    assert int((tmp_path / "counter").read_bytes()) == GUESTS * 2 * INCREMENTS


async def test_a_lock_that_is_granted_to_nobody_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with start_daemon("bundled", tmp_path) as daemon:
        async with vfsmount.connect(daemon.socket) as one, vfsmount.connect(daemon.socket) as two:
            node, other = [(await guest.lookup(1, b"file")).nodeid for guest in (one, two)]
            fh, held = (await one.open(node, os.O_RDWR)).fh, (await two.open(other, os.O_RDWR)).fh
            await one.setlk(node, whole(fh, 1))
            with trio.move_on_after(0.1) as scope:
                await two.setlk(other, whole(held, 2), wait=True)
            assert scope.cancelled_caught
            await one.setlk(node, whole(fh, 1, LockType.UNLOCK))

            with trio.fail_after(DEADLINE):
                await one.setlk(node, whole(fh, 3), wait=True)
