"""The relay: one thread between ``/dev/fuse`` and the virtqueues; it hands messages on as they are.

    kernel ──read(2)──> slot of shared memory ──descriptor──> daemon ──reply──> slot ──write(2)──>

A request is read into the memory that the device sees, looked at just enough to know how long its
reply may be, and made available. The reply is written to the kernel from where the device put it.
Nothing is copied in between, and nothing is decoded but the 40 bytes of the header. What is changed
on the way is listed in ``rewrite``.

Theory of operation. The loop does whatever there is to do and looks again:

    replies used by the device     take all, write each to the kernel
    requests from the kernel       read one (all, when several were found lately), then kick once
    neither                        offer the CPU and look again, for a bounded time with the
                                   device's calls suppressed; then sleep on everything at once

* A kick, or a reply, often lets the other side run at once on this CPU (wake-up preemption); when
  the system call returns, the next thing to do is there already. So looks come before yields.
* The kernel does not look at the result of a RELEASE: it is answered at once and goes
  to the device with the next kick (``POSTED``), before a sleep at the latest.
* Back-pressure is not to read: when all slots are with the device, the kernel queues.
* This thread alone touches queues, arena and slots. Others set a flag and write the wake eventfd.
* A reply that was judged is believed for the write that follows at once. A daemon that changes it
  in between can make the kernel refuse it, or take it for the answer to another request, which it
  could have answered wrongly in the first place.
"""

from __future__ import annotations

import errno
import os
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import ABANDONED, DONE, POSTED, Pending
from vfsmount.channel.rings import PollBudget
from vfsmount.client.relay.caretaker import Caretaker
from vfsmount.client.relay.kernel import ENDED
from vfsmount.client.relay.questions import Question
from vfsmount.client.relay.rewrite import TookPart
from vfsmount.client.relay.rooms import room_for_reply
from vfsmount.client.relay.route import SendAgain
from vfsmount.client.relay.routes import ROUTES, make_routes
from vfsmount.client.relay.slots import Slot
from vfsmount.errors import ProtocolViolation
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from vfsmount.client.relay.parts import Parts

__all__ = ["Loop"]

#: Single reads after which the relay stops to look for a second request before it kicks.
_BURST: Final = 8
#: Nanoseconds that they may wait for it, however long the search for something to do is.
_POSTED_NS: Final = 10_000_000

_IN_HEADER: Final = struct.Struct("<IIQQ").unpack_from  # len, opcode, unique, nodeid

_U32: Final = struct.Struct("<I").unpack_from
_OUT: Final = fuse.OUT_HEADER.size
_RELEASE: Final = int(fuse.Opcode.RELEASE)


class Loop:
    """The loop and its state; the relay's thread alone.

    Args:
        parts: What it works with.
    """

    __slots__ = (
        "_answers",
        "_asleep",
        "_burst",
        "_caretaker",
        "_device",
        "_due_ns",
        "_idle",
        "_kernel",
        "_late",
        "_loan",
        "_map",
        "_opens",
        "_orders",
        "_pool",
        "_queue",
        "_reuse",
        "_routes",
        "_set_id",
        "_set_ups",
        "_sleeper",
        "_spare",
    )

    def __init__(self, parts: Parts) -> None:
        self._loan, self._queue = parts.loan, parts.loan.requests
        self._map = parts.loan.memory.map
        self._orders, self._sleeper, self._pool = parts.orders, parts.sleeper, parts.pool
        self._kernel, self._device, self._opens = parts.kernel, parts.device, parts.opens
        self._late, self._answers = parts.late, parts.answers
        self._set_id, self._reuse = parts.set_id, parts.reuse
        self._set_ups = None if parts.passthrough is None else parts.passthrough.set_ups
        self._caretaker = Caretaker(parts)
        self._routes = make_routes(parts)
        #: The slot to read into next; None for any.
        self._spare: Slot | None = None
        self._burst = 0
        self._idle = PollBudget(self._loan.budget.limit_us)
        self._asleep = False
        #: When the caretaker is due.
        self._due_ns = 0

    # --- the loop --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve while there is a daemon, until the connection ends or somebody says so.

        Raises:
            OSError: The device failed in a way that is not its end.
        """
        ring, yield_cpu, now_ns = self._queue.ring, os.sched_yield, perf_counter_ns
        has_used, collect, read, loan = ring.has_used, self._collect, self._read, self._loan
        orders, device, look = self._orders, self._device, self._kernel.look
        serve_asked = self._sleeper.serve_asked
        set_ups = self._set_ups
        found = False
        since = 0  # when the present search for something to do began; 0 while there is some
        while not orders.given:
            if set_ups is not None:
                if set_ups.asked:
                    serve_asked()
                if set_ups.lingering:
                    set_ups.let_go(now_ns())
            if found or has_used():
                collect()
                since = 0
            try:
                # A read in vain costs 1.0 us, because it makes an exception; a look 0.3.
                found = (not since or bool(look(0, 1))) and read()
            except OSError as error:
                if error.errno in ENDED:
                    return
                if error.errno != errno.ENOENT:  # interrupted before it was read
                    raise
                found = True
            if found:
                since = 0
                continue
            budget = loan.budget if ring.outstanding else self._idle
            now = now_ns()
            since = since or now
            patience = budget.nanoseconds
            if device.posted and patience > _POSTED_NS:
                patience = _POSTED_NS
            if now - since < patience:
                yield_cpu()
            elif device.posted:
                device.kick()
            else:
                budget.miss()
                self._sleep()
                since = 0

    def _sleep(self) -> None:
        """Wait until anything happens."""
        ring = self._queue.ring
        if ring.outstanding and ring.arm():
            return
        reads = self._spare_slot() is not None
        happened = self._sleeper.sleep(self._caretaker.patience(), reads=reads)
        self._asleep = True
        if not happened or perf_counter_ns() > self._due_ns:
            self._look_after(idle=not happened)

    def _look_after(self, *, idle: bool) -> None:
        self._sleeper.serve_asked()  # which a loop that never sleeps would not hear of
        self._due_ns = self._caretaker.look(idle=idle)

    def progress(self) -> None:
        """Do all that there is to do without requests."""
        self._sleeper.serve_asked()
        if self._queue.ring.has_used():
            self._collect()

    # --- requests --------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Read what the kernel has, one request or several, and kick; return whether there was any.

        Raises:
            OSError: The device has ended or failed.
        """
        slot = self._spare
        device = self._device
        if slot is None or device.stalled:
            slot = self._spare_slot()
            if slot is None:
                return False
        got = self._kernel.readinto(slot.view)
        if not got:
            if got is None:
                return False
            raise OSError(errno.ENODEV, "end of file")  # only something else than /dev/fuse has one
        if self._burst or self._queue.ring.outstanding > device.posted:
            self._read_more(slot)
        elif self._take(slot, True):
            self._spare = None
        if self._asleep:
            self._asleep = False
        elif self._idle.nanoseconds < self._idle.limit:
            self._idle.hit()
        return True

    def _read_more(self, slot: Slot) -> None:
        """Hand on what was read to ``slot``, and what else the kernel has; then kick once."""
        device, ring = self._device, self._queue.ring
        before, posted = ring.outstanding, device.posted
        if before > posted:
            self._burst = _BURST
        got: int | None = 1
        while got:
            if self._take(slot, False):
                self._spare = None
                following = self._spare_slot()
                if following is None:
                    break
                slot = following
            got = self._kernel.readinto(slot.view)
        added = ring.outstanding - before - device.posted + posted
        if added:
            device.kick()
            if added == 1:
                self._burst -= 1

    def any_slot(self) -> Slot:
        """Return a slot to read into when the device has gone: then any will do."""
        return self._spare or self._pool.take() or self._device.in_flight()[0]

    def _spare_slot(self) -> Slot | None:
        """The slot to read into; None when the kernel has to wait."""
        if self._device.stalled:
            return None
        if self._spare is None:
            self._spare = self._pool.take()
        return self._spare

    def _give_back(self, slot: Slot) -> None:
        """Take a slot back; that with the most memory is the next to be read into.

        New pages cost 0.8 ms a MiB at the first touch, as much as two WRITEs of it.
        """
        spare = self._spare
        if spare is None:
            self._spare = slot
        elif spare.touched < slot.touched:
            self._spare = slot
            self._pool.put(spare)
        else:
            self._pool.put(slot)

    def _take(self, slot: Slot, kick: bool) -> bool:
        """Hand one request on, and kick; return whether it needs its slot from now on."""
        at = slot.at
        memory = self._map
        size, opcode, unique, nodeid = _IN_HEADER(memory, at)
        slot.answers = slot.unique = unique
        routes = self._routes
        slot.route = route = routes[opcode] if opcode < ROUTES else routes[-1]
        if route.local is not None and route.local(slot, at, size, nodeid):
            return False
        slot.opcode = opcode
        slot.nodeid = nodeid
        slot.errno = slot.length = 0
        slot.reported = False
        room = route.room
        if not room:
            size_at = route.size_at
            room = (
                _U32(memory, at + size_at)[0] + _OUT
                if size_at
                else room_for_reply(opcode, memory, at)
            )
        if size != slot.size or room != slot.writable:  # else all about it is said already
            if not slot.make_room(size, room):
                slot.size = 0
                self._kernel.answer(unique, errno.EIO)
                return False
            if slot.head >= 0:
                self._queue.describe_reserved(slot, at, size)
        slot.started_ns = perf_counter_ns()
        if route.changes:
            self._opens.begin_change()
        if route.special is not None and route.special(slot, at, size, nodeid):
            return True
        if slot.head >= 0:
            self._queue.submit_reserved(slot, slot.head, kick)
            if kick:
                self._device.posted = 0
        else:
            self._device.submit(slot)
            if kick:
                self._device.kick()
        return True

    # --- replies ---------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take everything that the device has used, and answer it."""
        take, ring, answer = self._queue.take, self._queue.ring, self._answers.answer
        try:
            # The first look is always taken: a device that uses what it does not have is caught.
            pending = take()
            if pending is None:
                return
            while pending is not None:
                if type(pending) is not Slot:
                    self._finish_own(pending)
                else:
                    if pending.route.changes:
                        self._opens.end_change()
                    if pending.check is not None:
                        if self._opens.replied(pending):
                            self._finish(pending)
                    elif pending.state == DONE:
                        try:
                            answer(pending)
                        except TookPart as part:
                            self._send_rest(pending, part.count)
                        except SendAgain:
                            self._device.send_again(pending)
                        else:
                            pending.answers = 0
                            if self._spare is None:
                                self._spare = pending
                            else:
                                self._give_back(pending)
                    else:
                        self._settle(pending)
                pending = take() if ring.outstanding else None
        except ProtocolViolation as violation:
            self._orders.violated(violation)
        budget = self._loan.budget
        if self._asleep:
            self._asleep = False
        elif budget.nanoseconds < budget.limit:
            budget.hit()
        else:
            budget.hits += 1
        if self._device.stalled:
            self._device.retry_stalled()
        if self._device.owed:
            self._device.send_owed()
        if self._answers.counted_ns > self._due_ns:
            self._look_after(idle=False)

    def _send_rest(self, slot: Slot, taken: int) -> None:
        """The kernel's pages are written in part; go on, or say that they are not written."""
        self._opens.begin_change()
        if not self._device.send_rest(slot, taken):
            self._opens.end_change()
            self._answers.fail(slot, errno.EIO)
            slot.answers = 0
            self._give_back(slot)

    def _finish(self, slot: Slot) -> None:
        """All that an answer needs is there."""
        if slot.state != DONE:
            self._settle(slot)
            return
        check = slot.check
        if check is not None and check.reply:
            if check.is_reused and self._reuse is not None:
                self._answers.counted_ns = slot.started_ns  # for the caretaker's sake
                if self._reuse.finish(slot, check):
                    self._free(slot)
                return
            self._opens.put_back(slot, check)
        try:
            self._answers.answer(slot)
        except SendAgain:
            self._device.send_again(slot)
            return
        self._free(slot)

    def _free(self, slot: Slot) -> None:
        slot.check = None
        slot.answers = 0
        self._give_back(slot)

    def _settle(self, slot: Slot) -> None:
        """The device has answered what nobody waits for."""
        if slot.state == POSTED:
            self._answers.count(slot)
        else:
            self._late.undo(slot)
        self._free(slot)

    def _finish_own(self, pending: Pending) -> None:
        """A request of our own is through; somebody may have waited for it."""
        if type(pending) is Question:
            ready = self._opens.answered(pending)
            if ready is not None:
                self._finish(ready)
            return
        if pending.opcode == _RELEASE and pending.state == POSTED:
            self._answers.count_own(pending)
        opened = self._opens.learned(pending)
        cleared, error = self._set_id.learned(pending)
        self._loan.arena.free(pending.block)
        for slot in opened:
            self._finish(slot)
        for slot in cleared:
            self._go_on(slot, error)

    def _go_on(self, slot: Slot, error: int) -> None:
        """A request was held, and goes to the device now, unless it has failed or been answered."""
        if not error and slot.state != ABANDONED:
            self._device.submit(slot)
            self._device.kick()
            return
        if slot.route.changes:
            self._opens.end_change()
        if slot.state != ABANDONED:
            self._answers.fail(slot, error)
        self._free(slot)
