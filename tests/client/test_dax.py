"""Reads and writes inside mapped ranges: no message, and what the host has now."""

from __future__ import annotations

import errno
import os
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

import vfsmount
from tests.support.daemons import start_daemon
from tests.support.hammer import hammered
from tests.support.wait import wait_until_async
from vfsmount.errors import ChannelBroken, RemoteErrno

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.support.daemons import Daemon
    from vfsmount.client.dax import Dax
    from vfsmount.client.session import Session

DEADLINE = 30.0
MIB = 1 << 20
RANGE = 2 * MIB


class File:
    """An open file of a guest whose first range is mapped."""

    def __init__(self, guest: Session, dax: Dax, nodeid: int, fh: int) -> None:
        self.guest = guest
        self.dax = dax
        self.nodeid = nodeid
        self.fh = fh
        self.before = self.messages()

    def messages(self) -> int:
        rows = self.guest.channel.statistics().requests
        return sum(rows[name].count for name in ("READ", "WRITE") if name in rows)

    @property
    def sent(self) -> int:
        """READ and WRITE messages since the beginning."""
        return self.messages() - self.before

    async def read(self, offset: int, size: int) -> bytes:
        return await self.guest.read(self.nodeid, self.fh, offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        return await self.guest.write(self.nodeid, self.fh, offset, data)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests: each brings a session of its own."""
    with start_daemon("bundled", tmp_path_factory.mktemp("share")) as daemon:
        yield daemon


@pytest.fixture
def folder(daemon: Daemon) -> Iterator[Path]:
    """What it shares, empty."""
    yield daemon.source
    for path in daemon.source.iterdir():
        path.unlink()


@asynccontextmanager
async def session(daemon: Daemon, window: int = 8 * MIB) -> AsyncIterator[tuple[Session, Dax]]:
    with trio.fail_after(DEADLINE):
        async with vfsmount.connect(daemon.socket, dax=window) as guest:
            assert guest.dax is not None
            yield guest, guest.dax


@asynccontextmanager
async def mapped(
    daemon: Daemon, content: bytes, flags: int = os.O_RDWR, *, write: bool = True
) -> AsyncIterator[File]:
    """A file of that content at ``file``, opened and mapped."""
    (daemon.source / "file").write_bytes(content)
    async with session(daemon) as (guest, dax):
        entry = await guest.lookup(1, b"file")
        opened = await guest.open(entry.nodeid, flags)
        assert await dax.map(entry.nodeid, 0, len(content) or 1, write=write)
        file = File(guest, dax, entry.nodeid, opened.fh)
        yield file
        await guest.release(entry.nodeid, opened.fh, flags)
        guest.forget(entry.nodeid)
        assert guest.window is not None
        guest.window.check_invariants()


async def test_no_message(daemon: Daemon, folder: Path) -> None:
    content = os.urandom(3 * MIB)
    async with mapped(daemon, content) as file:
        for offset, size in ((0, 1), (5, 4096), (RANGE - 10, 20), (0, 3 * MIB), (3 * MIB - 5, 10)):
            assert await file.read(offset, size) == content[offset : offset + size]
        assert await file.read(3 * MIB, 10) == b""
        assert await file.write(RANGE - 3, b"abcdef") == 6
        assert (
            await file.read(RANGE - 4, 8)
            == content[RANGE - 4 : RANGE - 3] + b"abcdef" + content[RANGE + 3 : RANGE + 4]
        )
        assert (folder / "file").read_bytes()[RANGE - 3 : RANGE + 3] == b"abcdef"
        view = await file.guest.read_view(file.nodeid, file.fh, 0, 4096)
        assert view == content[:4096]
        assert file.sent == 0
        assert file.dax.statistics().hits == 9


async def test_a_hundred_thousand_accesses(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, bytes(MIB)) as file:
        for at in range(50_000):
            await file.write(at, b"x")
            await file.read(at, 4096)
        rows = file.guest.channel.statistics().requests
        assert not {"READ", "WRITE", "GETXATTR"} & set(rows)
        assert (folder / "file").read_bytes()[:50_001] == b"x" * 50_000 + b"\0"


async def test_what_the_host_does_is_seen_at_once(daemon: Daemon, folder: Path) -> None:
    path = folder / "file"
    async with mapped(daemon, b"a" * MIB) as file:
        with path.open("r+b") as host:
            host.write(b"host")
            host.flush()
            assert await file.read(0, 6) == b"hostaa"
            host.truncate(3)
            assert await file.read(0, 6) == b"hos"
            assert await file.read(4096, 6) == b""
            host.truncate(10)
            assert await file.read(0, 20) == b"hos" + bytes(7)
            host.seek(3 * MIB)
            host.write(b"end")
            host.flush()
            assert await file.read(MIB, 6) == bytes(6)
        assert file.sent == 0


async def test_writes_that_extend_go_by_message(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, b"a" * 100) as file:
        assert await file.write(95, b"12345") == 5
        assert file.sent == 0
        assert await file.write(95, b"123456") == 6
        assert file.sent == 1
        assert await file.write(200, b"far") == 3
        assert file.sent == 2
        assert await file.write(100, b"in a hole") == 9
        assert await file.read(95, 300) == b"12345in a hole" + bytes(91) + b"far"
        assert file.sent == 2
        (folder / "file").write_bytes(b"")
        assert await file.write(0, b"x") == 1
        assert file.sent == 3
        assert (await file.guest.getattr(file.nodeid)).attr.size == 1


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_DSYNC, os.O_SYNC])
async def test_handles_whose_writes_are_the_daemons(
    daemon: Daemon, folder: Path, flag: int
) -> None:
    async with mapped(daemon, b"a" * 100, os.O_RDWR | flag) as file:
        await file.guest.write(file.nodeid, file.fh, 0, b"b", 0, os.O_RDWR | flag)
        assert file.sent == 1
        assert await file.read(100, 1) == (b"b" if flag == os.O_APPEND else b"")
        assert file.sent == 1


async def test_handles_keep_their_rights(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, b"a" * 100) as file:
        guest, nodeid = file.guest, file.nodeid
        reader = await guest.open(nodeid, os.O_RDONLY)
        writer = await guest.open(nodeid, os.O_WRONLY)
        with pytest.raises(RemoteErrno) as caught:
            await guest.write(nodeid, reader.fh, 0, b"b")
        assert caught.value.errno == errno.EBADF
        with pytest.raises(RemoteErrno):
            await guest.read(nodeid, writer.fh, 0, 1)
        with pytest.raises(RemoteErrno):
            await guest.read(nodeid, 4711, 0, 1)
        assert await guest.read(nodeid, reader.fh, 0, 1) == b"a"
        await guest.write(nodeid, writer.fh, 0, b"b")
        for opened, flags in ((reader, os.O_RDONLY), (writer, os.O_WRONLY)):
            await guest.release(nodeid, opened.fh, flags)
            with pytest.raises(RemoteErrno):
                await guest.read(nodeid, opened.fh, 0, 1)
        assert (folder / "file").read_bytes()[:2] == b"ba"


async def test_set_id_bits_are_the_daemons_to_clear(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, b"a" * 100) as file:
        (folder / "file").chmod(0o4755)
        await file.guest.write(file.nodeid, file.fh, 0, b"b", 4)
        assert file.sent == 1


async def test_read_only_until_somebody_writes(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, b"a" * 100, write=False) as file:
        assert await file.read(0, 1) == b"a"
        assert file.sent == 0
        while not file.dax.statistics().set_ups > 1:
            await file.write(0, b"b")
            await trio.lowlevel.checkpoint()
        before = file.sent
        assert await file.write(1, b"c") == 1
        assert await file.read(0, 3) == b"bca"
        assert file.sent == before
        assert file.dax.statistics().mapped_ranges == 1


async def test_mapped_when_that_pays(daemon: Daemon, folder: Path) -> None:
    async with session(daemon) as (guest, dax):
        (folder / "file").write_bytes(bytes(MIB))
        entry = await guest.lookup(1, b"file")
        opened = await guest.open(entry.nodeid, os.O_RDONLY)
        file = File(guest, dax, entry.nodeid, opened.fh)
        for _ in range(100):
            await file.read(0, 4096)
            await trio.lowlevel.checkpoint()
        assert 8 <= file.sent < 20
        assert dax.statistics().hits > 80
        await guest.release(entry.nodeid, opened.fh)
        guest.forget(entry.nodeid)


async def test_forgotten_files_are_let_go(daemon: Daemon, folder: Path) -> None:
    window_before = len(os.listdir("/proc/self/fd"))
    async with session(daemon) as (guest, dax):
        before = len(os.listdir("/proc/self/fd"))
        daemon_before = daemon.fd_count()
        for at in range(20):  # of a window of four
            (folder / "file").write_bytes(b"%d" % at)
            entry = await guest.lookup(1, b"file")
            opened = await guest.open(entry.nodeid, os.O_RDONLY)
            assert await dax.map(entry.nodeid, 0, 1)
            assert await guest.read(entry.nodeid, opened.fh, 0, 10) == b"%d" % at
            await guest.release(entry.nodeid, opened.fh)
            (folder / "file").unlink()
            guest.forget(entry.nodeid)
        assert guest.window is not None
        window = guest.window
        await wait_until_async(lambda: window.mapped() == 0, DEADLINE, "everything to be unmapped")
        assert dax.statistics().reclaims == 0
        # By a thread of its own, perhaps.
        await wait_until_async(
            lambda: len(os.listdir("/proc/self/fd")) == before, DEADLINE, "descriptors to be closed"
        )
        await wait_until_async(
            lambda: daemon.fd_count() == daemon_before, DEADLINE, "the daemon to forget"
        )
    await wait_until_async(
        lambda: len(os.listdir("/proc/self/fd")) == window_before, DEADLINE, "all to be closed"
    )


async def test_forgotten_while_it_is_set_up(daemon: Daemon, folder: Path) -> None:
    """By the time it is mapped the node's number may mean another file."""
    (folder / "file").write_bytes(b"a")
    async with session(daemon) as (guest, dax), trio.open_nursery() as nursery:
        entry = await guest.lookup(1, b"file")
        daemon.pause()
        nursery.start_soon(dax.map, entry.nodeid, 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        guest.forget(entry.nodeid)
        daemon.resume()
        window = guest.window
        assert window is not None
        await wait_until_async(
            lambda: (dax.statistics().set_ups, window.mapped()) == (1, 0), DEADLINE, "its removal"
        )
        assert dax.statistics().mapped_ranges == 0


async def test_more_files_than_the_window_holds(daemon: Daemon, folder: Path) -> None:
    async with session(daemon) as (guest, dax):
        handles = []
        for at in range(6):
            (folder / f"file{at}").write_bytes(b"%d" % at)
            entry = await guest.lookup(1, b"file%d" % at)
            opened = await guest.open(entry.nodeid, os.O_RDONLY)
            assert await dax.map(entry.nodeid, 0, 1)
            handles.append((entry.nodeid, opened.fh))
        assert dax.statistics().reclaims == 2
        for at, (nodeid, fh) in enumerate(handles):
            assert await guest.read(nodeid, fh, 0, 2) == b"%d" % at
        assert dax.statistics().hits == 4
        for nodeid, fh in handles:
            await guest.release(nodeid, fh)
            guest.forget(nodeid)


async def test_a_working_set_that_exceeds_the_window_is_bypassed(
    daemon: Daemon, folder: Path
) -> None:
    content = os.urandom(32 * MIB)
    (folder / "file").write_bytes(content)
    async with session(daemon) as (guest, dax):
        entry = await guest.lookup(1, b"file")
        opened = await guest.open(entry.nodeid, os.O_RDONLY)
        for at in range(8000):
            offset = at * 7919 * 4096 % (32 * MIB)
            data = await guest.read(entry.nodeid, opened.fh, offset, 4096)
            assert data == content[offset : offset + 4096]
        found = dax.statistics()
        assert found.mapped_ranges >= 3  # one may be on its way
        assert found.hits + found.misses == 8000
        assert found.hits > 1200  # what is mapped stays, a quarter of the file
        assert found.bypassed > 4000
        assert found.set_ups < 8000 / 50
        await guest.release(entry.nodeid, opened.fh)
        guest.forget(entry.nodeid)


async def test_ranges_of_a_file_that_nobody_uses_any_more(daemon: Daemon, folder: Path) -> None:
    for name in ("old", "new"):
        (folder / name).write_bytes(bytes(8 * MIB))
    async with session(daemon) as (guest, dax):
        files = []
        for known in (b"old", b"new"):
            entry = await guest.lookup(1, known)
            files.append((entry.nodeid, (await guest.open(entry.nodeid, os.O_RDONLY)).fh))
        assert await dax.map(files[0][0], 0, 8 * MIB)
        before = dax.statistics()
        assert before.mapped_ranges == before.ranges
        for at in range(1000):
            await guest.read(*files[1], at * 7919 * 4096 % (8 * MIB), 4096)
        found = dax.statistics()
        assert found.reclaims - before.reclaims == found.ranges
        assert found.hits > 600
        for nodeid, fh in files:
            await guest.release(nodeid, fh)
            guest.forget(nodeid)


async def test_views_without_a_copy(daemon: Daemon, folder: Path) -> None:
    content = os.urandom(3 * MIB)
    async with mapped(daemon, content) as file:
        read = file.guest.read_mapped
        view = await read(file.nodeid, file.fh, 4096, MIB)
        assert view == content[4096 : 4096 + MIB]
        assert len(await read(file.nodeid, file.fh, 3 * MIB - 5, 100)) == 5
        assert len(await read(file.nodeid, file.fh, 3 * MIB, 100)) == 0
        await file.write(4096, b"seen")
        assert bytes(view[:4]) == b"seen"
        os.truncate(folder / "file", 5000)
        assert bytes(view[:4]) == b"seen"
        assert view[8192:] == bytes(MIB - 8192)
        assert await read(file.nodeid, file.fh, 4990, 100) == content[4990:5000]
        assert file.sent == 0
        assert len(await read(file.nodeid, file.fh, RANGE - 5, 10)) == 0  # in two ranges: a copy
        assert file.sent == 0
        await file.guest.removemapping(file.nodeid, [(0, 8 * MIB)])
        assert view == bytes(MIB)
        assert bytes(await read(file.nodeid, file.fh, 4096, 4)) == b"seen"
        assert file.sent == 1


async def test_random_accesses_of_more_files_than_fit(daemon: Daemon, folder: Path) -> None:
    """Compared with the host after each step, while it changes the files, too."""
    numbers = random.Random(2)
    size = 3 * MIB
    async with session(daemon, 6 * MIB) as (guest, dax):
        files = []
        for at in range(4):
            (folder / f"file{at}").write_bytes(numbers.randbytes(size))
            entry = await guest.lookup(1, b"file%d" % at)
            opened = await guest.open(entry.nodeid, os.O_RDWR)
            files.append((entry.nodeid, opened.fh, os.open(folder / f"file{at}", os.O_RDWR)))
        for _ in range(3000):
            nodeid, fh, host = numbers.choice(files)
            offset, length = numbers.randrange(size), numbers.randrange(1, 9000)
            match numbers.randrange(12):
                case 0:
                    os.truncate(host, offset)
                case 1:
                    os.pwrite(host, numbers.randbytes(length), offset)
                case 2:
                    await dax.map(nodeid, offset, length, write=numbers.random() < 0.5)
                case step if step < 8:
                    expected = os.pread(host, length, offset)
                    assert await guest.read(nodeid, fh, offset, length) == expected
                case _:
                    data = numbers.randbytes(length)
                    assert await guest.write(nodeid, fh, offset, data) == length
                    assert os.pread(host, length, offset) == data
        assert guest.window is not None
        guest.window.check_invariants()
        found = dax.statistics()
        assert min(found.hits, found.misses, found.reclaims, found.set_ups) > 50
        for nodeid, fh, host in files:
            os.close(host)
            await guest.release(nodeid, fh)
            guest.forget(nodeid)


async def test_set_ups_that_time_out(tmp_path: Path) -> None:
    """Their ranges are given to nobody before the daemon has answered, and then to all again."""
    for name in ("file", "other"):
        (tmp_path / name).write_bytes(b"a" * 2 * RANGE)
    # Long enough for what is answered at once, also on a busy machine.
    options = vfsmount.ChannelOptions(request_timeout=2.0)
    with start_daemon("bundled", tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with vfsmount.connect(daemon.socket, options=options, dax=2 * RANGE) as guest:
            assert guest.dax is not None
            assert guest.window is not None
            nodes = [(await guest.lookup(1, name)).nodeid for name in (b"file", b"other")]
            daemon.pause()
            assert not await guest.dax.map(nodes[0], 0, RANGE)
            assert not await guest.dax.map(nodes[1], 0, 2 * RANGE)
            assert guest.window.ranges.lost == guest.channel.orphans == 1
            daemon.resume()
            await wait_until_async(lambda: not guest.channel.orphans, DEADLINE, "the late reply")
            assert await guest.dax.map(nodes[1], 0, 2 * RANGE)
            assert guest.dax.statistics().mapped_ranges == 2
            guest.window.check_invariants()
            for nodeid in nodes:
                guest.forget(nodeid)


async def test_extended_attributes_under_other_names(daemon: Daemon, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root sees all names")
    async with mapped(daemon, b"a" * 100) as file:
        lacks, name = file.dax.lacks_xattr, b"security.capability"
        os.setxattr(folder / "file", "user.other", b"x")
        assert lacks(file.nodeid, name)
        assert not lacks(file.nodeid + 1, name)
        os.setxattr(folder / "file", "trusted.virtiofs.security.capability", b"x")
        assert not lacks(file.nodeid, name)


async def test_synced_to_the_host(daemon: Daemon, folder: Path) -> None:
    async with mapped(daemon, bytes(100)) as file:
        await file.write(0, b"durable")
        await file.guest.fsync(file.nodeid, file.fh)
        assert file.guest.channel.statistics().requests["FSYNC"].count == 1
        assert file.sent == 0


async def test_truncated_by_the_host_all_the_time(daemon: Daemon, folder: Path) -> None:
    """A plain load from a mapping would kill this process here, by SIGBUS."""
    size = 3 * MIB
    async with mapped(daemon, b"a" * size) as file:
        with hammered(folder / "file", size):
            short = 0
            for at in range(3000):
                data = await file.read(at * 977 % size, 8192)
                short += len(data) < 8192
                assert not data.strip(b"a\0b")
                await file.write(at * 1009 % (size - 4), b"bbbb")
            assert file.dax.statistics().hits > 1000
            assert short


async def test_the_daemon_is_killed(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("the channel to the daemon has ended")
    (tmp_path / "file").write_bytes(b"a" * 100)
    with start_daemon("bundled", tmp_path) as daemon:
        async with session(daemon) as (guest, dax):
            entry = await guest.lookup(1, b"file")
            opened = await guest.open(entry.nodeid, os.O_RDWR)
            assert await dax.map(entry.nodeid, 0, 100, write=True)
            daemon.kill()
            await guest.channel.wait_ended()
            assert await guest.read(entry.nodeid, opened.fh, 0, 3) == b"aaa"
            assert await guest.write(entry.nodeid, opened.fh, 0, b"b") == 1
            assert not await dax.map(entry.nodeid, RANGE, 100)
            with pytest.raises(ChannelBroken):
                await guest.read(entry.nodeid, opened.fh, RANGE, 1)
    assert (tmp_path / "file").read_bytes()[:2] == b"ba"
