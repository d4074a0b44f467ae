"""Callers that go away, and devices that do not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.channel.support import DEADLINE, Hoard, getattr_request, opened
from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions
from vfsmount.errors import RequestTimeout
from vfsmount.testing import FakeDevice
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.channel import Channel

both_ways = pytest.mark.parametrize("poll_us", [0, 5000], ids=["parked", "polled"])


async def cancel_one(channel: Channel, hoard: Hoard, abandoned: list[bytes]) -> None:
    """Send a request and cancel its caller when the device has it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, channel, abandoned.append)
        await hoard.wait(len(hoard.requests) + 1)
        nursery.cancel_scope.cancel()


async def ask(channel: Channel, on_abandoned: Callable[[bytes], None]) -> None:
    """Send a request that minds being abandoned."""
    await channel.request(Opcode.LOOKUP, 1, b"x\0", reply_size=128, on_abandoned=on_abandoned)


@both_ways
async def test_cancelled_request_stays_with_the_device(poll_us: int) -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard), poll_us=poll_us) as channel:
        await cancel_one(channel, hoard, abandoned)
        statistics = channel.statistics()
        (flight,) = statistics.in_flight
        assert flight.abandoned
        assert statistics.abandoned == 1
        assert statistics.arena_used > 0, "the device may still write there"
        assert not abandoned

        hoard.requests[0].reply(b"an entry")
        await wait_until_async(lambda: abandoned, DEADLINE, "the late reply")

        assert abandoned == [b"an entry"]
        assert channel.statistics().in_flight == ()
        assert channel.statistics().arena_used == 0


async def test_its_memory_is_given_to_nobody_else() -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard)) as channel, trio.open_nursery() as nursery:
        await cancel_one(channel, hoard, abandoned)
        nursery.start_soon(getattr_request, channel)
        first, second = await hoard.wait(2)
        first.reply(b"late")
        second.reply(b"other")
        assert not set(first.chain.writable) & set(second.chain.writable)


async def test_failed_late_reply_is_nobodys_business() -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard)) as channel:
        await cancel_one(channel, hoard, abandoned)
        hoard.requests[0].reply(error=-2)
        await wait_until_async(lambda: not channel.statistics().arena_used, DEADLINE, "the reply")
    assert not abandoned


async def test_cancelled_while_waiting_for_room_was_never_sent() -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard), queue_size=2) as channel, trio.open_nursery() as nursery:
        for nodeid in range(2):
            nursery.start_soon(getattr_request, channel, nodeid)
        await hoard.wait(2)
        with trio.move_on_after(0.02) as scope:
            await ask(channel, abandoned.append)
        assert scope.cancelled_caught
        assert channel.statistics().waiting == 0
        for request in hoard.requests[:2]:
            request.reply()
        nursery.start_soon(getattr_request, channel, 7)
        (await hoard.wait(3))[2].reply()
    assert sorted(request.header.nodeid for request in hoard.requests) == [0, 1, 7]
    assert not abandoned


async def test_who_waits_behind_a_cancelled_one_goes_on() -> None:
    """The first in line needs more than there is; when it goes, there is room for the second."""
    hoard = Hoard()
    options = ChannelOptions(queue_size=4, indirect=False)
    async with (
        opened(FakeDevice(hoard), options=options) as channel,
        trio.open_nursery() as nursery,
    ):
        channel._watchdog.interval = 2 * DEADLINE  # the look at mute requests would notice, too
        large = trio.CancelScope()

        async def ask_for_much() -> None:
            with large:
                await channel.request_raw([b"1", b"2", b"3"])

        nursery.start_soon(getattr_request, channel, 1)
        await hoard.wait(1)
        nursery.start_soon(ask_for_much)
        await wait_until_async(lambda: channel.statistics().waiting == 1, DEADLINE, "the first")
        nursery.start_soon(getattr_request, channel, 2)
        await wait_until_async(lambda: channel.statistics().waiting == 2, DEADLINE, "the second")

        large.cancel()

        await wait_until_async(lambda: channel.statistics().waiting == 0, DEADLINE, "the second")
        second = (await hoard.wait(2))[1]
        assert second.header.nodeid == 2
        for request in hoard.requests:
            request.reply()


async def test_cancelled_before_anything_was_sent() -> None:
    device = FakeDevice()
    async with opened(device) as channel:
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.request_raw([b"x"])
        assert scope.cancelled_caught
    assert device.served == 0


async def test_callback_may_use_the_channel() -> None:
    hoard = Hoard()

    async with opened(FakeDevice(hoard)) as channel:

        def give_back(body: bytes) -> None:
            channel.forget(body[0], 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, channel, give_back)
            await hoard.wait(1)
            nursery.cancel_scope.cancel()
        hoard.requests[0].reply(b"\x07")
        forget = (await hoard.wait(2))[1]
        assert forget.queue == 0
        assert forget.header.nodeid == 7
        forget.use(0)


async def test_all_of_a_full_ring_cancelled_and_answered() -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard), queue_size=16) as channel:
        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(ask, channel, abandoned.append)
            await hoard.wait(16)
            nursery.cancel_scope.cancel()
        for request in reversed(hoard.requests):
            request.reply(b"x")
        await wait_until_async(lambda: len(abandoned) == 16, DEADLINE, "the late replies")
        assert channel.statistics().arena_used == 0


# --- time limits ----------------------------------------------------------------------------------


async def test_timed_out_request_is_quarantined() -> None:
    hoard = Hoard()
    abandoned: list[bytes] = []
    async with opened(FakeDevice(hoard), request_timeout=0.05) as channel:
        with pytest.raises(RequestTimeout, match=r"LOOKUP of node 1 within 0\.05 s"):
            await ask(channel, abandoned.append)
        assert channel.statistics().arena_used > 0
        assert channel.statistics().in_flight[0].abandoned

        (await hoard.wait(1))[0].reply(b"too late")
        await wait_until_async(lambda: abandoned, DEADLINE, "the late reply")
        assert abandoned == [b"too late"]
        assert channel.statistics().arena_used == 0


async def test_who_waits_for_room_times_out_as_well() -> None:
    hoard = Hoard()
    errors: list[RequestTimeout] = []

    async def ask_and_note() -> None:
        try:
            await getattr_request(channel)
        except RequestTimeout as error:
            errors.append(error)

    options = ChannelOptions(queue_size=2, request_timeout=0.05)
    async with opened(FakeDevice(hoard), options=options) as channel:
        async with trio.open_nursery() as nursery:  # ends when all have failed
            for _ in range(5):
                nursery.start_soon(ask_and_note)
        assert len(errors) == 5
        assert channel.statistics().waiting == 0
        assert len(await hoard.wait(2)) == 2


async def test_a_lock_may_be_waited_for_as_long_as_it_takes() -> None:
    hoard = Hoard()

    async def lock() -> None:
        await channel.request(Opcode.SETLKW, 1, bytes(48), reply_size=0)

    options = ChannelOptions(request_timeout=0.05, mute_after=0.05)
    async with (
        opened(FakeDevice(hoard), options=options) as channel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lock)
        await hoard.wait(1)
        age = 0.0
        while age < 0.2:
            await trio.sleep(0.01)
            age = channel.statistics().in_flight[0].age
        assert channel.statistics().mute == ()
        hoard.requests[0].reply()


# --- mute devices ---------------------------------------------------------------------------------


async def test_mute_device_is_reported_and_shown(
    expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("no reply to GETATTR of node 77 for .* s: the daemon is mute")
    hoard = Hoard()
    async with opened(FakeDevice(hoard), mute_after=0.05) as channel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr_request, channel, 77)
            await wait_until_async(lambda: channel.statistics().mute, DEADLINE, "silence")
            (mute,) = channel.statistics().mute
            assert (mute.nodeid, mute.opcode) == (77, Opcode.GETATTR)
            assert mute.age >= 0.05
            await wait_until_async(lambda: "is mute" in caplog.text, DEADLINE, "the report")
            (await hoard.wait(1))[0].reply()
        assert channel.statistics().mute == ()


async def test_nothing_wakes_up_when_nothing_is_in_flight() -> None:
    class Wakeups(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task.coro.__name__ in {"look_after", "reap_on_calls", "send_in_time"}:
                self.count += 1

    hoard = Hoard()
    async with opened(FakeDevice(hoard)) as channel:
        channel._watchdog.interval = 0.005
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr_request, channel)
            (await hoard.wait(1))[0].reply()
        channel.forget(5, 1)
        (await hoard.wait(2))[1].use(0)
        await trio.testing.wait_all_tasks_blocked(0.05)  # the last look when everything is over
        wakeups = Wakeups()
        trio.lowlevel.add_instrument(wakeups)
        with trio.move_on_after(0.1):
            await trio.sleep_forever()
        trio.lowlevel.remove_instrument(wakeups)
    assert wakeups.count == 0
