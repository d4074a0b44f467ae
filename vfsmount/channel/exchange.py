"""Requests on one queue and the tasks that wait for their replies: the trio side of ``rings``.

Two ways lead to a reply. The quick one has no checkpoint: submit, kick, look at the used ring for a
few microseconds while the daemon works, return. When the reply does not come in that time, the task
is parked, and whoever finds the reply later (the task that waits for calls, or another request that
looks) reschedules it.

Measured over Rust virtiofsd, everything on one CPU, the daemon's work included: GETATTR 15 us, READ
of 4 KiB 16, WRITE of 4 KiB 17, READ of 1 MiB 116 (as a view 89), WRITE of 1 MiB 145; some 6 us of
each are Python's. 10,000 quick requests were 10,000 eventfd writes, 9 sched_yields and 158 looks of
the event loop. The rules:

* Whenever control goes back to the event loop while the device has requests, calls are armed and
  the ring has been looked at since (``settle``).
* Requests that find no room queue up; whoever makes room submits the first ones on their behalf, so
  nobody is overtaken.
* A caller that is cancelled leaves a request that was sent to the device, block and all, until that
  has returned it.
* A violation of the protocol goes to ``on_violation``, which must call ``fail``; afterwards the
  exchange does nothing but raise.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import outcome
import trio

from vfsmount.channel.inflight import ABANDONED, DONE, NEW, POSTED, SENT, Pending
from vfsmount.errors import ProtocolViolation, VfsmountError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.channel.arena import Arena
    from vfsmount.channel.memory import SharedMemory
    from vfsmount.channel.rings import DriverQueue, PollBudget

__all__ = ["Exchange", "fresh"]

#: Requests that go the quick way before one takes a checkpoint, so that other tasks live: a
#: reschedule costs 50 us, one in 64 adds 1 us to each.
_FAIRNESS: Final = 64
#: Posted requests that are shown to the device without waiting for company.
_POSTED_AT_ONCE: Final = 32


def fresh(error: VfsmountError) -> VfsmountError:
    """Return a copy for one more raiser: one exception that many raise would gather tracebacks."""
    copy = type(error)(str(error), error.cure)
    copy.__cause__ = error
    return copy


class Exchange:
    """One queue, its waiters, and the line for its room.

    Args:
        queue: The queue.
        memory: Where replies lie.
        arena: Where blocks go back to.
        budget: How long to look for replies.
        on_violation: Told when the device breaks the rules; it calls ``fail``.
        on_posted: Told of replies to what was posted; it counts them.
        quiet: Only raw chains want calls (the hiprio queue, whose FORGETs nobody waits for).

    Attributes:
        queue: The queue.
        room: Requests that wait for room, and how each is submitted, in order.
        error: Why it has ended, or None.
        abandoned: Requests so far whose caller went away.
        orphans: Those of them that the device still has, and may carry out at any time.
        busy: Set when a task parks; whoever looks after mute requests replaces it.
    """

    def __init__(
        self,
        queue: DriverQueue,
        memory: SharedMemory,
        arena: Arena,
        budget: PollBudget,
        on_violation: Callable[[ProtocolViolation], None],
        on_posted: Callable[[Pending], None],
        *,
        quiet: bool = False,
    ) -> None:
        self.queue = queue
        self.room: deque[tuple[Pending, Callable[[Pending], bool]]] = deque()
        self.error: VfsmountError | None = None
        self.abandoned = 0
        self.orphans = 0
        self.busy = trio.Event()
        self._map = memory.map
        self._arena = arena
        self._budget = budget
        self._on_violation = on_violation
        self._on_posted = on_posted
        self._quiet = quiet
        self._turns = 0
        self._unkicked = 0

    # --- the quick way ---------------------------------------------------------------------------

    def attempt(self, pending: Pending) -> bool:
        """Submit a FUSE request and look for its reply; return whether it is there.

        On False go on with ``wait``.

        Raises:
            ChannelBroken: The channel has failed, before or meanwhile.
            ChannelClosed: It was closed.
        """
        if self.error is not None:
            raise fresh(self.error)
        self._turns += 1
        if self._turns >= _FAIRNESS or self.room:
            return False
        ring = self.queue.ring
        if ring.outstanding:
            # Before the kick: a daemon on this CPU runs inside it, and would call.
            ring.disarm()
        sent = False
        try:
            sent = self.queue.submit(pending)
        finally:
            if not sent:
                self.settle()
        return sent and self._look(pending)

    def _look(self, pending: Pending) -> bool:
        """Look for the reply to a request that the device has; return whether it is there.

        When it is not, calls are armed, so the caller may park.
        """
        queue, budget = self.queue, self._budget
        ring = queue.ring
        done: list[Pending] = []
        try:
            if budget.nanoseconds and queue.poll(pending, budget.nanoseconds, done):
                budget.hit()
                if not ring.outstanding and len(done) == 1:
                    return True
            else:
                budget.miss()
        except ProtocolViolation as violation:
            self._deliver(done)
            self._on_violation(violation)
        else:
            self._deliver(done)
            self.settle()
        if pending.state != DONE and self.error is not None:
            raise fresh(self.error)
        return pending.state == DONE

    def free(self, block: int) -> None:
        """Give a block back, and its room to whoever waits for it."""
        self._arena.free(block)
        if self.room:
            self.admit()
            self.settle()

    def post(self, pending: Pending) -> bool:
        """Add a request that nobody waits for; the next kick shows it to the device.

        Return False when there is no room now, or the channel has failed.
        """
        if self.error is not None or self.room or not self.queue.submit(pending, kick=False):
            return False
        pending.state = POSTED
        self._unkicked += 1
        if self._unkicked >= _POSTED_AT_ONCE:
            self.flush()
        return True

    def flush(self) -> None:
        """Show the device what was posted since the last flush, if no request has done so."""
        if self._unkicked and self.error is None:
            self._unkicked = 0
            self.queue.kick()
            self.busy.set()  # the watchdog looks after posted requests too
            self.settle()

    # --- the slow way ----------------------------------------------------------------------------

    async def wait(self, pending: Pending) -> None:
        """Go on where ``attempt`` returned False, until the reply is there.

        Cancelled, it leaves the request to the device, or takes it back if it was not sent yet.

        Raises:
            VfsmountError: The channel or the request failed.
        """
        if pending.state == NEW:
            self._turns = 0
            await trio.lowlevel.checkpoint()
            if self.error is not None:
                raise fresh(self.error)
            self._stand_in_line(pending, self.queue.submit)
            if pending.state == SENT:
                self.queue.ring.disarm()
                if self._look(pending):
                    return
        await self._park(pending)

    async def transact(self, pending: Pending, submit: Callable[[Pending], bool]) -> None:
        """Submit a request in a way of its own, and wait until it is done.

        Raises:
            VfsmountError: The channel or the request failed.
        """
        await trio.lowlevel.checkpoint()
        if self.error is None:
            self._stand_in_line(pending, submit)
        if pending.state == SENT:
            self.settle()
        if self.error is not None and pending.state != DONE:
            raise fresh(self.error)
        if pending.state != DONE:
            await self._park(pending)

    def _stand_in_line(self, pending: Pending, submit: Callable[[Pending], bool]) -> None:
        """Submit a request if there is room and nobody waits for some; else queue it up.

        A request that was queued must be parked at once, for ``admit`` may have to tell its task.
        """
        pending.started_ns = perf_counter_ns()
        if self.room or not submit(pending):
            self.room.append((pending, submit))

    def admit(self) -> None:
        """Submit waiting requests, in order, while there is room."""
        while self.room:
            pending, submit = self.room[0]
            try:
                if not submit(pending):
                    return
            except ValueError as error:  # its caller asked for what cannot be
                trio.lowlevel.reschedule(pending.waiter, outcome.Error(error))
                pending.waiter = None
            self.room.popleft()

    async def _park(self, pending: Pending) -> None:
        """Sleep until somebody has found the reply."""

        def abort(_: object) -> trio.lowlevel.Abort:
            pending.waiter = None
            self._abandon(pending)
            return trio.lowlevel.Abort.SUCCEEDED

        pending.waiter = trio.lowlevel.current_task()
        self.busy.set()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _abandon(self, pending: Pending) -> None:
        """Forget a request that was not sent, leave one that was to the device."""
        self.abandoned += 1
        if pending.state == SENT:
            pending.state = ABANDONED
            self.orphans += 1
            return
        self.room = deque(entry for entry in self.room if entry[0] is not pending)
        if self.error is None:
            self.admit()  # those behind it may need less room
            self.settle()

    def give_up(self, pending: Pending, error: VfsmountError) -> None:
        """Fail one request; what the device has of it stays with the device."""
        waiter, pending.waiter = pending.waiter, None
        self._abandon(pending)
        if waiter is not None:
            trio.lowlevel.reschedule(waiter, outcome.Error(error))

    def take_over(self) -> None:
        """Count what a borrower of the queue has left to the device."""
        self.orphans += sum(one.state == ABANDONED for one in self.queue.outstanding())

    # --- reaping ---------------------------------------------------------------------------------

    def reap(self) -> None:
        """Take back what the device has used, and hand it out."""
        if self.error is not None:
            return
        done: list[Pending] = []
        try:
            self.queue.reap(done)
        except ProtocolViolation as violation:
            self._deliver(done)
            self._on_violation(violation)
        else:
            self._deliver(done)

    def settle(self) -> None:
        """Arm calls, and hand out what came before they were armed."""
        ring = self.queue.ring
        if self._quiet and not any(pending.opcode < 0 for pending in self.queue.outstanding()):
            return
        while self.error is None and ring.outstanding and ring.arm():
            self.reap()

    def _deliver(self, done: list[Pending]) -> None:
        """Wake the waiters, clean up what nobody waits for."""
        for pending in done:
            if pending.state == ABANDONED:
                self._clean_up(pending)
            elif pending.state == POSTED:
                self._arena.free(pending.block)
                self._on_posted(pending)
            elif pending.waiter is not None:
                trio.lowlevel.reschedule(pending.waiter)
                pending.waiter = None
        if self.room:
            self.admit()

    def _clean_up(self, pending: Pending) -> None:
        self.orphans -= 1
        body = self._map[pending.data_at : pending.data_at + pending.length]
        self._arena.free(pending.block)
        if pending.on_abandoned is not None and not pending.errno:
            pending.on_abandoned(body)

    # --- the end ---------------------------------------------------------------------------------

    def pending(self) -> list[Pending]:
        """Requests that the device has, oldest first, and those that wait for room."""
        sent = sorted(self.queue.outstanding(), key=lambda pending: pending.started_ns)
        return sent + [pending for pending, _ in self.room]

    def fail(self, error: VfsmountError) -> None:
        """End it: everybody who waits gets such an error, and so does whoever comes later."""
        self.error = error
        waiting = [pending for pending in self.pending() if pending.waiter is not None]
        self.room.clear()
        for pending in waiting:
            trio.lowlevel.reschedule(pending.waiter, outcome.Error(fresh(error)))
            pending.waiter = None
