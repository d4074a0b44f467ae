"""A change whose caller has gone, and that the daemon carries out afterwards: nobody sees old data.

A daemon of one file and many names, which keeps what it is told to change until the test says so.
"""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

import vfsmount
from tests.support.wait import wait_until_async
from vfsmount.cache.pages import BLOCK
from vfsmount.client.session import setattr_in
from vfsmount.errors import RemoteErrno
from vfsmount.testing.fake_device import DeviceRequest, FakeDevice
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from vfsmount.client.cached import CachedSession

FILE = 2
PATIENCE = 5.0
FLAGS, FLAGS2 = fuse.split_flags(InitFlag.INIT_EXT | InitFlag.MAX_PAGES)
INIT = fuse.INIT_OUT.values(7, 38, 65536, FLAGS, 0, 0, 1 << 20, 1, 256, 0, FLAGS2, 0, 0)
CHANGES = {Opcode.WRITE, Opcode.SETATTR, Opcode.CREATE, Opcode.UNLINK}


class Host:
    """The daemon, and what it has."""

    def __init__(self) -> None:
        self.content = b"old"
        self.names = {b"file", b"other"}
        self.holds = False
        self.held: list[DeviceRequest] = []
        self.view: CachedSession

    def serve(self, request: DeviceRequest) -> None:
        opcode = Opcode(request.header.opcode)
        if self.holds and opcode in CHANGES:
            self.held.append(request)
        elif not request.room:
            request.use()
        else:
            self.answer(request, opcode)

    def answer(self, request: DeviceRequest, opcode: Opcode) -> None:
        if opcode == Opcode.LOOKUP and request.body[:-1] not in self.names:
            request.reply(error=-errno.ENOENT)
            return
        if opcode == Opcode.WRITE:
            self.content = request.body[fuse.WRITE_IN.size :]
        elif opcode in (Opcode.SETATTR, Opcode.CREATE):
            self.content = b""
        elif opcode == Opcode.UNLINK:
            self.names.discard(request.body[:-1])
        request.reply(self.body(request, opcode))

    def body(self, request: DeviceRequest, opcode: Opcode) -> bytes:
        size = len(self.content)
        attr = fuse.Attr(FILE, size, 1, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
        entry = fuse.ENTRY_OUT.pack(fuse.EntryOut(FILE, 0, 0, 0, 0, 0, attr))
        opened = fuse.OPEN_OUT.values(1, 0, 0)
        bodies = {
            Opcode.INIT: INIT,
            Opcode.LOOKUP: entry,
            Opcode.CREATE: entry + opened,
            Opcode.OPEN: opened,
            Opcode.READ: self.content,
            Opcode.WRITE: fuse.WRITE_OUT.values(size),
        }
        if opcode in (Opcode.GETATTR, Opcode.SETATTR):
            return fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr))
        return bodies.get(opcode, b"")

    async def leave(self, change: Callable[[], Awaitable[object]]) -> None:
        """Have the caller of a change go away as soon as the daemon has it."""
        self.holds = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await wait_until_async(lambda: bool(self.held), PATIENCE, "the change to be sent")
            nursery.cancel_scope.cancel()
        assert self.view._session.channel.orphans == 1

    async def carry_out(self) -> None:
        """Do what was asked for."""
        self.holds = False
        for request in self.held:
            self.answer(request, Opcode(request.header.opcode))
        channel = self.view._session.channel
        await wait_until_async(lambda: not channel.orphans, PATIENCE, "the late answer")


@asynccontextmanager
async def viewed() -> AsyncIterator[Host]:
    host = Host()
    with FakeDevice(host.serve) as device:
        async with vfsmount.connect(sock=device.guest_socket()) as guest:
            with guest.cached(vfsmount.CachePolicy.for_mode("always")) as host.view:
                yield host
                host.view.check_invariants()


CASES: dict[str, Callable[[CachedSession], Awaitable[object]]] = {
    "write": lambda view: view.write("file", b"brand-new"),
    "truncate": lambda view: view.setattr("file", setattr_in(size=0)),
    "create": lambda view: view.create("file"),
    "create of what is known by another name": lambda view: view.create("third"),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", CASES)
async def test_contents_and_size(case: str, known: bool) -> None:
    async with viewed() as host:
        if known:
            assert await host.view.read("other") == b"old"
        await host.leave(lambda: CASES[case](host.view))
        assert await host.view.read("other") == b"old"
        assert (await host.view.stat("other")).size == 3
        await host.carry_out()
        assert host.content != b"old"
        assert await host.view.read("other") == host.content
        assert (await host.view.stat("other")).size == len(host.content)


async def test_names() -> None:
    async with viewed() as host:
        await host.leave(lambda: host.view.unlink("file"))
        assert (await host.view.stat("file")).size == 3
        await host.carry_out()
        with pytest.raises(RemoteErrno, match="ENOENT"):
            await host.view.stat("file")


async def test_afterwards_all_is_kept_again() -> None:
    async with viewed() as host:
        host.content = bytes(BLOCK)
        await host.leave(lambda: host.view.write("file", b"w"))
        await host.carry_out()
        host.content = bytes(BLOCK)
        assert await host.view.read("file") == host.content
        reads = host.view._session.channel.statistics().requests["READ"].count
        assert await host.view.read("file") == host.content
        assert host.view._session.channel.statistics().requests["READ"].count == reads
