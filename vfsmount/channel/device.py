"""The channel: one request to the device, its reply back, as one ``await``.

Two ways lead to a reply. The quick one has no checkpoint: submit, kick, look at the used ring for a
few microseconds while the daemon works, return. When the reply does not come in that time, the task
is parked, and whoever finds the reply later (the task that waits for calls, or another request that
looks) reschedules it. Rules:

* Whenever control goes back to the event loop while the device has requests, calls are armed and
  the ring has been looked at since (``_settle``).
* A block of the arena belongs to its request until the caller has copied the reply, or until the
  device has returned it if nobody waits any more. A lent block (``request_view``) belongs to the
  caller until the next call into the channel.
* Requests that find no room queue up; whoever makes room submits the first ones on their behalf, so
  nobody can overtake.
* The first failure is the last: it is logged once, and every waiter and every later call gets it.
"""

from __future__ import annotations

import logging
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING

import outcome
import trio

from vfsmount.channel.eventfd import CallWatch
from vfsmount.channel.forgets import BATCH, ForgetGatherer
from vfsmount.channel.inflight import ABANDONED, DONE, NEW, SENT, Pending
from vfsmount.channel.rings import PollBudget
from vfsmount.channel.statistics import (
    ChannelStatistics,
    InFlightRequest,
    NotificationStatistics,
    OpcodeCounter,
    OpcodeStatistics,
)
from vfsmount.channel.watchdog import Watchdog
from vfsmount.errors import (
    ChannelBroken,
    ChannelClosed,
    HandshakeError,
    ProtocolViolation,
    RemoteErrno,
    RequestTimeout,
    VfsmountError,
)
from vfsmount.wire import virtio_fs
from vfsmount.wire.fuse import opcode_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from vfsmount.channel.arena import Arena
    from vfsmount.channel.frontend import DeviceOffer, Frontend
    from vfsmount.channel.memory import SharedMemory
    from vfsmount.channel.options import ChannelOptions
    from vfsmount.channel.rings import DriverQueue

__all__ = ["Channel"]

log = logging.getLogger(__name__)

#: Requests that go the quick way before one takes a checkpoint, so that other tasks live.
_FAIRNESS = 64
#: Seconds that a FORGET may wait for company.
_FORGET_DELAY = 0.01
#: Seconds for the orderly end.
_STOP_PATIENCE = 2.0
#: Free blocks of this many bytes lose their memory when the channel has more than ``_KEEP`` to
#: spare.
_TRIM_BLOCK = 64 << 10
_KEEP = 4 << 20


class Channel:
    """The way to one device; made by ``open_channel``. One event loop, one thread.

    Attributes:
        offer: What the device offered.
        features: Virtio features acked.
        protocol_features: Protocol features acked.
        queue_size: Entries of the request queue.
    """

    def __init__(
        self,
        frontend: Frontend,
        offer: DeviceOffer,
        options: ChannelOptions,
        memory: SharedMemory,
        arena: Arena,
        hiprio: DriverQueue,
        requests: DriverQueue,
    ) -> None:
        self.offer = offer
        self.features = frontend.features
        self.protocol_features = frontend.protocol_features
        self.queue_size = requests.layout.queue_size
        self._frontend = frontend
        self._options = options
        self._memory = memory
        self._map = memory.map
        self._arena = arena
        self._hiprio = hiprio
        self._queue = requests
        self._budget = PollBudget(options.poll_us)
        self._watchdog = Watchdog(options.mute_after, options.request_timeout)
        self._watch = CallWatch(hiprio.call_fd, requests.call_fd)
        self._calls = 0
        self._turns = 0
        self._room: deque[tuple[Pending, Callable[[Pending], bool]]] = deque()
        self._lent: tuple[int, memoryview] | None = None
        self._forgets = ForgetGatherer(hiprio)
        self._forgets_wait = trio.Event()
        self._busy = trio.Event()
        self._counters: dict[int, OpcodeCounter] = {}
        self._abandoned = 0
        self._error: VfsmountError | None = None
        self._ended = trio.Event()
        frontend.on_lost = self.fail

    @property
    def config(self) -> virtio_fs.Config | None:
        """Config space of the device; None when it has none."""
        return self.offer.config

    @property
    def num_request_queues(self) -> int:
        """Request queues that the device has; we use the first."""
        return self.offer.num_request_queues

    # --- requests --------------------------------------------------------------------------------

    async def request(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        *,
        payload: Buffer | None = None,
        reply_size: int,
        uid: int = 0,
        gid: int = 0,
        pid: int = 0,
        extlen: int = 0,
        on_abandoned: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """Send one FUSE request and return the body of its reply.

        A checkpoint only when the reply is slow, and in one call out of 64. After cancellation the
        request may still be carried out: the device keeps its buffers until it answers.

        Args:
            opcode: FUSE opcode.
            nodeid: Node that the request names.
            body: What follows the header: argument struct, names, extensions.
            payload: Data that follows the body; copied before this returns or parks.
            reply_size: Most bytes of the reply's body. The device gets exactly that much room.
            uid: Caller's user id; ``gid`` and ``pid`` likewise.
            gid: See uid.
            pid: See uid.
            extlen: Bytes of extensions at the end of ``body``, divided by 8.
            on_abandoned: Called with the reply's body if the caller was cancelled or timed out and
                the device then carried the request out; must not raise.

        Raises:
            RemoteErrno: The daemon answered with an error.
            RequestTimeout: No reply in ``request_timeout`` seconds.
            ChannelBroken: The daemon went away, or (ProtocolViolation) broke the rules.
            ChannelClosed: We closed the channel.
        """
        pending = Pending(
            opcode, nodeid, body, payload, reply_size, uid, gid, pid, extlen, on_abandoned
        )
        if not self._try(pending):
            await self._wait(pending)
        data = self._map[pending.data_at : pending.data_at + pending.length]
        self._finish(pending)
        return data

    async def request_view(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        *,
        payload: Buffer | None = None,
        reply_size: int,
        uid: int = 0,
        gid: int = 0,
        pid: int = 0,
        extlen: int = 0,
        on_abandoned: Callable[[bytes], None] | None = None,
    ) -> memoryview:
        """As ``request``, but the body is a read-only view of shared memory: nothing is copied.

        The view is valid until anybody next calls into this channel, which releases it. The device
        can write to that memory still, so look at a byte once only, or not at all.

        Raises:
            VfsmountError: As ``request``.
        """
        pending = Pending(
            opcode, nodeid, body, payload, reply_size, uid, gid, pid, extlen, on_abandoned
        )
        if not self._try(pending):
            await self._wait(pending)
        if pending.errno:
            self._finish(pending)  # raises
        end = pending.data_at + pending.length
        view = self._memory.view[pending.data_at : end].toreadonly()
        self._count(pending)
        self._take_back()
        self._lent = (pending.block, view)
        return view

    async def request_raw(
        self,
        readable: Sequence[bytes],
        writable: Sequence[int] = (),
        *,
        queue: int = virtio_fs.first_request_queue(False),
    ) -> tuple[int, bytes]:
        """Make a chain of any pieces available, for those who write or test devices.

        Nothing is added to it and nothing but the used length is checked.

        Args:
            readable: Contents of the device-readable descriptors.
            writable: Sizes in bytes of the device-writable ones, which follow them.
            queue: Ring index: 0 for hiprio, 1 for requests.

        Returns:
            The used length, and that many bytes of the writable part.

        Raises:
            ValueError: No such queue, no pieces, or more than the queue or a block holds.
            VfsmountError: As ``request``.
        """
        self._raise_if_failed()
        target = {0: self._hiprio, 1: self._queue}.get(queue)
        if target is None:
            raise ValueError(f"no queue {queue}")
        pending = Pending(-1, 0, b"", None, sum(writable), 0, 0, 0, 0, None)
        await trio.lowlevel.checkpoint()
        self._raise_if_failed()
        self._take_back()
        self._join(pending, lambda one: target.submit_raw(one, readable, writable))
        self._settle(target)
        if pending.state != DONE:
            await self._park(pending)
        data = self._map[pending.data_at : pending.data_at + pending.length]
        self._free(pending.block)
        return pending.length, data

    # --- the quick way ---------------------------------------------------------------------------

    def _try(self, pending: Pending) -> bool:
        """Submit a request and look for its reply; return whether it is there.

        Raises:
            ChannelBroken: As ``request``.
        """
        if self._error is not None:
            self._raise_if_failed()
        if self._lent is not None:
            self._take_back()
        self._turns += 1
        if self._turns >= _FAIRNESS or self._room or not self._queue.submit(pending):
            return False
        return self._look(pending)

    def _look(self, pending: Pending) -> bool:
        """Look for the reply to a request that the device has; return whether it is there.

        When it is not, calls are armed, so the caller may park.

        Raises:
            ChannelBroken: The channel failed meanwhile.
        """
        queue, budget = self._queue, self._budget
        ring = queue.ring
        done: list[Pending] = []
        try:
            if ring.outstanding > 1:
                ring.disarm()
            if budget.nanoseconds and queue.poll(pending, budget.nanoseconds, done):
                budget.hit()
                if not ring.outstanding and len(done) == 1:
                    return True
            else:
                budget.miss()
        except ProtocolViolation as violation:
            self._deliver(done)
            self.fail(violation)
        else:
            self._deliver(done)
            self._settle(queue)
        if pending.state != DONE:
            self._raise_if_failed()
        return pending.state == DONE

    def _finish(self, pending: Pending) -> None:
        """Count a request and free its block.

        Raises:
            RemoteErrno: The reply is an error.
        """
        self._count(pending)
        self._free(pending.block)
        if pending.errno:
            raise RemoteErrno(pending.opcode, pending.nodeid, pending.errno)

    def _count(self, pending: Pending) -> None:
        counter = self._counters.get(pending.opcode)
        if counter is None:
            counter = self._counters[pending.opcode] = OpcodeCounter()
        counter.add(perf_counter_ns() - pending.started_ns)
        if pending.errno:
            counter.errors += 1

    def _free(self, block: int) -> None:
        self._arena.free(block)
        if self._room:
            self._admit()
            self._settle(self._queue)

    def _take_back(self) -> None:
        """End the loan of ``request_view``."""
        if self._lent is None:
            return
        (block, view), self._lent = self._lent, None
        try:
            view.release()
        except BufferError:
            log.debug("a view of shared memory is still in use after its time")
        self._free(block)

    # --- the slow way ----------------------------------------------------------------------------

    async def _wait(self, pending: Pending) -> None:
        """Wait until a request is done that was not done at once.

        Cancelled, it leaves the request to the device, or takes it back if it was not sent yet.
        """
        if pending.state == NEW:
            self._turns = 0
            await trio.lowlevel.checkpoint()
            self._raise_if_failed()
            self._join(pending, self._queue.submit)
            if pending.state == SENT and self._look(pending):
                return
        await self._park(pending)

    def _join(self, pending: Pending, submit: Callable[[Pending], bool]) -> None:
        """Stand in line for room; straight through when there is some and nobody waits."""
        pending.started_ns = perf_counter_ns()
        self._room.append((pending, submit))
        self._admit()

    def _admit(self) -> None:
        """Submit waiting requests, in order, while there is room."""
        while self._room:
            pending, submit = self._room[0]
            if not submit(pending):
                return
            self._room.popleft()

    async def _park(self, pending: Pending) -> None:
        """Sleep until somebody has found the reply.

        Raises:
            VfsmountError: The channel or the request failed.
        """

        def abort(_: object) -> trio.lowlevel.Abort:
            pending.waiter = None
            self._abandon(pending)
            return trio.lowlevel.Abort.SUCCEEDED

        pending.waiter = trio.lowlevel.current_task()
        self._busy.set()
        await trio.lowlevel.wait_task_rescheduled(abort)
        if self._memory.closed:
            raise ChannelClosed("the channel is closed")

    def _abandon(self, pending: Pending) -> None:
        """The caller goes: forget a request that was not sent, leave one that was to the device."""
        self._abandoned += 1
        if pending.state == SENT:
            pending.state = ABANDONED
            return
        self._room = deque(entry for entry in self._room if entry[0] is not pending)
        self._admit()  # those behind it may need less room
        self._settle(self._queue)

    def _deliver(self, done: list[Pending]) -> None:
        """Hand out what has been reaped: wake the waiters, clean up what nobody waits for."""
        for pending in done:
            if pending.state == ABANDONED:
                self._clean_up(pending)
            elif pending.waiter is not None:
                trio.lowlevel.reschedule(pending.waiter)
                pending.waiter = None
        if self._room:
            self._admit()

    def _clean_up(self, pending: Pending) -> None:
        body = self._map[pending.data_at : pending.data_at + pending.length]
        self._arena.free(pending.block)
        if pending.on_abandoned is not None and not pending.errno:
            pending.on_abandoned(body)

    def _settle(self, queue: DriverQueue) -> None:
        """Arm calls, and deliver what came before they were armed."""
        ring = queue.ring
        while self._error is None and ring.outstanding and ring.arm():
            self._reap(queue)

    def _reap(self, queue: DriverQueue) -> None:
        """Reap and deliver; a violation fails the channel."""
        done: list[Pending] = []
        try:
            queue.reap(done)
        except ProtocolViolation as violation:
            self._deliver(done)
            self.fail(violation)
        else:
            self._deliver(done)

    # --- FORGET ----------------------------------------------------------------------------------

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Give back ``nlookup`` references to a node. Never blocks, never fails.

        They are gathered and go to the hiprio queue: at once when there are 32 nodes, else within
        10 ms.
        """
        if self._error is not None:
            return
        self._take_back()
        self._forgets.add(nodeid, nlookup)
        if len(self._forgets) >= BATCH:
            self._flush_forgets()
        elif not self._forgets_wait.is_set():
            self._forgets_wait.set()

    def _flush_forgets(self) -> None:
        if self._error is None and self._hiprio.ring.has_used():
            self._reap(self._hiprio)
        if self._error is None:
            self._forgets.flush()

    async def flush_forgets_in_time(self) -> None:
        """Background task: send FORGETs that found no company."""
        while True:
            await self._forgets_wait.wait()
            await trio.sleep(_FORGET_DELAY)
            self._forgets_wait = trio.Event()
            self._flush_forgets()
            if len(self._forgets):  # no room: look again
                self._forgets_wait.set()

    # --- the tasks -------------------------------------------------------------------------------

    async def reap_on_calls(self) -> None:
        """Background task: sleep until the device calls, then reap."""
        while True:
            await trio.lowlevel.wait_readable(self._watch.fileno())
            self._watch.clear()
            self._calls += 1
            self._progress()

    def _progress(self) -> None:
        for queue in (self._queue, self._hiprio):
            if self._error is None:
                self._reap(queue)
        self._settle(self._queue)
        # FORGETs want no calls; a raw chain on that queue does.
        if any(pending.waiter is not None for pending in self._hiprio.outstanding()):
            self._settle(self._hiprio)

    async def look_after(self) -> None:
        """Background task: report mute requests, enforce time limits, give memory back.

        It wakes up only while something is in flight, and once more when nothing is.
        """
        while True:
            await self._busy.wait()
            self._busy = trio.Event()
            busy = True
            while busy:
                await trio.sleep(self._watchdog.interval)
                self._progress()  # a call that got lost would be a delay, not a hang
                self._time_out()
                busy = bool(self._queue.ring.outstanding or self._room)
                self._trim()

    def _time_out(self) -> None:
        now = perf_counter_ns()
        for pending in self._watchdog.examine(self._all_pending(), now):
            waiter, pending.waiter = pending.waiter, None
            self._abandon(pending)
            if waiter is not None:
                limit = self._options.request_timeout
                error = RequestTimeout(f"no reply to {pending} within {limit:g} s")
                trio.lowlevel.reschedule(waiter, outcome.Error(error))

    def _all_pending(self) -> list[Pending]:
        sent = [*self._queue.outstanding(), *self._hiprio.outstanding()]
        return sorted(sent, key=lambda p: p.started_ns) + [pending for pending, _ in self._room]

    def _trim(self) -> None:
        """Give memory back that is resident in free blocks, when it has become much."""
        if self._memory.resident() > self._arena.used_bytes + _KEEP:
            for offset, size in self._arena.free_extents(_TRIM_BLOCK):
                self._memory.punch(offset, size)

    # --- the end ---------------------------------------------------------------------------------

    def fail(self, error: VfsmountError) -> None:
        """End the channel: every waiter and every later call gets such an error. Once only.

        Args:
            error: ChannelBroken, ProtocolViolation or ChannelClosed: the reason.
        """
        if self._error is not None:
            return
        self._error = error
        if isinstance(error, ChannelBroken):
            log.error("the channel to the daemon ended: %s", error)
            self._frontend.close()
        waiting = [pending for pending in self._all_pending() if pending.waiter is not None]
        self._room.clear()
        for pending in waiting:
            trio.lowlevel.reschedule(pending.waiter, outcome.Error(self._failure(error)))
            pending.waiter = None
        self._ended.set()

    @staticmethod
    def _failure(error: VfsmountError) -> VfsmountError:
        """Return a fresh exception for one waiter: one that many raise would gather tracebacks."""
        failure = type(error)(str(error), error.cure)
        failure.__cause__ = error
        return failure

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._failure(self._error)

    async def wait_ended(self) -> VfsmountError:
        """Wait until the channel has ended, and return the reason."""
        await self._ended.wait()
        assert self._error is not None
        return self._error

    async def aclose(self) -> None:
        """End the channel in order: flush FORGETs, stop the rings. At most two seconds.

        Whoever still waits for a reply gets ChannelClosed. Again is harmless.
        """
        if self._error is None:
            self._take_back()
            self._flush_forgets()
        if self._error is None:
            self.fail(ChannelClosed("the channel is closed"))
            patience = trio.CancelScope(deadline=trio.current_time() + _STOP_PATIENCE, shield=True)
            with patience:
                try:
                    await self._frontend.stop([self._hiprio.index, self._queue.index])
                except HandshakeError as error:
                    log.debug("the rings were not stopped in order: %s", error)
        self._frontend.close()

    def release(self) -> None:
        """Close what the channel opened itself; after the tasks have ended."""
        if self._lent is not None:
            self._lent[1].release()
            self._lent = None
        self._watch.close()

    # --- figures ---------------------------------------------------------------------------------

    def statistics(self) -> ChannelStatistics:
        """Return the figures of this moment."""
        now = perf_counter_ns()
        sent = [pending for pending in self._all_pending() if pending.state != NEW]
        queues = (self._queue, self._hiprio)
        return ChannelStatistics(
            requests=self._request_statistics(),
            in_flight=tuple(_in_flight(pending, now) for pending in sent),
            mute=tuple(_in_flight(p, now) for p in sent if self._watchdog.is_mute(p, now)),
            waiting=len(self._room),
            abandoned=self._abandoned,
            forgets_waiting=len(self._forgets),
            notifications=NotificationStatistics(
                kicks=sum(queue.kicks for queue in queues),
                kicks_saved=sum(queue.kicks_saved for queue in queues),
                calls=self._calls,
                polls_hit=self._budget.hits,
                polls_missed=self._budget.misses,
            ),
            arena_used=self._arena.used_bytes,
            memory_resident=0 if self._memory.closed else self._memory.resident(),
        )

    def _request_statistics(self) -> dict[str, OpcodeStatistics]:
        timed = {opcode_name(op): counter.snapshot() for op, counter in self._counters.items()}
        forgets = {
            opcode_name(op): OpcodeStatistics(count, 0, 0.0, 0.0, 0.0)
            for op, count in self._forgets.sent.items()
            if count
        }
        return timed | forgets


def _in_flight(pending: Pending, now_ns: int) -> InFlightRequest:
    return InFlightRequest(
        pending.opcode,
        pending.nodeid,
        pending.unique,
        (now_ns - pending.started_ns) / 1e9,
        pending.state == ABANDONED,
    )
