"""The relay's end of the virtqueues: handing slots over, kicks, FORGETs, and what waits for room.

Requests of our own (those that undo, what takes set-id bits off) are ordinary ``Pending``s; slots
are the kernel's. Both may be outstanding at once, and the queue keeps some descriptors for ours.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import ABANDONED, NEW, POSTED, Pending
from vfsmount.client.relay.slots import Slot
from vfsmount.errors import ProtocolViolation
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.opens import OpenChecks
    from vfsmount.client.relay.orders import Orders

__all__ = ["DevicePort"]

_FORGET_BATCH: Final = 32
_RELEASE: Final = int(Opcode.RELEASE)
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_IN: Final = fuse.IN_HEADER.size
_WRITE_OFFSET_AT: Final = _IN + 8  # write_in: fh, offset, size
_WRITE_SIZE_AT: Final = _IN + 16


class DevicePort:
    """The queues, and what is known of what they hold.

    Args:
        loan: The queues.
        orders: Is told of violations; after an error nothing more is sent.
        opens: OPENs wait there as well.

    Attributes:
        posted: Requests handed over since the last kick that nobody waits for.
        stalled: Slots that found the ring full (of our own requests: there are slots enough).
        undoing: Requests of our own that have found no room yet, and that nobody waits for.
        owed: The same, and somebody does.
        held: Slots that wait for one of our own.
    """

    __slots__ = (
        "_loan",
        "_map",
        "_opens",
        "_orders",
        "_queue",
        "held",
        "owed",
        "posted",
        "stalled",
        "undoing",
    )

    def __init__(self, loan: Loan, orders: Orders, opens: OpenChecks) -> None:
        self._loan = loan
        self._orders = orders
        self._opens = opens
        self._queue = loan.requests
        self._map = loan.memory.map
        self.posted = 0
        self.stalled: list[Slot] = []
        self.undoing: list[Pending] = []
        self.owed: list[Pending] = []
        self.held: set[Slot] = set()

    def in_flight(self) -> list[Slot]:
        """Requests of the kernel that the device has, or that wait for one of ours there.

        Those answered already are included.
        """
        slots = [one for one in self._queue.outstanding() if isinstance(one, Slot)]
        return slots + list(self.held) + self._opens.waiting()

    # --- slots ---

    def submit(self, slot: Slot) -> None:
        """Hand a slot over; the device learns of it with the next kick."""
        if slot.head >= 0:
            self._queue.submit_reserved(slot, slot.head, False)
        elif not self._queue.submit_placed(slot, slot.at, slot.size):
            slot.state = NEW  # whatever became of the request that was there before
            self.stalled.append(slot)

    def send_rest(self, slot: Slot, taken: int) -> bool:
        """Send a WRITE again, less what the device has written; False when that cannot be true."""
        data = slot.at + _IN + fuse.WRITE_IN.size
        left = slot.at + slot.size - data - taken  # by what is known here, not by shared memory
        if not taken or left <= 0:
            return False
        (offset,) = _U64.unpack_from(self._map, slot.at + _WRITE_OFFSET_AT)
        self._map.move(data, data + taken, left)
        _U32.pack_into(self._map, slot.at, slot.size - taken)
        _U64.pack_into(self._map, slot.at + _WRITE_OFFSET_AT, (offset + taken) % (1 << 64))
        _U32.pack_into(self._map, slot.at + _WRITE_SIZE_AT, left)
        slot.size -= taken
        if slot.head >= 0:
            self._queue.describe_reserved(slot, slot.at, slot.size)
        self.send_again(slot)
        return True

    def send_again(self, slot: Slot) -> None:
        """Hand a slot over right after its reply was taken: its own descriptors are room enough."""
        slot.errno = slot.length = 0
        self.submit(slot)
        self.kick()

    def retry_stalled(self) -> None:
        """Hand over what found no room."""
        waiting, self.stalled = self.stalled, []
        for slot in waiting:
            self.submit(slot)
        self._queue.kick()

    def kick(self) -> None:
        """Tell the device of everything, of what was posted too."""
        self.posted = 0
        self._queue.kick()

    # --- requests of our own ---

    def send_own(self, pending: Pending) -> None:
        """Send a request that somebody waits for, now or as soon as there is room."""
        if not self._queue.submit(pending):
            self.owed.append(pending)

    def send_owed(self) -> None:
        """Send what found no room."""
        while self.owed and self._queue.submit(self.owed[0]):
            del self.owed[0]

    def undo(self, opcode: int, nodeid: int, body: bytes) -> None:
        """Send a request whose reply nobody reads, now or when there is room."""
        self.undoing.append(Pending(opcode, nodeid, body, None, 0, 0, 0, 0, 0, None))
        self.send_undoing()

    def send_undoing(self) -> None:
        """Send what found no room."""
        while self.undoing and self._queue.submit(self.undoing[0]):
            self.undoing.pop(0).state = ABANDONED

    def post_release(self, nodeid: int, fh: int) -> None:
        """Give a handle of a file back, with the next kick."""
        body = fuse.RELEASE_IN.values(fh, 0, 0, 0)
        pending = Pending(_RELEASE, nodeid, body, None, 0, 0, 0, 0, 0, None)
        if self._queue.submit(pending, kick=False):
            pending.state = POSTED
            self.posted += 1
        else:
            self.undoing.append(pending)

    def send_aside(self, opcode: int, body: bytes) -> bool:
        """Send a request without a reply on the hiprio queue; False without room."""
        pending = Pending(opcode, 0, body, None, -1, 0, 0, 0, 0, None)
        self.reap_aside()
        if self._orders.error is not None or not self._loan.hiprio.submit(pending):
            return False
        pending.state = POSTED
        return True

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Give references back, in company."""
        forgets = self._loan.forgets
        forgets.add(nodeid, nlookup)
        if len(forgets) >= _FORGET_BATCH:
            self.flush_forgets()

    def flush_forgets(self) -> None:
        """Send the FORGETs that wait."""
        self.reap_aside()
        if len(self._loan.forgets) and self._orders.error is None:
            self._loan.forgets.flush()

    def reap_aside(self) -> None:
        """Free what FORGETs lay in; the device returns that without a call."""
        done: list[Pending] = []
        try:
            self._loan.hiprio.reap(done)
        except ProtocolViolation as violation:
            self._orders.violated(violation)
        for pending in done:
            self._loan.arena.free(pending.block)
