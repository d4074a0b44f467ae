"""Where the relay's requests lie: slots of shared memory, each for one message and its reply.

A read(2) of ``/dev/fuse`` wants room for the largest request, whatever comes. So every slot has
addresses for that, and memory only for what was really used:

    0         reply of up to 3.8 KiB: nearly all opcodes touch this one page only
    3984      indirect descriptor table, 32 bytes
    4016      the request. A WRITE's header and struct take 80 bytes, so its data begin on a page,
              which makes the kernel's copy of 1 MiB 8 % faster
    8176      or above: a larger reply, with its data on a page

Slots are handed out last in, first out: under a steady load the same few pages go round. What a
burst of large messages has touched is given back when there is time (``trim``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfsmount.channel.arena import MAX_BLOCK
from vfsmount.channel.inflight import Pending
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.opens import OpenCheck
    from vfsmount.client.relay.route import Route

__all__ = ["SMALL_REPLY", "Slot", "SlotPool"]

_PAGE: Final = 4096
_OUT: Final = fuse.OUT_HEADER.size
#: Offset of the request in its slot.
_REQUEST: Final = _PAGE - fuse.IN_HEADER.size - fuse.WRITE_IN.size
#: Bytes of reply, header included, that fit before the descriptor table.
SMALL_REPLY: Final = _REQUEST - 32
#: Slots are laid out in units of this many bytes; what is above the largest message is room for an
#: IOCTL, which may have up to 16 KiB in both directions.
_UNIT: Final = 64 << 10
#: Touched beyond this, a slot is worth trimming.
_SMALL_USE: Final = 4 * _PAGE
#: Views of small replies that a slot keeps; there are as many lengths as structs, but the device
#: says how long a reply is.
_VIEWS: Final = 16


class Slot(Pending):
    """Memory for one request, and the request that is in it now.

    Attributes:
        base: Offset of its memory; ``at`` is where the request begins.
        size: Bytes of the request.
        small: ``data_at`` of a small reply.
        end: Offset behind its memory.
        head: The descriptor reserved for it, or -1.
        view: What the device is read into.
        touched: Bytes, from its beginning, that large messages have used since the last trim.
        xattr: Name that a GETXATTR asks for, and how many changes there had been; else None.
        answers: ``unique`` that the kernel waits for; another than the device's only for a wait
            for a lock that was interrupted and asked for again.
        check: What an OPEN has to know besides its reply; None for anything else.
        route: What is done with its opcode.
        views: Small replies, header included, by the length of their bodies. A slice costs three
            times as much as finding it here.
        wide: The last reply that was not small, its ``data_at`` and length.
    """

    __slots__ = (
        "answers",
        "at",
        "base",
        "check",
        "end",
        "head",
        "route",
        "size",
        "small",
        "touched",
        "view",
        "views",
        "wide",
        "wide_at",
        "wide_length",
        "xattr",
    )

    def __init__(self, base: int, size: int, view: memoryview, head: int) -> None:
        super().__init__(0, 0, b"", None, 0, 0, 0, 0, 0, None)
        self.writable = 0
        self.base = base
        self.at = base + _REQUEST
        self.small = base + _OUT
        self.end = base + size
        self.view = view
        self.head = head
        self.touched = 0
        self.xattr: tuple[bytes, int] | None = None
        self.check: OpenCheck | None = None
        self.size = 0
        self.answers = 0
        self.route: Route
        self.views: dict[int, memoryview] = {}
        self.wide: memoryview = view[:0]
        self.wide_at = self.wide_length = -1

    def make_room(self, size: int, room: int) -> bool:
        """Say where the reply goes; False when it cannot be that long.

        ``data_at`` depends on nothing but the two arguments.

        Args:
            size: Bytes of the request.
            room: Bytes of the reply, header included.
        """
        self.size = size
        self.writable = room
        if room <= SMALL_REPLY:
            self.data_at = self.small
            return True
        self.data_at = (self.at + size + _OUT + _PAGE - 1) & -_PAGE
        top = self.data_at + room
        if top - self.base > self.touched:
            self.touched = top - self.base
        return top <= self.end

    def reply(self, memory: memoryview) -> memoryview:
        """Return the reply, its header included, where ``views`` or ``wide`` do not have it yet."""
        at, length = self.data_at, self.length
        view = memory[at - _OUT : at + length]
        if at != self.small:
            self.wide.release()
            self.wide, self.wide_at, self.wide_length = view, at, length
        elif len(self.views) < _VIEWS:
            self.views[length] = view
        return view

    def release(self) -> None:
        """Let go of the memory."""
        for view in (self.view, self.wide, *self.views.values()):
            view.release()


class SlotPool:
    """All slots of a relay.

    Args:
        loan: Where the memory comes from.
        largest: Bytes of the largest message in either direction, header included.
        limit: Most slots.
    """

    def __init__(self, loan: Loan, largest: int, limit: int) -> None:
        self._memory = loan.memory
        self._arena = loan.arena
        self._queue = loan.requests
        self._largest = largest
        self._size = -(-(2 * _PAGE + largest) // _UNIT) * _UNIT
        self._limit = limit
        self._blocks: list[int] = []
        self._slots: list[Slot] = []
        self._free: list[Slot] = []

    def take(self) -> Slot | None:
        """Return a free slot, or None when all are in use."""
        if not self._free and not self._make():
            return None
        return self._free.pop()

    def put(self, slot: Slot) -> None:
        """Take a slot back."""
        self._free.append(slot)

    def _make(self) -> bool:
        per_block = MAX_BLOCK // self._size
        number = len(self._slots) % per_block
        if len(self._slots) >= self._limit:
            return False
        if number == 0:
            block = self._arena.allocate(MAX_BLOCK)
            if block < 0:
                return False
            self._blocks.append(block)
        base = self._blocks[-1] + number * self._size
        start = base + _REQUEST
        view = self._memory.view[start : start + max(self._largest, 2 * _PAGE)]
        head = self._queue.reserve(start)
        self._slots.append(Slot(base, self._size, view, head))
        self._free.append(self._slots[-1])
        return True

    def is_bloated(self, limit: int) -> bool:
        """Whether free slots hold more than ``limit`` bytes that ``trim`` would give back."""
        return sum(slot.touched for slot in self._free if slot.touched > _SMALL_USE) > limit

    def trim(self) -> None:
        """Give the memory of free slots back, but for what small messages use."""
        for slot in self._free:
            if slot.touched > _SMALL_USE:
                size = -(-(slot.touched - _SMALL_USE) // _PAGE) * _PAGE
                self._memory.punch(slot.base + _SMALL_USE, size)
                slot.touched = slot.size = 0  # to be touched again, it has to be measured again

    def close(self) -> None:
        """Let go of the memory, which cannot be unmapped before."""
        for slot in self._slots:
            slot.release()
        self._slots.clear()
        self._free.clear()
