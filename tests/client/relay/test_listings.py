"""Listings of directories whose names the kernel knows: READDIRPLUS becomes READDIR on the way."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.relay.fake_kernel import on_stage
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.relay.listings import names_as_plus, room_for_names
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from vfsmount.testing.fake_device import DeviceRequest

LONG = CachePolicy.for_mode("auto", 600.0)
ENTRY = fuse.EntryOut(42, 0, 0, 0, 0, 0, fuse.Attr(*[0] * 16))
FOLDER = 9
SIZE = 32768
NAMES = [b"a", b"name", b"longer-name.txt", b"x" * 255]


def dirents(names: list[bytes]) -> bytes:
    return b"".join(
        fuse.encode_dirent(100 + number, number + 1, 8, name) for number, name in enumerate(names)
    )


def ask(offset: int = 0, size: int = SIZE) -> bytes:
    return fuse.READ_IN.values(3, offset, size, 0, 0, 0)


def kept(body: bytes) -> list[tuple[int, bytes]]:
    """Nodes and names of a READDIRPLUS reply."""
    found, at = [], 0
    while at < len(body):
        entry = fuse.ENTRY_OUT.unpack(body, at)
        at += fuse.ENTRY_OUT.size
        length = fuse.DIRENT.unpack(body, at).namelen
        found.append((entry.nodeid, body[at + 24 : at + 24 + length]))
        at += (24 + length + 7) & -8
    return found


class Folder:
    """A device with one directory; remembers what it was asked."""

    def __init__(self, names: list[bytes]) -> None:
        self.names = names
        self.asked: list[int] = []
        self.error = 0

    def __call__(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        self.asked.append(opcode)
        if self.error:
            request.reply(error=-self.error)
        elif opcode == Opcode.READDIR:
            assert fuse.READ_IN.unpack(request.body).size == room_for_names(SIZE)
            request.reply(dirents(self.names))
        elif opcode == Opcode.READDIRPLUS:
            request.reply(fuse.ENTRY_OUT.pack(ENTRY) + dirents(self.names[:1]))
        elif opcode == Opcode.LOOKUP:
            request.reply(fuse.ENTRY_OUT.pack(ENTRY))
        elif request.room:
            request.reply()
        else:
            request.use()


async def test_the_second_listing_has_names_alone() -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, LONG) as stage:
        first = await stage.call(Opcode.READDIRPLUS, FOLDER, ask())
        again = await stage.call(Opcode.READDIRPLUS, FOLDER, ask())
        counted = stage.channel.statistics().requests

    assert kept(first.body) == [(42, NAMES[0])]
    assert kept(again.body) == [(0, name) for name in NAMES]
    assert folder.asked == [Opcode.READDIRPLUS, Opcode.READDIR]
    assert {name: row.count for name, row in counted.items()} == {"READDIRPLUS": 1, "READDIR": 1}


async def test_many_lookups_are_as_good_as_a_listing() -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, LONG) as stage:
        for number in range(16):
            await stage.call(Opcode.LOOKUP, FOLDER, b"%d\0" % number)
        await stage.call(Opcode.READDIRPLUS, FOLDER, ask())

    assert folder.asked[-1] == Opcode.READDIR


@pytest.mark.parametrize("mode", ["none", "always", "host"])
async def test_other_modes_ask_for_all(mode: str) -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, CachePolicy.for_mode(mode)) as stage:
        for _ in range(2):
            await stage.call(Opcode.READDIRPLUS, FOLDER, ask())

    assert folder.asked == [Opcode.READDIRPLUS] * 2


async def test_what_goes_on_is_left_to_the_kernel() -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, LONG) as stage:
        for offset in (0, 5, 9):
            await stage.call(Opcode.READDIRPLUS, FOLDER, ask(offset))

    assert folder.asked == [Opcode.READDIRPLUS] * 3


async def test_after_a_forget_all_is_asked_for() -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, LONG) as stage:
        await stage.call(Opcode.READDIRPLUS, FOLDER, ask())
        stage.send(Opcode.FORGET, 42, fuse.FORGET_IN.values(1))
        await stage.call(Opcode.READDIRPLUS, FOLDER, ask())

    assert Opcode.READDIR not in folder.asked


async def test_an_error_comes_through() -> None:
    folder = Folder(NAMES)
    async with on_stage(folder, LONG) as stage:
        await stage.call(Opcode.READDIRPLUS, FOLDER, ask())
        folder.error = errno.EACCES
        assert (await stage.call(Opcode.READDIRPLUS, FOLDER, ask())).errno == errno.EACCES


@given(names=st.lists(st.binary(min_size=1, max_size=255)))
def test_names_keep_within_the_room(names: list[bytes]) -> None:
    data = dirents(names)
    memory = mmap.mmap(-1, 1 << 16 | len(data))
    memory[64 : 64 + len(data)] = data

    plus = names_as_plus(memory, 64, len(data))

    assert kept(plus) == [(0, name) for name in names]
    assert room_for_names(len(plus)) <= len(data)


@given(data=st.binary(max_size=400))
def test_nonsense_ends_the_listing(data: bytes) -> None:
    memory = mmap.mmap(-1, 4096)
    memory[: len(data)] = data

    assert len(names_as_plus(memory, 0, len(data))) <= len(data) * 19 // 3
