"""How the relay ends: without a daemon, or with what it still has answered."""

from __future__ import annotations

import errno
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import ABANDONED, POSTED
from vfsmount.client.relay.interrupts import LOOK_SECONDS
from vfsmount.client.relay.kernel import ENDED
from vfsmount.errors import ProtocolViolation
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    import mmap
    import select
    from collections.abc import Callable, Iterable

    from vfsmount.channel.virtqueue import Virtqueue
    from vfsmount.client.relay.kernel import KernelPort
    from vfsmount.client.relay.orders import Orders
    from vfsmount.client.relay.slots import Slot

__all__ = ["DRAIN_SECONDS", "drain", "fail_all", "serve_lost"]

#: Seconds that the end waits for requests that are with the device.
DRAIN_SECONDS: Final = 5.0

_IN_HEADER: Final = struct.Struct("<IIQQ").unpack_from  # len, opcode, unique, nodeid

#: Opcodes that are never answered, or only when refused.
_SILENT: Final = frozenset(
    int(opcode)
    for opcode, operation in fuse.OPERATIONS.items()
    if not operation.has_reply or opcode == Opcode.INTERRUPT
)


def errno_of(orders: Orders) -> int:
    """What everybody gets when the daemon is gone, or cannot be believed."""
    return errno.EIO if isinstance(orders.error, ProtocolViolation) else errno.ENOTCONN


def fail_all(slots: Iterable[Slot], kernel: KernelPort, orders: Orders) -> None:
    """Answer what the device had when it was lost."""
    for slot in slots:
        if slot.state not in (ABANDONED, POSTED):
            kernel.answer(slot.answers, errno_of(orders))


def serve_lost(
    memory: mmap.mmap, slot: Slot, kernel: KernelPort, orders: Orders, watch: select.epoll
) -> None:
    """Answer everything with an error, until the mount ends.

    Args:
        memory: Shared memory.
        slot: To read into; any will do, because the device is gone.
        kernel: Who asks.
        orders: When to stop, and why all fails.
        watch: Sleeps on the kernel and the orders.

    Raises:
        OSError: The kernel's device failed in a way that is not its end.
    """
    number = errno_of(orders)
    while not orders.stopping:
        try:
            got = kernel.readinto(slot.view)
        except OSError as error:
            if error.errno in ENDED:
                return
            if error.errno != errno.ENOENT:
                raise
            continue
        if got == 0:
            return
        if got is None:
            watch.poll()
            orders.heed()
            continue
        _, opcode, unique, _ = _IN_HEADER(memory, slot.at)
        if opcode not in _SILENT:
            kernel.answer(unique, number)


def drain(
    ring: Virtqueue, progress: Callable[[], object], orders: Orders, watch: select.epoll
) -> None:
    """Wait for what the device has: RELEASEs and writes nobody waits for. Bounded.

    Args:
        ring: Where replies come.
        progress: Takes and answers them, and what the daemon asks.
        orders: When not to wait any more.
        watch: Sleeps on the device and the orders.
    """
    deadline = perf_counter_ns() + int(DRAIN_SECONDS * 1e9)
    while ring.outstanding and orders.error is None and not orders.aborting:
        if not ring.arm():
            if perf_counter_ns() > deadline:
                return
            watch.poll(LOOK_SECONDS)
            orders.heed()
        progress()
