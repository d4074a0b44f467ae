"""The kernel's side of ``/dev/fuse``, played by a test, with the relay's thread and a fake device.

A socket of packets stands for the device file: one message per read and per write, as there. What
it cannot do is refuse a reply; the tests on real mounts have that.
"""

from __future__ import annotations

import errno
import socket
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from tests.support.wait import wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.channel import Channel, ChannelOptions, open_channel
from vfsmount.client.relay.init import Terms
from vfsmount.client.relay.thread import Relay
from vfsmount.testing.fake_device import ALL_FEATURES, DeviceRequest, FakeDevice
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfsmount.errors import VfsmountError

__all__ = ["AUTO", "Reply", "Stage", "on_stage"]

AUTO = CachePolicy.for_mode("auto")
PATIENCE = 20.0
LARGEST = 1 << 17


class Reply(NamedTuple):
    """What the kernel got."""

    unique: int
    errno: int
    body: bytes


class Stage:
    """Everything that a test plays with.

    Attributes:
        channel: The channel, its queues lent.
        device: The fake device.
        relay: The relay, running.
    """

    def __init__(self, channel: Channel, device: FakeDevice, sock: socket.socket) -> None:
        self.channel = channel
        self.device = device
        self.relay: Relay
        self.failures: list[BaseException] = []
        self._sock = sock
        self._unique = 0

    def send(
        self, opcode: int, nodeid: int = 1, body: bytes = b"", pid: int = 0, uid: int = 0
    ) -> int:
        """Send a request; returns its unique."""
        self._unique += 2
        self._sock.send(fuse.encode_request(opcode, self._unique, nodeid, body, pid=pid, uid=uid))
        return self._unique

    def interrupt(self, unique: int) -> None:
        """Send INTERRUPT for a request."""
        body = fuse.INTERRUPT_IN.values(unique)
        self._sock.send(fuse.encode_request(fuse.Opcode.INTERRUPT, unique + 1, 0, body))

    async def receive(self) -> Reply:
        """Wait for a reply."""
        data = await trio.to_thread.run_sync(self._sock.recv, LARGEST + 4096)
        assert data, "the relay has ended"
        header = fuse.OUT_HEADER.unpack(data)
        assert header.len == len(data)
        return Reply(header.unique, -header.error, data[fuse.OUT_HEADER.size :])

    async def call(self, opcode: int, nodeid: int = 1, body: bytes = b"", pid: int = 0) -> Reply:
        """Send a request and wait for its reply."""
        unique = self.send(opcode, nodeid, body, pid)
        reply = await self.receive()
        assert reply.unique == unique
        return reply

    async def nothing_comes(self) -> None:
        """Make sure that no reply is on its way: a later request is answered first."""
        assert (await self.call(fuse.Opcode.INIT)).errno == errno.EIO


@asynccontextmanager
async def on_stage(
    serve: Callable[[DeviceRequest], object],
    policy: CachePolicy = AUTO,
    *,
    options: ChannelOptions | None = None,
    features: int = ALL_FEATURES,
    clears_set_id: bool = True,
    quiet_flush: bool = False,
    heeds_interrupts: bool = False,
) -> AsyncIterator[Stage]:
    """Run a relay between a fake kernel and a fake device."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(PATIENCE)
    token = trio.lowlevel.current_trio_token()
    with theirs, ours, FakeDevice(serve, features=features) as device:
        async with open_channel(
            sock=device.guest_socket(), options=options or ChannelOptions()
        ) as channel:
            stage = Stage(channel, device, theirs)

            def failed(error: VfsmountError) -> None:
                stage.relay.fail(error)

            loan = await channel.lend(failed)
            stage.relay = relay = Relay(
                ours.fileno(),
                loan,
                policy,
                Terms(
                    max_message=LARGEST,
                    clears_set_id=clears_set_id,
                    quiet_flush=quiet_flush,
                    keeps_locks=False,
                    heeds_interrupts=heeds_interrupts,
                ),
                lambda violation: token.run_sync_soon(channel.fail, violation),
            )
            thread = threading.Thread(target=_run, args=(stage,), daemon=True)
            thread.start()
            try:
                yield stage
            finally:
                theirs.shutdown(socket.SHUT_WR)
                relay.abort()
                await wait_until_async(lambda: not thread.is_alive(), PATIENCE, "the relay to end")
                channel.end_loan()
                relay.close()
    assert not stage.failures, stage.failures


def _run(stage: Stage) -> None:
    try:
        stage.relay.run()
    except BaseException as error:  # told by the test that owns the stage
        stage.failures.append(error)
