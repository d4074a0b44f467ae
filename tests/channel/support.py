"""What the tests of the channel share."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
import trio.testing

from tests.support.wait import wait_until, wait_until_async
from vfsmount.channel import ChannelOptions, open_channel
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfsmount.channel import Channel
    from vfsmount.testing import DeviceRequest, FakeDevice

__all__ = ["DEADLINE", "Hoard", "getattr_request", "opened", "time_passes_after"]

#: Seconds for any one test: long enough for a busy machine, short enough to call it a hang.
DEADLINE = 20


@asynccontextmanager
async def opened(
    device: FakeDevice, *, options: ChannelOptions | None = None, **how: Any
) -> AsyncIterator[Channel]:
    """Run a fake device and a channel to it, with a deadline on everything."""
    chosen = options or ChannelOptions(**how)
    with trio.fail_after(DEADLINE), device:
        async with open_channel(sock=device.guest_socket(), options=chosen) as channel:
            yield channel


async def getattr_request(channel: Channel, nodeid: int = 5, reply_size: int = 104) -> bytes:
    """Send something small."""
    return await channel.request(Opcode.GETATTR, nodeid, bytes(16), reply_size=reply_size)


async def time_passes_after(clock: trio.testing.MockClock, device: FakeDevice, name: str) -> None:
    """Have a clock that stands still go on when the device has had a message.

    So what comes before is in time, however slow the device's thread is.
    """
    await trio.to_thread.run_sync(wait_until, lambda: name in device.requests, DEADLINE, name)
    clock.autojump_threshold = 0.01


class Hoard:
    """A server that keeps every request, for the test to answer when it likes."""

    def __init__(self) -> None:
        self.requests: list[DeviceRequest] = []

    def __call__(self, request: DeviceRequest) -> None:
        self.requests.append(request)

    async def wait(self, count: int) -> list[DeviceRequest]:
        """Wait until the device has ``count`` of them."""
        await wait_until_async(lambda: len(self.requests) >= count, DEADLINE, f"{count} requests")
        return self.requests

    async def wait_in_thread(self, count: int) -> list[DeviceRequest]:
        """The same where the clock stands still."""
        await trio.to_thread.run_sync(
            wait_until, lambda: len(self.requests) >= count, DEADLINE, f"{count} requests"
        )
        return self.requests
