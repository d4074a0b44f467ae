"""The in-flight region: what a daemon that takes over must know of its predecessor's requests.

The front-end keeps the memory (vhost-user, "Inflight I/O tracking") and gives it to whoever serves
its rings next. Each queue has an area in it, all words in native byte order:

    QueueRegionSplit, 16 bytes   features u64, version u16, desc_num u16, last_batch_head u16,
                                 used_idx u16
    DescStateSplit, 16 bytes     inflight u8, padding, next u16, counter u64; one per entry

Order of stores, so that a death between any two loses nothing: a head is marked when it is taken;
before it is returned it becomes ``last_batch_head``; after ``used.idx`` has moved its mark goes and
``used_idx`` follows. If ``used_idx`` is behind ``used.idx``, the last batch was returned and only
its marks are left over.

A request that is served again may have been served before: a successor has no session either, and
answers EIO until INIT. What it saves the guest from is waiting for ever.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from vfsmount.hostd.faults import RingFault
from vfsmount.hostd.vring import Chain, DeviceRing
from vfsmount.wire.vring import INDEX_MASK

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TrackedRing", "area_size", "create_region", "split_region"]

_VERSION: Final = 1
_ENTRY: Final = 16
#: Areas begin at multiples of this, a cache line.
_ALIGN: Final = 64
#: version, desc_num, last_batch_head, used_idx
_HEAD: Final = struct.Struct("=8xHHHH")
#: Where the last two are, in halves of 2 bytes; and an entry's ``next``.
_LAST_BATCH_HEAD: Final = 6
_USED_IDX: Final = 7
_NEXT: Final = 3


def area_size(queue_size: int) -> int:
    """Bytes of one queue's area."""
    return -(-_ENTRY * (queue_size + 1) // _ALIGN) * _ALIGN


def create_region(num_queues: int, queue_size: int) -> tuple[int, int]:
    """Return a new region's descriptor, which is the caller's, and its bytes."""
    fd = os.memfd_create("in-flight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    size = num_queues * area_size(queue_size)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd, size


def split_region(view: memoryview, queue_size: int) -> Iterator[memoryview]:
    """Yield the areas of a region, in the order of the queues."""
    stride = area_size(queue_size)
    for start in range(0, view.nbytes - stride + 1, stride):
        yield view[start : start + stride]


class TrackedRing(DeviceRing):
    """A ring that writes down which chains are in flight.

    It begins with those that the area says were: they are taken before anything new, oldest first.

    Args:
        queue_size: Entries.
        area: The queue's area.
        held: Heads that this process has taken from the queue and not returned. It is kept up to
            date, and outlives the ring: a ring that stops and goes on still owes them.
        args: As for ``DeviceRing``.
        kwargs: As for ``DeviceRing``.

    Raises:
        RingFault: The area is for rings of another size, or of a version that we do not know.
    """

    __slots__ = ("_again", "_bytes", "_counter", "_counters", "_halves", "_held")

    def __init__(
        self, queue_size: int, *args: Any, area: memoryview, held: set[int], **kwargs: Any
    ) -> None:
        super().__init__(queue_size, *args, **kwargs)
        if area.nbytes < area_size(queue_size):
            raise RingFault(f"ring of {queue_size} entries, in-flight area of {area.nbytes} bytes")
        self._bytes = area
        self._halves = area.cast("H")
        self._counters = area.cast("Q")
        self._held = held
        self._counter = 0
        self._again: list[int] = []
        version, count, _, _ = _HEAD.unpack_from(area)
        if not version:
            _HEAD.pack_into(area, 0, _VERSION, queue_size, 0, self.used_idx)
        elif version != _VERSION or count != queue_size:
            raise RingFault(f"in-flight area of version {version} for {count} entries")
        else:
            self._recover(queue_size)

    def _recover(self, queue_size: int) -> None:
        """Find out what the predecessor has left, and go on behind it."""
        self._finish_batch(queue_size)
        marked = [head for head in range(queue_size) if self._bytes[_ENTRY * (head + 1)]]
        marked.sort(key=lambda head: self._counters[2 * head + 3])
        if marked:
            self._counter = self._counters[2 * marked[-1] + 3]
        self.next_avail = (self.used_idx + len(marked)) & INDEX_MASK
        self._again = [head for head in marked if head not in self._held]

    def _finish_batch(self, queue_size: int) -> None:
        """Take the marks of chains that were returned.

        The numbers are the front-end's; what they cannot be leads nowhere, and is no batch.
        """
        returned = (self.used_idx - self._halves[_USED_IDX]) & INDEX_MASK
        head: int = self._halves[_LAST_BATCH_HEAD]
        for _ in range(returned if returned <= queue_size else 0):
            if head >= queue_size:
                break
            self._bytes[_ENTRY * (head + 1)] = 0
            head = self._halves[8 * (head + 1) + _NEXT]
        self._halves[_USED_IDX] = self.used_idx

    def pending(self) -> bool:
        """Whether there is more to take."""
        return bool(self._again) or super().pending()

    def pop(self) -> Chain | None:
        """Take the next chain, and mark it. Raises as ``DeviceRing.pop``."""
        chain = self.chain(self._again.pop(0)) if self._again else super().pop()
        if chain is not None:
            head = chain.head
            self._counter += 1
            self._counters[2 * head + 3] = self._counter & _COUNTER_MASK
            self._bytes[_ENTRY * (head + 1)] = 1
            self._held.add(head)
        return chain

    def push(self, head: int, written: int) -> None:
        """Return a chain, and take its mark."""
        halves = self._halves
        halves[8 * (head + 1) + _NEXT] = halves[_LAST_BATCH_HEAD]
        halves[_LAST_BATCH_HEAD] = head
        super().push(head, written)
        self._bytes[_ENTRY * (head + 1)] = 0
        halves[_USED_IDX] = self.used_idx
        self._held.discard(head)


_COUNTER_MASK: Final = (1 << 64) - 1
