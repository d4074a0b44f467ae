"""What the tests of the channel share."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from tests.support.wait import wait_until_async
from vfsmount.channel import ChannelOptions, open_channel
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vfsmount.channel import Channel
    from vfsmount.testing import DeviceRequest, FakeDevice

__all__ = ["DEADLINE", "Hoard", "getattr_request", "opened"]

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
