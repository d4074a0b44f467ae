"""The driver's side of one split virtqueue: descriptors out, used elements in; nothing but memory.

Source: VIRTIO specification, "Split Virtqueues", "Driver Requirements". The queue knows nothing of
eventfds, requests or waiting. Rules:

* We write descriptors, the available ring and ``used_event``; the device writes the used ring. No
  word has two writers, so nothing needs compare-and-swap.
* The device is not trusted. Everything read from the used ring is read once and checked. Free list
  and chains are private; ``next`` is never read back from shared memory.
* Each 16 bit index is one 2 byte load or store through ``memoryview.cast("H")`` (a slice assignment
  would be a memmove of unpromised width).

Publication order, argued once. ``publish`` needs: descriptors and ring slots before ``avail.idx``
(store-store), and ``avail.idx`` before the look at ``avail_event`` (store-load); ``arm`` needs
``used_event`` before the second look at ``used.idx`` (store-load); taking needs ``used.idx`` before
the element and the data (load-load). x86-64 orders all of these but store-load; there ``strong`` is
true and a fence is spent on store-load alone. Elsewhere each of them gets the fence. When the
answer of ``publish`` is "kick", the eventfd write that follows is itself a full barrier for the
device that it wakes, so only the answer "do not kick" has to be made certain: the fence and the
second look (0.1 us) are paid when a kick (0.5 us, and a wake-up) is saved.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.errors import ProtocolViolation
from vfsmount.wire.vring import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    INDEX_MASK,
    USED_RING_OFFSET,
    VringLayout,
    avail_ring_size,
    used_ring_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Part", "Virtqueue"]

#: One piece of a chain: guest address, bytes, whether the device writes it.
Part = tuple[int, int, bool]

_PACK_DESC: Final = struct.Struct("<QIHH").pack_into
_DESC_SIZE: Final = 16

#: Stands for the other descriptors of a reserved head, which has none and is never free.
_RESERVED: Final = ()

# Positions in the 16 bit views of the two rings; the event words lie behind the slots.
_FLAGS: Final = 0
_IDX: Final = 1
_SLOTS: Final = 2


class Virtqueue:
    """One ring, seen by its driver.

    Invariants: ``num_free`` plus reserved ones plus those of outstanding chains is the queue size;
    the free-running ``avail.idx`` is ``outstanding`` ahead of what has been taken from the used
    ring.

    Args:
        memory: Writable bytes that hold the ring, zeroed.
        layout: Where its parts are in ``memory``.
        event_idx: RING_EVENT_IDX was acked.
        fence: A full memory barrier.
        strong: The machine orders everything but store-load by itself (x86).
        start: First index, as given with SET_VRING_BASE.

    Attributes:
        outstanding: Chains that the device has not used yet.
    """

    __slots__ = (
        "_armed_at",
        "_avail",
        "_avail_event",
        "_chains",
        "_desc",
        "_elements",
        "_event_idx",
        "_fence",
        "_free",
        "_last_used",
        "_mask",
        "_memory",
        "_next",
        "_published",
        "_reserved",
        "_strong",
        "_used",
        "_used_event",
        "outstanding",
        "size",
    )

    def __init__(
        self,
        memory: memoryview,
        layout: VringLayout,
        *,
        event_idx: bool,
        fence: Callable[[], object],
        strong: bool,
        start: int = 0,
    ) -> None:
        size = layout.queue_size
        elements = layout.used + USED_RING_OFFSET
        self.size = size
        self.outstanding = 0
        self._memory = memory
        self._desc = layout.desc
        self._avail = memory[layout.avail : layout.avail + avail_ring_size(size)].cast("H")
        self._used = memory[layout.used : layout.used + used_ring_size(size)].cast("H")
        self._elements = memory[elements : elements + 8 * size].cast("I")
        self._used_event = _SLOTS + size
        self._avail_event = _SLOTS + 4 * size
        self._mask = size - 1
        self._event_idx = event_idx
        self._fence = fence
        self._strong = strong
        # LIFO, so that a lightly used queue stays in the same few cache lines.
        self._free = list(range(size - 1, -1, -1))
        #: Per head: None when not outstanding, else the other descriptors of the chain.
        self._chains: list[Sequence[int] | None] = [None] * size
        self._reserved: set[int] = set()
        self._next = self._published = self._last_used = start
        self._avail[_IDX] = start
        self._armed_at = -1
        self._disarm()

    def release(self) -> None:
        """Let go of the memory, so that it can be unmapped; the queue is dead afterwards."""
        for view in (self._avail, self._used, self._elements):
            view.release()

    @property
    def num_free(self) -> int:
        """Descriptors that can be added."""
        return len(self._free)

    # --- making buffers available ---

    def add_indirect(self, table_guest_addr: int, table_size: int) -> int:
        """Add a chain that lies in an indirect table of ``table_size`` bytes; return its head.

        One descriptor must be free. The device sees nothing before ``publish``.
        """
        head = self._free.pop()
        at = self._desc + _DESC_SIZE * head
        _PACK_DESC(self._memory, at, table_guest_addr, table_size, DESC_F_INDIRECT, 0)
        self._chains[head] = []
        self._add(head)
        return head

    def reserve(self, table_guest_addr: int) -> int:
        """Take a descriptor for good, for whoever always uses the same table; return its head.

        One descriptor must be free. Its requests are then added with ``add_reserved``.
        """
        head = self._free.pop()
        at = self._desc + _DESC_SIZE * head
        _PACK_DESC(self._memory, at, table_guest_addr, 2 * _DESC_SIZE, DESC_F_INDIRECT, 0)
        self._reserved.add(head)
        return head

    def add_reserved(self, head: int) -> None:
        """Add the chain of a reserved head, which must not be outstanding."""
        self._chains[head] = _RESERVED
        following = self._next
        self._avail[_SLOTS + (following & self._mask)] = head
        self._next = (following + 1) & INDEX_MASK
        self.outstanding += 1

    def send_reserved(self, head: int) -> bool:
        """``add_reserved`` and ``publish`` in one."""
        self._chains[head] = _RESERVED
        new = self._next
        avail = self._avail
        avail[_SLOTS + (new & self._mask)] = head
        self._next = new = (new + 1) & INDEX_MASK
        self.outstanding += 1
        if not self._strong or not self._event_idx:
            return self.publish()
        moved = (new - self._published) & INDEX_MASK
        avail[_IDX] = self._published = new
        if (new - self._used[self._avail_event] - 1) & INDEX_MASK < moved:
            return True
        self._fence()
        return (new - self._used[self._avail_event] - 1) & INDEX_MASK < moved

    def add_chain(self, parts: Sequence[Part]) -> int:
        """Add a chain of direct descriptors, readable parts first; return its head.

        ``len(parts)`` descriptors must be free. The device sees nothing before ``publish``.
        """
        heads = [self._free.pop() for _ in parts]
        for i, (guest_addr, size, writable) in enumerate(parts):
            more = i + 1 < len(parts)
            flags = DESC_F_NEXT * more | DESC_F_WRITE * writable
            following = heads[i + 1] if more else 0
            at = self._desc + _DESC_SIZE * heads[i]
            _PACK_DESC(self._memory, at, guest_addr, size, flags, following)
        self._chains[heads[0]] = heads[1:]
        self._add(heads[0])
        return heads[0]

    def _add(self, head: int) -> None:
        self._avail[_SLOTS + (self._next & self._mask)] = head
        self._next = (self._next + 1) & INDEX_MASK
        self.outstanding += 1

    def publish(self) -> bool:
        """Show the device everything added; return whether it has to be kicked.

        A kick too many is harmless, one too few hangs the ring.
        """
        old, new = self._published, self._next
        if not self._strong:
            self._fence()
        self._avail[_IDX] = self._published = new
        if not self._event_idx:
            return new != old
        # need_event() of wire.vring, written out: a call costs as much as the test.
        moved = (new - old) & INDEX_MASK
        if (new - self._used[self._avail_event] - 1) & INDEX_MASK < moved:
            return True
        self._fence()
        return (new - self._used[self._avail_event] - 1) & INDEX_MASK < moved

    # --- taking used buffers back ---

    def has_used(self) -> bool:
        """Whether the device has used something; one load."""
        return self._used[_IDX] != self._last_used

    def take_used(self) -> tuple[int, int] | None:
        """Take the next used chain: its head, and the bytes that the device says it wrote.

        None when there is none. The length is unchecked: the caller knows the chain.

        Raises:
            ProtocolViolation: ``used.idx`` runs ahead of what was made available; the id is no
                head, or not one that is outstanding.
        """
        last = self._last_used
        index = self._used[_IDX]
        if index == last:
            return None
        count = (index - last) & INDEX_MASK
        if count > self.outstanding:
            raise ProtocolViolation(
                f"the device used {count} buffers, only {self.outstanding} were available"
            )
        if not self._strong:
            self._fence()
        at = 2 * (last & self._mask)
        elements = self._elements
        head = elements[at]
        length = elements[at + 1]
        chain = self._chains[head] if head < self.size else None
        if chain is None:
            raise ProtocolViolation(f"the device used descriptor {head}, which is not available")
        self._last_used = (last + 1) & INDEX_MASK
        self._chains[head] = None
        if chain is not _RESERVED:
            self._free.append(head)
            if chain:
                self._free.extend(chain)
        self.outstanding -= 1
        return head, length

    # --- calls ---

    def arm(self) -> bool:
        """Ask for a call at the next completion; return whether there is one to take already.

        Sleep only after False. A call already asked for and not yet due is not asked for again.
        """
        if self._armed_at != self._last_used:
            self._armed_at = self._last_used
            if self._event_idx:
                self._avail[self._used_event] = self._last_used
            else:
                self._avail[_FLAGS] = 0
            self._fence()
        return self._used[_IDX] != self._last_used

    def disarm(self) -> None:
        """Tell the device that we look by ourselves; a hint, calls may still come."""
        if self._armed_at == self._last_used:
            self._disarm()

    def _disarm(self) -> None:
        self._armed_at = -1
        if self._event_idx:
            # Behind what has been used, so that it is passed again only after 65535 more.
            self._avail[self._used_event] = (self._last_used - 1) & INDEX_MASK
        else:
            self._avail[_FLAGS] = AVAIL_F_NO_INTERRUPT

    # --- for tests ---

    def check_invariants(self) -> None:
        """Raise AssertionError when the private state contradicts itself."""
        chains = [(head, chain) for head, chain in enumerate(self._chains) if chain is not None]
        busy = [index for head, chain in chains for index in (head, *chain)]
        busy += [head for head in self._reserved if self._chains[head] is None]
        assert sorted(busy + self._free) == list(range(self.size)), "descriptors lost or doubled"
        assert len(chains) == self.outstanding
        assert (self._next - self._last_used) & INDEX_MASK == self.outstanding % (INDEX_MASK + 1)
        assert self._avail[_IDX] == self._published
