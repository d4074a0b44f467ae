"""The channel over real host daemons."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.channel.support import DEADLINE
from tests.support.daemons import require_daemon, start_daemon
from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions, open_channel, probe
from vfsmount.errors import ChannelBroken, HandshakeError, RemoteErrno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode
from vfsmount.wire.vhost_user import ProtocolFeature, VirtioFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.daemons import Daemon
    from vfsmount.channel import Channel

pytestmark = pytest.mark.needs_daemon

real_kinds = pytest.mark.parametrize("kind", ["c", "rust"])


async def init(channel: Channel) -> None:
    """Start a FUSE session, with nothing special in it."""
    flags, flags2 = fuse.split_flags(InitFlag.MAX_PAGES | InitFlag.BIG_WRITES)
    body = fuse.INIT_IN.values(7, 36, 1 << 20, flags, flags2)
    await channel.request(Opcode.INIT, 0, body, reply_size=fuse.INIT_OUT.size)


async def lookup(channel: Channel, name: bytes, parent: int = 1) -> int:
    """Return a nodeid."""
    reply = await channel.request(Opcode.LOOKUP, parent, name + b"\0", reply_size=128)
    return fuse.ENTRY_OUT.unpack(reply).nodeid


async def open_file(channel: Channel, nodeid: int) -> int:
    """Return a file handle."""
    body = fuse.OPEN_IN.values(os.O_RDWR, 0)
    return fuse.OPEN_OUT.unpack(await channel.request(Opcode.OPEN, nodeid, body, reply_size=16)).fh


async def read(channel: Channel, nodeid: int, fh: int, offset: int, size: int) -> bytes:
    body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
    return await channel.request(Opcode.READ, nodeid, body, reply_size=size)


async def pause(daemon: Daemon) -> None:
    """Stop a daemon, and wait until each of its threads has stopped."""
    daemon.pause()
    tasks = Path(f"/proc/{daemon.pid}/task")

    def stopped() -> bool:
        try:
            stats = [(task / "stat").read_text() for task in tasks.iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            return False  # a thread has just ended: look again
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    await wait_until_async(stopped, DEADLINE, "the daemon to stop")


@pytest.mark.parametrize(
    "options",
    [
        ChannelOptions(),
        ChannelOptions(poll_us=0),
        ChannelOptions(indirect=False, queue_size=16),
        ChannelOptions(event_idx=False, queue_size=2),
    ],
    ids=["defaults", "parked", "direct", "flags"],
)
async def test_read_and_write(daemon_kind: str, tmp_path: Path, options: ChannelOptions) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket, options) as channel:
            await init(channel)
            nodeid = await lookup(channel, b"file")
            fh = await open_file(channel, nodeid)
            for offset, size in ((0, 1), (5, 4096), (4096, 4096), (1 << 20, 1 << 20)):
                assert await read(channel, nodeid, fh, offset, size) == data[offset : offset + size]
            assert await read(channel, nodeid, fh, (3 << 20) - 5, 100) == data[-5:]
            payload = os.urandom(1 << 20)
            body = fuse.WRITE_IN.values(fh, 12345, len(payload), 0, 0, 0)
            reply = await channel.request(
                Opcode.WRITE, nodeid, body, payload=memoryview(payload), reply_size=8
            )
            assert fuse.WRITE_OUT.unpack(reply).size == len(payload)
            with pytest.raises(RemoteErrno):
                await lookup(channel, b"absent")
        assert (tmp_path / "file").read_bytes()[12345 : 12345 + (1 << 20)] == payload


async def test_many_at_once(daemon_kind: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket, ChannelOptions(queue_size=64)) as channel:
            await init(channel)
            nodeid = await lookup(channel, b"file")
            fh = await open_file(channel, nodeid)

            async def reader(step: int) -> None:
                for i in range(20):
                    offset = (step * 7919 + i * 4099) % (1 << 20)
                    expected = data[offset : offset + 3000]
                    assert await read(channel, nodeid, fh, offset, 3000) == expected

            async with trio.open_nursery() as nursery:
                for step in range(200):
                    nursery.start_soon(reader, step)
            assert channel.statistics().requests["READ"].count == 4000
            assert channel.statistics().arena_used == 0


async def test_forget_gives_descriptors_back(daemon_kind: str, tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"file{i}").touch()
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            before = daemon.fd_count()
            nodes = [await lookup(channel, b"file%d" % i) for i in range(100)]
            assert [await lookup(channel, b"file%d" % i) for i in range(100)] == nodes
            assert len(set(nodes)) == 100
            assert daemon.fd_count() == before + 100
            for nodeid in nodes:
                channel.forget(nodeid, 1)
                channel.forget(nodeid, 1)
            await wait_until_async(lambda: daemon.fd_count() == before, DEADLINE, "the FORGETs")


async def test_destroy_and_goodbye(daemon_kind: str, tmp_path: Path) -> None:
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            await channel.request(Opcode.DESTROY, 0, b"", reply_size=0)
        if daemon_kind != "bundled":
            assert await trio.to_thread.run_sync(daemon.wait) == 0


@real_kinds
async def test_what_real_daemons_offer(kind: str, tmp_path: Path) -> None:
    require_daemon(kind)
    with start_daemon(kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            assert channel.features == int(
                VirtioFeature.VERSION_1
                | VirtioFeature.PROTOCOL_FEATURES
                | VirtioFeature.RING_EVENT_IDX
                | VirtioFeature.RING_INDIRECT_DESC
            )
            assert channel.protocol_features & ProtocolFeature.REPLY_ACK
            assert channel.config is None
            assert channel.num_request_queues == 1


async def test_tag_in_the_config_space(tmp_path: Path) -> None:
    require_daemon("rust")
    with start_daemon("rust", tmp_path, extra=["--tag", "myfs"]) as daemon:
        async with open_channel(daemon.socket) as channel:
            assert channel.config is not None
            assert channel.config.tag == b"myfs"
            await init(channel)


async def test_probe(daemon_kind: str, tmp_path: Path) -> None:
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        offer = await probe(daemon.socket)
    assert offer.features & VirtioFeature.VERSION_1
    assert offer.num_queues is not None
    assert offer.num_queues >= 2


async def test_killed_daemon(
    daemon_kind: str, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("the channel to the daemon has ended")
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            await pause(daemon)
            failures: list[BaseException] = []

            async def ask() -> None:
                try:
                    await lookup(channel, b"x")
                except ChannelBroken as error:
                    failures.append(error)

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked(0.05)
                start = trio.current_time()
                daemon.kill(signal.SIGKILL)
            assert trio.current_time() - start < 2
            assert len(failures) == 10
            with pytest.raises(ChannelBroken):
                await lookup(channel, b"x")


async def test_paused_daemon_goes_on(daemon_kind: str, tmp_path: Path) -> None:
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            await pause(daemon)
            with trio.move_on_after(0.05):
                await lookup(channel, b"x")
            assert channel.statistics().abandoned == 1
            daemon.resume()
            with pytest.raises(RemoteErrno):
                await lookup(channel, b"x")
            assert channel.statistics().in_flight == ()


@real_kinds
async def test_second_guest_of_a_busy_daemon(kind: str, tmp_path: Path) -> None:
    """Real daemons serve one connection; the second is told so within the time limit."""
    require_daemon(kind)
    with start_daemon(kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            with pytest.raises((HandshakeError, Exception)) as caught:
                async with open_channel(daemon.socket, ChannelOptions(connect_timeout=0.3)):
                    pass
            assert "daemon" in str(caught.value) or "listens" in str(caught.value)
            await init(channel)


@real_kinds
async def test_sizes_of_replies_are_exact(kind: str, tmp_path: Path) -> None:
    """The strict check (header length equals used length) holds for what real daemons answer."""
    require_daemon(kind)
    (tmp_path / "file").write_text("x" * 100)
    (tmp_path / "link").symlink_to("target")
    with start_daemon(kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with open_channel(daemon.socket) as channel:
            await init(channel)
            assert len(await channel.request(Opcode.GETATTR, 1, bytes(16), reply_size=104)) == 104
            assert len(await channel.request(Opcode.STATFS, 1, b"", reply_size=80)) == 80
            link = await lookup(channel, b"link")
            assert await channel.request(Opcode.READLINK, link, b"", reply_size=4096) == b"target"
            body = fuse.OPEN_IN.values(os.O_DIRECTORY, 0)
            reply = await channel.request(Opcode.OPENDIR, 1, body, reply_size=16)
            fh = fuse.OPEN_OUT.unpack(reply).fh
            for opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
                body = fuse.READ_IN.values(fh, 0, 65536, 0, 0, 0)
                assert await channel.request(opcode, 1, body, reply_size=65536)
