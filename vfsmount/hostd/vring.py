"""A split virtqueue seen from the device: take chains, return them, know when to call.

Pure: it works on memoryviews and a function that translates addresses. The driver is not trusted:
whatever it writes, a method returns something sound or raises ``RingFault``.

Publication order, argued once. The driver fills descriptors and its slot, then moves ``avail.idx``;
we load ``avail.idx``, then the slot, then the descriptors. We write the reply and the used element,
then store ``used.idx``, then load ``used_event`` to decide about the call; the last pair is store →
load, so a fence stands between them. The same pair is in ``enable_kicks``: store ``avail_event``,
fence, load ``avail.idx`` again. Where stores may overtake each other, ``push`` has a fence as well.

Kicks are off unless we are about to sleep: with EVENT_IDX an ``avail_event`` that lies behind never
matches, so it is left there; otherwise ``used.flags`` says NO_NOTIFY.

Every descriptor is read once into private memory, an indirect table as a whole, so that a driver
that changes one later changes nothing here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.hostd.barrier import TOTAL_STORE_ORDER, fence
from vfsmount.hostd.faults import RingFault
from vfsmount.wire.vring import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS_OFFSET,
    AVAIL_IDX_OFFSET,
    AVAIL_RING_OFFSET,
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    INDEX_MASK,
    USED_ELEM,
    USED_F_NO_NOTIFY,
    USED_FLAGS_OFFSET,
    USED_IDX_OFFSET,
    USED_RING_OFFSET,
    avail_event_offset,
    need_event,
    used_event_offset,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Chain", "DeviceRing"]

#: Descriptors in one chain. The standard's limit is the queue size; drivers with indirect tables go
#: beyond it on small queues, and 1024 is what QEMU's devices take (VIRTQUEUE_MAX_SIZE).
MIN_CHAIN_LIMIT = 1024

# Bare structs: a record of each descriptor would cost more (0.6 us) than the rest of a chain.
_DESC = struct.Struct("<QIHH")
_desc_at = _DESC.unpack_from
#: Two descriptors at once, for the commonest chain of all.
_PAIR = struct.Struct("<QIHHQIHH")
_pair_at, _PAIR_SIZE = _PAIR.unpack_from, _PAIR.size
_ELEMENT: Final = USED_ELEM.size
_used_into = USED_ELEM.values_into
#: Makes a tuple of a class without its ``__new__`` in Python (0.15 us less).
_record = tuple.__new__


class Chain(NamedTuple):
    """One request: buffers in shared memory, which change whenever the driver likes.

    Attributes:
        head: Index of the first descriptor; names the chain when it is returned.
        readable: What the driver says, in order; empty buffers left out.
        writable: Room for the reply, in order; empty buffers left out.
    """

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class DeviceRing:
    """The device's side of one virtqueue.

    Args:
        queue_size: Entries, a power of two.
        desc: Descriptor table, 16 bytes each.
        avail: Available ring with its event word.
        used: Used ring with its event word.
        next_avail: First available index to take (SET_VRING_BASE).
        translate: ``translate(guest_addr, length)`` returns that memory or raises RingFault.
        event_idx: RING_EVENT_IDX is negotiated.
        indirect: RING_INDIRECT_DESC is negotiated.

    Attributes:
        next_avail: Index of the next available entry to take, modulo 65536.
        used_idx: Our copy of ``used.idx``, which nobody else writes.
        hints: Whether ``disable_kicks`` has something to do.
    """

    __slots__ = (
        "_armed_at",
        "_avail_event",
        "_avail_flags",
        "_avail_idx",
        "_called_at",
        "_chain_limit",
        "_desc",
        "_event_idx",
        "_heads",
        "_indirect",
        "_mask",
        "_size",
        "_translate",
        "_used",
        "_used_event",
        "_used_flags",
        "_used_idx",
        "hints",
        "next_avail",
        "used_idx",
    )

    def __init__(
        self,
        queue_size: int,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        next_avail: int,
        translate: Callable[[int, int], memoryview],
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self._size = queue_size
        self._mask = queue_size - 1
        self._chain_limit = max(queue_size, MIN_CHAIN_LIMIT)
        self._desc = desc
        self._heads = avail[AVAIL_RING_OFFSET : AVAIL_RING_OFFSET + 2 * queue_size].cast("H")
        self._used = used
        # Two-byte views, so that each index is loaded and stored in one piece.
        self._avail_flags = _word(avail, AVAIL_FLAGS_OFFSET)
        self._avail_idx = _word(avail, AVAIL_IDX_OFFSET)
        self._used_event = _word(avail, used_event_offset(queue_size))
        self._used_flags = _word(used, USED_FLAGS_OFFSET)
        self._used_idx = _word(used, USED_IDX_OFFSET)
        self._avail_event = _word(used, avail_event_offset(queue_size))
        self._translate = translate
        self._event_idx = event_idx
        self._indirect = indirect
        self.next_avail = next_avail
        self.used_idx: int = self._used_idx[0]
        self._called_at = self.used_idx
        self._armed_at = -1
        self.hints = not event_idx
        self._used_flags[0] = 0 if event_idx else USED_F_NO_NOTIFY

    def pending(self) -> bool:
        """Whether the driver has made more available."""
        available: int = self._avail_idx[0]
        return available != self.next_avail

    def pop(self) -> Chain | None:
        """Take the next chain; None when there is none.

        The caller returns it with ``push``, in any order.

        Raises:
            RingFault: The index, the head or the chain is not possible.
        """
        at, available = self.next_avail, self._avail_idx[0]
        if at == available:
            return None
        if (available - at) & INDEX_MASK > self._size:
            raise RingFault(f"avail index {available} is more than a queue ahead of {at}")
        if not TOTAL_STORE_ORDER:
            fence()
        head: int = self._heads[at & self._mask]
        if head >= self._size:
            raise RingFault(f"chain head {head} in a queue of {self._size}")
        self.next_avail = (at + 1) & INDEX_MASK
        return self.chain(head)

    def chain(self, head: int) -> Chain:
        """Return the chain that begins at a head taken from this ring, now or before.

        Raises:
            RingFault: The chain is not possible (any more).
        """
        entry = _desc_at(self._desc, DESC.size * head)
        addr, length, flags, _ = entry
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        if flags != DESC_F_INDIRECT or length != _PAIR_SIZE or not self._indirect:
            self._walk(entry, readable, writable)
            return Chain(head, readable, writable)
        # The commonest: an indirect table of one readable buffer and one writable.
        translate = self._translate
        pair = _pair_at(translate(addr, _PAIR_SIZE))
        addr, length, flags, following, addr2, length2, flags2, _ = pair
        if (
            flags == DESC_F_NEXT
            and following == 1
            and flags2 == DESC_F_WRITE
            and length
            and length2
        ):
            return _record(Chain, (head, [translate(addr, length)], [translate(addr2, length2)]))
        self._walk_table(_PAIR.pack(*pair), readable, writable)
        return Chain(head, readable, writable)

    def _walk(
        self,
        entry: tuple[int, int, int, int],
        readable: list[memoryview],
        writable: list[memoryview],
    ) -> None:
        """Follow a chain in the descriptor table; it may end in one indirect table."""
        for _ in range(self._size):
            guest_addr, length, flags, following = entry
            if flags & DESC_F_INDIRECT:
                self._enter_table(guest_addr, length, flags, readable, writable)
                return
            self._take(guest_addr, length, flags, readable, writable)
            if not flags & DESC_F_NEXT:
                return
            if following >= self._size:
                raise RingFault(f"descriptor {following} in a queue of {self._size}")
            entry = _DESC.unpack_from(self._desc, DESC.size * following)
        raise RingFault(f"chain of more than {self._size} descriptors, or a loop")

    def _enter_table(
        self,
        guest_addr: int,
        length: int,
        flags: int,
        readable: list[memoryview],
        writable: list[memoryview],
    ) -> None:
        if not self._indirect:
            raise RingFault("indirect descriptor, which was not negotiated")
        if flags & DESC_F_NEXT:
            raise RingFault("indirect descriptor with a next one")
        if not length or length % DESC.size or length > DESC.size * self._chain_limit:
            raise RingFault(f"indirect table of {length} bytes")
        table = bytes(self._translate(guest_addr, length))
        self._walk_table(table, readable, writable)

    def _walk_table(
        self, table: bytes, readable: list[memoryview], writable: list[memoryview]
    ) -> None:
        count = len(table) // DESC.size
        index = 0
        for _ in range(count):
            guest_addr, length, flags, following = _DESC.unpack_from(table, DESC.size * index)
            if flags & DESC_F_INDIRECT:
                raise RingFault("indirect descriptor in an indirect table")
            self._take(guest_addr, length, flags, readable, writable)
            if not flags & DESC_F_NEXT:
                return
            index = following
            if index >= count:
                raise RingFault(f"descriptor {index} in an indirect table of {count}")
        raise RingFault(f"loop in an indirect table of {count}")

    def _take(
        self,
        guest_addr: int,
        length: int,
        flags: int,
        readable: list[memoryview],
        writable: list[memoryview],
    ) -> None:
        """Sort one buffer in. Empty ones mean nothing, so their address is not looked at."""
        if flags & DESC_F_WRITE:
            if length:
                writable.append(self._translate(guest_addr, length))
            return
        if writable:
            raise RingFault("readable descriptor behind a writable one")
        if length:
            readable.append(self._translate(guest_addr, length))

    def push(self, head: int, written: int) -> None:
        """Return a chain: ``written`` bytes of its writable part count.

        The reply must be in place. Call ``must_call`` when the batch is done.
        """
        at = self.used_idx
        _used_into(self._used, USED_RING_OFFSET + _ELEMENT * (at & self._mask), head, written)
        if not TOTAL_STORE_ORDER:
            fence()
        self.used_idx = self._used_idx[0] = (at + 1) & INDEX_MASK

    def must_call(self) -> bool:
        """Whether the driver wants to be called for what was pushed since the last time."""
        new, old = self.used_idx, self._called_at
        if new == old:
            return False
        self._called_at = new
        fence()
        if self._event_idx:
            return need_event(self._used_event[0], new, old)
        return not self._avail_flags[0] & AVAIL_F_NO_INTERRUPT

    def enable_kicks(self) -> bool:
        """Ask for a kick at the next chain; call it before going to sleep.

        Returns:
            True when there is more already: do not sleep.
        """
        if self._armed_at != self.next_avail:  # else what was asked for has not come yet
            if self._event_idx:
                self._avail_event[0] = self._armed_at = self.next_avail
            else:
                self._used_flags[0] = 0
            fence()
        return self.pending()

    def disable_kicks(self) -> None:
        """We are awake: with EVENT_IDX nothing to do, else a hint to save kicks."""
        if not self._event_idx:
            self._used_flags[0] = USED_F_NO_NOTIFY


def _word(view: memoryview, offset: int) -> memoryview:
    return view[offset : offset + 2].cast("H")
