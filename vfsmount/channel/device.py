"""The channel: FUSE requests to one device and their replies, as awaitable calls.

Its parts: ``exchange`` waits for replies, ``forgets`` gathers what needs none, ``watchdog`` judges
what takes too long, ``statistics`` counts. What is decided here:

* A block of the arena belongs to its request until the caller has copied the reply. A lent block
  (``request_view``) belongs to the caller until anybody's next call into the channel.
* The first failure is the last: it is logged once, the connection is closed, and every waiter and
  every later call gets it.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import trio

from vfsmount.channel.eventfd import CallWatch
from vfsmount.channel.exchange import Exchange, fresh
from vfsmount.channel.forgets import BATCH, ForgetGatherer
from vfsmount.channel.inflight import ABANDONED, NEW, Pending
from vfsmount.channel.loan import Loan
from vfsmount.channel.rings import PollBudget
from vfsmount.channel.statistics import (
    ChannelStatistics,
    InFlightRequest,
    NotificationStatistics,
    OpcodeCounter,
    OpcodeStatistics,
)
from vfsmount.channel.trace import is_traced, trace_request
from vfsmount.channel.watchdog import Watchdog
from vfsmount.errors import (
    ChannelBroken,
    ChannelClosed,
    HandshakeError,
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
    from vfsmount.channel.backend_requests import BackendRequestServer
    from vfsmount.channel.frontend import DeviceOffer, Frontend
    from vfsmount.channel.memory import SharedMemory
    from vfsmount.channel.options import ChannelOptions
    from vfsmount.channel.rings import DriverQueue

__all__ = ["Channel"]

log = logging.getLogger(__name__)

#: Seconds that a FORGET or a posted request may wait for company.
_LATER: Final = 0.01
#: Seconds between two looks whether the queues can be lent.
_LOAN_DELAY: Final = 0.001
#: Seconds for the orderly end.
_STOP_PATIENCE: Final = 2.0
#: Free blocks of this many bytes lose their memory when there is more than _KEEP to spare.
_TRIM_BLOCK: Final = 64 << 10
_KEEP: Final = 4 << 20


class Channel:
    """The way to one device; made by ``open_channel``. One event loop, one thread.

    Attributes:
        offer: What the device offered.
        features: Virtio features acked.
        protocol_features: Protocol features acked.
        backend_requests: Who answers what the device asks; None where it cannot ask.
        queue_size: Entries of the request queue.
        poll_us: Most microseconds to look for something before sleeping.
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
        self.backend_requests: BackendRequestServer | None = None
        self.features = frontend.features
        self.protocol_features = frontend.protocol_features
        self.queue_size = requests.layout.queue_size
        self._frontend = frontend
        self._memory = memory
        self._map = memory.map
        self._arena = arena
        self._budget = PollBudget(options.poll_us)
        self._requests = Exchange(requests, memory, arena, self._budget, self.fail, self._count)
        self._hiprio = Exchange(
            hiprio, memory, arena, PollBudget(0), self.fail, _uncounted, quiet=True
        )
        self._exchanges = (self._hiprio, self._requests)
        self._forgets = ForgetGatherer(hiprio)
        self._later = trio.Event()
        self._watch = CallWatch(hiprio.call_fd, requests.call_fd)
        self._watchdog = Watchdog(options.mute_after, options.request_timeout)
        self._request_timeout = options.request_timeout
        self.poll_us = options.poll_us
        self._lent: tuple[int, memoryview] | None = None
        self._loan: Loan | None = None
        self._at_home = trio.Event()
        self._at_home.set()
        self._sleep = trio.CancelScope()
        self._counters: dict[int, OpcodeCounter] = {}
        self._is_traced = is_traced()
        self._calls = 0
        self._error: VfsmountError | None = None
        self._ended = trio.Event()
        frontend.on_lost = self.fail

    @property
    def config(self) -> virtio_fs.Config | None:
        """Config space of the device; None when it has none."""
        return self.offer.config

    @property
    def orphans(self) -> int:
        """Requests of callers who went away that the device may carry out at any time.

        What is asked while there are some may be answered from before or after that.
        """
        return self._requests.orphans

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
            payload: Data that follows the body; must not change while this call lasts.
            reply_size: Most bytes of the reply's body. The device gets exactly that much room.
            uid: Caller's user id.
            gid: Caller's group id.
            pid: Caller's process id.
            extlen: Bytes of extensions at the end of ``body``, divided by 8.
            on_abandoned: Called with the reply's body if the caller was cancelled or timed out and
                the device then carried the request out; must not raise.

        Raises:
            RemoteErrno: The daemon answered with an error.
            RequestTimeout: No reply in ``request_timeout`` seconds.
            ChannelBroken: The daemon went away, or (ProtocolViolation) broke the rules.
            ChannelClosed: We closed the channel.
            ValueError: More than 16 MiB in all.
        """
        pending = Pending(
            opcode, nodeid, body, payload, reply_size, uid, gid, pid, extlen, on_abandoned
        )
        if self._lent is not None:
            self._take_back()
        if not self._requests.attempt(pending):
            await self._wait(pending)
        self._count(pending)
        data = self._map[pending.data_at : pending.data_at + pending.length]
        self._requests.free(pending.block)
        if pending.errno:
            raise RemoteErrno(opcode, nodeid, pending.errno)
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
        can still write to that memory, so look at a byte once only, or not at all.

        Raises:
            VfsmountError: As ``request``.
        """
        pending = Pending(
            opcode, nodeid, body, payload, reply_size, uid, gid, pid, extlen, on_abandoned
        )
        if self._lent is not None:
            self._take_back()
        if not self._requests.attempt(pending):
            await self._wait(pending)
        self._count(pending)
        if pending.errno:
            self._requests.free(pending.block)
            raise RemoteErrno(opcode, nodeid, pending.errno)
        end = pending.data_at + pending.length
        view = self._memory.view[pending.data_at : end].toreadonly()
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

        Nothing is added to it, and nothing but the used length is checked.

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
        if not 0 <= queue < len(self._exchanges):
            raise ValueError(f"no queue {queue}")
        exchange = self._exchanges[queue]
        submit_raw = exchange.queue.submit_raw
        pending = Pending(-1, 0, b"", None, sum(writable), 0, 0, 0, 0, None)
        self._take_back()
        await exchange.transact(pending, lambda one: submit_raw(one, readable, writable))
        self._raise_if_unmapped()
        data = self._map[pending.data_at : pending.data_at + pending.length]
        exchange.free(pending.block)
        return pending.length, data

    async def _wait(self, pending: Pending) -> None:
        await self._requests.wait(pending)
        self._raise_if_unmapped()

    def _raise_if_unmapped(self) -> None:
        """A waiter whose reply came just before the end may run just after it."""
        if self._memory.closed:
            raise ChannelClosed("the channel is closed")

    def _count(self, pending: Pending) -> None:
        counter = self._counters.get(pending.opcode)
        if counter is None:
            counter = self._counters[pending.opcode] = OpcodeCounter()
        duration = perf_counter_ns() - pending.started_ns
        counter.add(duration)
        if pending.errno:
            counter.errors += 1
        if self._is_traced:
            trace_request(pending, duration)

    def _take_back(self) -> None:
        """End the loan of ``request_view``."""
        if self._lent is None:
            return
        (block, view), self._lent = self._lent, None
        try:
            view.release()
        except BufferError:
            log.debug("a view of shared memory is still in use after its time")
        self._requests.free(block)

    # --- what nobody waits for -------------------------------------------------------------------

    def post(
        self, opcode: int, nodeid: int, body: bytes, *, uid: int = 0, gid: int = 0, pid: int = 0
    ) -> bool:
        """Send a request whose reply has no body and interests nobody, such as RELEASE.

        It goes with the next request, which saves a kick and two changes of process (15 us), or
        within 10 ms. Order towards later requests is kept.

        Returns:
            False when there is no room now or the queues are lent: use ``request`` then.
        """
        if self._loan is not None:
            return False
        if self._lent is not None:
            self._take_back()
        pending = Pending(opcode, nodeid, body, None, 0, uid, gid, pid, 0, None)
        if not self._requests.post(pending):
            return False
        self._later.set()
        return True

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Give back ``nlookup`` references to a node. Never blocks, never fails.

        They are gathered and go to the hiprio queue: at once when there are 32 nodes, else within
        10 ms, or at the end of the channel.
        """
        if self._error is not None:
            return
        self._take_back()
        self._forgets.add(nodeid, nlookup)
        if len(self._forgets) >= BATCH:
            self._flush_forgets()
        else:
            self._later.set()

    def _flush_forgets(self) -> None:
        if self._loan is not None:
            return
        self._hiprio.reap()  # the device returns their buffers without a call
        if self._error is None:
            self._forgets.flush()

    async def send_in_time(self) -> None:
        """Background task: send FORGETs and posted requests that found no company."""
        while True:
            await self._later.wait()
            await trio.sleep(_LATER)
            self._later = trio.Event()
            if self._loan is None:
                self._requests.flush()
            self._flush_forgets()
            if len(self._forgets) and self._error is None and self._loan is None:
                # No room: look again.
                self._later.set()

    # --- the other background tasks --------------------------------------------------------------

    async def reap_on_calls(self) -> None:
        """Background task: sleep until the device calls, then reap."""
        while True:
            await self._at_home.wait()
            with trio.CancelScope() as self._sleep:
                await trio.lowlevel.wait_readable(self._watch.fileno())
            if self._loan is None:
                self._watch.clear()
                self._calls += 1
                self._progress()

    def _progress(self) -> None:
        if self._loan is not None:
            return
        for exchange in self._exchanges:
            exchange.reap()
            exchange.settle()

    async def look_after(self) -> None:
        """Background task: report mute requests, enforce time limits, give memory back.

        It wakes up only while something is in flight, and once more when nothing is.
        """
        while True:
            await self._requests.busy.wait()
            self._requests.busy = trio.Event()
            busy = True
            while busy:
                await trio.sleep(self._watchdog.interval)
                self._progress()  # should a call get lost, that is a delay and not a hang
                self._time_out()
                self._trim()
                busy = any(exchange.pending() for exchange in self._exchanges)

    def _time_out(self) -> None:
        if self._loan is not None:
            return
        now = perf_counter_ns()
        for exchange in self._exchanges:
            for pending in self._watchdog.examine(exchange.pending(), now):
                limit = self._request_timeout
                text = f"no reply to {pending} within {limit:g} s"
                exchange.give_up(pending, RequestTimeout(text, "the daemon may hang"))

    def _trim(self) -> None:
        """Give memory back that is resident in free blocks, when it has become much."""
        if self._loan is not None:
            return
        if self._memory.resident() > self._arena.used_bytes + _KEEP:
            for offset, size in self._arena.free_extents(_TRIM_BLOCK):
                self._memory.punch(offset, size)

    # --- another thread's turn -------------------------------------------------------------------

    async def lend(self, on_failed: Callable[[VfsmountError], None]) -> Loan:
        """Hand the queues over to another thread, once nothing is in flight.

        Args:
            on_failed: Called in this thread when the channel fails meanwhile; must not raise.

        Raises:
            VfsmountError: The channel has failed or was closed.
        """
        self._take_back()
        # Somebody may have been cancelled: the device still has the request, nobody waits for it.
        while self._error is None and (self._requests.pending() or self._is_asked()):  # noqa: ASYNC110
            await trio.sleep(_LOAN_DELAY)
        if self._error is not None:
            raise fresh(self._error)
        self._flush_forgets()
        self._loan = Loan(
            memory=self._memory,
            arena=self._arena,
            hiprio=self._hiprio.queue,
            requests=self._requests.queue,
            forgets=self._forgets,
            budget=self._budget,
            watchdog=self._watchdog,
            request_timeout=self._request_timeout,
            counters=self._counters,
            on_failed=on_failed,
            backend=None if self.backend_requests is None else self.backend_requests.lend(),
        )
        for exchange in self._exchanges:
            exchange.error = ChannelClosed("the queues are in other hands")
        self._at_home = trio.Event()
        self._sleep.cancel()
        return self._loan

    def _is_asked(self) -> bool:
        return self.backend_requests is not None and self.backend_requests.busy

    def end_loan(self) -> None:
        """Take the queues back: the borrower does not touch them any more. Again is harmless.

        What the borrower leaves outstanding must be abandoned, with blocks of the arena of its own.
        """
        if self._loan is None:
            return
        self._calls += self._loan.calls
        self._requests.abandoned += self._loan.abandoned
        self._requests.take_over()
        if self._loan.backend is not None:
            self._loan.backend.close()
        if self.backend_requests is not None:
            self.backend_requests.end_loan()
        self._loan = None
        for exchange in self._exchanges:
            exchange.error = self._error
        self._at_home.set()
        self._progress()

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
            log.error("the channel to the daemon has ended: %s", error)
            self._frontend.close()
        for exchange in self._exchanges:
            exchange.fail(error)
        self._ended.set()
        if self._loan is not None:
            self._loan.on_failed(error)

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
            deadline = trio.current_time() + _STOP_PATIENCE
            with trio.CancelScope(deadline=deadline, shield=True):
                await self._stop()
        self._frontend.close()

    async def _stop(self) -> None:
        try:
            await self._frontend.stop([exchange.queue.index for exchange in self._exchanges])
        except HandshakeError as error:
            log.debug("the rings were not stopped in order: %s", error)

    def release(self) -> None:
        """Close what the channel opened itself; after its tasks have ended."""
        if self._lent is not None:
            self._lent[1].release()
            self._lent = None
        self._watch.close()

    # --- figures ---------------------------------------------------------------------------------

    def statistics(self) -> ChannelStatistics:
        """Return the figures of this moment."""
        now = perf_counter_ns()
        pending = [one for exchange in self._exchanges for one in exchange.pending()]
        sent = [one for one in pending if one.state != NEW]
        queues = [exchange.queue for exchange in self._exchanges]
        return ChannelStatistics(
            requests=self._request_statistics(),
            in_flight=tuple(_in_flight(one, now) for one in sent),
            mute=tuple(_in_flight(one, now) for one in sent if self._watchdog.is_mute(one, now)),
            waiting=len(pending) - len(sent),
            abandoned=sum(exchange.abandoned for exchange in self._exchanges)
            + (self._loan.abandoned if self._loan is not None else 0),
            forgets_waiting=len(self._forgets),
            notifications=NotificationStatistics(
                kicks=sum(queue.kicks for queue in queues),
                kicks_saved=sum(queue.kicks_saved for queue in queues),
                calls=self._calls + (self._loan.calls if self._loan is not None else 0),
                polls_hit=self._budget.hits,
                polls_missed=self._budget.misses,
            ),
            arena_used=self._arena.used_bytes,
            memory_resident=0 if self._memory.closed else self._memory.resident(),
        )

    def _request_statistics(self) -> dict[str, OpcodeStatistics]:
        # A copy, because a borrower of the queues may add rows meanwhile.
        counters = list(self._counters.items())
        timed = {opcode_name(op): counter.snapshot() for op, counter in counters}
        forgets = {
            opcode_name(op): OpcodeStatistics(count, 0, 0.0, 0.0, 0.0)
            for op, count in self._forgets.sent.items()
            if count
        }
        return timed | forgets


def _uncounted(_: Pending) -> None:
    """Posted on the hiprio queue: FORGETs, counted where they are gathered; and INTERRUPTs."""


def _in_flight(pending: Pending, now_ns: int) -> InFlightRequest:
    age = (now_ns - pending.started_ns) / 1e9
    abandoned = pending.state == ABANDONED
    return InFlightRequest(pending.opcode, pending.nodeid, pending.unique, age, abandoned)
