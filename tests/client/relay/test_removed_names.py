"""Listings with attributes that come upon names which the host has removed meanwhile.

virtiofsd (C) answers ENOENT then, and the C library takes that for the end of the directory.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.client.relay.fake_kernel import on_stage
from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import start_mount
from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions
from vfsmount.client.mount.status import read_status
from vfsmount.client.relay.listings import room_for_names
from vfsmount.testing.fake_device import ALL_FEATURES, DeviceRequest
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import VirtioFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.relay.fake_kernel import Reply, Stage

PLAIN_FEATURES = int(VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES)
PATIENCE = 5.0
#: What is known when the kernel decides how a listing goes on does not depend on how long it took.
LONG = ("--timeout", "600")
FOLDER = 9
SIZE = 32768
ASK = fuse.READ_IN.values(3, 5, SIZE, 0, 0, 0)
NAMES = [fuse.encode_dirent(100 + at, at + 6, 8, b"name-%d" % at) for at in range(3)]
#: The same as the kernel wants them: names, and nothing about the files.
PLUS = b"".join(bytes(fuse.ENTRY_OUT.size) + name for name in NAMES)


class Folder:
    """A device with a directory from which a name was removed.

    Attributes:
        asked: All requests for listings.
        kept: Those of them that wait for the test to answer.
        error: What READDIR fails with.
    """

    def __init__(self, *keeps: int, error: int = 0) -> None:
        self.asked: list[DeviceRequest] = []
        self.kept: list[DeviceRequest] = []
        self.error = error
        self._keeps = keeps

    def __call__(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        if opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
            self.asked.append(request)
        if opcode in self._keeps:
            self.kept.append(request)
        else:
            self.answer(request)

    def answer(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        if opcode == Opcode.READDIRPLUS:
            request.reply(error=-errno.ENOENT)
        elif opcode == Opcode.READDIR and not self.error:
            request.reply(b"".join(NAMES))
        else:
            request.reply(error=-self.error)

    def opcodes(self) -> list[int]:
        return [one.header.opcode for one in self.asked]

    async def wait_kept(self, count: int) -> list[DeviceRequest]:
        await wait_until_async(lambda: len(self.kept) >= count, PATIENCE, f"{count} requests")
        return self.kept


@pytest.mark.parametrize("features", [ALL_FEATURES, PLAIN_FEATURES], ids=["all", "plain"])
async def test_names_alone_are_asked_for(features: int) -> None:
    folder = Folder()
    async with on_stage(folder, features=features) as stage:
        for _ in range(2):  # the slot is as good as new
            reply = await stage.call(Opcode.READDIRPLUS, FOLDER, ASK)
            assert (reply.errno, reply.body) == (0, PLUS)
        counted = stage.channel.statistics().requests

    assert folder.opcodes() == [Opcode.READDIRPLUS, Opcode.READDIR] * 2
    first, second = folder.asked[:2]
    assert second.header == first.header._replace(opcode=Opcode.READDIR)
    asked = fuse.READ_IN.unpack(first.body)
    assert fuse.READ_IN.unpack(second.body) == asked._replace(size=room_for_names(SIZE))
    assert {name: (row.count, row.errors) for name, row in counted.items()} == {
        "READDIRPLUS": (2, 2),
        "READDIR": (2, 0),
    }


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EBADF])
async def test_a_directory_that_is_gone_is_gone(error: int) -> None:
    folder = Folder(error=error)
    async with on_stage(folder) as stage:
        assert (await stage.call(Opcode.READDIRPLUS, FOLDER, ASK)).errno == error

    assert folder.opcodes() == [Opcode.READDIRPLUS, Opcode.READDIR]


async def test_other_errors_come_through() -> None:
    folder = Folder(Opcode.READDIRPLUS)
    async with on_stage(folder) as stage:
        stage.send(Opcode.READDIRPLUS, FOLDER, ASK)
        (await folder.wait_kept(1))[0].reply(error=-errno.EACCES)
        assert (await stage.receive()).errno == errno.EACCES

    assert folder.opcodes() == [Opcode.READDIRPLUS]


@pytest.mark.parametrize("features", [ALL_FEATURES, PLAIN_FEATURES], ids=["all", "plain"])
async def test_a_full_ring_has_room_for_it(features: int) -> None:
    folder = Folder(Opcode.READDIRPLUS)
    options = ChannelOptions(queue_size=8)
    room = 4
    async with on_stage(folder, options=options, features=features) as stage:
        sent = {stage.send(Opcode.READDIRPLUS, FOLDER, ASK) for _ in range(5 * room)}
        received: list[Reply] = []
        while len(received) < len(sent):
            kept = await folder.wait_kept(len(received) + room)
            for request in kept[len(received) :][:room]:
                folder.answer(request)
            received += [await stage.receive() for _ in range(room)]

    assert {reply.unique for reply in received} == sent
    assert all(reply.body == PLUS for reply in received)


async def asked_and_killed(stage: Stage, folder: Folder) -> DeviceRequest:
    """The request of a caller that was killed while the daemon had it."""
    unique = stage.send(Opcode.READDIRPLUS, FOLDER, ASK)
    (kept,) = await folder.wait_kept(1)
    stage.interrupt(unique)
    assert (await stage.receive()).errno == errno.EINTR
    return kept


async def test_a_caller_that_is_gone_is_asked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfsmount.client.relay.interrupts.is_being_killed", lambda _: True)
    folder = Folder(Opcode.READDIRPLUS)
    async with on_stage(folder) as stage:
        folder.answer(await asked_and_killed(stage, folder))
        await stage.call(Opcode.ACCESS, 1, bytes(8))

    assert folder.opcodes() == [Opcode.READDIRPLUS]


async def test_a_caller_that_is_killed_in_between_need_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vfsmount.client.relay.interrupts.is_being_killed", lambda _: True)
    folder = Folder(Opcode.READDIR)
    async with on_stage(folder) as stage:
        folder.answer(await asked_and_killed(stage, folder))
        await stage.nothing_comes()


async def test_a_time_limit_is_for_both_together(expect_log: Callable[[str], None]) -> None:
    expect_log("no reply to READDIR of node 9 for .*: the daemon is mute")
    folder = Folder(Opcode.READDIR)
    # Time enough for the first answer before anybody calls the daemon mute, and for that word
    # before the end, whoever has the CPU.
    options = ChannelOptions(mute_after=0.5, request_timeout=2.0)
    async with on_stage(folder, options=options) as stage:
        assert (await stage.call(Opcode.READDIRPLUS, FOLDER, ASK)).errno == errno.ETIMEDOUT
        folder.answer((await folder.wait_kept(1))[0])
        await stage.nothing_comes()


async def test_one_that_has_timed_out_is_asked_for_no_more() -> None:
    folder = Folder(Opcode.READDIRPLUS)
    async with on_stage(folder, options=ChannelOptions(request_timeout=0.2)) as stage:
        assert (await stage.call(Opcode.READDIRPLUS, FOLDER, ASK)).errno == errno.ETIMEDOUT
        folder.answer((await folder.wait_kept(1))[0])
        await stage.call(Opcode.ACCESS, 1, bytes(8))

    assert folder.opcodes() == [Opcode.READDIRPLUS]


async def test_an_end_waits_for_it() -> None:
    folder = Folder(Opcode.READDIRPLUS, Opcode.READDIR)
    async with on_stage(folder) as stage:
        stage.send(Opcode.READDIRPLUS, FOLDER, ASK)
        await folder.wait_kept(1)
        stage.relay.stop()
        folder.answer(folder.kept[0])
        folder.answer((await folder.wait_kept(2))[1])
        assert (await stage.receive()).body == PLUS
        await wait_until_async(lambda: stage.relay.ended, PATIENCE, "the relay to end")


async def test_a_daemon_that_dies_in_between_fails_it(expect_log: Callable[[str], None]) -> None:
    expect_log("the channel to the daemon has ended")
    folder = Folder(Opcode.READDIR)
    async with on_stage(folder) as stage:
        unique = stage.send(Opcode.READDIRPLUS, FOLDER, ASK)
        await folder.wait_kept(1)
        stage.device.hang_up()
        reply = await stage.receive()
        assert (reply.unique, reply.errno) == (unique, errno.ENOTCONN)


@pytest.mark.needs_fuse
@pytest.mark.needs_daemon
@pytest.mark.parametrize("cache", ["auto", "always"])
def test_what_stays_is_listed_once(cache: str) -> None:
    """On a mount: the daemon has read names ahead when the host removes them."""
    with (
        quick_folders("removed", "host", "mnt") as (host, path),
        start_daemon("c", host, extra=("-o", "readdirplus")) as daemon,
        start_mount(path, daemon.socket, cache=cache, engine="relay", options=LONG) as mount,
    ):
        for number in range(1900):
            (host / f"name-{number:04}").touch()
        found: list[str] = []
        with os.scandir(mount.path) as entries:
            for entry in entries:
                if not found:
                    for number in range(0, 1900, 5):
                        (host / f"name-{number:04}").unlink()
                found.append(entry.name)
                with suppress(FileNotFoundError):
                    os.stat(entry)  # has the kernel ask for attributes all the way
        rows = read_status(str(mount.path))["requests"]
        assert rows["READDIRPLUS"]["errors"], "the daemon has come upon no removed name"
        stay = {one.name for one in host.iterdir()}

    assert len(stay) == 1520
    assert sorted(name for name in found if name in stay) == sorted(stay)
