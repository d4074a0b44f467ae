"""The relay: one thread between ``/dev/fuse`` and the virtqueues; it hands messages on as they are.

    kernel ──read(2)──> slot of shared memory ──descriptor──> daemon ──reply──> slot ──write(2)──>

A request is read into the memory that the device sees, looked at just enough to know how long its
reply may be, and made available. The reply is written to the kernel from where the device put it.
Nothing is copied in between, and nothing is decoded but the 40 bytes of the header. What is changed
on the way is listed in ``rewrite``. This file has the loop; what it joins:

    kernel, device      the two ends
    slots, rooms        where messages lie, and how much room they get
    routes, route       the table: what is done with which opcode, in
    known, handles, writes, writeback, locks      requests that are answered, changed or noted here
    answers, rewrite    replies, and what is changed in them
    late, undo, interrupts      requests answered before their time
    opens               what goes with an OPEN: the check in mode ``auto``, and
    passthrough         which files the kernel reads and writes by itself
    passed_nodes, set_ups, backing      who does; what the daemon and the kernel are asked for that
    memory, unwritten, listings         what is remembered
    parts               all that, joined
    orders, ending      what other threads say; the end
    init                INIT, before the loop
    time_slice          who runs next on one CPU

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
import select
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from vfsmount.channel.inflight import ABANDONED, DONE, POSTED, Pending
from vfsmount.channel.rings import PollBudget
from vfsmount.client.relay.backing import BackingFiles
from vfsmount.client.relay.ending import drain, fail_all, serve_lost
from vfsmount.client.relay.interrupts import LOOK_SECONDS
from vfsmount.client.relay.kernel import ENDED
from vfsmount.client.relay.orders import Orders
from vfsmount.client.relay.parts import Parts
from vfsmount.client.relay.passthrough import PASS_FROM, Passthrough
from vfsmount.client.relay.rooms import largest_request, room_for_reply
from vfsmount.client.relay.routes import ROUTES, make_routes
from vfsmount.client.relay.slots import Slot, SlotPool
from vfsmount.errors import ProtocolViolation
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.init import Terms
    from vfsmount.dax_shm.window import Window

__all__ = ["Relay"]

#: Seconds that a FORGET may wait for company, as in the channel.
_FORGET_SECONDS: Final = 0.01
#: Seconds of idleness after which memory is given back, when it is more than _KEEP bytes.
_TRIM_SECONDS: Final = 1.0
_KEEP: Final = 4 << 20
#: Seconds of sleep while the daemon has files open for writing that we are done with.
_LINGER_SECONDS: Final = 0.001
#: Single reads after which the relay stops to look for a second request before it kicks.
_BURST: Final = 8
#: Nanoseconds that they may wait for it, however long the search for something to do is.
_POSTED_NS: Final = 10_000_000

_IN_HEADER: Final = struct.Struct("<IIQQ").unpack_from  # len, opcode, unique, nodeid

_U32: Final = struct.Struct("<I").unpack_from
_OUT: Final = fuse.OUT_HEADER.size


class Relay:
    """The loop and its state.

    ``stop``, ``abort`` and ``fail`` are for other threads.

    Args:
        device: The connected, initialised ``/dev/fuse``; becomes non-blocking, stays the caller's.
        loan: The queues.
        policy: What the kernel may believe.
        terms: What INIT has settled.
        on_violation: Called in this thread when the daemon breaks the rules.
        window: The DAX window, where the kernel has agreed to FUSE passthrough.
        pass_from: Bytes that a file has to have at least to be passed through; 0 for any.

    Attributes:
        ended: ``run`` touches nothing any more.
    """

    __slots__ = (
        "_all",
        "_answers",
        "_asked",
        "_asleep",
        "_burst",
        "_device",
        "_idle",
        "_kernel",
        "_late",
        "_loan",
        "_looked_ns",
        "_map",
        "_opens",
        "_orders",
        "_passthrough",
        "_pool",
        "_queue",
        "_replies",
        "_routes",
        "_spare",
        "abort",
        "ended",
        "fail",
        "stop",
    )

    def __init__(
        self,
        device: int,
        loan: Loan,
        policy: CachePolicy,
        terms: Terms,
        on_violation: Callable[[ProtocolViolation], None],
        *,
        window: Window | None = None,
        pass_from: int = PASS_FROM,
    ) -> None:
        self.ended = False
        self._orders = Orders(on_violation)
        self.stop, self.abort, self.fail = self._orders.stop, self._orders.abort, self._orders.fail
        self._loan = loan
        self._queue = loan.requests
        self._map = loan.memory.map
        # One more than the ring takes: an INTERRUPT or FORGET can be read when all are in use.
        self._pool = SlotPool(loan, largest_request(terms.max_message), self._queue.capacity + 1)
        self._spare: Slot | None = None
        self._burst = 0
        self._idle = PollBudget(loan.budget.limit_us)
        self._asleep = False
        self._looked_ns = 0
        self._passthrough = (
            None if window is None else Passthrough(loan, window, BackingFiles(device), pass_from)
        )
        parts = Parts(device, loan, policy, terms, self._orders, self._passthrough)
        self._kernel, self._device, self._opens = parts.kernel, parts.device, parts.opens
        self._late, self._answers = parts.late, parts.answers
        self._routes = make_routes(parts)
        # Two sets to sleep on: with and without the kernel's requests (back-pressure). Calls are
        # edge triggered, because the eventfd is shared with the daemon and is never read.
        self._all, self._replies = (select.epoll(flags=select.EPOLL_CLOEXEC) for _ in range(2))
        self._asked = loan.backend
        for watch in (self._all, self._replies):
            watch.register(self._queue.call_fd, select.EPOLLIN | select.EPOLLET)
            watch.register(self._orders.wake_fd, select.EPOLLIN)
            if self._asked is not None:
                watch.register(self._asked, select.EPOLLIN)
        self._all.register(device, select.EPOLLIN)

    @property
    def refused(self) -> int:
        """Replies that the kernel would not take."""
        return self._answers.refused

    def passthrough_facts(self) -> dict[str, Any]:
        """What the kernel does by itself, for ``status``."""
        return {} if self._passthrough is None else self._passthrough.facts()

    def run(self) -> None:
        """Serve until the connection ends or somebody says so.

        Raises:
            OSError: The device failed in a way that is not its end.
        """
        try:
            if self._passthrough is not None:
                self._passthrough.prepare_thread()
            self._serve()
            if self._orders.error is not None:
                self._serve_lost()
            elif not self._orders.aborting:
                self._device.kick()
                drain(self._queue.ring, self._progress, self._orders, self._replies)
        finally:
            self._leave()

    def _serve_lost(self) -> None:
        self._leave_unasked()
        in_flight = self._device.in_flight()
        fail_all((*in_flight, *self._device.stalled), self._kernel, self._orders)
        # Where all slots are with the device, which is gone, any will do.
        slot = self._spare or self._pool.take() or in_flight[0]
        serve_lost(self._map, slot, self._kernel, self._orders, self._all)

    def _leave(self) -> None:
        """Let go of everything; what the device still has gets blocks that the channel can free."""
        for slot in self._device.in_flight():
            slot.state = ABANDONED
            slot.block = self._loan.arena.allocate(1)
        for watch in (self._all, self._replies, self._kernel):
            watch.close()
        self._pool.close()
        self.ended = True

    def close(self) -> None:
        """Close what ``stop`` and ``fail`` use; when ``run`` has returned."""
        self._orders.close()

    # --- the loop --------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The loop, while there is a daemon."""
        ring, yield_cpu, now_ns = self._queue.ring, os.sched_yield, perf_counter_ns
        has_used, collect, read, loan = ring.has_used, self._collect, self._read, self._loan
        orders, device, look = self._orders, self._device, self._kernel.look
        set_ups = None if self._passthrough is None else self._passthrough.set_ups
        found = False
        since = 0  # when the present search for something to do began; 0 while there is some
        while not orders.given:
            if set_ups is not None:
                if set_ups.asked:
                    self._serve_asked()
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
        ring, orders = self._queue.ring, self._orders
        if ring.outstanding and ring.arm():
            return
        watch = self._replies if self._spare_slot() is None else self._all
        lingering = self._passthrough is not None and bool(self._passthrough.set_ups.lingering)
        events = watch.poll(_LINGER_SECONDS if lingering else self._timeout())
        ring.disarm()
        self._asleep = True
        for fd, _ in events:
            if fd == orders.wake_fd:
                orders.heed()
            elif fd == self._queue.call_fd:
                self._loan.calls += 1
            elif self._asked is not None and fd == self._asked.fileno():
                self._serve_asked()
        if not events or perf_counter_ns() > self._looked_ns:
            self._look_after(idle=not events and not lingering)

    def _serve_asked(self) -> None:
        """Do what the daemon asks of us."""
        if self._asked is None:
            return
        try:
            self._asked.serve()
        except ProtocolViolation as violation:
            self._orders.violated(violation)
        if self._asked.ended or self._orders.error is not None:
            self._leave_unasked()

    def _leave_unasked(self) -> None:
        if self._asked is not None:
            for watch in (self._all, self._replies):
                watch.unregister(self._asked)
            self._asked = None

    def _progress(self) -> None:
        """All that can happen without requests."""
        self._serve_asked()
        if self._queue.ring.has_used():
            self._collect()

    def _timeout(self) -> float | None:
        """Seconds to sleep at most; None for ever."""
        if self._late.interrupts:
            return LOOK_SECONDS
        if len(self._loan.forgets) or self._device.undoing:
            return _FORGET_SECONDS
        if self._loan.hiprio.ring.outstanding:
            return LOOK_SECONDS  # to have the buffers of FORGETs back; the device does not call
        if self._queue.ring.outstanding:
            return self._loan.watchdog.interval
        untidy = self._passthrough is not None and self._passthrough.set_ups.untidy
        return _TRIM_SECONDS if untidy or self._pool.is_bloated(_KEEP) else None

    def _look_after(self, *, idle: bool) -> None:
        """What has to be done now and then: forgets, mute requests, interrupted callers, memory."""
        now = perf_counter_ns()
        self._looked_ns = now + int(self._loan.watchdog.interval * 1e9)
        self._serve_asked()  # which a loop that never sleeps would not hear of
        self._device.flush_forgets()
        self._device.send_undoing()
        self._late.interrupts.look()
        overdue = set(self._loan.watchdog.examine(self._device.in_flight(), now))
        for slot in self._device.in_flight():
            if slot in overdue:
                self._late.give_up(slot, errno.ETIMEDOUT)
        if idle and not self._queue.ring.outstanding and self._pool.is_bloated(_KEEP):
            self._pool.trim()
        if idle and self._passthrough is not None:
            self._passthrough.set_ups.tidy()

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
            room = _U32(memory, at + size_at)[0] + _OUT if size_at else self._room(opcode, at)
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

    def _room(self, opcode: int, at: int) -> int:
        return room_for_reply(opcode, self._map, at)

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
                        answer(pending)
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
        if self._answers.counted_ns > self._looked_ns:
            self._look_after(idle=False)

    def _finish(self, slot: Slot) -> None:
        """All that an answer needs is there."""
        if slot.state != DONE:
            self._settle(slot)
            return
        self._answers.answer(slot)
        slot.check = None
        slot.answers = 0
        self._give_back(slot)

    def _settle(self, slot: Slot) -> None:
        """The device has answered what nobody waits for."""
        if slot.state == POSTED:
            self._answers.count(slot)
        else:
            self._late.undo(slot)
        slot.check = None
        slot.answers = 0
        self._give_back(slot)

    def _finish_own(self, pending: Pending) -> None:
        """A request of our own is through; a write or an open may have waited for it."""
        opened = self._opens.learned(pending)
        self._loan.arena.free(pending.block)
        for slot in opened:
            self._finish(slot)
        abandoned = self._device.unhold(pending)
        if abandoned is not None:
            self._opens.end_change()
            self._give_back(abandoned)
