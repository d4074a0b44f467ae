"""One virtqueue at work: submit, kick, poll, reap; no event loop, so any one thread may own it.

A ``DriverQueue`` joins the ring (``virtqueue``), the arena, the eventfds and the table of what is
outstanding. Whoever owns it decides how to wait: look (``poll``), or ``arm`` it and sleep until the
call eventfd has been written. Rules:

* One thread at a time. Queues that share an arena belong to the same thread.
* ``reap`` moves requests from outstanding to done; only their owner frees their blocks.
* A violation leaves the request that it is about outstanding, so that failing everything
  outstanding fails everybody.
"""

from __future__ import annotations

import os
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.channel.barrier import STRONG, full_barrier
from vfsmount.channel.eventfd import close_fd, new_eventfd
from vfsmount.channel.inflight import DONE, SENT, Pending, check_reply, place
from vfsmount.channel.memory import GUEST_BASE
from vfsmount.channel.virtqueue import Virtqueue
from vfsmount.errors import ProtocolViolation
from vfsmount.wire.fuse import IN_HEADER, OUT_HEADER
from vfsmount.wire.vring import DESC_F_NEXT, DESC_F_WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfsmount.channel.arena import Arena
    from vfsmount.channel.memory import SharedMemory
    from vfsmount.wire.vring import VringLayout

__all__ = ["UNRESERVED", "DriverQueue", "PollBudget"]

#: Two descriptors and ``fuse_in_header`` in one call: 0.21 us, in two it is 0.27.
_TABLE_AND_HEADER: Final = struct.Struct("<QIHHQIHHIIQQIIIH2x").pack_into
_TABLE: Final = struct.Struct("<QIHHQIHH").pack_into
_TABLE_SIZE: Final = 32
#: Descriptors that are never reserved, for requests made on the way.
UNRESERVED: Final = 4
_DESC: Final = struct.Struct("<QIHH").pack_into
_DESC_SIZE: Final = 16
_OUT_HEADER: Final = struct.Struct("<IiQ").unpack_from
_IN: Final = IN_HEADER.size
_OUT: Final = OUT_HEADER.size
_notify: Final = os.eventfd_write


class PollBudget:
    """How long to look for a reply before sleeping: grows by success, shrinks by failure.

    Looking wins when replies come soon (a trio reschedule costs 50 us); it is wasted CPU when the
    daemon waits for a disk. So a miss halves the budget, a hit doubles it, and every 64th request
    looks for the full time, to notice when replies have become fast again.

    Args:
        limit_us: Upper bound in microseconds; 0 never looks.

    Attributes:
        nanoseconds: The budget for the next request.
        limit: The upper bound, in nanoseconds as well.
        hits: Replies found.
        misses: Replies not found.
    """

    __slots__ = ("hits", "limit", "misses", "nanoseconds")

    def __init__(self, limit_us: int) -> None:
        self.limit = self.nanoseconds = limit_us * 1000
        self.hits = 0
        self.misses = 0

    @property
    def limit_us(self) -> int:
        """The upper bound, microseconds."""
        return self.limit // 1000

    def hit(self) -> None:
        """The reply came in time."""
        self.hits += 1
        if self.nanoseconds < self.limit:
            self.nanoseconds = min(2 * self.nanoseconds + 1000, self.limit)

    def miss(self) -> None:
        """It did not."""
        self.misses += 1
        self.nanoseconds = self.limit if self.misses & 63 == 0 else self.nanoseconds >> 1


class DriverQueue:
    """A virtqueue, its eventfds and its requests.

    Args:
        index: Ring index at the device.
        memory: The shared memory.
        arena: Allocator of its blocks.
        layout: Where the ring is in ``memory``.
        event_idx: RING_EVENT_IDX was acked.
        indirect: RING_INDIRECT_DESC was acked.

    Attributes:
        index: Ring index.
        layout: Where the ring is.
        ring: The ring itself.
        kick_fd: Eventfd on which the device is kicked.
        call_fd: Eventfd on which it calls.
        kicks: Kicks given.
        kicks_saved: Submissions that needed none.
    """

    def __init__(
        self,
        index: int,
        memory: SharedMemory,
        arena: Arena,
        layout: VringLayout,
        *,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self.index = index
        self.layout = layout
        self.ring = Virtqueue(
            memory.view, layout, event_idx=event_idx, fence=full_barrier, strong=STRONG
        )
        self.kick_fd = new_eventfd()
        self.call_fd = new_eventfd()
        self.kicks = 0
        self.kicks_saved = 0
        self._map = memory.map
        self._words = memory.view.cast("I")
        self._quads = memory.view.cast("Q")
        self._arena = arena
        self._indirect = indirect
        self._needed = 1 if indirect else 2
        self._outstanding: list[Pending | None] = [None] * layout.queue_size
        # Even and increasing, and never the same on two queues.
        self._unique = index << 48

    def close(self) -> None:
        """Close the eventfds and let go of the memory; again is harmless."""
        fds = (self.kick_fd, self.call_fd)
        self.kick_fd = self.call_fd = -1
        for fd in fds:
            close_fd(fd)
        self._words.release()
        self._quads.release()
        self.ring.release()

    def outstanding(self) -> Iterator[Pending]:
        """Yield the requests that the device has, in no order."""
        return (pending for pending in self._outstanding if pending is not None)

    # --- submitting ---

    def next_unique(self) -> int:
        """Return the identifier for a request that is to lie in shared memory already."""
        self._unique += 2
        return self._unique

    def submit(self, pending: Pending, *, kick: bool = True) -> bool:
        """Write a FUSE request, make it available and kick; return False when there is no room.

        Without ``kick`` the device does not see it before the next kick of the queue.

        On True the device has it: ``state`` is SENT and the block stays untouched until reaped.

        Raises:
            ValueError: Larger than the largest block.
        """
        ring = self.ring
        if ring.num_free < self._needed:
            return False
        body, payload, reply_size = pending.body, pending.payload, pending.reply_size
        payload_size = 0 if payload is None else memoryview(payload).nbytes
        readable_at, writable_at, size = place(len(body), payload_size, reply_size)
        block = self._arena.allocate(size)
        if block < 0:
            return False
        at = block + readable_at
        in_size = _IN + len(body) + payload_size
        out_size = size - writable_at
        pending.block = block
        pending.data_at = block + writable_at + _OUT
        pending.writable = out_size
        pending.unique = self._unique = self._unique + 2
        _TABLE_AND_HEADER(
            self._map,
            at - _TABLE_SIZE,
            GUEST_BASE + at,
            in_size,
            DESC_F_NEXT if out_size else 0,
            1,
            GUEST_BASE + block + writable_at,
            out_size,
            DESC_F_WRITE,
            0,
            in_size,
            pending.opcode,
            pending.unique,
            pending.nodeid,
            pending.uid,
            pending.gid,
            pending.pid,
            pending.total_extlen,
        )
        at += _IN
        end = at + len(body)
        self._map[at:end] = body
        if payload is not None:
            self._map[end : end + payload_size] = payload
        if self._indirect:
            table = GUEST_BASE + block + readable_at - _TABLE_SIZE
            head = ring.add_indirect(table, _TABLE_SIZE if out_size else _DESC_SIZE)
        else:
            readable = (GUEST_BASE + block + readable_at, in_size, False)
            writable = (GUEST_BASE + block + writable_at, out_size, True)
            head = ring.add_chain((readable, writable) if out_size else (readable,))
        self._send(pending, head, kick)
        return True

    def submit_placed(self, pending: Pending, at: int, size: int) -> bool:
        """Add a request that lies in shared memory already; return False when there is no room.

        The device learns of it with the next ``kick``. ``pending`` must say where its reply goes
        (``data_at``, ``writable``, which is not 0) and which ``unique`` it has.

        Args:
            pending: The request.
            at: Where its header begins; the 32 bytes before are written to (see ``inflight``).
            size: Bytes of it.
        """
        ring = self.ring
        if ring.num_free < self._needed:
            return False
        reply_at = GUEST_BASE + pending.data_at - _OUT
        if self._indirect:
            table = at - _TABLE_SIZE
            _TABLE(
                self._map,
                table,
                GUEST_BASE + at,
                size,
                DESC_F_NEXT,
                1,
                reply_at,
                pending.writable,
                DESC_F_WRITE,
                0,
            )
            head = ring.add_indirect(GUEST_BASE + table, _TABLE_SIZE)
        else:
            head = ring.add_chain(
                ((GUEST_BASE + at, size, False), (reply_at, pending.writable, True))
            )
        self._outstanding[head] = pending
        pending.state = SENT
        return True

    @property
    def capacity(self) -> int:
        """Requests that can be outstanding at once, less some that others may need."""
        return self.ring.size - UNRESERVED if self._indirect else self.ring.size // 2

    def reserve(self, at: int) -> int:
        """Bind a descriptor to the place where requests of one owner always begin.

        Return its head for ``submit_reserved``, or -1 where that cannot be: no indirect
        descriptors, or none left.
        """
        if not self._indirect or self.ring.num_free <= UNRESERVED:
            return -1
        _TABLE(
            self._map,
            at - _TABLE_SIZE,
            GUEST_BASE + at,
            0,
            DESC_F_NEXT,
            1,
            0,
            0,
            DESC_F_WRITE,
            0,
        )
        return self.ring.reserve(GUEST_BASE + at - _TABLE_SIZE)

    def describe_reserved(self, pending: Pending, at: int, size: int) -> None:
        """Write what ``submit_reserved`` relies on; it stands until the next time.

        Args:
            pending: Says where its reply goes (``data_at``) and how long it may be (``writable``).
            at: What the head was reserved for, a multiple of 8.
            size: Bytes of the request.
        """
        word = (at - _TABLE_SIZE) >> 2
        self._words[word + 2] = size
        self._words[word + 6] = pending.writable
        self._quads[(word >> 1) + 2] = GUEST_BASE - _OUT + pending.data_at

    def submit_reserved(self, pending: Pending, head: int, kick: bool) -> None:
        """As ``submit_placed``, quicker, and there is always room."""
        self._outstanding[head] = pending
        pending.state = SENT
        if not kick:
            self.ring.add_reserved(head)
        elif self.ring.send_reserved(head):
            self.kicks += 1
            _notify(self.kick_fd, 1)
        else:
            self.kicks_saved += 1

    def submit_raw(
        self, pending: Pending, readable: Sequence[bytes], writable: Sequence[int]
    ) -> bool:
        """Make a chain of any pieces available, unchecked; return False when there is no room.

        The block holds the table, the readable pieces and the writable ones, back to back.

        Raises:
            ValueError: No pieces, more pieces than the queue has descriptors, or too many bytes.
        """
        ring = self.ring
        count = len(readable) + len(writable)
        if not 1 <= count <= ring.size:
            raise ValueError(f"a chain of {count} descriptors, the queue has {ring.size}")
        if ring.num_free < (1 if self._indirect else count):
            return False
        table_size = _DESC_SIZE * count
        content = b"".join(readable)
        block = self._arena.allocate(table_size + len(content) + sum(writable))
        if block < 0:
            return False
        at = block + table_size
        self._map[at : at + len(content)] = content
        pending.block = block
        pending.data_at = at + len(content)
        pending.writable = sum(writable)
        parts = []
        for length, is_writable in [(len(p), False) for p in readable] + [
            (n, True) for n in writable
        ]:
            parts.append((GUEST_BASE + at, length, is_writable))
            at += length
        self._send(pending, self._add_parts(block, parts), True)
        return True

    def _add_parts(self, block: int, parts: Sequence[tuple[int, int, bool]]) -> int:
        if not self._indirect:
            return self.ring.add_chain(parts)
        last = len(parts) - 1
        for i, (guest_addr, length, is_writable) in enumerate(parts):
            flags = DESC_F_NEXT * (i < last) | DESC_F_WRITE * is_writable
            following = i + 1 if i < last else 0
            _DESC(self._map, block + _DESC_SIZE * i, guest_addr, length, flags, following)
        return self.ring.add_indirect(GUEST_BASE + block, _DESC_SIZE * len(parts))

    def _send(self, pending: Pending, head: int, kick: bool) -> None:
        self._outstanding[head] = pending
        pending.state = SENT
        pending.started_ns = perf_counter_ns()
        if kick:
            self.kick()

    def kick(self) -> None:
        """Show the device what was added, and tell it if it wants to be told."""
        if self.ring.publish():
            self.kicks += 1
            _notify(self.kick_fd, 1)
        else:
            self.kicks_saved += 1

    # --- reaping ---

    def reap(self, done: list[Pending]) -> None:
        """Take everything that the device has used; add it to ``done``.

        Their state becomes DONE, or stays ABANDONED or POSTED. ``done`` is right even when this
        raises.

        Raises:
            ProtocolViolation: The device broke a rule; the queue must not be used any more.
        """
        while (pending := self.take()) is not None:
            done.append(pending)

    def take(self) -> Pending | None:
        """Take the next one that the device has used, as ``reap`` does; None when there is none.

        Raises:
            ProtocolViolation: As ``reap``.
        """
        used = self.ring.take_used()
        if used is None:
            return None
        head, written = used
        pending = self._outstanding[head]
        assert pending is not None
        writable = pending.writable
        if written > writable:
            raise ProtocolViolation(
                f"the device wrote {written} bytes to {pending}, there is room for {writable}"
            )
        if pending.opcode < 0:
            pending.length = written
        elif writable:
            at = pending.data_at - _OUT
            quad, quads = at >> 3, self._quads
            # Length and error are one load, which is the length alone when all is well.
            if quads[quad] == written >= _OUT and quads[quad + 1] == pending.unique and not at & 7:
                pending.length = written - _OUT
            else:
                # Checked is what was read, not what is there now.
                check_reply(pending, written, *_OUT_HEADER(self._map, at))
        self._outstanding[head] = None
        if pending.state == SENT:
            pending.state = DONE
        return pending

    def poll(self, pending: Pending, nanoseconds: int, done: list[Pending]) -> bool:
        """Look for the reply to one request, for at most about ``nanoseconds``; return if it came.

        Between two looks the CPU is offered to others: when the daemon was woken on this very CPU,
        it runs now. Everything else that was used meanwhile is added to ``done`` as well.

        Raises:
            ProtocolViolation: As ``reap``.
        """
        ring = self.ring
        deadline = perf_counter_ns() + nanoseconds
        while True:
            # First look, then yield: a daemon on this very CPU runs inside the kick (wake-up
            # preemption) and has answered by now; the yield would hand the CPU to the application.
            if ring.has_used():
                self.reap(done)
                if pending.state == DONE:
                    return True
            if perf_counter_ns() >= deadline:
                return False
            os.sched_yield()
