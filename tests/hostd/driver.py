"""The driver's side of a ring, as plain as it can be, and free to break every rule."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vfsmount.wire import vring
from vfsmount.wire.vring import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE


class Buffer(NamedTuple):
    """One descriptor: where, how long, and whether the device writes to it."""

    addr: int
    length: int
    writable: bool = False

    @property
    def flags(self) -> int:
        return DESC_F_WRITE if self.writable else 0


class DriverRing:
    """A ring laid out at ``base`` of a memory whose first byte has address ``addr``."""

    def __init__(self, memory: memoryview, queue_size: int, base: int = 0, addr: int = 0) -> None:
        self.memory = memory
        self.size = queue_size
        self.layout = vring.vring_layout(queue_size, base)
        self.addr = addr
        self.avail_idx = 0
        self.used_seen = 0

    @property
    def desc_addr(self) -> int:
        return self.addr + self.layout.desc

    @property
    def avail_addr(self) -> int:
        return self.addr + self.layout.avail

    @property
    def used_addr(self) -> int:
        return self.addr + self.layout.used

    def part(self, start: int, size: int) -> memoryview:
        return self.memory[start : start + size]

    @property
    def desc(self) -> memoryview:
        return self.part(self.layout.desc, vring.desc_table_size(self.size))

    @property
    def avail(self) -> memoryview:
        return self.part(self.layout.avail, vring.avail_ring_size(self.size))

    @property
    def used(self) -> memoryview:
        return self.part(self.layout.used, vring.used_ring_size(self.size))

    # --- writing ---------------------------------------------------------------------------------

    def put(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor, sound or not."""
        DESC.values_into(self.desc, DESC.size * index, addr, length, flags, following)

    def put_chain(self, buffers: list[Buffer], first: int = 0) -> int:
        """Write a direct chain into consecutive descriptors; returns its head."""
        for at, buffer in enumerate(buffers):
            more = at + 1 < len(buffers)
            flags = buffer.flags | (DESC_F_NEXT if more else 0)
            self.put(first + at, buffer.addr, buffer.length, flags, first + at + 1 if more else 0)
        return first

    def put_indirect(self, index: int, table_addr: int, buffers: list[Buffer]) -> int:
        """Write an indirect table at an address, and the descriptor that leads to it."""
        table = indirect_table(buffers)
        at = table_addr - self.addr
        self.memory[at : at + len(table)] = table
        self.put(index, table_addr, len(table), DESC_F_INDIRECT)
        return index

    def offer(self, head: int) -> None:
        """Put a head into the available ring."""
        slot = vring.AVAIL_RING_OFFSET + 2 * (self.avail_idx % self.size)
        _word(self.avail, slot)[0] = head
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, idx: int) -> None:
        self.avail_idx = idx & 0xFFFF
        _word(self.avail, vring.AVAIL_IDX_OFFSET)[0] = self.avail_idx

    def set_avail_flags(self, flags: int) -> None:
        _word(self.avail, vring.AVAIL_FLAGS_OFFSET)[0] = flags

    def set_used_event(self, event: int) -> None:
        _word(self.avail, vring.used_event_offset(self.size))[0] = event & 0xFFFF

    # --- reading ---------------------------------------------------------------------------------

    @property
    def used_idx(self) -> int:
        return _word(self.used, vring.USED_IDX_OFFSET)[0]

    @property
    def used_flags(self) -> int:
        return _word(self.used, vring.USED_FLAGS_OFFSET)[0]

    @property
    def avail_event(self) -> int:
        return _word(self.used, vring.avail_event_offset(self.size))[0]

    def collect(self) -> list[tuple[int, int]]:
        """Return the (head, length) of everything used since the last time."""
        collected = []
        while self.used_seen != self.used_idx:
            slot = vring.USED_RING_OFFSET + 8 * (self.used_seen % self.size)
            collected.append(struct.unpack_from("<II", self.used, slot))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return collected


def _word(part: memoryview, offset: int) -> memoryview:
    """Return a view of two bytes that the other side may look at any time.

    It loads and stores them at once. ``struct.pack_into`` writes zeros first, and an index that is
    0 for a moment is a broken ring to who reads it then.
    """
    return part[offset : offset + 2].cast("H")


def indirect_table(buffers: list[Buffer]) -> bytes:
    """Return the table for a chain, each entry leading to the next."""
    table = b""
    for at, buffer in enumerate(buffers):
        more = at + 1 < len(buffers)
        flags = buffer.flags | (DESC_F_NEXT if more else 0)
        table += DESC.values(buffer.addr, buffer.length, flags, at + 1 if more else 0)
    return table
