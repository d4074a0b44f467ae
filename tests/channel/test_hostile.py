"""Devices that lie: the channel ends with one clear line, everybody is told, nobody hangs."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trio.lowlevel
import trio.testing

from tests.channel.support import (
    DEADLINE,
    Hoard,
    getattr_request,
    opened,
    time_passes_after,
)
from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions
from vfsmount.errors import ChannelBroken, ChannelClosed, ProtocolViolation
from vfsmount.testing import DeviceRequest, FakeDevice, Reaction
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import FrontendRequest, encode_header, encode_message

if TYPE_CHECKING:
    from vfsmount.channel import Channel

both_ways = pytest.mark.parametrize("poll_us", [0, 5000], ids=["parked", "polled"])
Lie: TypeAlias = Callable[[DeviceRequest], object]


def use_twice(request: DeviceRequest) -> None:
    """Both are published at once: seen alone, the first would be an answer of no bytes."""
    ring = request.device.ring(request.queue)
    for ahead in (0, 1):
        ring.put(request.chain.head, 0, ahead)
    ring.publish(2)
    request.device.call(request.queue)


def jump(distance: int) -> Lie:
    def lie(request: DeviceRequest) -> None:
        request.device.ring(request.queue).publish(distance)
        request.device.call(request.queue)

    return lie


def half_a_header(request: DeviceRequest) -> None:
    request.write(bytes(15))
    request.use(15)


LIES: dict[str, tuple[Lie, str]] = {
    "used id out of range": (lambda r: r.reply(head=1024), "descriptor 1024"),
    "used id absurd": (lambda r: r.reply(head=2**32 - 1), "descriptor 4294967295"),
    "used id not outstanding": (lambda r: r.reply(head=r.chain.head ^ 1), "not available"),
    "used twice": (use_twice, "used 2 buffers, only 1"),
    "used.idx jumps by 2": (jump(2), "used 2 buffers"),
    "used.idx jumps by 1000": (jump(1000), "used 1000 buffers"),
    "used.idx jumps back": (jump(65535), "used 65535 buffers"),
    "length beyond the buffer": (lambda r: r.reply(written=16 + 104 + 1), "room for 120"),
    "length absurd": (lambda r: r.reply(written=2**32 - 1), "wrote 4294967295"),
    "header says more": (lambda r: r.reply(length=120), "says 120 bytes, 16 were written"),
    "header says less": (lambda r: r.reply(b"body", length=16), "says 16 bytes, 20 were"),
    "header says absurd": (lambda r: r.reply(length=2**32 - 1), "says 4294967295 bytes"),
    "header says nothing": (lambda r: r.reply(length=0), "says 0 bytes"),
    "wrong unique": (lambda r: r.reply(unique=r.header.unique + 2), "carries unique"),
    "no unique": (lambda r: r.reply(unique=0), "carries unique 0"),
    "positive errno": (lambda r: r.reply(error=2), "error 2, which is not a negated errno"),
    "errno -512": (lambda r: r.reply(error=-512), "error -512"),
    "errno absurd": (lambda r: r.reply(error=-(2**31)), "error -2147483648"),
    "error with a body": (lambda r: r.reply(b"x", error=-5), "error -5 and 1 bytes of body"),
    "one byte": (lambda r: r.use(1), "1 bytes is shorter"),
    "half a header": (half_a_header, "15 bytes is shorter"),
}


@both_ways
@pytest.mark.parametrize("lie", LIES)
async def test_lie(lie: str, poll_us: int, expect_log: Callable[[str], None]) -> None:
    serve, complaint = LIES[lie]
    expect_log("the channel to the daemon has ended: ")
    device = FakeDevice(serve)
    async with opened(device, poll_us=poll_us) as channel:
        with pytest.raises(ProtocolViolation, match=complaint) as caught:
            await getattr_request(channel)
        assert "\n" not in str(caught.value)
        # Nothing is believed any more.
        with pytest.raises(ProtocolViolation, match=complaint):
            await getattr_request(channel)
        with pytest.raises(ProtocolViolation, match=complaint):
            await channel.request_view(Opcode.READ, 1, b"", reply_size=1)
        with pytest.raises(ProtocolViolation, match=complaint):
            await channel.request_raw([b"x"])
        channel.forget(1, 1)
        assert isinstance(await channel.wait_ended(), ProtocolViolation)
        await wait_until_async(lambda: not device.connected, DEADLINE, "the device to be left")


@both_ways
async def test_everybody_who_waits_is_told(
    poll_us: int, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("not available")
    hoard = Hoard()
    outcomes: list[str] = []

    async def ask(nodeid: int) -> None:
        try:
            outcomes.append((await getattr_request(channel, nodeid)).decode())
        except ProtocolViolation as error:
            outcomes.append(str(error))

    options = ChannelOptions(queue_size=8, poll_us=poll_us)
    async with opened(FakeDevice(hoard), options=options) as channel:
        async with trio.open_nursery() as nursery:
            for nodeid in range(12):  # eight in flight, four in line
                nursery.start_soon(ask, nodeid)
            requests = await hoard.wait(8)
            with requests[0].device.paused():
                # One good reply first, in the same look at the ring: it counts.
                requests[3].write(struct.pack("<IiQ", 20, 0, requests[3].header.unique) + b"good")
                requests[3].device.ring(1).use(requests[3].chain.head, 20)
                requests[0].reply(head=requests[3].chain.head)
                requests[0].device.call(1)
        assert channel.statistics().waiting == 0
    assert len(outcomes) == 12
    assert outcomes.count("good") == 1
    assert all("not available" in outcome for outcome in outcomes if outcome != "good")
    assert caplog.text.count("the channel to the daemon has ended") == 1


async def test_late_lie_about_an_abandoned_request(expect_log: Callable[[str], None]) -> None:
    expect_log("carries unique")
    hoard = Hoard()
    async with opened(FakeDevice(hoard)) as channel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr_request, channel)
            await hoard.wait(1)
            nursery.cancel_scope.cancel()
        hoard.requests[0].reply(unique=1)
        assert isinstance(await channel.wait_ended(), ProtocolViolation)


async def test_reply_to_a_forget(expect_log: Callable[[str], None]) -> None:
    expect_log("wrote 16 bytes to FORGET of node 5, there is room for 0")
    device = FakeDevice(lambda request: request.use(16))
    async with opened(device) as channel:
        channel.forget(5, 1)
        await trio.lowlevel.checkpoint()
        while not device.served:
            channel.forget(5, 1)
            await trio.sleep(0.005)
        channel.forget(6, 1)
        assert isinstance(await channel.wait_ended(), ProtocolViolation)


async def test_raw_chains_are_checked_for_their_length_only(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("wrote 5 bytes to raw request, there is room for 4")
    async with opened(FakeDevice(lambda request: request.use(len(request.data)))) as channel:
        assert (await channel.request_raw([b"abcd"], [4]))[0] == 4
        with pytest.raises(ProtocolViolation, match="room for 4"):
            await channel.request_raw([b"abcde"], [4])


# --- the connection -------------------------------------------------------------------------------


async def expect_end(channel: Channel, kind: type[ChannelBroken], complaint: str) -> None:
    error = await channel.wait_ended()
    assert type(error) is kind
    assert complaint in str(error)
    with pytest.raises(kind, match=complaint):
        await getattr_request(channel)


@both_ways
async def test_daemon_dies_in_the_middle_of_requests(
    poll_us: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("the daemon closed the vhost-user connection")
    hoard = Hoard()
    failures: list[ChannelBroken] = []

    async def ask() -> None:
        try:
            await getattr_request(channel)
        except ChannelBroken as error:
            failures.append(error)

    device = FakeDevice(hoard)
    options = ChannelOptions(queue_size=8, poll_us=poll_us)
    async with opened(device, options=options) as channel, trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask)
        await hoard.wait(8)
        device.hang_up()
        await expect_end(channel, ChannelBroken, "closed the vhost-user connection")
    assert len(failures) == 12
    assert len(set(map(id, failures))) == 12, "each has an exception of its own"
    assert all(error.can_reconnect for error in failures)


async def test_daemon_dies_while_nothing_is_asked(expect_log: Callable[[str], None]) -> None:
    expect_log("the daemon closed")
    device = FakeDevice()
    async with opened(device) as channel:
        await getattr_request(channel)
        device.hang_up()
        await expect_end(channel, ChannelBroken, "closed")


GARBAGE = {
    "text": (b"HTTP/1.1 200 OK\r\n\r\n", "garbage on the vhost-user socket"),
    "zeros": (bytes(12), "garbage on the vhost-user socket: vhost-user version 0"),
    "a huge message": (struct.pack("=III", 1, 5, 2**31), "payload of 2147483648 bytes"),
    "a reply to nothing": (
        encode_header(FrontendRequest.GET_FEATURES, 8, reply=True) + bytes(8),
        "message 1 that nobody asked for",
    ),
    "a request": (encode_message(FrontendRequest.SET_OWNER), "message 3 that nobody asked for"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_on_the_socket(garbage: str, expect_log: Callable[[str], None]) -> None:
    data, complaint = GARBAGE[garbage]
    expect_log("the channel to the daemon has ended")
    hoard = Hoard()
    device = FakeDevice(hoard)
    async with opened(device) as channel, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ProtocolViolation):
                await getattr_request(channel)

        nursery.start_soon(ask)
        await hoard.wait(1)
        device.send(data)
        await expect_end(channel, ProtocolViolation, complaint)


async def test_descriptors_that_nobody_wants_are_closed(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("nobody asked for")
    device = FakeDevice()
    async with opened(device) as channel:
        before = len(os.listdir("/proc/self/fd"))
        read_end, write_end = os.pipe()
        message = encode_header(FrontendRequest.GET_FEATURES, 8, reply=True) + bytes(8)
        device.send_with_fds(message, [read_end] * 5)
        os.close(read_end)
        await channel.wait_ended()
        # All copies are closed, soon, when the write end of the pipe finds nobody to read.
        unread = select.poll()
        unread.register(write_end, 0)
        assert unread.poll(DEADLINE * 1000) == [(write_end, select.POLLERR)]
        os.close(write_end)
        assert len(os.listdir("/proc/self/fd")) <= before


async def test_device_that_closes_during_the_orderly_end() -> None:
    device = FakeDevice(reactions={FrontendRequest.GET_VRING_BASE: Reaction.CLOSE})
    async with opened(device) as channel:
        await getattr_request(channel)
    assert isinstance(await channel.wait_ended(), ChannelClosed)


async def test_device_that_is_mute_during_the_orderly_end(
    mock_clock: trio.testing.MockClock,
) -> None:
    """Time stands still while the device answers, and passes when only it could go on."""
    ignored = FrontendRequest.GET_VRING_BASE
    device = FakeDevice(reactions={ignored: Reaction.IGNORE})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(time_passes_after, mock_clock, device, ignored.name)
        async with opened(device, connect_timeout=1) as channel:
            await getattr_request(channel)
            before = trio.current_time()
        assert trio.current_time() - before == pytest.approx(1)


async def test_device_that_never_looks_at_its_rings() -> None:
    async with opened(FakeDevice(mute=True), request_timeout=0.05) as channel:
        with trio.move_on_after(0.02) as scope:
            await getattr_request(channel)
        assert scope.cancelled_caught
        for nodeid in range(200):
            channel.forget(nodeid, 1)


async def test_device_that_calls_for_nothing() -> None:
    device = FakeDevice()
    async with opened(device) as channel:
        for _ in range(20):
            device.call(1)
            device.call(0)
            await getattr_request(channel)
