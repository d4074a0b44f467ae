"""Pages that the daemon refuses below the kernel's write-back: who is told, and who is not."""

from __future__ import annotations

import errno
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.client.relay.fake_kernel import on_stage
from vfsmount.cache.policy import CachePolicy
from vfsmount.channel import ChannelOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, WriteFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.client.relay.fake_kernel import Reply, Stage
    from vfsmount.testing.fake_device import DeviceRequest

KEPT = CachePolicy.for_mode("always", writeback=True)
FILE = 7
PAGE = bytes(range(256)) * 16
MINE, OTHERS = 0x1111, 0x2222


ATTR = fuse.Attr(7, 0, 0, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)


class Kernel:
    """What the kernel asks of one file, whose pages the daemon refuses with ``error``."""

    def __init__(self) -> None:
        self.stage: Stage
        self.error = -errno.EDQUOT
        self.answers: dict[int, int] = {}
        self.handles = 0
        self.is_mute = False
        self.links = 1
        self.parts: list[int] = []
        self.written = bytearray()

    def serve(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        if opcode == Opcode.TMPFILE:
            assert fuse.CREATE_IN.unpack(request.body[:16]).flags == os.O_TMPFILE | os.O_RDWR
            entry = fuse.EntryOut(FILE, 0, 0, 0, 0, 0, ATTR)
            request.reply(fuse.ENTRY_OUT.pack(entry) + fuse.OPEN_OUT.values(70, 0, 0))
        elif opcode == Opcode.OPEN:
            flags = fuse.OPEN_IN.unpack(request.body).flags
            assert flags & os.O_ACCMODE != os.O_WRONLY
            self.handles += 1
            request.reply(fuse.OPEN_OUT.values(self.handles, 0, 0))
        elif opcode == Opcode.GETATTR:
            attr = ATTR._replace(nlink=self.links)
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr)))
        elif opcode == Opcode.WRITE:
            self.write_part(request)
        elif not request.room:
            request.use()
        else:
            request.reply(error=self.answers.get(opcode, 0))

    def write_part(self, request: DeviceRequest) -> None:
        """Take as much as ``parts`` says next; with none left, refuse."""
        write = fuse.WRITE_IN.unpack(request.body)
        data = request.body[fuse.WRITE_IN.size :]
        assert (len(data), request.header.len) == (write.size, len(request.data))
        if self.parts:
            taken = self.parts.pop(0)
            self.written[write.offset : write.offset + taken] = data[:taken]
            request.reply(fuse.WRITE_OUT.values(taken))
        elif not self.is_mute:
            request.reply(error=self.error)

    async def open(self, flags: int = os.O_WRONLY) -> int:
        unique = self.stage.send(Opcode.OPEN, FILE, fuse.OPEN_IN.values(flags, 0))
        while (reply := await self.stage.receive()).unique != unique:
            assert not reply.unique  # attributes are invalidated in mode ``auto``
        return fuse.OPEN_OUT.unpack(reply.body).fh

    async def write(self, fh: int, flags: int = WriteFlag.CACHE) -> Reply:
        body = fuse.WRITE_IN.values(fh, 0, 4096, flags, 0, 0) + PAGE
        return await self.stage.call(Opcode.WRITE, FILE, body)

    async def flush(self, fh: int, owner: int = MINE) -> int:
        body = fuse.FLUSH_IN.values(fh, owner)
        return (await self.stage.call(Opcode.FLUSH, FILE, body)).errno

    async def fsync(self, fh: int) -> int:
        body = fuse.FSYNC_IN.values(fh, 0)
        return (await self.stage.call(Opcode.FSYNC, FILE, body)).errno

    async def copy(self, fh: int) -> int:
        body = fuse.COPY_FILE_RANGE_IN.values(fh, 0, 1, 99, 0, 4096, 0)
        return (await self.stage.call(Opcode.COPY_FILE_RANGE, FILE, body)).errno

    async def release(self, fh: int, opcode: int = Opcode.RELEASE) -> None:
        await self.stage.call(opcode, FILE, fuse.RELEASE_IN.values(fh, 0, 0, 0))


@asynccontextmanager
async def kernel(
    options: ChannelOptions | None = None, policy: CachePolicy = KEPT
) -> AsyncIterator[Kernel]:
    found = Kernel()
    async with on_stage(found.serve, policy, options=options) as found.stage:
        yield found


async def test_each_writer_is_told_what_the_daemon_said() -> None:
    async with kernel() as it:
        one, two, reader = await it.open(), await it.open(os.O_RDWR), await it.open(os.O_RDONLY)
        reply = await it.write(one)
        assert (reply.errno, fuse.WRITE_OUT.unpack(reply.body).size) == (0, 4096)
        assert [await it.flush(fh) for fh in (reader, one, one)] == [0, errno.EDQUOT, 0]
        assert [await it.flush(two, owner) for owner in (OTHERS, MINE)] == [errno.EDQUOT] * 2
        later = await it.open()
        assert [await it.flush(fh) for fh in (later, two)] == [0, 0]


async def test_fsync_tells_a_handle_once_and_is_enough() -> None:
    async with kernel() as it:
        one, two, reader = await it.open(), await it.open(), await it.open(os.O_RDONLY)
        await it.write(one)
        assert [await it.fsync(one), await it.flush(one), await it.fsync(one)] == [
            errno.EDQUOT,
            0,
            0,
        ]
        assert await it.fsync(reader) == 0
        assert await it.copy(reader) == 0
        assert await it.fsync(two) == errno.EDQUOT
        await it.write(one)  # again
        assert await it.copy(reader) == errno.EDQUOT  # of what the host has not
        assert [await it.fsync(fh) for fh in (reader, one)] == [errno.EDQUOT] * 2


async def test_a_node_may_be_forgotten_in_part() -> None:
    """As after a lookup that has found another file than the kernel knew by that name."""
    async with kernel() as it:
        one = await it.open()
        await it.write(one)
        it.stage.send(Opcode.FORGET, FILE, fuse.FORGET_IN.values(1))
        later = await it.open()
        assert [await it.fsync(fh) for fh in (later, one)] == [errno.EDQUOT] * 2
        await it.write(one)
        for fh in (one, later):
            assert await it.flush(fh) == errno.EDQUOT
            await it.release(fh)
        it.stage.send(Opcode.FORGET, FILE, fuse.FORGET_IN.values(1))
        assert await it.copy(await it.open()) == 0


async def test_a_write_that_somebody_waits_for_fails_at_once() -> None:
    async with kernel() as it:
        one = await it.open()
        assert (await it.write(one, flags=0)).errno == errno.EDQUOT
        assert await it.flush(one) == 0


async def test_where_nobody_could_be_told_the_kernel_is() -> None:
    async with kernel() as it:
        one = await it.open()
        await it.release(one)
        assert (await it.write(one)).errno == errno.EDQUOT


async def test_a_file_without_a_name() -> None:
    """Opened for reading, too, and not for appending; told like any other."""
    async with kernel() as it:
        flags = os.O_TMPFILE | os.O_WRONLY | os.O_APPEND
        body = fuse.CREATE_IN.values(flags, 0o640, 0, 0) + b"/\0"
        assert (await it.stage.call(Opcode.TMPFILE, 1, body)).errno == 0
        await it.write(70)
        assert await it.flush(70) == errno.EDQUOT


async def test_a_directory_may_have_the_same_handle() -> None:
    """The C daemon counts them apart."""
    async with kernel() as it:
        one = await it.open()
        await it.write(one)
        await it.release(one, Opcode.RELEASEDIR)
        assert await it.flush(one) == errno.EDQUOT


async def test_a_daemon_without_flush_and_fsync() -> None:
    """The kernel would send no more of them, and nobody would be told anything."""
    async with kernel() as it:
        it.answers = {Opcode.FLUSH: -errno.ENOSYS, Opcode.FSYNC: -errno.ENOSYS}
        one = await it.open()
        assert [await it.flush(one), await it.fsync(one)] == [0, 0]
        await it.write(one)
        assert [await it.flush(one), await it.fsync(one)] == [errno.EDQUOT] * 2
        it.answers = {Opcode.FLUSH: -errno.EIO}
        assert await it.flush(one) == errno.EIO


async def test_what_is_taken_in_parts() -> None:
    """The kernel would not notice; the daemon says why with the next part only."""
    async with kernel() as it:
        one = await it.open()
        it.parts = [1000, 3095, 1]
        assert (await it.write(one)).errno == 0
        assert it.written == PAGE
        assert await it.flush(one) == 0
        it.parts = [1000, 95]
        assert (await it.write(one)).errno == 0
        assert await it.flush(one) == errno.EDQUOT
        it.parts = [0]
        assert (await it.write(one)).errno == 0
        assert await it.flush(one) == errno.ENOSPC
        await it.release(one)
        it.parts = [1000]
        assert (await it.write(one)).errno == errno.EDQUOT


async def test_no_reply_in_time() -> None:
    # Long enough for what is answered at once, also on a busy machine.
    options = ChannelOptions(mute_after=10, request_timeout=2.0)
    async with kernel(options) as it:
        it.is_mute = True
        one, two = await it.open(), await it.open()
        assert (await it.write(one)).errno == 0
        assert [await it.flush(fh) for fh in (one, two)] == [errno.ETIMEDOUT] * 2


async def test_nobody_asks(expect_log: Callable[[str], None]) -> None:
    """Closed, and written to through a mapping afterwards."""
    expect_log("pages of node 7 did not reach the host, nobody asked: Disk quota exceeded")
    async with kernel() as it:
        one = await it.open()
        assert await it.flush(one) == 0
        await it.write(one)
        await it.release(one)
        again = await it.open()
        assert [await it.flush(again), await it.fsync(again), await it.fsync(again)] == [
            0,
            errno.EDQUOT,
            0,
        ]
        await it.write(again)
        assert await it.flush(again) == errno.EDQUOT
        await it.release(again)
        it.stage.send(Opcode.FORGET, FILE, fuse.FORGET_IN.values(1))
        assert await it.fsync(await it.open()) == 0


async def test_an_open_that_came_to_nothing() -> None:
    """Its handle goes back, and its number may come again, for somebody who only reads."""
    async with kernel(policy=CachePolicy.for_mode("auto", writeback=True)) as it:
        it.links = 0
        stale = await it.stage.call(Opcode.OPEN, FILE, fuse.OPEN_IN.values(os.O_WRONLY, 0))
        assert stale.errno == errno.ESTALE
        it.links, it.handles = 1, 0
        assert await it.open(os.O_RDONLY) == 1
        assert (await it.write(1)).errno == errno.EDQUOT
