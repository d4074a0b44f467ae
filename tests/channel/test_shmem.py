"""A daemon that maps: what a hostile one may ask, and what older ones say instead."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

import vfsmount
from tests.channel.support import DEADLINE
from tests.support.wait import wait_until_async
from vfsmount.errors import ProtocolViolation
from vfsmount.testing import FakeDevice
from vfsmount.wire import fuse
from vfsmount.wire.fuse import AttrFlag, InitFlag, Opcode
from vfsmount.wire.vhost_user import BackendRequest, ShmemMap, encode_header, encode_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from vfsmount.client.session import Session
    from vfsmount.dax_shm.window import Window
    from vfsmount.testing.fake_device import DeviceRequest

MIB = 1 << 20
SIZE = 8 * MIB
MAP, UNMAP = BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP
DAX_FLAGS = InitFlag.MAP_ALIGNMENT | InitFlag.INIT_EXT


class Guest:
    """A daemon of the test's making, and the guest's end of its window."""

    def __init__(self, device: FakeDevice, session: Session, window: Window) -> None:
        self.device = device
        self.session = session
        self.window = window

    async def ask(self, request: BackendRequest, record: ShmemMap, *fds: int) -> int:
        """Ask for something; returns the errno of the answer."""
        return await self.ask_raw(encode_message(request, record, need_reply=True), *fds)

    async def ask_raw(self, message: bytes, *fds: int) -> int:
        answer = await trio.to_thread.run_sync(self.device.ask_raw, message, fds)
        self.window.check_invariants()
        return (1 << 64) - answer if answer else 0

    async def map(self, fd: int, **changes: int) -> int:
        return await self.ask(MAP, ShmemMap(0, 0, 0, 2 * MIB, 0)._replace(**changes), fd)


def init_reply(flags: InitFlag, alignment: int) -> bytes:
    first, second = fuse.split_flags(flags)
    out = fuse.InitOut(7, 40, 0, first, 0, 0, 1 << 17, 1, 32, alignment, second, 0, 0)
    return fuse.INIT_OUT.pack(out)


@asynccontextmanager
async def guest(
    *,
    shmem: int = SIZE,
    flags: InitFlag = DAX_FLAGS,
    alignment: int = 12,
    serve: Callable[[DeviceRequest], None] | None = None,
) -> AsyncIterator[Guest]:
    def react(request: DeviceRequest) -> None:
        if request.header.opcode == Opcode.INIT:
            request.reply(init_reply(flags, alignment))
        elif serve is not None:
            serve(request)
        else:
            request.reply(b"")

    with trio.fail_after(DEADLINE), FakeDevice(react, shmem=shmem) as device:
        async with vfsmount.connect(sock=device.guest_socket(), dax=SIZE) as session:
            assert session.window is not None
            yield Guest(device, session, session.window)


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


# --- a hostile daemon -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"shmid": 1},
        {"shmid": 255},
        {"flags": 2},
        {"flags": 1 << 63},
        {"length": 0},
        {"length": 4095},
        {"length": SIZE + 4096},
        {"length": (1 << 64) - 4096},
        {"shm_offset": SIZE},
        {"shm_offset": SIZE - MIB},
        {"shm_offset": 1},
        {"shm_offset": (1 << 64) - 4096},
        {"shm_offset": (1 << 64) - 4096, "length": 8192},
        {"fd_offset": 1},
        {"fd_offset": 1 << 63},
        {"fd_offset": (1 << 64) - 4096},
    ],
    ids=str,
)
async def test_a_mapping_never_leaves_the_window(path: Path, change: dict[str, int]) -> None:
    async with guest() as one:
        with opened(path) as fd:
            assert await one.map(fd, **change) == errno.EINVAL
            assert one.window.mapped() == 0
            assert await one.map(fd) == 0


async def test_what_is_mapped_is_not_mapped_over(path: Path) -> None:
    async with guest() as one:
        with opened(path) as fd:
            assert await one.map(fd, shm_offset=2 * MIB) == 0
            for offset in (2 * MIB, 4 * MIB - 4096, 4096):
                assert await one.map(fd, shm_offset=offset) == errno.EEXIST
            for record in (
                ShmemMap(0, 0, 2 * MIB, MIB, 0),
                ShmemMap(0, 0, 0, 4 * MIB, 0),
                ShmemMap(1, 0, 2 * MIB, 2 * MIB, 0),
            ):
                assert await one.ask(UNMAP, record) == errno.EINVAL
            assert await one.ask(UNMAP, ShmemMap(0, 0, 2 * MIB, 2 * MIB, 0)) == 0
            assert one.window.mapped() == 0


async def test_descriptors_that_are_no_good(path: Path, tmp_path: Path) -> None:
    async with guest() as one:
        with opened(path, os.O_RDONLY) as fd:
            assert await one.map(fd, flags=1) == errno.EACCES
        with opened(path, os.O_WRONLY) as fd:
            assert await one.map(fd, flags=1) == errno.EACCES
        with opened(path, os.O_RDWR | os.O_APPEND) as fd:
            assert await one.map(fd, flags=1) == errno.EINVAL
        with opened(path, os.O_PATH) as fd:
            assert await one.map(fd) == errno.EBADF
        with opened("/dev/zero") as fd:
            assert await one.map(fd, flags=1) == errno.ENODEV
        with opened(tmp_path, os.O_RDONLY) as fd:
            assert await one.map(fd) == errno.ENODEV
        assert one.window.mapped() == 0


@pytest.mark.parametrize("count", [0, 2])
async def test_a_wrong_number_of_descriptors_ends_the_channel(
    path: Path, count: int, expect_log: Callable[[str], None]
) -> None:
    expect_log(f"SHMEM_MAP with {count} descriptors")
    async with guest() as one:
        with opened(path) as fd:
            message = encode_message(MAP, ShmemMap(0, 0, 0, 4096, 0))
            assert one.device.backend_channel is not None
            await trio.to_thread.run_sync(one.device.send_backend, message, [fd] * count)
        assert isinstance(await one.session.channel.wait_ended(), ProtocolViolation)
        assert one.window.mapped() == 0


async def test_everything_is_closed_at_the_end(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with guest() as one:
        with opened(path) as fd:
            assert await one.map(fd) == 0
        window = one.window
    # A thread closes what came with messages.
    await wait_until_async(
        lambda: len(os.listdir("/proc/self/fd")) == before, DEADLINE, "descriptors to be closed"
    )
    assert window.descriptor(0, write=False) is None


async def test_a_daemon_that_says_yes_and_maps_nothing(path: Path) -> None:
    """Nor is a mapping believed that is not the one that was asked for."""
    async with guest() as one:
        dax = one.session.dax
        assert dax is not None
        assert not await dax.map(5, 0, 1)
        with opened(path) as fd:
            for offset in range(0, SIZE, 2 * MIB):
                assert await one.map(fd, shm_offset=offset, fd_offset=4 * MIB) == 0
        assert not await dax.map(6, 0, 1)
        assert await dax.map(6, 4 * MIB, 1)
        assert not await dax.map(6, 4 * MIB, 1, write=True)
        assert dax.statistics().failures >= 3


async def test_unmapped_without_being_asked(path: Path) -> None:
    def serve(request: DeviceRequest) -> None:
        if request.header.opcode == Opcode.OPEN:
            request.reply(fuse.OPEN_OUT.values(1, 0, 0))
        elif request.header.opcode == Opcode.READ:
            request.reply(b"by message")
        else:
            request.reply(b"")

    async with guest(serve=serve) as one:
        dax = one.session.dax
        assert dax is not None
        with opened(path) as fd:
            for offset in range(0, SIZE, 2 * MIB):
                assert await one.map(fd, shm_offset=offset) == 0
        await one.session.open(5, os.O_RDONLY)
        assert await dax.map(5, 0, 1)
        assert await one.session.read(5, 1, 0, 100) == b"content"
        for offset in range(0, SIZE, 2 * MIB):
            assert await one.ask(UNMAP, ShmemMap(0, 0, offset, 2 * MIB, 0)) == 0
        assert await one.session.read(5, 1, 0, 100) == b"by message"
        assert dax.statistics().mapped_ranges == 0


# --- what INIT says -------------------------------------------------------------------------------


@pytest.mark.parametrize(("alignment", "size"), [(0, 2), (12, 2), (21, 2), (22, 4), (23, 8)])
async def test_ranges_suit_the_daemon(alignment: int, size: int) -> None:
    async with guest(alignment=alignment) as one:
        assert one.window.range_size == size * MIB


@pytest.mark.parametrize("alignment", [24, 63, 64, 65535])
async def test_alignments_that_leave_no_room(alignment: int) -> None:
    def serve(request: DeviceRequest) -> None:
        init = request.header.opcode == Opcode.INIT
        request.reply(init_reply(DAX_FLAGS, alignment) if init else b"")

    with trio.fail_after(DEADLINE), FakeDevice(serve, shmem=SIZE) as device:
        async with vfsmount.connect(sock=device.guest_socket(), dax=SIZE) as session:
            assert (session.window, session.dax) == (None, None)


async def test_files_that_the_daemon_does_not_want_mapped(path: Path) -> None:
    """HAS_INODE_DAX: the attributes of each file say."""
    wanted: dict[int, int] = {5: int(AttrFlag.DAX), 6: 0}

    def serve(request: DeviceRequest) -> None:
        match request.header.opcode:
            case Opcode.LOOKUP:
                nodeid = int(request.body[:1])
                blank = fuse.ATTR.unpack(bytes(fuse.ATTR.size))
                attr = blank._replace(ino=nodeid, mode=0o100644, flags=wanted[nodeid])
                request.reply(fuse.ENTRY_OUT.pack(fuse.EntryOut(nodeid, 0, 1, 1, 0, 0, attr)))
            case Opcode.OPEN:
                request.reply(fuse.OPEN_OUT.values(request.header.nodeid, 0, 0))
            case Opcode.READ:
                request.reply(b"m")
            case _:
                request.reply(b"")

    async with guest(flags=DAX_FLAGS | InitFlag.HAS_INODE_DAX, serve=serve) as one:
        with opened(path) as fd:
            for offset in range(0, SIZE, 2 * MIB):
                assert await one.map(fd, shm_offset=offset) == 0
        for nodeid, expected in ((5, b"c"), (6, b"m")):
            await one.session.lookup(1, b"%d" % nodeid)
            await one.session.open(nodeid, os.O_RDONLY)
            last = b""
            for _ in range(30):
                last = await one.session.read(nodeid, nodeid, 0, 1)
                await trio.lowlevel.checkpoint()
            assert last == expected


# --- older daemons --------------------------------------------------------------------------------


def older(number: int, *entries: tuple[int, int, int, int]) -> bytes:
    payload = struct.pack("=IHH", 0, len(entries), 0)
    payload += b"".join(struct.pack("=4Q", *one) for one in entries)
    return encode_header(number, len(payload), need_reply=True) + payload


@pytest.mark.parametrize(("fs_map", "fs_unmap"), [(6, 7), (1000, 1001)])
async def test_older_messages(path: Path, fs_map: int, fs_unmap: int) -> None:
    async with guest(shmem=0) as one:
        assert one.window.size == SIZE
        with opened(path) as fd:
            first = (0, 0, 2 * MIB, 1)
            second = (4 * MIB, 2 * MIB, 2 * MIB, 3)
            assert await one.ask_raw(older(fs_map, first, second), fd) == 0
            assert [one.window.mapping(at, 2 * MIB) is None for at in (0, 2 * MIB)] == [False] * 2
            found = one.window.mapping(2 * MIB, 2 * MIB)
            assert found is not None
            assert (found.foffset, found.writable) == (4 * MIB, True)
            # In place of what is there, and all or nothing.
            assert await one.ask_raw(older(fs_map, (2 * MIB, 0, 2 * MIB, 1)), fd) == 0
            assert one.window.mapped() == 2
            beyond = (0, SIZE, 2 * MIB, 1)
            assert (
                await one.ask_raw(older(fs_map, (0, 4 * MIB, MIB, 1), beyond), fd) == errno.EINVAL
            )
            assert one.window.mapped() == 2
        assert await one.ask_raw(older(fs_unmap, (0, 2 * MIB, 2 * MIB, 0))) == 0
        assert one.window.mapped() == 1
        assert await one.ask_raw(older(fs_unmap, (0, 0, (1 << 64) - 1, 0))) == 0
        assert one.window.mapped() == 0


@pytest.mark.parametrize(
    ("message", "fds"),
    [(older(1000), 0), (older(1000), 2), (encode_header(1000, 1) + b"x", 1)],
)
async def test_older_messages_that_make_no_sense(
    path: Path, message: bytes, fds: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("garbage on the back-end request channel")
    async with guest(shmem=0) as one:
        with opened(path) as fd:
            await trio.to_thread.run_sync(one.device.send_backend, message, [fd] * fds)
        assert isinstance(await one.session.channel.wait_ended(), ProtocolViolation)
