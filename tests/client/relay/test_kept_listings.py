"""Directories that are opened again: the kernel's listing is kept where the host's is the same."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import pytest

from tests.client.pyfuse.fake_session import attributes
from tests.client.relay.fake_kernel import Stage, on_stage
from tests.support.pages import while_pages_stay
from tests.support.shares import Shared, messages
from tests.support.wait import wait_until
from vfsmount.cache.policy import CachePolicy
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, OpenOutFlag

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vfsmount.testing.fake_device import DeviceRequest

FOLDER = 9
LONG = CachePolicy.for_mode("auto", 600.0)
FILL = OpenOutFlag.CACHE_DIR
KEEP = OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE
LIST = fuse.READ_IN.values(3, 0, 32768, 0, 0, 0)
#: Longer than a change may hide another of the same time.
SETTLED_NS = 60_000_000


class Host:
    """A device with one directory, last changed at second ``ctime``."""

    def __init__(self, ctime: int = 1) -> None:
        self.ctime = ctime
        self.error = 0
        self.seen: list[int] = []

    def __call__(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        self.seen.append(opcode)
        if opcode == Opcode.OPENDIR:
            request.reply(fuse.OPEN_OUT.values(3, 0, 0))
        elif opcode == Opcode.GETATTR and self.error:
            request.reply(error=-self.error)
        elif opcode == Opcode.GETATTR:
            attr = attributes(mode=stat.S_IFDIR | 0o755, ctime=self.ctime)
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr)))
        elif request.room:
            request.reply()
        else:
            request.use()


async def opened(stage: Stage) -> int:
    """Open the directory; return the flags."""
    reply = await stage.call(Opcode.OPENDIR, FOLDER, fuse.OPEN_IN.values(0, 0))
    return fuse.OPEN_OUT.unpack(reply.body).open_flags


async def listed(stage: Stage) -> int:
    """Open and list the directory; return the flags."""
    flags = await opened(stage)
    await stage.call(Opcode.READDIRPLUS, FOLDER, LIST)
    return flags


async def test_an_unchanged_directory_is_kept() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        assert await listed(stage) == FILL
        assert await opened(stage) == KEEP
        assert sorted(host.seen) == sorted(
            [Opcode.OPENDIR, Opcode.GETATTR] * 2 + [Opcode.READDIRPLUS]
        )


async def test_a_changed_one_is_listed_again() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        await listed(stage)
        host.ctime = 2
        assert await listed(stage) == FILL
        assert await opened(stage) == KEEP


async def test_one_that_changed_a_moment_ago_is_not_kept() -> None:
    async with on_stage(Host(ctime=int(time.time()) + 60), LONG) as stage:
        assert [await listed(stage), await listed(stage)] == [0, 0]


async def test_names_alone_are_not_enough() -> None:
    """Kept names of which the kernel does not know the files cost a LOOKUP each."""
    host = Host()
    async with on_stage(host, LONG) as stage:
        assert [await opened(stage), await opened(stage)] == [FILL, FILL]
        await listed(stage)
        stage.send(Opcode.FORGET, 77, fuse.FORGET_IN.values(1))
        assert await opened(stage) == FILL


async def test_a_daemon_that_does_not_say_is_asked_for_all() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        await listed(stage)
        host.error = 5
        assert await listed(stage) == 0
        host.error = 0
        assert await opened(stage) == FILL


@pytest.mark.parametrize("mode", ["none", "host"])
async def test_other_modes_do_not_ask(mode: str) -> None:
    host = Host()
    async with on_stage(host, CachePolicy.for_mode(mode)) as stage:
        assert [await opened(stage), await opened(stage)] == [0, 0]
        assert host.seen == [Opcode.OPENDIR] * 2


async def test_the_attributes_asked_for_answer_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To list a directory makes its time of access unknown; ``ls -lR`` asks for that."""
    monkeypatch.setattr("vfsmount.client.relay.opens._PARKED_NS", 10**12)
    host = Host()
    async with on_stage(host, LONG) as stage:
        await listed(stage)
        await opened(stage)
        host.seen.clear()
        await stage.call(Opcode.GETATTR, FOLDER, bytes(16))
        assert host.seen == []
        for lists in (Opcode.READDIR, Opcode.READDIRPLUS):
            await opened(stage)
            await stage.call(lists, FOLDER, LIST)
            host.seen.clear()
            await stage.call(Opcode.GETATTR, FOLDER, bytes(16))
            assert host.seen == [Opcode.GETATTR]


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.MKDIR, fuse.MKDIR_IN.values(0o755, 0) + b"name\0"),
        (Opcode.MKNOD, fuse.MKNOD_IN.values(0o100644, 0, 0) + b"name\0"),
        (Opcode.CREATE, fuse.CREATE_IN.values(1, 0o644, 0, 0) + b"name\0"),
        (Opcode.SYMLINK, b"name\0target\0"),
        (Opcode.LINK, (5).to_bytes(8, "little") + b"name\0"),
        (Opcode.UNLINK, b"name\0"),
        (Opcode.RMDIR, b"name\0"),
        (Opcode.RENAME, (5).to_bytes(8, "little") + b"name\0other\0"),
        (Opcode.RENAME2, fuse.RENAME2_IN.values(5, 0) + b"name\0other\0"),
    ],
    ids=lambda one: one.name if isinstance(one, Opcode) else "",
)
async def test_after_a_change_of_ours_the_daemon_is_asked(
    opcode: Opcode, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfsmount.client.relay.opens._PARKED_NS", 10**12)
    host = Host()
    async with on_stage(host, LONG) as stage:
        await opened(stage)
        stage.send(opcode, FOLDER, body)
        await stage.receive()
        host.seen.clear()
        await stage.call(Opcode.GETATTR, FOLDER, bytes(16))
        assert host.seen == [Opcode.GETATTR]


# --- mounted -------------------------------------------------------------------------------------


def settle(folder: Path) -> None:
    """Wait until the directory's last change is in the past, for whoever lists it."""
    changed = folder.stat().st_ctime_ns
    wait_until(lambda: time.time_ns() > changed + SETTLED_NS, 5.0, "the clock")


def counted(shared: Shared, mounted: Path) -> int:
    """List the directory; return the messages about that."""
    before = messages(shared.mounts[0])
    os.listdir(mounted)
    sent = messages(shared.mounts[0]) - before
    return sent["READDIR"] + sent["READDIRPLUS"]


@pytest.mark.needs_fuse
def test_a_listing_is_sent_once(shared: Shared) -> None:
    def list_often() -> list[int]:
        host, mounted = shared.folder()
        for number in range(100):
            (host / f"file-{number:03}").touch()
        settle(host)
        return [counted(shared, mounted) for _ in range(4)]

    first, *others = while_pages_stay(list_often)
    assert first > 0
    assert others == [0, 0, 0]


@pytest.mark.needs_fuse
def test_every_change_at_the_host_is_seen_at_once(shared: Shared) -> None:
    host, mounted = shared.folder()
    (host / "there").touch()
    changes: list[Callable[[], object]] = [
        lambda: (host / "new").touch(),
        lambda: (host / "new").rename(host / "newer"),
        lambda: (host / "newer").rename(host / "there"),
        lambda: (host / "folder").mkdir(),
        lambda: (host / "there").unlink(),
        lambda: (host / "folder").rmdir(),
    ]
    for change in changes:
        settle(host)
        for _ in range(3):  # the last is kept
            assert sorted(os.listdir(mounted)) == sorted(os.listdir(host))
        change()
        assert sorted(os.listdir(mounted)) == sorted(os.listdir(host))


@pytest.mark.needs_fuse
def test_changes_in_quick_succession_are_all_seen(shared: Shared) -> None:
    """Many have the same time."""
    host, mounted = shared.folder()
    for number in range(300):
        (host / f"{number}").touch()
        assert len(os.listdir(mounted)) == number + 1


@pytest.mark.needs_fuse
def test_own_changes_are_seen_at_once(shared: Shared) -> None:
    host, mounted = shared.folder()
    settle(host)
    for number in range(3):
        os.listdir(mounted)
        os.listdir(mounted)
        (mounted / f"{number}").touch()
        assert len(os.listdir(mounted)) == number + 1
        settle(host)
