"""Requests over a channel to a device that behaves."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.channel.support import DEADLINE, Hoard, getattr_request, opened
from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions
from vfsmount.channel.arena import MAX_BLOCK
from vfsmount.channel.opening import ARENA_SIZE
from vfsmount.errors import ChannelClosed, RemoteErrno
from vfsmount.testing import FakeDevice
from vfsmount.wire.fuse import Opcode, decode_forgets, decode_request

if TYPE_CHECKING:
    from vfsmount.channel import Channel
    from vfsmount.testing import DeviceRequest

#: Both ways to a reply: looking for it, and being woken up.
both_ways = pytest.mark.parametrize("poll_us", [0, 5000], ids=["parked", "polled"])


async def wait_for_requests(channel: Channel, count: int) -> None:
    """Wait until so many requests are with the device or in line."""

    def there() -> bool:
        statistics = channel.statistics()
        return len(statistics.in_flight) + statistics.waiting == count

    await wait_until_async(there, DEADLINE, f"{count} requests")


def echo(request: DeviceRequest) -> None:
    """Answer with the request's own body."""
    request.reply(request.body)


@both_ways
async def test_request_and_reply(poll_us: int) -> None:
    seen: list[DeviceRequest] = []

    def serve(request: DeviceRequest) -> None:
        seen.append(request)
        request.reply(b"reply")

    async with opened(FakeDevice(serve), poll_us=poll_us) as channel:
        body = await channel.request(
            Opcode.WRITE, 7, b"body", payload=b"data", reply_size=8, uid=1, gid=2, pid=3, extlen=0
        )

    assert body == b"reply"
    (request,) = seen
    header = request.header
    assert header.opcode == Opcode.WRITE
    assert header.nodeid == 7
    assert (header.uid, header.gid, header.pid) == (1, 2, 3)
    assert header.len == len(request.data) == 48
    assert request.body == b"bodydata"
    assert request.room == 16 + 8, "the device gets exactly the room that was asked for"
    assert request.queue == 1


@both_ways
@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
async def test_every_kind_of_ring(poll_us: int, indirect: bool, event_idx: bool) -> None:
    device = FakeDevice(echo)
    options = ChannelOptions(poll_us=poll_us, indirect=indirect, event_idx=event_idx, queue_size=4)
    async with opened(device, options=options) as channel:
        for i in range(50):
            body = struct.pack("<I", i)
            assert await channel.request(Opcode.GETATTR, 1, body, reply_size=4) == body


@both_ways
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 20])
async def test_sizes(poll_us: int, size: int) -> None:
    payload = memoryview(bytes(range(256)) * (size // 256 + 1))[:size]
    async with opened(FakeDevice(echo), poll_us=poll_us) as channel:
        for body in (b"", b"x" * 40):
            reply = await channel.request(
                Opcode.WRITE, 1, body, payload=payload, reply_size=size + len(body)
            )
            assert reply == body + payload


async def test_payload_of_any_shape() -> None:
    numbers = memoryview(struct.pack("<4I", 1, 2, 3, 4)).cast("I")
    async with opened(FakeDevice(echo)) as channel:
        reply = await channel.request(Opcode.WRITE, 1, b"", payload=numbers, reply_size=16)
    assert reply == numbers.tobytes()


async def test_too_large_for_any_block() -> None:
    async with opened(FakeDevice()) as channel:
        for _ in range(130):  # the quick way and the fair one
            with pytest.raises(ValueError, match="do not fit"):
                await channel.request(Opcode.READ, 1, b"", reply_size=MAX_BLOCK)
        await getattr_request(channel)


async def test_too_large_for_any_block_leaves_calls_on_for_others() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard)) as channel:
        channel._watchdog.interval = 2 * DEADLINE  # the look at mute requests would do instead
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr_request, channel)
            (request,) = await hoard.wait(1)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ValueError, match="do not fit"):
                await channel.request(Opcode.READ, 1, b"", reply_size=MAX_BLOCK)
            request.reply()


async def test_too_large_for_any_block_behind_others() -> None:
    hoard = Hoard()
    failures: list[str] = []

    async def ask_too_much(reply_size: int) -> None:
        try:
            await getattr_request(channel, 9, reply_size)
        except ValueError as error:
            failures.append(str(error))

    async with opened(FakeDevice(hoard), queue_size=2) as channel, trio.open_nursery() as nursery:
        for nodeid in range(3):
            nursery.start_soon(getattr_request, channel, nodeid)
            await wait_for_requests(channel, nodeid + 1)
        nursery.start_soon(ask_too_much, MAX_BLOCK)
        await wait_for_requests(channel, 4)
        nursery.start_soon(getattr_request, channel, 4)
        for i in range(4):
            (await hoard.wait(i + 1))[i].reply()
    assert len(failures) == 1


@both_ways
async def test_error_of_the_daemon(poll_us: int) -> None:
    device = FakeDevice(lambda request: request.reply(error=-2))
    async with opened(device, poll_us=poll_us) as channel:
        for _ in range(3):
            with pytest.raises(RemoteErrno) as caught:
                await getattr_request(channel, nodeid=9)
            error = caught.value
            assert (error.opcode, error.nodeid, error.errno) == (Opcode.GETATTR, 9, 2)
        assert channel.statistics().requests["GETATTR"].errors == 3
        assert channel.statistics().arena_used == 0


async def test_no_bytes_is_an_io_error_and_the_channel_lives() -> None:
    def serve(request: DeviceRequest) -> None:
        request.use(0) if request.header.nodeid == 9 else request.reply()

    async with opened(FakeDevice(serve)) as channel:
        with pytest.raises(RemoteErrno) as caught:
            await getattr_request(channel, nodeid=9)
        assert caught.value.errno == 5
        await getattr_request(channel)


async def test_destroy_without_an_answer() -> None:
    device = FakeDevice(lambda request: request.use(0))
    async with opened(device) as channel:
        assert await channel.request(Opcode.DESTROY, 0, b"", reply_size=0) == b""


async def test_uniques_are_even_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    # All forgets go together at the end, however long the requests take.
    monkeypatch.setattr("vfsmount.channel.device._LATER", 1000.0)
    seen: list[int] = []

    def serve(request: DeviceRequest) -> None:
        seen.append(request.header.unique)
        request.use() if request.queue == 0 else request.reply()

    async with opened(FakeDevice(serve)) as channel:
        for _ in range(5):
            await getattr_request(channel)
            channel.forget(3, 1)
    assert len(seen) == len(set(seen)) == 6
    assert all(unique % 2 == 0 and unique > 0 for unique in seen)
    assert seen[:5] == sorted(seen[:5])


# --- many at once ---------------------------------------------------------------------------------


@both_ways
async def test_replies_in_any_order(poll_us: int) -> None:
    hoard = Hoard()
    replies: dict[int, bytes] = {}

    async def ask(nodeid: int) -> None:
        replies[nodeid] = await getattr_request(channel, nodeid)

    device = FakeDevice(hoard)
    async with opened(device, poll_us=poll_us) as channel, trio.open_nursery() as nursery:
        for nodeid in range(20):
            nursery.start_soon(ask, nodeid)
        for request in reversed(await hoard.wait(20)):
            request.reply(struct.pack("<Q", request.header.nodeid))

    assert replies == {nodeid: struct.pack("<Q", nodeid) for nodeid in range(20)}


@both_ways
@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
async def test_full_ring_is_first_come_first_served(poll_us: int, indirect: bool) -> None:
    hoard = Hoard()
    device = FakeDevice(hoard)
    options = ChannelOptions(queue_size=8, poll_us=poll_us, indirect=indirect)
    room = 8 if indirect else 4
    async with opened(device, options=options) as channel, trio.open_nursery() as nursery:
        for nodeid in range(20):
            nursery.start_soon(getattr_request, channel, nodeid)
            await wait_for_requests(channel, nodeid + 1)
        await hoard.wait(room)
        assert len(channel.statistics().in_flight) == room
        assert channel.statistics().waiting == 20 - room
        for i in range(20):
            requests = await hoard.wait(i + 1)
            requests[i].reply()

        await wait_until_async(lambda: not nursery.child_tasks, DEADLINE, "all to be answered")
        assert channel.statistics().arena_used == 0

    assert [request.header.nodeid for request in hoard.requests] == list(range(20))


async def test_full_arena_waits_and_goes_on() -> None:
    hoard = Hoard()
    blocks = ARENA_SIZE // MAX_BLOCK
    async with opened(FakeDevice(hoard)) as channel, trio.open_nursery() as nursery:
        for nodeid in range(blocks + 6):
            nursery.start_soon(getattr_request, channel, nodeid, MAX_BLOCK // 2 + 1)
        await hoard.wait(blocks)
        await wait_until_async(lambda: channel.statistics().waiting == 6, DEADLINE, "a line")
        for i in range(blocks + 6):
            (await hoard.wait(i + 1))[i].reply()


async def test_nobody_overtakes_who_waits_for_room() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard), queue_size=2) as channel, trio.open_nursery() as nursery:
        for nodeid in range(3):
            nursery.start_soon(getattr_request, channel, nodeid)
            await wait_for_requests(channel, nodeid + 1)
        # Room for one: it belongs to the third, though a fourth comes first to use it.
        (await hoard.wait(1))[0].reply()
        nursery.start_soon(getattr_request, channel, 3)
        for i in range(1, 4):
            (await hoard.wait(i + 1))[i].reply()
    assert [request.header.nodeid for request in hoard.requests] == [0, 1, 2, 3]


async def test_no_calls_while_somebody_looks_anyway() -> None:
    hoard = Hoard()

    def serve(request: DeviceRequest) -> None:
        hoard(request) if request.header.nodeid == 1 else request.reply()

    device = FakeDevice(serve)
    async with opened(device, poll_us=50_000) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(getattr_request, channel, 1)
        (slow,) = await hoard.wait(1)
        for _ in range(100):
            await getattr_request(channel, 2)
        assert device.calls < 20
        slow.reply()


async def test_other_tasks_live_beside_quick_requests() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.lowlevel.checkpoint()
            ticks += 1

    async with opened(FakeDevice(), poll_us=5000) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        for _ in range(640):
            await getattr_request(channel)
        nursery.cancel_scope.cancel()
    assert ticks >= 640 // 64 - 3


# --- views ----------------------------------------------------------------------------------------


@both_ways
async def test_view_of_the_reply(poll_us: int) -> None:
    async with opened(FakeDevice(echo), poll_us=poll_us) as channel:
        view = await channel.request_view(Opcode.READ, 1, b"a" * 5000, reply_size=5000)
        assert view.readonly
        assert view == b"a" * 5000
        assert channel.statistics().arena_used > 0

        second = await channel.request_view(Opcode.READ, 1, b"b" * 10, reply_size=10)
        with pytest.raises(ValueError, match="released"):
            bytes(view)
        assert second == b"b" * 10

        channel.forget(5, 1)
        with pytest.raises(ValueError, match="released"):
            bytes(second)
        assert channel.statistics().arena_used == 0


async def test_views_that_two_tasks_waited_for() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard), poll_us=0) as channel:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask_for_view, channel)
            for request in await hoard.wait(2):
                request.reply(b"x" * 5000)
        channel.forget(5, 1)
        assert channel.statistics().arena_used == 0, "one of two loans was forgotten"
        (await hoard.wait(3))[2].use(0)


async def ask_for_view(channel: Channel) -> None:
    await channel.request_view(Opcode.READ, 1, b"", reply_size=5000)


async def test_view_of_an_error() -> None:
    async with opened(FakeDevice(lambda request: request.reply(error=-5))) as channel:
        with pytest.raises(RemoteErrno):
            await channel.request_view(Opcode.READ, 1, b"", reply_size=10)
        assert channel.statistics().arena_used == 0


async def test_view_that_outlives_the_channel() -> None:
    async with opened(FakeDevice(echo)) as channel:
        view = await channel.request_view(Opcode.READ, 1, b"abc", reply_size=10)
        held = memoryview(view)
    assert bytes(held) == b"abc", "memory stays mapped while somebody looks"
    held.release()
    with pytest.raises(ValueError, match="released"):
        bytes(view)


# --- raw chains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
async def test_raw_chain(indirect: bool) -> None:
    seen: list[DeviceRequest] = []

    def serve(request: DeviceRequest) -> None:
        seen.append(request)
        request.write(b"0123456789")
        request.use(7)

    async with opened(FakeDevice(serve), indirect=indirect) as channel:
        assert await channel.request_raw([b"ab", b"", b"cde"], [4, 8]) == (7, b"0123456")
    (request,) = seen
    assert request.data == b"abcde"
    assert [length for _, length in request.chain.readable] == [2, 0, 3]
    assert [length for _, length in request.chain.writable] == [4, 8]


async def test_raw_chain_on_the_hiprio_queue() -> None:
    queues: list[int] = []

    def serve(request: DeviceRequest) -> None:
        queues.append(request.queue)
        request.use(0)

    async with opened(FakeDevice(serve)) as channel:
        channel.forget(5, 1)
        assert await channel.request_raw([b"x"], queue=0) == (0, b"")
        assert await channel.request_raw([b"x"], queue=1) == (0, b"")
        with pytest.raises(ValueError, match="no queue 2"):
            await channel.request_raw([b"x"], queue=2)
    assert queues[:2] == [0, 1]


async def test_raw_chains_that_cannot_be() -> None:
    async with opened(FakeDevice(), queue_size=4) as channel:
        for pieces in ([], [b"x"] * 5):
            with pytest.raises(ValueError, match="descriptors"):
                await channel.request_raw(pieces)
        await getattr_request(channel)


# --- FORGET ---------------------------------------------------------------------------------------


class ForgetDevice(FakeDevice):
    """Collects what is forgotten."""

    def __init__(self) -> None:
        super().__init__(self._serve)
        self.opcodes: list[int] = []
        self.forgotten: dict[int, int] = {}

    def _serve(self, request: DeviceRequest) -> None:
        if request.queue != 0:
            request.reply()
            return
        assert request.room == 0
        message = decode_request(request.data)
        self.opcodes.append(message.header.opcode)
        for one in decode_forgets(message):
            self.forgotten[one.nodeid] = self.forgotten.get(one.nodeid, 0) + one.nlookup
        request.use(0)


async def test_one_forget_goes_alone_and_soon() -> None:
    device = ForgetDevice()
    async with opened(device) as channel:
        channel.forget(5, 1)
        channel.forget(5, 2)
        assert channel.statistics().forgets_waiting == 1
        await wait_until_async(lambda: device.forgotten, 1, "the flusher")
        assert device.forgotten == {5: 3}
        assert device.opcodes == [Opcode.FORGET]
        assert channel.statistics().requests["FORGET"].count == 1


async def test_32_nodes_go_at_once_in_one_message() -> None:
    device = ForgetDevice()
    async with opened(device) as channel:
        for nodeid in range(2, 34):
            channel.forget(nodeid, nodeid)
        assert channel.statistics().forgets_waiting == 0
        assert channel.statistics().notifications.kicks == 1
        await wait_until_async(lambda: device.forgotten, DEADLINE, "the device")
    assert device.forgotten == {nodeid: nodeid for nodeid in range(2, 34)}
    assert device.opcodes == [Opcode.BATCH_FORGET]


async def test_no_forget_is_lost_at_the_end() -> None:
    device = ForgetDevice()
    async with opened(device) as channel:
        for nodeid in range(2, 1000):
            channel.forget(nodeid, 1)
    assert device.forgotten == dict.fromkeys(range(2, 1000), 1)


async def test_forgets_are_nobodys_orphans() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard)) as channel:
        for nodeid in range(2, 34):
            channel.forget(nodeid, 1)
        (flight,) = channel.statistics().in_flight
        assert not flight.abandoned
        (await hoard.wait(1))[0].use(0)
        channel._progress()
        assert not channel.statistics().in_flight
        assert [exchange.orphans for exchange in channel._exchanges] == [0, 0]


async def test_forgets_wait_for_room_and_blocks_come_back() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard), queue_size=2, indirect=False) as channel:
        for nodeid in range(2, 2 + 32 * 5):
            channel.forget(nodeid, 1)
        assert channel.statistics().forgets_waiting == 32 * 4
        for i in range(5):
            (await hoard.wait(i + 1))[i].use(0)
        await wait_until_async(
            lambda: channel.statistics().forgets_waiting == 0, DEADLINE, "all to be sent"
        )
        channel.forget(1000, 1)
        (await hoard.wait(6))[5].use(0)


async def test_forgets_after_the_end_are_nothing() -> None:
    async with opened(ForgetDevice()) as channel:
        await channel.aclose()
        channel.forget(5, 1)


# --- the end --------------------------------------------------------------------------------------


async def test_closing_fails_who_waits_and_who_comes_later() -> None:
    hoard = Hoard()
    failures: list[str] = []

    async def ask() -> None:
        try:
            await getattr_request(channel)
        except ChannelClosed as error:
            failures.append(str(error))

    async with opened(FakeDevice(hoard), queue_size=2) as channel, trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(ask)
        await hoard.wait(2)
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(ChannelClosed):
            await getattr_request(channel)
        with pytest.raises(ChannelClosed):
            await channel.request_raw([b"x"])
        assert isinstance(await channel.wait_ended(), ChannelClosed)
    assert failures == ["the channel is closed"] * 4


async def test_reply_at_the_very_end_is_not_read_from_unmapped_memory() -> None:
    hoard = Hoard()
    outcome: list[object] = []

    async def ask() -> None:
        try:
            outcome.append(await getattr_request(channel))
        except ChannelClosed as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery, opened(FakeDevice(hoard), poll_us=0) as channel:
        nursery.start_soon(ask)
        (await hoard.wait(1))[0].reply(b"late")
    assert len(outcome) == 1


async def test_memory_goes_back_when_the_burst_is_over(mock_clock: trio.testing.MockClock) -> None:
    """The clock stands still during the burst, which could else be over before we look."""
    hoard = Hoard()
    async with opened(FakeDevice(hoard)) as channel:
        async with trio.open_nursery() as nursery:
            for nodeid in range(20):
                nursery.start_soon(getattr_request, channel, nodeid, 1 << 20)
            for request in await hoard.wait_in_thread(20):
                request.reply(bytes(1 << 20))
        assert channel.statistics().memory_resident > 20 << 20
        mock_clock.jump(channel._watchdog.interval)
        await trio.testing.wait_all_tasks_blocked()
        assert channel.statistics().memory_resident < 2 << 20


async def test_statistics() -> None:
    hoard = Hoard()
    async with opened(FakeDevice(hoard), poll_us=0) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(getattr_request, channel, 77)
        (request,) = await hoard.wait(1)
        statistics = channel.statistics()
        (flight,) = statistics.in_flight
        assert (flight.opcode, flight.nodeid) == (Opcode.GETATTR, 77)
        assert 0 <= flight.age < DEADLINE
        assert not flight.abandoned
        assert statistics.mute == ()
        assert statistics.requests == {}
        request.reply()
        await wait_until_async(lambda: channel.statistics().requests, DEADLINE, "the count")
        after = channel.statistics()
        assert after.requests["GETATTR"].count == 1
        assert after.requests["GETATTR"].mean_us > 0
        assert after.notifications.kicks == 1
        assert after.notifications.calls >= 1
        assert after.notifications.polls_missed == 1
        assert after.in_flight == ()
