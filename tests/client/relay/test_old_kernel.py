"""INIT with a kernel that knows less than the daemon accepted: it is begun anew with less.

The kernel is played by a socket; the daemons are real ones, which must stand a second INIT, and a
fake one, which sees what it is offered.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.daemons import start_daemon
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.mount.engine import RelayEngine
from vfsmount.client.relay.init import SHARED_FLAGS
from vfsmount.client.session import Session, connect
from vfsmount.errors import MountError
from vfsmount.testing.fake_device import DeviceRequest, FakeDevice
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PATIENCE = 5.0
#: Of Linux 5.4, roughly; nothing in the second word.
OLD = InitFlag.ASYNC_READ | InitFlag.BIG_WRITES | InitFlag.DO_READDIRPLUS | InitFlag.MAX_PAGES


class Kernel:
    """The kernel's end: one message a packet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unique = 0

    def send(self, opcode: int, nodeid: int, body: bytes) -> None:
        self._unique += 2
        self._sock.send(fuse.encode_request(opcode, self._unique, nodeid, body))

    def offer(self, flags: InitFlag, major: int = fuse.KERNEL_VERSION) -> None:
        one, two = fuse.split_flags(flags)
        asked = fuse.InitIn(major, 31, 1 << 17, one, two)
        self.send(Opcode.INIT, 0, fuse.INIT_IN.pack(asked))

    async def receive(self) -> bytes:
        data = await trio.to_thread.run_sync(self._sock.recv, 1 << 17)
        header = fuse.OUT_HEADER.unpack(data)
        assert (header.error, header.unique) == (0, self._unique)
        return data[fuse.OUT_HEADER.size :]


@asynccontextmanager
async def served(session: Session, offered: InitFlag) -> AsyncIterator[tuple[Kernel, InitFlag]]:
    """Serve a kernel that offers this; the flags are those that it is told."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(PATIENCE)
    with theirs, ours:
        kernel = Kernel(theirs)
        kernel.offer(offered)
        engine = RelayEngine(session, CachePolicy.for_mode("auto"), "for the test")
        await engine.start(ours.fileno())
        answer = fuse.INIT_OUT.unpack(await kernel.receive())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            yield kernel, fuse.join_flags(answer.flags, answer.flags2)
            nursery.cancel_scope.cancel()


class Accepting:
    """A device that accepts whatever it is offered, and remembers that."""

    def __init__(self) -> None:
        self.offers: list[InitFlag] = []

    def __call__(self, request: DeviceRequest) -> None:
        if request.header.opcode != Opcode.INIT:
            request.reply(bytes(request.room - fuse.OUT_HEADER.size))
            return
        asked = fuse.decode_request(request.data).args
        self.offers.append(fuse.join_flags(asked.flags, asked.flags2))
        reply = fuse.InitOut(
            7, 38, 1 << 17, asked.flags, 16, 12, 1 << 17, 1, 32, 0, asked.flags2, 0, 0
        )
        request.reply(fuse.INIT_OUT.pack(reply))


async def test_what_the_kernel_lacks_is_withdrawn() -> None:
    device = Accepting()
    with FakeDevice(device) as fake:
        async with connect(sock=fake.guest_socket()) as session:
            accepted = session.facts.flags & SHARED_FLAGS
            assert accepted, "nothing to withdraw"
            async with served(session, OLD) as (kernel, told):
                assert not told & SHARED_FLAGS
                assert not told & ~OLD
                kernel.send(Opcode.GETATTR, 1, bytes(16))
                assert len(await kernel.receive()) == fuse.ATTR_OUT.size
            first, second = device.offers
            assert second == first & ~accepted
            assert not session.facts.flags & SHARED_FLAGS


async def test_one_that_knows_all_needs_no_second_init() -> None:
    device = Accepting()
    with FakeDevice(device) as fake:
        async with connect(sock=fake.guest_socket()) as session:
            everything = OLD | InitFlag.INIT_EXT | session.facts.flags
            async with served(session, everything) as (_, told):
                shared = session.facts.flags & SHARED_FLAGS
                # The older of the two ways to clear set-id bits goes, and there is no write-back.
                assert told & SHARED_FLAGS == shared & ~(
                    InitFlag.HANDLE_KILLPRIV | InitFlag.WRITEBACK_CACHE
                )
            assert len(device.offers) == 1


@pytest.mark.needs_daemon
async def test_real_daemons_stand_it(daemon_kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with start_daemon(daemon_kind, tmp_path) as daemon:
        async with (
            connect(daemon.socket) as session,
            served(session, OLD) as (kernel, told),
        ):
            assert not told & ~OLD
            kernel.send(Opcode.LOOKUP, 1, b"file\0")
            entry = fuse.ENTRY_OUT.unpack(await kernel.receive())
            assert entry.attr.size == 7
            kernel.send(Opcode.OPEN, entry.nodeid, fuse.OPEN_IN.values(0, 0))
            handle = fuse.OPEN_OUT.unpack(await kernel.receive()).fh
            read = fuse.READ_IN.values(handle, 0, 4096, 0, 0, 0)
            kernel.send(Opcode.READ, entry.nodeid, read)
            assert await kernel.receive() == b"content"


async def test_another_major_version_is_refused() -> None:
    with FakeDevice(Accepting()) as fake:
        async with connect(sock=fake.guest_socket()) as session:
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, ours:
                Kernel(theirs).offer(OLD, major=8)
                engine = RelayEngine(session, CachePolicy.for_mode("auto"), "for the test")
                with pytest.raises(MountError, match="another FUSE"):
                    await engine.start(ours.fileno())
