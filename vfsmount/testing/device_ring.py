"""A split virtqueue from the device's side: slow, obvious, and able to lie.

It shares nothing with the driver's ring but the specification ("Split Virtqueues"): everything is
read and written with ``struct`` at offsets worked out here, so that an error in one of the two does
not cancel itself out in the other.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["Chain", "DeviceRing"]

_NEXT, _WRITE, _INDIRECT = 1, 2, 4


class Chain(NamedTuple):
    """A chain that the driver made available.

    Attributes:
        head: Index of its first descriptor.
        readable: (guest address, bytes) of its device-readable pieces.
        writable: The same of its device-writable pieces.
    """

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]


class DeviceRing:
    """One ring.

    Args:
        memory: The guest's memory.
        size: Queue size.
        desc: Offset of the descriptor table in ``memory``; ``avail`` and ``used`` likewise.
        avail: Offset of the available ring.
        used: Offset of the used ring.
        event_idx: RING_EVENT_IDX was negotiated.
        offset_of: Turns a guest address into an offset in ``memory``.
        start: First index, from SET_VRING_BASE.

    Attributes:
        last_avail: Index of the next chain to take.
        used_idx: Index of the next element to use.
    """

    def __init__(
        self,
        memory: Buffer,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool,
        offset_of: Callable[[int], int] = lambda guest_addr: guest_addr,
        start: int = 0,
    ) -> None:
        self.last_avail = start
        self.used_idx = start
        self._memory = memory
        self._size = size
        self._desc = desc
        self._avail = avail
        self._used = used
        self._event_idx = event_idx
        self._offset_of = offset_of

    def _word(self, offset: int) -> memoryview:
        """Return a view that loads and stores two bytes at once, as the driver may look any time.

        ``struct.pack_into`` writes zeros first: an index that is 0 for a moment.
        """
        return memoryview(self._memory)[offset : offset + 2].cast("H")

    def _u16(self, offset: int) -> int:
        return self._word(offset)[0]

    def _set_u16(self, offset: int, value: int) -> None:
        self._word(offset)[0] = value % 65536

    @property
    def avail_idx(self) -> int:
        """The driver's index."""
        return self._u16(self._avail + 2)

    def take(self) -> Chain | None:
        """Take the next chain, or return None when there is none.

        Raises:
            AssertionError: The driver broke a rule.
        """
        waiting = (self.avail_idx - self.last_avail) % 65536
        assert waiting <= self._size, f"{waiting} chains available in a ring of {self._size}"
        if waiting == 0:
            return None
        slot = self._avail + 4 + 2 * (self.last_avail % self._size)
        head = self._u16(slot)
        assert head < self._size, f"head {head}"
        self.last_avail = (self.last_avail + 1) % 65536
        return self._walk(head)

    def _walk(self, head: int) -> Chain:
        chain = Chain(head, [], [])
        table, count, index = self._desc, self._size, head
        for _ in range(self._size + 1):  # an indirect descriptor is no buffer and comes on top
            at = table + 16 * index
            addr, length, flags, following = struct.unpack_from("<QIHH", self._memory, at)
            if flags & _INDIRECT:
                assert table == self._desc, "an indirect table in an indirect table"
                assert not flags & _NEXT, "an indirect descriptor with NEXT"
                assert length % 16 == 0, f"an indirect table of {length} bytes"
                assert length > 0, "an empty indirect table"
                table, count, index = self._offset_of(addr), length // 16, 0
                continue
            if flags & _WRITE:
                chain.writable.append((addr, length))
            else:
                assert not chain.writable, "a readable descriptor behind a writable one"
                chain.readable.append((addr, length))
            if not flags & _NEXT:
                return chain
            index = following
            assert index < count, f"next {index} in a table of {count}"
        raise AssertionError("a loop of descriptors")

    def want_kick(self) -> bool:
        """Ask for a kick with the next chain; return whether there is one already."""
        self._set_u16(self._used + 4 + 8 * self._size, self.last_avail)
        return self.avail_idx != self.last_avail

    def use(self, head: int, length: int) -> bool:
        """Put one element into the used ring and publish it; return whether to call."""
        self.put(head, length)
        return self.publish(1)

    def put(self, head: int, length: int, ahead: int = 0) -> None:
        """Put one element into the used ring, ``ahead`` of the next one, without publishing it."""
        slot = (self.used_idx + ahead) % self._size
        struct.pack_into("<II", self._memory, self._used + 4 + 8 * slot, head, length)

    def publish(self, count: int) -> bool:
        """Move ``used.idx`` on by ``count``, right or wrong; return whether to call."""
        old, self.used_idx = self.used_idx, (self.used_idx + count) % 65536
        self._set_u16(self._used + 2, self.used_idx)
        if not self._event_idx:
            return not self._u16(self._avail) & 1
        event = self._u16(self._avail + 4 + 2 * self._size)
        passed = [(old + i) % 65536 for i in range((self.used_idx - old) % 65536)]
        return event in passed
