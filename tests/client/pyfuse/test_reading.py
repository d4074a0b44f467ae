"""Reading ahead through the handlers, on a session that only records."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, cast

import pyfuse3
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.client.pyfuse.fake_session import FakeSession, attributes
from tests.client.pyfuse.test_operations import ROOT, inode, look_up, opened
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.pyfuse.operations import VirtioFsOperations
from vfsmount.client.pyfuse.reading import Reading
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfsmount.client.session import Session

KIB, MIB = 1 << 10, 1 << 20
PIECE = 128 * KIB
NODE = inode(50)


class Host(FakeSession):
    """A daemon with one file; reads wait while it is ``slow``, and give what was there before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.content = bytearray(os.urandom(size // 16) * 16)
        self.version = 1
        self.slow: trio.Event | None = None
        self.answers["write"] = self._write
        self.answers["getattr"] = self._getattr
        self.answers["setattr"] = self._getattr
        self.read_view = self.read

    def _getattr(self, *_: Any) -> fuse.AttrOut:
        return fuse.AttrOut(1, 0, self.attr())

    def attr(self) -> fuse.Attr:
        return attributes(ino=50, size=len(self.content), mtime=self.version)

    def change(self) -> None:
        """By somebody else."""
        self.content[: 2 * MIB] = os.urandom(2 * MIB)
        self.version += 1

    def _write(self, _node: int, _fh: int, at: int, data: Any, *_: Any) -> int:
        self.content[at : at + len(data)] = data
        self.version += 1
        return len(data)

    async def read(self, _node: int, _fh: int, at: int, size: int) -> bytes:
        self.calls.append(("read", (at, size)))
        if isinstance(self.answers.get("read"), Exception):
            raise self.answers["read"]
        data = bytes(self.content[at : at + size])
        await trio.lowlevel.checkpoint()
        if self.slow is not None:
            await self.slow.wait()
        return data


class Stage:
    """Handlers over a host with one file, which is open."""

    def __init__(self, host: Host, ops: VirtioFsOperations, fh: pyfuse3.FileHandleT) -> None:
        self.host, self.ops, self.fh = host, ops, fh

    async def read(self, at: int, size: int = PIECE) -> None:
        expected = bytes(self.host.content[at : at + size])
        assert await self.ops.read(self.fh, at, size) == expected
        await wait_all_tasks_blocked()

    @property
    def reads(self) -> list[tuple[int, int]]:
        return cast("list[tuple[int, int]]", self.host.arguments("read"))


@pytest.fixture
def mode() -> str:
    return "auto"


@pytest.fixture
async def stage(
    mode: str, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda *_, **__: None)
    host = Host(16 * MIB)
    ops = VirtioFsOperations(cast("Session", host), CachePolicy.for_mode(mode, writeback=True))
    ops.reading = Reading(cast("Session", host), 8 * MIB)
    nursery.start_soon(ops.reading.run)
    await look_up(ops, host, 5, host.attr())
    stage = Stage(host, ops, await opened(ops, host, NODE))
    yield stage
    ops.reading.pages.check_invariants()


async def test_in_order(stage: Stage) -> None:
    for at in range(0, 16 * MIB + PIECE, PIECE):
        await stage.read(at)
    assert len(stage.reads) <= 20
    assert max(size for _, size in stage.reads) == MIB
    assert sum(size for _, size in stage.reads) <= 18 * MIB


async def test_the_next_is_there_before_it_is_wanted(stage: Stage) -> None:
    for at in range(0, 4 * MIB, PIECE):
        await stage.read(at)
    before = len(stage.reads)
    stage.host.slow = trio.Event()
    await stage.read(4 * MIB)
    stage.host.slow.set()
    assert len(stage.reads) <= before + 1


async def test_at_random_nothing_else_is_read(stage: Stage) -> None:
    places = [7 * MIB, 2 * MIB, 9 * MIB + 4096, 2 * MIB + 8192]
    for at in places:
        await stage.read(at, 4096)
    assert stage.reads == [(at, 4096) for at in places]


async def test_a_read_is_whole_where_messages_are_short(stage: Stage) -> None:
    """A short answer would be the end of the file."""
    stage.host.facts = stage.host.facts._replace(max_read=PIECE)
    stage.ops.reading = Reading(cast("Session", stage.host), 64 * MIB)
    await stage.read(0, PIECE // 8)
    await stage.read(PIECE // 8)


async def test_nothing_is_kept_while_a_late_write_may_come(stage: Stage) -> None:
    """The first was asked for before it, and answered before it, too."""
    stage.host.channel.orphans = 1
    stage.host.slow = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.ops.read, stage.fh, 0, PIECE)
        await wait_all_tasks_blocked()
        stage.host.channel.orphans = 0
        stage.host.slow.set()
    assert stage.ops.reading is not None
    assert not stage.ops.reading.pages.size
    before = len(stage.reads)
    await stage.read(0)
    assert len(stage.reads) > before


async def test_kept(stage: Stage) -> None:
    for at in range(0, 2 * MIB, PIECE):
        await stage.read(at)
    reads = len(stage.reads)
    await stage.ops.release(stage.fh)
    stage.fh = await opened(stage.ops, stage.host, NODE)
    for at in range(0, 2 * MIB, PIECE):
        await stage.read(at)
    assert len(stage.reads) == reads


class Truncation:
    """``SetattrFields`` of truncate(2), which cannot be made in Python."""

    update_size = True
    update_mode = update_uid = update_gid = update_atime = update_mtime = update_ctime = False


async def truncate(stage: Stage) -> None:
    stage.host.change()
    fields = cast("pyfuse3.SetattrFields", Truncation())
    await stage.ops.setattr(NODE, pyfuse3.EntryAttributes(), fields, None, ROOT)


async def write(stage: Stage) -> None:
    await stage.ops.write(stage.fh, 4096, b"written here")


async def write_through(stage: Stage) -> None:
    fh = await opened(stage.ops, stage.host, NODE, flags=os.O_RDWR | os.O_DSYNC)
    await stage.ops.write(fh, 4096, b"written here")


async def change_and_open(stage: Stage) -> None:
    stage.host.change()
    await opened(stage.ops, stage.host, NODE)


async def change_and_ask(stage: Stage) -> None:
    stage.host.change()
    await stage.ops.getattr(NODE, ROOT)


async def forget(stage: Stage) -> None:
    await stage.ops.forget([(NODE, 1)])
    stage.host.change()


CHANGES = [truncate, write, write_through, change_and_open, change_and_ask, forget]


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_changed_is_read_anew(stage: Stage, change: Callable[[Stage], Any]) -> None:
    for at in range(0, MIB, PIECE):
        await stage.read(at)
    await change(stage)
    await stage.ops.flush(stage.fh)
    for at in range(0, MIB, PIECE):
        await stage.read(at)


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_on_its_way_meanwhile_is_not_kept(
    stage: Stage, nursery: trio.Nursery, change: Callable[[Stage], Any]
) -> None:
    stage.host.slow = trio.Event()
    nursery.start_soon(stage.ops.read, stage.fh, 0, PIECE)
    await wait_all_tasks_blocked()
    await change(stage)
    await stage.ops.flush(stage.fh)
    stage.host.slow.set()
    await wait_all_tasks_blocked()
    await stage.read(0)


async def test_a_handle_is_given_back_when_nothing_is_on_its_way(
    stage: Stage, nursery: trio.Nursery
) -> None:
    await stage.read(0)
    await stage.read(PIECE)
    stage.host.slow = trio.Event()
    for at in range(2 * PIECE, MIB, PIECE):
        await stage.read(at)
    assert len(stage.reads) >= 3
    nursery.start_soon(stage.ops.release, stage.fh)
    await wait_all_tasks_blocked()
    await stage.ops.forget([(NODE, 1)])
    assert not {"release", "forget"} & set(stage.host.names())
    stage.host.slow.set()
    await wait_all_tasks_blocked()
    assert stage.host.names()[-2:] == ["release", "forget"]


async def test_errors_are_told_to_who_reads(stage: Stage) -> None:
    await stage.read(0)
    stage.host.answers["read"] = RemoteErrno(15, 5, errno.EIO)
    with pytest.raises(pyfuse3.FUSEError):
        await stage.ops.read(stage.fh, PIECE, PIECE)
    del stage.host.answers["read"]
    await stage.read(PIECE)


async def test_several_who_read_the_same_part_ask_once(stage: Stage, nursery: trio.Nursery) -> None:
    await stage.read(0)
    stage.host.slow = trio.Event()
    for at in range(PIECE, 5 * PIECE, PIECE):
        nursery.start_soon(stage.ops.read, stage.fh, at, PIECE)
        await wait_all_tasks_blocked()  # tasks begin in no particular order
    assert len(stage.reads) == 2
    stage.host.slow.set()


async def test_direct_handles_ask_the_host(stage: Stage) -> None:
    await stage.read(0)
    stage.fh = await opened(stage.ops, stage.host, NODE, flags=os.O_RDONLY | os.O_DIRECT)
    await stage.read(0)
    assert len(stage.reads) == 2
