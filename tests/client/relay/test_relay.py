"""The relay's loop between a fake kernel and a fake device: what arrives, what comes back."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import trio

from tests.client.relay.fake_kernel import AUTO, LARGEST, PATIENCE, on_stage
from tests.support.wait import wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.channel import ChannelOptions
from vfsmount.testing.fake_device import ALL_FEATURES, DeviceRequest
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode
from vfsmount.wire.vhost_user import VirtioFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.relay.fake_kernel import Stage

NONE = CachePolicy.for_mode("none")
ATTR = fuse.Attr(7, 100, 8, 1, 2, 3, 4, 5, 6, 0o100644, 1, 0, 0, 0, 4096, 0)
ENTRY = fuse.ENTRY_OUT.pack(fuse.EntryOut(42, 0, 0, 0, 0, 0, ATTR))
PLAIN_FEATURES = int(VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES)


def echo(request: DeviceRequest) -> None:
    """Answer with what was asked."""
    if request.room:
        request.reply(request.body[: request.room - 16])
    else:
        request.use()


class Keeper:
    """A device that keeps some requests until it is told to answer."""

    def __init__(self, *opcodes: int) -> None:
        self.kept: list[DeviceRequest] = []
        self.others: list[DeviceRequest] = []
        self._opcodes = opcodes

    def __call__(self, request: DeviceRequest) -> None:
        if request.header.opcode in self._opcodes:
            self.kept.append(request)
            return
        self.others.append(request)
        echo_nothing(request)

    async def wait_kept(self, count: int) -> None:
        await wait_until_async(lambda: len(self.kept) >= count, 5, f"{count} requests to be kept")

    async def wait_other(self, opcode: int) -> DeviceRequest:
        def found() -> DeviceRequest | None:
            return next((one for one in self.others if one.header.opcode == opcode), None)

        request = await wait_until_async(found, 5, f"opcode {opcode} to arrive")
        assert request is not None
        return request


def echo_nothing(request: DeviceRequest) -> None:
    if request.room:
        request.reply()
    else:
        request.use()


# --- messages pass as they are ---


@pytest.mark.parametrize("features", [ALL_FEATURES, PLAIN_FEATURES], ids=["all", "plain"])
async def test_a_request_arrives_as_it_was_and_so_does_the_reply(features: int) -> None:
    seen: list[DeviceRequest] = []

    def serve(request: DeviceRequest) -> None:
        seen.append(request)
        request.reply(bytes(range(8)))

    async with on_stage(serve, features=features) as stage:
        body = fuse.WRITE_IN.values(5, 0, 100_000, 0, 0, 0) + bytes(range(250)) * 400
        reply = await stage.call(Opcode.WRITE, 9, body)

        assert reply.body == bytes(range(8))
        assert seen[0].body == body
        assert seen[0].header.unique == reply.unique
        assert seen[0].room == 24


async def test_a_read_has_exactly_the_room_that_it_asks_for() -> None:
    rooms = []

    def serve(request: DeviceRequest) -> None:
        rooms.append(request.room)
        request.reply(b"x" * (request.room - 16))

    async with on_stage(serve) as stage:
        for size in (1, 3952, 3953, 4096, 5000, LARGEST):
            reply = await stage.call(Opcode.READ, 9, fuse.READ_IN.values(1, 0, size, 0, 0, 0))
            assert reply.body == b"x" * size
            assert rooms.pop() == 16 + size


async def test_opcodes_that_nobody_knows_pass() -> None:
    async with on_stage(echo) as stage:
        for opcode in (54, 99, 4095):
            assert (await stage.call(opcode, 1, b"what is this")).body == b"what is this"


async def test_many_at_once_in_any_order() -> None:
    keeper = Keeper(Opcode.GETATTR)
    async with on_stage(keeper) as stage:
        sent = {stage.send(Opcode.GETATTR, 1, bytes(16)) for _ in range(100)}
        await keeper.wait_kept(100)
        for request in reversed(keeper.kept):
            request.reply(error=-errno.EPERM)
        received = {(await stage.receive()).unique for _ in sent}

        assert received == sent


@pytest.mark.parametrize("features", [ALL_FEATURES, PLAIN_FEATURES], ids=["all", "plain"])
async def test_more_than_the_ring_holds_wait(features: int) -> None:
    """Back-pressure: what finds no room stays with the kernel, and comes when there is some."""
    keeper = Keeper(Opcode.UNLINK)
    options = ChannelOptions(queue_size=8)
    async with on_stage(keeper, options=options, features=features) as stage:
        sent = {stage.send(Opcode.UNLINK, 1, b"name\0") for _ in range(30)}
        room = 4  # of indirect chains one more gets in
        received: set[int] = set()
        while len(received) < 30:
            await keeper.wait_kept(len(received) + min(room, 30 - len(received)))
            for request in keeper.kept[len(received) :]:
                request.reply()
                received.add((await stage.receive()).unique)

        assert received == sent


async def test_figures_are_the_channels() -> None:
    keeper = Keeper(Opcode.MKDIR)
    async with on_stage(keeper) as stage:
        for _ in range(3):
            await stage.call(Opcode.ACCESS, 1, bytes(8))
        stage.send(Opcode.MKDIR, 7, bytes(8) + b"name\0")
        await keeper.wait_kept(1)
        statistics = stage.channel.statistics()

        assert statistics.requests["ACCESS"].count == 3
        (pending,) = statistics.in_flight
        assert (pending.opcode, pending.nodeid) == (Opcode.MKDIR, 7)


# --- what is answered or gathered here ---


async def test_absent_names_become_negative_entries_where_the_mode_remembers_them() -> None:
    def serve(request: DeviceRequest) -> None:
        request.reply(error=-errno.ENOENT)

    async with on_stage(serve, AUTO) as stage:
        reply = await stage.call(Opcode.LOOKUP, 1, b"absent\0")
        assert reply.errno == 0
        entry = fuse.ENTRY_OUT.unpack(reply.body)
        assert (entry.nodeid, entry.entry_valid) == (0, 1)
        assert (await stage.call(Opcode.UNLINK, 1, b"absent\0")).errno == errno.ENOENT
    async with on_stage(serve, NONE) as stage:
        assert (await stage.call(Opcode.LOOKUP, 1, b"absent\0")).errno == errno.ENOENT


async def test_forgets_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    # They wait for company for longer than it takes to send them all, whoever has the CPU.
    monkeypatch.setattr("vfsmount.client.relay.caretaker._FORGET_SECONDS", 1.0)
    keeper = Keeper()
    async with on_stage(keeper) as stage:
        for node in range(2, 12):
            stage.send(Opcode.FORGET, node, fuse.FORGET_IN.values(node))
        stage.send(Opcode.BATCH_FORGET, 0, fuse.encode_batch_forget([(2, 5), (50, 1)]))
        wanted = Counter({2: 7, 50: 1} | {node: node for node in range(3, 12)})

        def forgotten() -> bool:
            found: Counter[int] = Counter()
            for one in keeper.others:
                for nodeid, nlookup in fuse.decode_forgets(fuse.decode_request(one.data)):
                    found[nodeid] += nlookup
            return found == wanted

        await wait_until_async(forgotten, 5, "all forgets to arrive")
        assert all(one.queue == 0 for one in keeper.others)
        # One message, or two if the relay happened to look just in between.
        assert len(keeper.others) <= 2


def release(flags: int = 0) -> bytes:
    return fuse.RELEASE_IN.values(5, 0, flags, 0)


@pytest.mark.parametrize("opcode", [Opcode.RELEASE, Opcode.RELEASEDIR])
async def test_a_release_is_answered_before_the_device_has(opcode: Opcode) -> None:
    keeper = Keeper(opcode)
    async with on_stage(keeper) as stage:
        for _ in range(3):
            reply = await stage.call(opcode, 9, release())
            assert (reply.errno, reply.body) == (0, b"")
        await keeper.wait_kept(3)  # without anything else to kick for
        assert all(request.body == release() for request in keeper.kept)
        for request in keeper.kept:
            request.reply(error=-errno.EBADF)
        await stage.call(Opcode.ACCESS, 1, bytes(8))  # no second answer came in between

        def is_counted() -> bool:
            counted = stage.channel.statistics().requests.get(opcode.name)
            return counted is not None and counted.count == 3

        await wait_until_async(is_counted, 5, "the replies to be counted")
        statistics = stage.channel.statistics()
        counted = statistics.requests[opcode.name]
        assert (counted.count, counted.errors) == (3, 3)
        assert not statistics.in_flight


async def test_a_release_that_gives_a_lock_up_is_waited_for() -> None:
    keeper = Keeper(Opcode.RELEASE)
    async with on_stage(keeper) as stage:
        sent = stage.send(Opcode.RELEASE, 9, release(fuse.ReleaseFlag.FLOCK_UNLOCK))
        await keeper.wait_kept(1)
        keeper.kept[0].reply(error=-errno.EIO)

        reply = await stage.receive()
        assert (reply.unique, reply.errno) == (sent, errno.EIO)


async def test_releases_that_nobody_kicked_for_go_at_the_end() -> None:
    keeper = Keeper(Opcode.RELEASE)
    async with on_stage(keeper, options=ChannelOptions(poll_us=0)) as stage:
        for _ in range(40):
            await stage.call(Opcode.RELEASE, 9, release())
        await keeper.wait_kept(40)
        for request in keeper.kept:
            request.reply()


async def test_a_flush_goes_to_the_device_when_something_was_written() -> None:
    flush = fuse.FLUSH_IN.values(5, 7)
    write = fuse.WRITE_IN.values(5, 0, 1, 0, 0, 0) + b"x"
    keeper = Keeper()
    async with on_stage(keeper, quiet_flush=True) as stage:
        for opcode, body in [
            (Opcode.FLUSH, flush),
            (Opcode.WRITE, write),
            (Opcode.FLUSH, flush),
            (Opcode.FLUSH, flush),
            (Opcode.WRITE, write),
            (Opcode.RELEASE, release()),
            (Opcode.FLUSH, flush),
        ]:
            assert (await stage.call(opcode, 9, body)).errno == 0
        await keeper.wait_other(Opcode.RELEASE)

        seen = [one.header.opcode for one in keeper.others]
        assert seen == [Opcode.WRITE, Opcode.FLUSH, Opcode.WRITE, Opcode.RELEASE]


async def test_every_flush_goes_to_the_device_below_write_back() -> None:
    keeper = Keeper()
    async with on_stage(keeper) as stage:
        await stage.call(Opcode.FLUSH, 9, fuse.FLUSH_IN.values(5, 7))
        assert [one.header.opcode for one in keeper.others] == [Opcode.FLUSH]


@pytest.mark.parametrize("opcode", [Opcode.SETLK, Opcode.SETLKW])
async def test_a_flush_goes_to_the_device_when_something_was_locked(opcode: Opcode) -> None:
    flush = fuse.FLUSH_IN.values(5, 7)
    keeper = Keeper()
    async with on_stage(keeper, quiet_flush=True) as stage:
        await stage.call(opcode, 9, WAIT)
        for node in (9, 10, 9):
            await stage.call(Opcode.FLUSH, node, flush)
        seen = [(one.header.opcode, one.header.nodeid) for one in keeper.others]
        assert seen == [(opcode, 9), (Opcode.FLUSH, 9), (Opcode.FLUSH, 9)]

        stage.send(Opcode.FORGET, 9, fuse.FORGET_IN.values(1))  # it may have been known twice
        await stage.call(Opcode.FLUSH, 9, flush)
        assert [one.header.opcode for one in keeper.others].count(Opcode.FLUSH) == 3
        for fh in (5, LOCK.fh):  # nothing is locked any more when the last locker is closed
            await stage.call(Opcode.FLUSH, 9, flush)
            await stage.call(Opcode.RELEASE, 9, fuse.RELEASE_IN.values(fh, 0, 0, 0))
        await stage.call(Opcode.FLUSH, 9, flush)
        assert [one.header.opcode for one in keeper.others].count(Opcode.FLUSH) == 5


CAPABILITY = fuse.GETXATTR_IN.values(20) + b"security.capability\0"


async def test_an_absent_capability_is_asked_for_once() -> None:
    asked = []

    def serve(request: DeviceRequest) -> None:
        asked.append(request.header.opcode)
        request.reply(error=-errno.ENODATA if request.header.opcode == Opcode.GETXATTR else 0)

    async with on_stage(serve, CachePolicy.for_mode("always")) as stage:
        for _ in range(5):
            assert (await stage.call(Opcode.GETXATTR, 9, CAPABILITY)).errno == errno.ENODATA
        assert asked == [Opcode.GETXATTR]
        await stage.call(Opcode.SETXATTR, 9, bytes(16) + b"security.capability\0")
        await stage.call(Opcode.GETXATTR, 9, CAPABILITY)
        assert asked == [Opcode.GETXATTR, Opcode.SETXATTR, Opcode.GETXATTR]
        stage.send(Opcode.FORGET, 9, fuse.FORGET_IN.values(1))
        await stage.call(Opcode.GETXATTR, 9, CAPABILITY)
        assert asked.count(Opcode.GETXATTR) == 3


@pytest.mark.parametrize(("flags", "asks"), [(os.O_EXCL, False), (0, True)])
async def test_a_file_that_had_to_be_new_has_no_capability(flags: int, asks: bool) -> None:
    asked = []

    def serve(request: DeviceRequest) -> None:
        if request.header.opcode == Opcode.CREATE:
            request.reply(ENTRY + fuse.OPEN_OUT.values(1, 0, 0))
            return
        asked.append(request.header.nodeid)
        request.reply(error=-errno.ENODATA)

    async with on_stage(serve, CachePolicy.for_mode("always")) as stage:
        await stage.call(Opcode.GETXATTR, 9, CAPABILITY)  # attributes are served
        await stage.call(Opcode.CREATE, 1, fuse.CREATE_IN.values(flags, 0o644, 0, 0) + b"new\0")
        assert (await stage.call(Opcode.GETXATTR, 42, CAPABILITY)).errno == errno.ENODATA
    assert asked == [9, 42][: 1 + asks]


# --- interrupts ---

LOCK = fuse.LkIn(3, 1234, 0, 9, LockType.WRITE, 77, 0)
WAIT = fuse.LK_IN.pack(LOCK)


async def interrupted_wait(stage: Stage, keeper: Keeper) -> int:
    """Interrupt a wait for a lock that the device has; return the number of the request."""
    unique = stage.send(Opcode.SETLKW, 9, WAIT)
    await keeper.wait_kept(1)
    stage.interrupt(unique)
    return unique


async def test_a_wait_for_a_lock_ends_when_interrupted_and_a_late_grant_is_undone() -> None:
    keeper = Keeper(Opcode.SETLKW)
    async with on_stage(keeper) as stage:
        unique = await interrupted_wait(stage, keeper)
        reply = await stage.receive()
        assert (reply.unique, reply.errno) == (unique, errno.EINTR)

        keeper.kept[0].reply()

        unlock = await keeper.wait_other(Opcode.SETLK)
        assert fuse.LK_IN.unpack(unlock.body) == LOCK._replace(type=LockType.UNLOCK)
        await stage.nothing_comes()


async def test_a_wait_that_is_asked_for_again_goes_on() -> None:
    keeper = Keeper(Opcode.SETLKW)
    async with on_stage(keeper) as stage:
        await interrupted_wait(stage, keeper)
        await stage.receive()
        again = stage.send(Opcode.SETLKW, 9, WAIT)
        await stage.nothing_comes()

        keeper.kept[0].reply()

        assert (await stage.receive()).unique == again
        await stage.nothing_comes()
        assert len(keeper.kept) == 1
        assert not keeper.others


async def test_an_owner_that_locked_something_else_meanwhile_keeps_the_grant() -> None:
    keeper = Keeper(Opcode.SETLKW)
    async with on_stage(keeper) as stage:
        await interrupted_wait(stage, keeper)
        await stage.receive()
        read_lock = fuse.LK_IN.pack(LOCK._replace(type=LockType.READ, end=3))
        await stage.call(Opcode.SETLK, 9, read_lock)

        keeper.kept[0].reply()
        await stage.nothing_comes()

        assert [one.header.opcode for one in keeper.others] == [Opcode.SETLK]


async def test_a_device_that_heeds_interrupts_ends_the_wait_itself() -> None:
    keeper = Keeper(Opcode.SETLKW)
    async with on_stage(keeper, heeds_interrupts=True) as stage:
        unique = await interrupted_wait(stage, keeper)
        interrupt = await keeper.wait_other(Opcode.INTERRUPT)
        assert fuse.INTERRUPT_IN.unpack(interrupt.body).unique == keeper.kept[0].header.unique
        await stage.nothing_comes()

        keeper.kept[0].reply(error=-errno.EINTR)

        reply = await stage.receive()
        assert (reply.unique, reply.errno) == (unique, errno.EINTR)
        await stage.call(Opcode.SETLK, 9, WAIT)


async def test_a_device_that_heeds_interrupts_is_told_of_waits_alone() -> None:
    keeper = Keeper(Opcode.LOOKUP)
    async with on_stage(keeper, heeds_interrupts=True) as stage:
        unique = stage.send(Opcode.LOOKUP, 1, b"name\0", pid=1)
        await keeper.wait_kept(1)
        stage.interrupt(unique)
        stage.interrupt(unique + 100)
        await stage.nothing_comes()
        await stage.call(Opcode.ACCESS, 1, bytes(8))
        assert [one.header.opcode for one in keeper.others] == [Opcode.ACCESS]
        keeper.kept[0].reply(ENTRY)
        await stage.receive()


async def test_an_interrupt_for_what_was_answered_is_nothing() -> None:
    async with on_stage(echo) as stage:
        reply = await stage.call(Opcode.ACCESS, 1, bytes(8))
        stage.interrupt(reply.unique)
        await stage.nothing_comes()


async def test_a_caller_that_lives_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(Opcode.LOOKUP)
    dying = threading.Event()
    monkeypatch.setattr(
        "vfsmount.client.relay.interrupts.is_being_killed", lambda _: dying.is_set()
    )
    async with on_stage(keeper) as stage:
        unique = stage.send(Opcode.LOOKUP, 1, b"name\0", pid=1)
        await keeper.wait_kept(1)
        stage.interrupt(unique)
        await stage.nothing_comes()
        await trio.sleep(0.3)  # three looks
        await stage.nothing_comes()

        dying.set()  # the kernel does not tell
        reply = await stage.receive()
        assert (reply.unique, reply.errno) == (unique, errno.EINTR)

        keeper.kept[0].reply(ENTRY)
        forget = await keeper.wait_other(Opcode.FORGET)
        assert forget.header.nodeid == 42
        await stage.nothing_comes()


# --- devices that misbehave ---


BAD: list[tuple[str, Callable[[DeviceRequest], None]]] = [
    ("shorter than a header", lambda request: request.use(8)),
    ("a length that lies", lambda request: request.reply(length=1000)),
    ("longer than the room", lambda request: request.reply(written=1 << 20)),
    ("another unique", lambda request: request.reply(unique=12345)),
    ("a positive error", lambda request: request.reply(error=5)),
    ("an absurd error", lambda request: request.reply(error=-512)),
    ("an error with a body", lambda request: request.reply(b"body", error=-5)),
    ("an id that is not outstanding", lambda request: request.reply(head=500)),
    ("an id beyond the ring", lambda request: request.reply(head=70000)),
]


@pytest.mark.parametrize(("what", "serve"), BAD, ids=[what for what, _ in BAD])
async def test_a_bad_reply_is_an_error_for_everybody_but_not_the_end(
    what: str, serve: Callable[[DeviceRequest], None], expect_log: Callable[[str], None]
) -> None:
    expect_log("the channel to the daemon has ended")
    async with on_stage(serve) as stage:
        assert (await stage.call(Opcode.GETATTR, 1, bytes(16))).errno == errno.EIO
        assert (await stage.call(Opcode.STATFS)).errno == errno.EIO
        stage.send(Opcode.FORGET, 5, fuse.FORGET_IN.values(1))
        assert (await stage.call(Opcode.STATFS)).errno == errno.EIO
        with trio.fail_after(5):
            await stage.channel.wait_ended()


async def test_no_bytes_at_all_are_an_error_of_this_request() -> None:
    async with on_stage(lambda request: request.use(0)) as stage:
        assert (await stage.call(Opcode.GETATTR, 1, bytes(16))).errno == errno.EIO


async def test_a_reply_given_twice(expect_log: Callable[[str], None]) -> None:
    expect_log("the channel to the daemon has ended")

    def serve(request: DeviceRequest) -> None:
        request.reply()
        request.use(16)

    async with on_stage(serve) as stage:
        stage.send(Opcode.ACCESS, 1, bytes(8))
        await stage.receive()
        assert (await stage.call(Opcode.ACCESS, 1, bytes(8))).errno == errno.EIO


async def test_a_daemon_that_dies_fails_all_at_once(expect_log: Callable[[str], None]) -> None:
    expect_log("the channel to the daemon has ended")
    keeper = Keeper(Opcode.GETATTR)
    async with on_stage(keeper) as stage:
        sent = {stage.send(Opcode.GETATTR, 1, bytes(16)) for _ in range(100)}
        await keeper.wait_kept(100)
        stage.device.hang_up()
        with trio.fail_after(2):
            replies = [await stage.receive() for _ in sent]

        assert {reply.unique for reply in replies} == sent
        assert {reply.errno for reply in replies} == {errno.ENOTCONN}
        assert (await stage.call(Opcode.STATFS)).errno == errno.ENOTCONN


async def test_what_waits_for_room_fails_too(expect_log: Callable[[str], None]) -> None:
    """Also where callers of the requests before have gone away."""
    expect_log("the channel to the daemon has ended")
    options = ChannelOptions(queue_size=8, request_timeout=0.5)
    keeper = Keeper(Opcode.UNLINK)
    async with on_stage(keeper, options=options, features=PLAIN_FEATURES) as stage:
        for _ in range(4):
            stage.send(Opcode.UNLINK, 1, b"name\0")
        assert {(await stage.receive()).errno for _ in range(4)} == {errno.ETIMEDOUT}
        await keeper.wait_kept(4)
        for request in keeper.kept:
            request.reply(error=-errno.ENOENT)
        await stage.call(Opcode.ACCESS, 1, bytes(8))
        sent = {stage.send(Opcode.UNLINK, 1, b"name\0") for _ in range(5)}
        await keeper.wait_kept(8)
        stage.device.hang_up()
        with trio.fail_after(PATIENCE):
            assert {(await stage.receive()).unique for _ in sent} == sent


async def test_a_mute_daemon(expect_log: Callable[[str], None]) -> None:
    expect_log("no reply to MKNOD of node 1 for .*: the daemon is mute")
    # The word about it comes long before the end, whoever has the CPU in between.
    options = ChannelOptions(mute_after=0.1, request_timeout=2.0)
    keeper = Keeper(Opcode.MKNOD)
    async with on_stage(keeper, options=options) as stage:
        assert (await stage.call(Opcode.MKNOD, 1, bytes(16) + b"n\0")).errno == errno.ETIMEDOUT
        await keeper.wait_kept(1)
        keeper.kept[0].reply(ENTRY)
        assert (await keeper.wait_other(Opcode.FORGET)).header.nodeid == 42
        assert stage.channel.statistics().abandoned == 1


async def test_a_change_that_comes_late() -> None:
    """What the kernel has asked meanwhile may be old."""
    keeper = Keeper(Opcode.WRITE)
    async with on_stage(keeper, options=ChannelOptions(request_timeout=0.2)) as stage:
        body = fuse.WRITE_IN.values(3, 0, 5, 0, 0, 0) + b"hello"
        assert (await stage.call(Opcode.WRITE, 42, body)).errno == errno.ETIMEDOUT
        await keeper.wait_kept(1)
        keeper.kept[0].reply(fuse.WRITE_OUT.values(5))
        notification = await stage.receive()
        assert (notification.unique, -notification.errno) == (0, fuse.NotifyCode.INVAL_INODE)
        assert struct.unpack("<Qqq", notification.body) == (42, -1, 0)


async def test_what_is_left_at_the_end_is_the_channels() -> None:
    """The channel can go on after a loan, even when a late reply comes."""
    keeper = Keeper(Opcode.LOOKUP)
    async with on_stage(keeper) as stage:
        stage.send(Opcode.LOOKUP, 1, b"name\0")
        await keeper.wait_kept(1)
        stage.relay.abort()
        await wait_until_async(lambda: stage.relay.ended, 5, "the relay to end")
        stage.channel.end_loan()
        assert stage.channel.orphans == 1
        keeper.kept[0].reply(ENTRY)
        assert await stage.channel.request(Opcode.STATFS, 1, b"", reply_size=80) == b""
        await wait_until_async(lambda: not stage.channel.orphans, 5, "the late reply")


SIZE = 100 << 10


async def test_large_writes_one_after_the_other_use_the_same_memory() -> None:
    """Also when requests that go their own way, as RELEASE does, come in between."""

    def serve(request: DeviceRequest) -> None:
        request.reply(fuse.WRITE_OUT.values(SIZE) if request.header.opcode == Opcode.WRITE else b"")

    async with on_stage(serve) as stage:
        body = fuse.WRITE_IN.values(1, 0, SIZE, 0, 0, 0) + bytes(SIZE)
        for _ in range(10):
            await stage.call(Opcode.WRITE, 2, body)
            await stage.call(Opcode.RELEASE, 2, bytes(24))
            await stage.call(Opcode.ACCESS, 2, bytes(8))
            await stage.call(Opcode.ACCESS, 2, bytes(8))

        # The slots of one writer: the one with the data, and a page or two of the rest.
        assert stage.channel.statistics().memory_resident < 2 * SIZE
