"""Write-behind through the handlers, on a session that only records."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, cast

import pyfuse3
import pytest
import trio

from tests.client.pyfuse.fake_session import FakeSession, attributes, entry
from tests.client.pyfuse.test_operations import ROOT, inode, look_up, opened
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.pyfuse.operations import VirtioFsOperations
from vfsmount.client.pyfuse.write_behind import WriteBehind
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.client.session import Session

BEHIND = CachePolicy.for_mode("auto", writeback=True)
FULL = RemoteErrno(16, 5, errno.ENOSPC)


class Host(FakeSession):
    """A daemon with one file."""

    def __init__(self, limit: int = 1 << 20) -> None:
        super().__init__(limit=limit)
        self.content = bytearray()
        self.answers["write"] = self._write
        self.answers["getattr"] = lambda *_: fuse.AttrOut(1, 0, attributes(size=len(self.content)))
        self.answers["setattr"] = self.answers["getattr"]
        self.answers["read_view"] = lambda _node, _fh, at, size: bytes(self.content[at : at + size])

    def slow_down(self) -> tuple[trio.Event, trio.Event]:
        """Have WRITE set the first event and wait for the second."""
        asked, go_on = trio.Event(), trio.Event()

        async def write(*args: Any) -> int:
            asked.set()
            await go_on.wait()
            return self._write(*args)

        self.answers["write"] = write
        return asked, go_on

    def _write(self, _node: int, _fh: int, at: int, data: Any, *_: Any) -> int:
        end = at + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[at:end] = data
        return len(data)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
async def ops(host: Host, monkeypatch: pytest.MonkeyPatch) -> VirtioFsOperations:
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda *_, **__: None)
    ops = VirtioFsOperations(cast("Session", host), BEHIND)
    await look_up(ops, host, 5)
    return ops


@pytest.fixture
async def handle(ops: VirtioFsOperations, host: Host) -> pyfuse3.FileHandleT:
    return await opened(ops, host, inode(50))


async def test_a_mebibyte_in_small_writes_is_one_message(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT
) -> None:
    for at in range(0, 1 << 20, 4096):
        assert await ops.write(handle, at, b"x" * 4096) == 4096
    assert "write" not in host.names()
    await ops.flush(handle)
    assert host.names().count("write") == 1
    assert host.content == b"x" * (1 << 20)


#: What must find the data at the host: by name, what to call.
EVENTS: dict[str, Callable[[VirtioFsOperations, pyfuse3.FileHandleT], Any]] = {
    "flush": lambda ops, fh: ops.flush(fh),
    "fsync": lambda ops, fh: ops.fsync(fh, False),
    "release": lambda ops, fh: ops.release(fh),
    "read": lambda ops, fh: ops.read(fh, 0, 10),
    "getattr": lambda ops, fh: ops.getattr(inode(50), ROOT),
    "setattr": lambda ops, fh: ops.setattr(
        inode(50), pyfuse3.EntryAttributes(), cast("pyfuse3.SetattrFields", Truncation()), fh, ROOT
    ),
    "open": lambda ops, fh: ops.open(inode(50), os.O_RDONLY, ROOT),
}


class Truncation:
    """``SetattrFields`` of truncate(2), which cannot be made in Python."""

    update_size = True
    update_mode = update_uid = update_gid = update_atime = update_mtime = update_ctime = False


@pytest.mark.parametrize("event", EVENTS)
async def test_what_writes_out(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT, event: str
) -> None:
    await ops.write(handle, 3, b"dirty")
    assert host.content == b""
    host.calls.clear()
    await EVENTS[event](ops, handle)
    assert host.content == b"\0\0\0dirty"
    assert host.names()[0] == "write"


async def test_size_counts_before_it_is_written(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT
) -> None:
    await ops.write(handle, 100, b"tail")
    found = await ops.lookup(inode(1), b"name", ROOT)
    assert found.st_size == 104
    assert host.content == b""


@pytest.mark.parametrize("way", ["lookup", "link", "readdir"])
@pytest.mark.parametrize("late", ["data", "reply"])
async def test_a_size_from_before_what_is_on_its_way_is_not_told(
    ops: VirtioFsOperations,
    host: Host,
    handle: pyfuse3.FileHandleT,
    way: str,
    late: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel knows the write as done, and would cut the file off."""
    written, go_on = host.slow_down()
    await ops.write(handle, 0, b"data")
    asked, answer = trio.Event(), trio.Event()

    async def old(*_: Any) -> Any:
        found = entry(5)
        asked.set()
        await answer.wait()
        return [fuse.DirEntryPlus(found, 50, 1, 8, b"name")] if way == "readdir" else found

    host.answers.update(lookup=old, link=old, readdirplus=old, opendir=fuse.OpenOut(9, 0, 0))
    told: list[Any] = []

    def take(_token: object, _name: bytes, found: Any, _cookie: int) -> bool:
        told.append(found)
        return False

    monkeypatch.setattr(pyfuse3, "readdir_reply", take)

    async def ask() -> None:
        if way == "lookup":
            told.append(await ops.lookup(inode(1), b"name", ROOT))
        elif way == "link":
            told.append(await ops.link(inode(50), inode(1), b"new", ROOT))
        else:
            directory = await ops.opendir(inode(1), ROOT)
            await ops.readdir(directory, 0, cast("pyfuse3.ReaddirToken", None))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ops.fsync, handle, False)
        await written.wait()
        nursery.start_soon(ask)
        await asked.wait()
        first, second = (answer, go_on) if late == "data" else (go_on, answer)
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        second.set()
    assert [found.st_size for found in told] == [4]


async def test_appends_are_the_hosts(ops: VirtioFsOperations, host: Host) -> None:
    plain = await opened(ops, host, inode(50))
    append = await opened(ops, host, inode(50), flags=os.O_WRONLY | os.O_APPEND)
    await ops.write(plain, 0, b"first")
    await ops.write(append, 5, b"second")
    assert host.content == b"firstsecond"
    assert host.names().count("write") == 2


async def test_each_handle_that_wrote_is_told_once(ops: VirtioFsOperations, host: Host) -> None:
    one, two, reader = [await opened(ops, host, inode(50)) for _ in range(3)]
    await ops.write(one, 0, b"one")
    await ops.write(two, 3, b"two")
    good, host.answers["write"] = host.answers["write"], FULL
    await ops.getattr(inode(50), ROOT)  # somebody else's trouble: not told here
    host.answers["write"] = good
    await ops.flush(reader)
    for handle in (one, two):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await ops.fsync(handle, False)
        assert caught.value.errno == errno.ENOSPC
        await ops.fsync(handle, False)
    assert host.content == b"onetwo"


async def test_what_never_got_there_is_told(
    ops: VirtioFsOperations,
    host: Host,
    handle: pyfuse3.FileHandleT,
    expect_log: Callable[[str], None],
) -> None:
    expect_log("4 bytes written to node 5 did not reach the host")
    await ops.write(handle, 0, b"lost")
    host.answers["write"] = FULL
    with pytest.raises(pyfuse3.FUSEError):
        await ops.flush(handle)
    await ops.release(handle)


async def test_a_close_does_not_miss_what_was_written_during_another(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT
) -> None:
    """Duplicates of a descriptor are one handle, and each of them is closed."""
    written, go_on = host.slow_down()
    await ops.write(handle, 0, b"one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ops.flush, handle)
        await written.wait()
        await ops.write(handle, 3, b"two")
        go_on.set()
    await ops.flush(handle)
    assert host.content == b"onetwo"


async def test_each_close_waits_for_what_is_on_its_way(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT
) -> None:
    written, go_on = host.slow_down()
    await ops.write(handle, 0, b"data")
    closed = []

    async def close() -> None:
        await ops.flush(handle)
        closed.append(bytes(host.content))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        await written.wait()
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert not closed
        go_on.set()
    assert closed == [b"data", b"data"]


async def test_a_file_found_and_emptied_by_create_stays_empty(
    ops: VirtioFsOperations, host: Host, handle: pyfuse3.FileHandleT
) -> None:
    """The kernel may remember a name as absent that the host has linked to a known file."""
    await ops.write(handle, 0, b"before")
    host.answers["create"] = entry(5, attributes(ino=50)), fuse.OpenOut(8, 0, 0)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    _, found = await ops.create(inode(1), b"other", 0o644, flags, ROOT)
    assert found.st_size == 0
    await ops.flush(handle)
    assert host.content == b""


async def test_too_much_is_written_by_the_writer(host: Host) -> None:
    behind = WriteBehind(cast("Session", host), limit=100)
    file = Plain()
    await behind.write(5, file, 0, bytes(100), 0)
    assert not host.content
    await behind.write(5, file, 100, b"x", 0)
    assert len(host.content) == 101


async def test_no_more_than_the_limit_is_kept_of_what_the_host_does_not_take(host: Host) -> None:
    behind = WriteBehind(cast("Session", host), limit=100)
    full, other, good = Plain(), Plain(), host.answers["write"]
    host.answers["write"] = lambda node, *args: FULL if node == 5 else good(node, *args)
    await behind.write(5, full, 0, bytes(101), 0)
    for _ in range(2):
        with pytest.raises(RemoteErrno) as caught:
            await behind.write(5, full, 101, b"y", 0)
        assert caught.value.errno == errno.ENOSPC
    await behind.write(6, other, 0, b"z", 0)  # who is not to blame goes on
    assert host.content == b"z"
    assert await behind.settle(6, other) == 0
    host.answers["write"] = good
    await behind.write(5, full, 101, b"y", 0)
    await behind.settle(5, full)
    assert host.content == bytes(101) + b"y"


class Plain:
    """A handle."""

    number, fh, flags = 1, 7, os.O_RDWR


async def test_old_data_are_written(host: Host, autojump_clock: trio.testing.MockClock) -> None:
    behind = WriteBehind(cast("Session", host))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(behind.run)
        await behind.write(5, Plain(), 0, b"old", 0)
        await trio.sleep(29.9)
        assert not host.content
        await behind.write(5, Plain(), 3, b"new", 0)
        await trio.sleep(0.2)
        assert host.content == b"oldnew"
        nursery.cancel_scope.cancel()


async def test_the_end_writes_everything(host: Host) -> None:
    behind = WriteBehind(cast("Session", host))
    await behind.write(5, Plain(), 0, b"last", 0)
    await behind.finish()
    assert host.content == b"last"
