"""Walkers: who looks at nothing in the directories that it lists gets names alone.

The test does what the kernel would: of a file whose attributes it was given without validity, it
asks for them when somebody looks. ``tests/proofs/test_walks.py`` has the real one, and programs.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.pyfuse.fake_session import attributes
from tests.client.relay.fake_kernel import on_stage
from tests.support.wait import wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.relay.listings import find_sentinel
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from tests.client.relay.fake_kernel import Stage
    from vfsmount.testing.fake_device import DeviceRequest

LONG = CachePolicy.for_mode("auto", 600.0)
ASK = fuse.READ_IN.values(3, 0, 32768, 0, 0, 0)
#: Threads.
ME, OTHER = 8000, 9000
FILES = 10
ALL, NAMES = Opcode.READDIRPLUS, Opcode.READDIR


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how fast the machine is."""
    monkeypatch.setattr("vfsmount.client.relay.walkers._AT_ONCE", 60.0)


class Entry(NamedTuple):
    """What the kernel knows of an entry by a listing."""

    nodeid: int
    has_attributes: bool


def reply_entry(nodeid: int, mode: int = stat.S_IFREG | 0o644) -> fuse.EntryOut:
    return fuse.EntryOut(nodeid, 0, 1, 1, 0, 0, attributes(ino=nodeid)._replace(mode=mode))


class Tree:
    """A device with directories of ten files each; the node of a file is 100 times its directory's.

    Attributes:
        seen: Opcodes that were asked for.
        keep: Those that are not answered at once, but ``kept``.
        size: Bytes of each file, to who asks; there are none in listings.
        failing: Who asks gets an error.
    """

    def __init__(self, files: int = FILES) -> None:
        self.seen: list[int] = []
        self.keep: set[int] = set()
        self.kept: list[DeviceRequest] = []
        self.size = 1
        self.failing = False
        self.files = files

    def __call__(self, request: DeviceRequest) -> None:
        self.seen.append(request.header.opcode)
        if request.header.opcode in self.keep:
            self.kept.append(request)
        else:
            self.answer(request)

    async def wait_kept(self, count: int) -> None:
        await wait_until_async(lambda: len(self.kept) == count, 5, f"{count} requests")

    def answer(self, request: DeviceRequest) -> None:
        opcode, directory = request.header.opcode, request.header.nodeid
        nodes = [100 * directory + number for number in range(self.files)]
        names = [b"file-%d" % nodeid for nodeid in nodes]
        if opcode == ALL:
            request.reply(
                b"".join(
                    fuse.encode_direntplus(reply_entry(nodeid), nodeid, 1, 8, name)
                    for nodeid, name in zip(nodes, names, strict=True)
                )
            )
        elif opcode == NAMES:
            request.reply(b"".join(fuse.encode_dirent(1, 1, 8, name) for name in names))
        elif opcode == Opcode.LOOKUP:
            kind = stat.S_IFDIR if request.body.startswith(b"folder") else stat.S_IFREG
            request.reply(fuse.ENTRY_OUT.pack(reply_entry(77, kind | 0o755)))
        elif opcode == Opcode.GETATTR and self.failing:
            request.reply(error=-errno.EIO)
        elif opcode in (Opcode.GETATTR, Opcode.SETATTR):
            attr = attributes(ino=request.header.nodeid, size=self.size)
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr)))
        elif opcode == Opcode.OPEN:
            request.reply(fuse.OPEN_OUT.values(3, 0, 0))
        elif request.room:
            request.reply()
        else:
            request.use()


async def list_one(stage: Stage, directory: int, pid: int = ME) -> list[Entry]:
    """List a directory; return what the kernel knows by that."""
    return entries((await stage.call(ALL, directory, ASK, pid)).body)


def entries(body: bytes) -> list[Entry]:
    return [Entry(one.entry.nodeid, one.entry.attr_valid > 0) for one in fuse.iter_direntplus(body)]


async def ask(stage: Stage, nodeid: int, pid: int = ME) -> fuse.AttrOut:
    """Do what the kernel does when somebody looks at a file that it has no attributes of."""
    reply = await stage.call(Opcode.GETATTR, nodeid, bytes(16), pid)
    return fuse.ATTR_OUT.unpack(reply.body)


async def look_at_all(stage: Stage, listed: list[Entry], pid: int = ME) -> None:
    for entry in listed:
        if entry.nodeid and not entry.has_attributes:
            await ask(stage, entry.nodeid, pid)


async def test_who_looks_at_nothing_gets_names() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 20):
            listed = await list_one(stage, directory)
            assert len(listed) == FILES
    assert tree.seen == [ALL] * 2 + [NAMES] * 8


async def test_one_file_of_a_listing_is_the_sentinel() -> None:
    async with on_stage(Tree(), LONG) as stage:
        listed = await list_one(stage, 10)
        assert [entry.has_attributes for entry in listed] == [False] + [True] * (FILES - 1)
        one = fuse.ENTRY_OUT.unpack((await stage.call(ALL, 11, ASK, ME)).body)
        assert (one.nodeid, one.entry_valid) == (1100, 600)
        assert (one.attr_valid, one.attr_valid_nsec) == (0, 0)


async def test_who_looks_gets_all_and_asks_for_nothing() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 20):
            await look_at_all(stage, await list_one(stage, directory))
    assert tree.seen == [ALL] * 10


async def test_a_sentinel_is_what_the_listing_said() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        tree.size = 5  # by the host, and attributes are believed for a while
        told = await ask(stage, 1000)
        assert (told.attr.ino, told.attr.size) == (1000, 0)
        assert 590 < told.attr_valid < 600
        assert (await ask(stage, 1000)).attr.size == 5, "it is for one question"
    assert tree.seen == [ALL, Opcode.GETATTR]


@pytest.mark.parametrize("change", [Opcode.SETATTR, Opcode.UNLINK])
async def test_after_a_change_the_daemon_is_asked(change: Opcode) -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        tree.size = 5
        await stage.call(change, 10, bytes(88))
        assert (await ask(stage, 1000)).attr.size == 5
        assert (await list_one(stage, 11))[0].has_attributes, "it was a look all the same"
    assert tree.seen == [ALL, change, Opcode.GETATTR, ALL]


@pytest.mark.parametrize("first", [ALL, Opcode.SETATTR])
async def test_a_change_on_its_way_makes_it_unsure(first: Opcode) -> None:
    tree = Tree()
    tree.keep = {int(ALL), int(Opcode.SETATTR)}
    second = Opcode.SETATTR if first == ALL else ALL
    async with on_stage(tree, LONG) as stage:
        for count, opcode in enumerate((first, second), 1):
            stage.send(opcode, 10, ASK if opcode == ALL else bytes(88), ME)
            await tree.wait_kept(count)
        for request in tree.kept:
            tree.answer(request)
            await stage.receive()
        tree.size = 5
        assert (await ask(stage, 1000)).attr.size == 5


async def test_a_change_that_takes_long_makes_it_unsure() -> None:
    tree = Tree()
    tree.keep = {int(Opcode.SETATTR)}
    async with on_stage(tree, LONG) as stage:
        unique = stage.send(Opcode.SETATTR, 10, bytes(88), ME)
        await tree.wait_kept(1)
        await list_one(stage, 10)
        tree.size = 5
        assert (await ask(stage, 1000)).attr.size == 5
        tree.answer(tree.kept[0])
        assert (await stage.receive()).unique == unique


async def test_an_open_ends_it() -> None:
    """Also one that has not found out what the file is like."""
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        tree.failing = True
        stage.send(Opcode.OPEN, 1000, fuse.OPEN_IN.values(os.O_RDONLY, 0), ME)
        while (await stage.receive()).unique == 0:
            pass
        tree.failing, tree.size = False, 5
        assert (await ask(stage, 1000)).attr.size == 5


async def test_who_asks_later_asks_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfsmount.client.relay.walkers._AT_ONCE", 0.0)
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        tree.size = 5
        assert (await ask(stage, 1000)).attr.size == 5
        assert (await list_one(stage, 11))[0].has_attributes, "it was a look all the same"


async def test_somebody_else_asks_the_daemon() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        tree.size = 5
        assert (await ask(stage, 1000, OTHER)).attr.size == 5
        assert (await list_one(stage, 11))[0].has_attributes, "threads share work"


async def test_a_number_that_comes_back_is_another_file() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        await list_one(stage, 10)
        stage.send(Opcode.FORGET, 1000, fuse.FORGET_IN.values(1))
        tree.size = 5
        assert (await ask(stage, 1000)).attr.size == 5


async def test_names_that_are_looked_up_after_all() -> None:
    """As by ``rm -r``: it is given all for a while, though it never asks for attributes."""
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 10 + 3 + 64 + 3):
            for number, entry in enumerate(await list_one(stage, directory)):
                if not entry.nodeid:
                    await stage.call(Opcode.LOOKUP, directory, b"file-%d\0" % number, ME)
    once = [ALL] * 2 + [NAMES] + [Opcode.LOOKUP] * FILES
    assert tree.seen == once + [ALL] * 64 + once


async def test_directories_that_are_looked_up_are_gone_through() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 20):
            await list_one(stage, directory)
            for number in range(4):
                await stage.call(Opcode.LOOKUP, directory, b"folder-%d\0" % number, ME)
    assert [opcode for opcode in tree.seen if opcode != Opcode.LOOKUP] == [ALL] * 2 + [NAMES] * 8


async def test_two_at_once_are_two() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 20):
            await list_one(stage, directory, ME)
            await look_at_all(stage, await list_one(stage, directory + 50, OTHER), OTHER)
    assert tree.seen[::2] == [ALL] * 2 + [NAMES] * 8
    assert tree.seen[1::2] == [ALL] * 10


async def test_who_is_out_of_sight_gets_all() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 15):
            assert all(entry.has_attributes for entry in await list_one(stage, directory, pid=0))
    assert tree.seen == [ALL] * 5


async def test_small_directories_tell_nothing() -> None:
    tree = Tree(files=7)
    async with on_stage(tree, LONG) as stage:
        for directory in range(10, 15):
            assert all(entry.has_attributes for entry in await list_one(stage, directory))
    assert tree.seen == [ALL] * 5


async def test_what_the_kernel_knows_tells_nothing() -> None:
    tree = Tree()
    async with on_stage(tree, LONG) as stage:
        for _ in range(5):
            await list_one(stage, 10)
        assert not (await list_one(stage, 11))[0].has_attributes
    assert tree.seen == [ALL] + [NAMES] * 4 + [ALL]


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy.for_mode("none"),
        CachePolicy.for_mode("always"),
        CachePolicy.for_mode("host"),
        CachePolicy.for_mode("auto", 1e9),
        CachePolicy.for_mode("auto", 600.0, attr_timeout=0.0),
        CachePolicy.for_mode("auto", 600.0, entry_timeout=0.0),
    ],
    ids=["none", "always", "host", "for-ever", "no-attributes", "no-names"],
)
async def test_others_get_all(policy: CachePolicy) -> None:
    tree = Tree()
    async with on_stage(tree, policy) as stage:
        for directory in range(10, 15):
            listed = await list_one(stage, directory)
            assert len({entry.has_attributes for entry in listed}) == 1
    assert tree.seen == [ALL] * 5


# --- where the sentinel is ---


def listing(kinds: list[int], nodeids: list[int]) -> bytes:
    return b"".join(
        fuse.encode_direntplus(reply_entry(nodeid, kind), 1, 1, 8, b"name-%d" % nodeid)
        for kind, nodeid in zip(kinds, nodeids, strict=True)
    )


def found_in(body: bytes) -> int | None:
    memory = mmap.mmap(-1, 1 << 16)
    memory[4096 : 4096 + len(body)] = body
    return find_sentinel(memory, 4096, len(body))


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO])
def test_the_first_file_of_many_is_found(kind: int) -> None:
    kinds = [kind] + [stat.S_IFREG] * 8
    body = listing(kinds, list(range(1, 10)))

    assert found_in(body) == 4096 + len(body) // 9
    assert found_in(listing(kinds[:-1], list(range(1, 9)))) is None
    assert found_in(listing(kinds, [1, 0, *range(3, 10)])) is None, "one has no node"


@given(body=st.binary(max_size=1600), count=st.integers(8, 9))
def test_no_reply_makes_it_leave_its_bytes(body: bytes, count: int) -> None:
    whole = listing([stat.S_IFREG] * count, list(range(1, count + 1))) + body
    found = found_in(whole)

    assert found == 4096
    assert (found_in(body) or 4096) <= 4096 + len(body)
