"""OPEN through the relay, between a fake kernel and a fake device: what goes where, when."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.client.pyfuse.fake_session import attributes
from tests.client.relay.fake_kernel import Stage, on_stage
from tests.support.wait import wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.wire import fuse
from vfsmount.wire.fuse import NotifyCode, Opcode, OpenOutFlag

if TYPE_CHECKING:
    from vfsmount.testing.fake_device import DeviceRequest

NODE = 7
#: Attributes are believed for longer than any test takes, also where somebody else has the CPU.
LONG = CachePolicy.for_mode("auto", 600.0)
OPEN = fuse.OPEN_IN.values(os.O_RDONLY, 0)
EMPTY = fuse.OPEN_IN.values(os.O_WRONLY | os.O_TRUNC, 0)


class Host:
    """A device with one file."""

    def __init__(self) -> None:
        self.attr = attributes(size=5, ctime=1)
        self.seen: list[int] = []
        self.kept: list[DeviceRequest] = []
        self.keep: set[int] = set()

    def __call__(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        self.seen.append(opcode)
        if opcode in self.keep:
            self.kept.append(request)
        else:
            self.answer(request)

    def answer(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        if opcode == Opcode.OPEN:
            request.reply(fuse.OPEN_OUT.values(3, 0, 0))
        elif opcode == Opcode.GETATTR:
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, self.attr)))
        elif request.room:
            request.reply()
        else:
            request.use()


async def open_file(stage: Stage) -> tuple[bool, int]:
    """Open the file; return whether attributes were invalidated before, and the flags."""
    stage.send(Opcode.OPEN, NODE, OPEN)
    reply = await stage.receive()
    told = reply.unique == 0
    if told:
        assert -reply.errno == NotifyCode.INVAL_INODE
        reply = await stage.receive()
    assert reply.errno == 0
    return told, fuse.OPEN_OUT.unpack(reply.body).open_flags


async def test_an_unchanged_file_costs_one_more_message() -> None:
    host = Host()
    async with on_stage(host) as stage:
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert await open_file(stage) == (False, 0)
        assert await open_file(stage) == (False, OpenOutFlag.KEEP_CACHE)
        assert sorted(host.seen) == [Opcode.GETATTR] * 3 + [Opcode.OPEN] * 2


async def test_a_reply_that_waits_is_answered_as_it_came() -> None:
    host = Host()
    host.keep = {int(Opcode.OPEN), int(Opcode.GETATTR)}
    async with on_stage(host) as stage:
        unique = stage.send(Opcode.OPEN, NODE, OPEN)
        await wait_until_async(lambda: len(host.kept) == 2, 5, "both requests")
        ahead, opened = host.kept
        host.answer(opened)
        await stage.call(Opcode.ACCESS, NODE, bytes(8))  # by now the relay has it
        header = fuse.OUT_HEADER.values(32, 0, unique)
        opened.write(header + fuse.OPEN_OUT.values(4, 0, 0))
        host.answer(ahead)
        assert (await stage.receive()).unique == 0  # attributes are invalidated
        reply = await stage.receive()
        assert (reply.unique, fuse.OPEN_OUT.unpack(reply.body).fh) == (unique, 3)


@pytest.fixture
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an open has found may answer the kernel's question however late that comes."""
    monkeypatch.setattr("vfsmount.client.relay.opens._PARKED_NS", 10**12)


@pytest.mark.usefixtures("_no_hurry")
async def test_what_is_asked_right_after_an_open_is_known() -> None:
    """fstat(2) asks, though nothing has changed: a READ has made the time of access unknown."""
    host = Host()
    async with on_stage(host, LONG) as stage:
        told = await stage.call(Opcode.GETATTR, NODE, bytes(16))
        await open_file(stage)
        await stage.call(Opcode.READ, NODE, fuse.READ_IN.values(3, 0, 5, 0, 0, 0))
        await open_file(stage)
        host.seen.clear()
        again = await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == []
        before, now = (fuse.ATTR_OUT.unpack(reply.body) for reply in (told, again))
        assert now.attr == before.attr
        assert 500 < now.attr_valid < 600
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == [Opcode.GETATTR]


@pytest.mark.usefixtures("_no_hurry")
async def test_a_read_after_the_open_makes_the_kernel_ask_the_daemon() -> None:
    host = Host()
    async with on_stage(host) as stage:
        await open_file(stage)
        await stage.call(Opcode.READ, NODE, fuse.READ_IN.values(3, 0, 5, 0, 0, 0))
        host.seen.clear()
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == [Opcode.GETATTR]


async def test_what_is_asked_later_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfsmount.client.relay.opens._PARKED_NS", 0)
    host = Host()
    async with on_stage(host) as stage:
        await open_file(stage)
        host.seen.clear()
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == [Opcode.GETATTR]


@pytest.mark.usefixtures("_no_hurry")
async def test_what_changed_is_told_once() -> None:
    """The kernel's question that follows is answered from what the open has found."""
    host = Host()
    async with on_stage(host, LONG) as stage:
        await open_file(stage)
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        host.attr = attributes(size=9, ctime=2)
        host.seen.clear()
        assert await open_file(stage) == (True, 0)
        reply = fuse.ATTR_OUT.unpack((await stage.call(Opcode.GETATTR, NODE, bytes(16))).body)
        assert reply.attr.size == 9
        assert 500 < reply.attr_valid < 600
        assert sorted(host.seen) == [Opcode.GETATTR, Opcode.OPEN]
        assert await open_file(stage) == (False, OpenOutFlag.KEEP_CACHE)


@pytest.mark.usefixtures("_no_hurry")
async def test_a_change_of_ours_makes_the_kernel_ask_the_daemon() -> None:
    host = Host()
    async with on_stage(host) as stage:
        await open_file(stage)
        write = fuse.WRITE_IN.values(3, 0, 1, 0, 0, 0) + b"x"
        await stage.call(Opcode.WRITE, NODE, write)
        host.seen.clear()
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == [Opcode.GETATTR]


@pytest.mark.usefixtures("_no_hurry")
async def test_a_change_on_its_way_parks_nothing() -> None:
    host = Host()
    host.keep = {int(Opcode.WRITE)}
    async with on_stage(host) as stage:
        unique = stage.send(Opcode.WRITE, NODE, fuse.WRITE_IN.values(3, 0, 1, 0, 0, 0) + b"x")
        assert (await open_file(stage))[0]
        host.answer(host.kept[0])
        assert (await stage.receive()).unique == unique
        host.seen.clear()
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen == [Opcode.GETATTR]


@pytest.mark.parametrize("late", [Opcode.OPEN, Opcode.GETATTR])
async def test_either_may_come_last(late: Opcode) -> None:
    host = Host()
    host.keep = {int(late)}
    async with on_stage(host) as stage:
        unique = stage.send(Opcode.OPEN, NODE, OPEN)
        await wait_until_async(lambda: host.kept, 5, "it to be kept")
        await stage.nothing_comes()
        host.answer(host.kept[0])
        assert (await stage.receive()).unique == 0
        assert (await stage.receive()).unique == unique


async def test_a_file_without_a_name_is_stale_once() -> None:
    host = Host()
    host.attr = host.attr._replace(nlink=0)
    async with on_stage(host) as stage:
        assert (await stage.call(Opcode.OPEN, NODE, OPEN)).errno == errno.ESTALE
        assert await open_file(stage) == (True, 0)
        assert Opcode.RELEASE in host.seen


async def test_the_handle_to_give_back_is_the_one_that_was_answered() -> None:
    """The device can write to its reply as long as it likes; it was read when it came."""
    host = Host()
    host.attr = host.attr._replace(nlink=0)
    host.keep = {int(Opcode.OPEN), int(Opcode.GETATTR), int(Opcode.RELEASE)}
    async with on_stage(host) as stage:
        unique = stage.send(Opcode.OPEN, NODE, OPEN)
        await wait_until_async(lambda: len(host.kept) == 2, 5, "the open and its check")
        check, opened = sorted(host.kept, key=lambda request: request.header.opcode)
        host.answer(opened)
        await stage.call(Opcode.STATFS)  # by now that reply has been seen
        opened.write(fuse.OUT_HEADER.values(32, 0, unique) + fuse.OPEN_OUT.values(9, 0, 0))
        host.answer(check)
        assert (await stage.receive()).errno == errno.ESTALE
        await wait_until_async(lambda: len(host.kept) == 3, 5, "the handle to be released")
        assert fuse.RELEASE_IN.unpack(host.kept[2].body).fh == 3
        host.answer(host.kept[2])


@pytest.mark.usefixtures("_no_hurry")
async def test_of_a_file_that_is_emptied_nothing_is_believed() -> None:
    host = Host()
    async with on_stage(host) as stage:
        await open_file(stage)
        host.seen.clear()
        reply = await stage.call(
            Opcode.OPEN, NODE, fuse.OPEN_IN.values(os.O_WRONLY | os.O_TRUNC, 0)
        )
        assert fuse.OPEN_OUT.unpack(reply.body).open_flags == 0
        assert host.seen == [Opcode.GETATTR, Opcode.OPEN]
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert host.seen[2:] == [Opcode.GETATTR]
        assert await open_file(stage) == (False, 0)


async def test_a_file_that_is_emptied_and_has_no_name_is_stale_once() -> None:
    host = Host()
    host.attr = host.attr._replace(nlink=0)
    async with on_stage(host) as stage:
        for expected in (errno.ESTALE, 0):
            stage.send(Opcode.OPEN, NODE, EMPTY)
            assert (await stage.receive()).errno == expected
        assert Opcode.RELEASE in host.seen
