"""The relay: one thread between ``/dev/fuse`` and the virtqueues; it hands messages on as they are.

    kernel ──read(2)──> slot of shared memory ──descriptor──> daemon ──reply──> slot ──write(2)──>

A request is read into the memory that the device sees, looked at just enough to know how long its
reply may be, and made available. The reply is written to the kernel from where the device put it.
Nothing is copied in between, and nothing is decoded but the 40 bytes of the header. What is changed
on the way is listed in ``relay_rewrite``.

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
* The kernel checks the length of each reply against its request. What it refuses has failed for the
  caller with EIO by then; it is counted.
* A reply that was judged is believed for the write that follows at once. A daemon that changes it
  in between can make the kernel refuse it, or take it for the answer to another request, which it
  could have answered wrongly in the first place.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import struct
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.channel.eventfd import close_fd, new_eventfd
from vfsmount.channel.inflight import ABANDONED, DONE, POSTED, SENT, Pending
from vfsmount.channel.rings import PollBudget
from vfsmount.channel.statistics import OpcodeCounter
from vfsmount.client.relay_interrupts import LOOK_SECONDS, Interrupts
from vfsmount.client.relay_opens import CHANGES, OpenChecks, invalidation
from vfsmount.client.relay_rewrite import (
    CapabilityMemory,
    SetIdMemory,
    asks_for_capability,
    flags_below_writeback,
    largest_request,
    negative_entry,
    reply_rewriters,
    room_for_reply,
    small_rooms,
    wants_set_id_cleared,
)
from vfsmount.client.relay_slots import SMALL_REPLY, Slot, SlotPool
from vfsmount.client.relay_undo import undo_late_reply
from vfsmount.client.session import setattr_in
from vfsmount.errors import ProtocolViolation, VfsmountError
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan

__all__ = ["Relay"]

log = logging.getLogger(__name__)

#: Seconds that a FORGET may wait for company, as in the channel.
_FORGET_SECONDS: Final = 0.01
_FORGET_BATCH: Final = 32
#: Seconds that the end waits for requests that are with the device.
DRAIN_SECONDS: Final = 5.0
#: Seconds of idleness after which memory is given back, when it is more than _KEEP bytes.
_TRIM_SECONDS: Final = 1.0
_KEEP: Final = 4 << 20
#: Single reads after which the relay stops to look for a second request before it kicks.
_BURST: Final = 8
#: RELEASEs that wait for a kick without company.
_POSTED_AT_ONCE: Final = 16
#: Nanoseconds that they may wait for it, however long the search for something to do is.
_POSTED_NS: Final = 10_000_000

_IN: Final = fuse.IN_HEADER.size
_OUT: Final = fuse.OUT_HEADER.size
_IN_HEADER: Final = struct.Struct("<IIQQ").unpack_from  # len, opcode, unique, nodeid
_PID: Final = struct.Struct("<I").unpack_from
_OPCODE_AT: Final = 4
_PID_AT: Final = 32
_PUT_U32: Final = struct.Struct("<I").pack_into
_U64: Final = struct.Struct("<Q").unpack_from
_PUT_OUT_HEADER: Final = struct.Struct("<IiQ").pack_into
_FORGET_ONE: Final = struct.Struct("<QQ").unpack_from
_COUNT: Final = struct.Struct("<I").unpack_from
_LK_IN: Final = fuse.LK_IN.size
_FH: Final = struct.Struct("<Q").unpack_from
_RELEASE_FLAGS: Final = struct.Struct("<I").unpack_from
_RELEASE_FLAGS_AT: Final = _IN + 12  # release_in: fh, flags, release_flags
_FLOCK_UNLOCK: Final = int(fuse.ReleaseFlag.FLOCK_UNLOCK)
_COPY_TARGET_AT: Final = 24  # copy_file_range_in: fh_in, off_in, nodeid_out, fh_out
_LOOKUP: Final = int(Opcode.LOOKUP)
_OPEN: Final = int(Opcode.OPEN)

#: Opcodes that are never answered, or only when refused.
_SILENT: Final = frozenset(
    int(opcode)
    for opcode, operation in fuse.OPERATIONS.items()
    if not operation.has_reply or opcode == Opcode.INTERRUPT
)

#: The connection has ended: unmounted, or aborted.
_ENDED: Final = frozenset((errno.ENODEV, errno.ECONNABORTED))


class Relay:
    """The loop and its state.

    Args:
        device: The connected, initialised ``/dev/fuse``; becomes non-blocking, stays the caller's.
        loan: The queues.
        policy: What the kernel may believe.
        max_message: Bytes of the largest READ or WRITE.
        clears_set_id: The daemon takes set-id bits off when a WRITE says so.
        on_violation: Called in this thread when the daemon breaks the rules.
        quiet_flush: A FLUSH means nothing to the daemon but "tell me of errors in writing": it has
            no locks of ours. Then one of a handle that wrote nothing is answered here.
        forwards_interrupts: The daemon can give requests up: tell it, on the hiprio queue, and let
            it answer. No daemon of today can.

    Attributes:
        refused: Replies that the kernel would not take.
        ended: ``run`` touches nothing any more.
    """

    # More attributes than the interpreter keeps at hand for a class without slots (30).
    __slots__ = (
        "_aborting",
        "_absent",
        "_all",
        "_answered_ns",
        "_asleep",
        "_burst",
        "_capabilities",
        "_checks_opens",
        "_counters",
        "_device",
        "_error",
        "_fd",
        "_forwards_interrupts",
        "_header",
        "_held",
        "_idle",
        "_interrupts",
        "_loan",
        "_local",
        "_looked_ns",
        "_map",
        "_modes",
        "_negative",
        "_on_violation",
        "_opens",
        "_pool",
        "_posted",
        "_queue",
        "_quiet_flush",
        "_readinto",
        "_replies",
        "_rewriters",
        "_small_rooms",
        "_spare",
        "_special",
        "_stalled",
        "_stopping",
        "_undone",
        "_view",
        "_wake",
        "_write",
        "_wrote",
        "ended",
        "refused",
    )

    def __init__(
        self,
        device: int,
        loan: Loan,
        policy: CachePolicy,
        max_message: int,
        clears_set_id: bool,
        on_violation: Callable[[ProtocolViolation], None],
        *,
        quiet_flush: bool = False,
        forwards_interrupts: bool = False,
    ) -> None:
        os.set_blocking(device, False)
        self.refused = 0
        self.ended = False
        self._fd = device
        self._device = io.FileIO(device, "r+", closefd=False)
        self._readinto = self._device.readinto
        self._write = self._device.write
        self._loan = loan
        self._queue = loan.requests
        self._map = loan.memory.map
        self._view = loan.memory.view
        self._counters = loan.counters
        self._on_violation = on_violation
        self._forwards_interrupts = forwards_interrupts
        # One more than the ring takes: an INTERRUPT or FORGET can be read when all are in use.
        self._pool = SlotPool(loan, largest_request(max_message), self._queue.capacity + 1)
        self._spare: Slot | None = None
        #: Requests that found the ring full (of our own requests: there are slots enough).
        self._stalled: list[Slot] = []
        self._burst = 0
        self._idle = PollBudget(loan.budget.limit_us)
        self._asleep = False
        self._undone: list[Pending] = []
        self._modes = SetIdMemory()
        self._opens = OpenChecks(loan, policy)
        self._checks_opens = policy.revalidate
        self._rewriters = reply_rewriters(
            policy,
            None if clears_set_id else self._modes,
            self._opens.fresh,
            no_flush=quiet_flush,
        )
        #: Handles that wrote since their last FLUSH.
        self._wrote: set[int] = set()
        self._quiet_flush = quiet_flush
        self._posted = 0
        #: Requests of our own, and the write that waits for each; None for those that undo.
        self._held: dict[Pending, Slot] = {}
        self._negative = negative_entry(policy)
        self._capabilities = CapabilityMemory(policy.attr_timeout)
        self._interrupts = Interrupts(self._give_up, self._lock_of, self._pid_of)
        self._local = self._local_handlers()
        if policy.writeback:
            self._local[_OPEN] = self._local[int(Opcode.CREATE)] = self._take_open
        #: What is special about handing an opcode on; True when that is all done.
        self._special: dict[int, Callable[[Slot, int, int, int], bool]] = {
            int(Opcode.RELEASE): self._post,
            int(Opcode.RELEASEDIR): self._post,
            int(Opcode.WRITE): self._note_write,
        }
        self._small_rooms = small_rooms(SMALL_REPLY)
        self._header = bytearray(_OUT)
        self._absent = bytearray(_OUT) + (self._negative or b"")
        self._answered_ns = self._looked_ns = 0
        # Told by other threads.
        self._error: VfsmountError | None = None
        self._stopping = False
        self._aborting = False
        self._wake = new_eventfd()
        # Two sets to sleep on: with and without the kernel's requests (back-pressure). Calls are
        # edge triggered, because the eventfd is shared with the daemon and is never read.
        self._all, self._replies = (select.epoll(flags=select.EPOLL_CLOEXEC) for _ in range(2))
        for watch in (self._all, self._replies):
            watch.register(self._queue.call_fd, select.EPOLLIN | select.EPOLLET)
            watch.register(self._wake, select.EPOLLIN)
        self._all.register(device, select.EPOLLIN)

    # --- from other threads ----------------------------------------------------------------------

    def stop(self) -> None:
        """End soon: what is with the device may be answered, nothing more is read."""
        self._stopping = True
        self._rouse()

    def abort(self) -> None:
        """End at once. Again, and after the end, is harmless."""
        self._aborting = self._stopping = True
        self._rouse()

    def fail(self, error: VfsmountError) -> None:
        """The channel has ended: everything from now on is answered with an error."""
        self._error = error
        self._rouse()

    def _rouse(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # --- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the connection ends or somebody says so.

        Raises:
            OSError: The device failed in a way that is not its end.
        """
        try:
            self._serve()
            if self._error is not None:
                self._serve_lost()
            elif not self._aborting:
                self._drain()
        finally:
            self._leave()

    def _serve(self) -> None:
        """The loop, while there is a daemon."""
        ring, yield_cpu, now_ns = self._queue.ring, os.sched_yield, perf_counter_ns
        has_used, collect, read, loan = ring.has_used, self._collect, self._read, self._loan
        since = 0  # when the present search for something to do began; 0 while there is some
        while not self._stopping and self._error is None:
            if has_used():
                collect()
                since = 0
            try:
                found = read()
            except OSError as error:
                if error.errno in _ENDED:
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
            if self._posted and patience > _POSTED_NS:
                patience = _POSTED_NS
            if now - since < patience:
                yield_cpu()
            elif self._posted:
                self._kick()
            else:
                budget.miss()
                self._sleep()
                since = 0

    def _sleep(self) -> None:
        """Wait until anything happens."""
        ring = self._queue.ring
        if ring.outstanding and ring.arm():
            return
        watch = self._replies if self._spare_slot() is None else self._all
        timeout = self._timeout()
        events = watch.poll(timeout)
        ring.disarm()
        self._asleep = True
        for fd, _ in events:
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif fd == self._queue.call_fd:
                self._loan.calls += 1
        if not events or perf_counter_ns() > self._looked_ns:
            self._look_after(idle=not events)

    def _spare_slot(self) -> Slot | None:
        """The slot to read into; None when the kernel has to wait."""
        if self._spare is None and not self._stalled:
            self._spare = self._pool.take()
        return None if self._stalled else self._spare

    def _timeout(self) -> float | None:
        """Seconds to sleep at most; None for ever."""
        if self._interrupts:
            return LOOK_SECONDS
        if len(self._loan.forgets) or self._undone:
            return _FORGET_SECONDS
        if self._loan.hiprio.ring.outstanding:
            return LOOK_SECONDS  # to have the buffers of FORGETs back; the device does not call
        if self._queue.ring.outstanding:
            return self._loan.watchdog.interval
        return _TRIM_SECONDS if self._pool.is_bloated(_KEEP) else None

    def _look_after(self, *, idle: bool) -> None:
        """What has to be done now and then: forgets, mute requests, interrupted callers, memory."""
        now = perf_counter_ns()
        self._looked_ns = now + int(self._loan.watchdog.interval * 1e9)
        self._flush_forgets()
        self._send_undone()
        self._interrupts.look()
        overdue = set(self._loan.watchdog.examine(self._in_flight(), now))
        for slot in self._in_flight():
            if slot in overdue:
                self._give_up(slot, errno.ETIMEDOUT)
        if idle and not self._queue.ring.outstanding and self._pool.is_bloated(_KEEP):
            self._pool.trim()

    def _in_flight(self) -> list[Slot]:
        """Requests of the kernel that the device has, those answered already included."""
        slots = [one for one in self._queue.outstanding() if isinstance(one, Slot)]
        return slots + list(self._held.values()) + self._opens.waiting()

    # --- requests --------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Read what the kernel has, one request or several, and kick; return whether there was any.

        Raises:
            OSError: The device has ended or failed.
        """
        slot = self._spare
        if slot is None or self._stalled:
            slot = self._spare_slot()
            if slot is None:
                return False
        readinto = self._readinto
        got = readinto(slot.view)
        if not got:
            if got is None:
                return False
            raise OSError(errno.ENODEV, "end of file")  # only something else than /dev/fuse has one
        queue = self._queue
        ring = queue.ring
        before, posted = ring.outstanding, self._posted
        if before > posted:
            self._burst = _BURST
        while got:
            if self._take(slot):
                self._spare = None
                if not self._burst:
                    break
                following = self._spare_slot()
                if following is None:
                    break
                slot = following
            got = readinto(slot.view)
        added = ring.outstanding - before - self._posted + posted
        if added or self._posted >= _POSTED_AT_ONCE:
            self._posted = 0
            queue.kick()
            if added == 1 and self._burst:
                self._burst -= 1
        if self._asleep:
            self._asleep = False
        elif self._idle.nanoseconds < self._idle.limit:
            self._idle.hit()
        return True

    def _take(self, slot: Slot) -> bool:
        """Hand one request on; return whether it needs its slot from now on."""
        at = slot.at
        memory = self._map
        size, opcode, unique, nodeid = _IN_HEADER(memory, at)
        slot.answers = slot.unique = unique
        handler = self._local.get(opcode)
        if handler is not None and handler(slot, at, size, nodeid):
            return False
        slot.opcode = opcode
        slot.nodeid = nodeid
        slot.size = size
        slot.errno = slot.length = 0
        slot.reported = False
        room = self._small_rooms.get(opcode)
        if room is not None:
            slot.data_at = slot.small
            slot.writable = room
        elif not slot.make_room(size, room_for_reply(opcode, memory, at)):
            self._reply_error(unique, errno.EIO)
            return False
        slot.started_ns = perf_counter_ns()
        if self._checks_opens:
            if opcode in CHANGES:
                self._opens.begin_change()
            elif opcode == _OPEN:
                self._opens.begin(slot)
        special = self._special.get(opcode)
        if special is not None and special(slot, at, size, nodeid):
            return True
        if slot.head >= 0:
            self._queue.submit_reserved(slot, slot.head, at, size)
        else:
            self._submit(slot)
        return True

    def _kick(self) -> None:
        self._posted = 0
        self._queue.kick()

    def _submit(self, slot: Slot) -> None:
        if slot.head >= 0:
            self._queue.submit_reserved(slot, slot.head, slot.at, slot.size)
        elif not self._queue.submit_placed(slot, slot.at, slot.size):
            self._stalled.append(slot)

    def _post(self, slot: Slot, at: int, size: int, _nodeid: int) -> bool:
        """Answer a RELEASE now, and let the device have it with the next kick.

        Not one that gives locks up: somebody may wait for them.
        """
        self._wrote.discard(_FH(self._map, at + _IN)[0])
        if slot.head < 0 or _RELEASE_FLAGS(self._map, at + _RELEASE_FLAGS_AT)[0] & _FLOCK_UNLOCK:
            return False
        unique, slot.answers = slot.answers, 0
        self._queue.submit_reserved(slot, slot.head, at, size)
        slot.state = POSTED
        self._posted += 1
        self._write_header(unique, 0)
        return True

    def _note_write(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        if at + size > slot.touched:
            slot.touched = at + size
        self._wrote.add(_FH(self._map, at + _IN)[0])
        return self._must_wait_for_mode(slot, at, nodeid)

    def _must_wait_for_mode(self, slot: Slot, at: int, nodeid: int) -> bool:
        """Send a SETATTR ahead of a write that clears set-id bits; return whether there was one."""
        if not wants_set_id_cleared(self._map, at):
            return False
        mode = self._modes.mode_to_set(nodeid)
        if mode is None:
            return False
        body = fuse.SETATTR_IN.pack(setattr_in(mode=mode))
        pending = Pending(Opcode.SETATTR, nodeid, body, None, fuse.ATTR_OUT.size, 0, 0, 0, 0, None)
        if not self._queue.submit(pending):
            return False  # the ring is full; the bits go with the next write
        slot.state = SENT
        self._held[pending] = slot
        return True

    def _local_handlers(self) -> dict[int, Callable[[Slot, int, int, int], bool]]:
        """Opcodes that may be dealt with here: (slot, at, size, nodeid) to whether it was."""
        quiet = {Opcode.FLUSH: self._take_flush} if self._quiet_flush else {}
        table: dict[Opcode, Callable[[Slot, int, int, int], bool]] = {
            **quiet,
            Opcode.FALLOCATE: self._take_fallocate,
            Opcode.COPY_FILE_RANGE: self._take_copy,
            Opcode.COPY_FILE_RANGE_64: self._take_copy,
            Opcode.FORGET: self._take_forget,
            Opcode.BATCH_FORGET: self._take_batch_forget,
            Opcode.INTERRUPT: self._take_interrupt,
            Opcode.CREATE: self._take_create,
            Opcode.GETATTR: self._take_getattr,
            Opcode.GETXATTR: self._take_getxattr,
            Opcode.SETXATTR: self._take_xattr_change,
            Opcode.REMOVEXATTR: self._take_xattr_change,
            Opcode.SETLK: self._take_lock,
            Opcode.SETLKW: self._take_lock_wait,
            Opcode.NOTIFY_REPLY: lambda *_: True,  # we never ask
            Opcode.INIT: self._take_unexpected,
            Opcode.DESTROY: self._take_unexpected,  # only fuseblk mounts send it
        }
        return {int(opcode): handler for opcode, handler in table.items()}

    def _take_forget(self, _slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        self._forget(nodeid, _U64(self._map, at + _IN)[0])
        return True

    def _take_batch_forget(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        start = at + _IN + fuse.BATCH_FORGET_IN.size
        for number in range(_COUNT(self._map, at + _IN)[0]):
            self._forget(*_FORGET_ONE(self._map, start + 16 * number))
        return True

    def _forget(self, nodeid: int, nlookup: int) -> None:
        self._capabilities.drop(nodeid)
        self._modes.drop(nodeid)
        self._opens.forget(nodeid)
        forgets = self._loan.forgets
        forgets.add(nodeid, nlookup)
        if len(forgets) >= _FORGET_BATCH:
            self._flush_forgets()

    def _flush_forgets(self) -> None:
        forgets = self._loan.forgets
        self._reap_forgets()
        if len(forgets) and self._error is None:
            forgets.flush()

    def _reap_forgets(self) -> None:
        """Free what FORGETs lay in; the device returns that without a call."""
        done: list[Pending] = []
        try:
            self._loan.hiprio.reap(done)
        except ProtocolViolation as violation:
            self._violated(violation)
        for pending in done:
            self._loan.arena.free(pending.block)

    def _take_interrupt(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        victim = _U64(self._map, at + _IN)[0]
        if self._forwards_interrupts:
            body = fuse.INTERRUPT_IN.values(victim)
            pending = Pending(Opcode.INTERRUPT, 0, body, None, -1, 0, 0, 0, 0, None)
            self._reap_forgets()
            if self._error is None and self._loan.hiprio.submit(pending):
                pending.state = ABANDONED
        else:
            self._interrupts.interrupt(victim, self._in_flight())
        return True

    def _take_flush(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        handle = _FH(self._map, at + _IN)[0]
        if handle in self._wrote:
            self._wrote.discard(handle)
            return False
        self._write_header(slot.answers, 0)
        return True

    def _take_fallocate(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        self._wrote.add(_FH(self._map, at + _IN)[0])
        return False

    def _take_copy(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        self._wrote.add(_FH(self._map, at + _IN + _COPY_TARGET_AT)[0])
        return False

    def _take_create(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        flags: int = _COUNT(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags & ~os.O_CREAT)
        return False

    def _take_open(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        flags: int = _COUNT(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags_below_writeback(flags) & ~os.O_CREAT)
        return False

    def _take_getattr(self, slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        body = self._opens.take_parked(nodeid)
        if body is None:
            return False
        header = fuse.OUT_HEADER.values(_OUT + len(body), 0, slot.answers)
        with suppress(OSError):  # the caller is gone, or all is
            self._write(header + body)
        return True

    def _take_getxattr(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        slot.is_capability = asks_for_capability(self._map, at, size)
        if slot.is_capability and self._capabilities.is_absent(nodeid, perf_counter_ns() / 1e9):
            self._reply_error(slot.answers, CapabilityMemory.errno)
            return True
        return False

    def _take_xattr_change(self, _slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        self._capabilities.drop(nodeid)
        return False

    def _take_lock(self, slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        self._interrupts.note_lock(nodeid, self._lock_of(slot))
        return False

    def _take_lock_wait(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        lock = self._lock_of(slot)
        if fuse.LK_IN.unpack(lock).type == LockType.UNLOCK:
            # Never waits; virtiofsd (C), which has no waiting, refuses it all the same.
            _PUT_U32(self._map, at + _OPCODE_AT, Opcode.SETLK)
            return False
        orphan = self._interrupts.adopt(nodeid, lock)
        if orphan is None:
            self._interrupts.note_lock(nodeid, lock)
            return False
        orphan.answers = slot.answers
        orphan.state = SENT
        return True

    def _take_unexpected(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        self._reply_error(slot.answers, errno.EIO)
        return True

    def _lock_of(self, slot: Slot) -> bytes:
        return self._map[slot.at + _IN : slot.at + _IN + _LK_IN]

    def _pid_of(self, slot: Slot) -> int:
        pid: int = _PID(self._map, slot.at + _PID_AT)[0]
        return pid

    # --- replies ---------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take everything that the device has used, and answer it."""
        take, ring = self._queue.take, self._queue.ring
        checks_opens = self._checks_opens
        try:
            # The first look is always taken: a device that uses what it does not have is caught.
            while (pending := take()) is not None:
                if type(pending) is not Slot:
                    self._finish_own(pending)
                    if not ring.outstanding:
                        break
                    continue
                if checks_opens and pending.opcode in CHANGES:
                    self._opens.end_change()
                if pending.check is not None:
                    if self._opens.replied(pending):
                        self._finish(pending)
                elif pending.state == DONE:
                    self._answer(pending)
                    pending.answers = 0
                    if self._spare is None:
                        self._spare = pending
                    else:
                        self._pool.put(pending)
                else:
                    self._settle(pending)
                if not ring.outstanding:
                    break
        except ProtocolViolation as violation:
            self._violated(violation)
        budget = self._loan.budget
        if self._asleep:
            self._asleep = False
        elif budget.nanoseconds < budget.limit:
            budget.hit()
        else:
            budget.hits += 1
        if self._stalled:
            self._retry_stalled()
        if self._answered_ns > self._looked_ns:
            self._look_after(idle=False)

    def _finish(self, slot: Slot) -> None:
        """All that an answer needs is there."""
        if slot.state != DONE:
            self._settle(slot)
            return
        self._answer(slot)
        slot.check = None
        slot.answers = 0
        self._pool.put(slot)

    def _settle(self, slot: Slot) -> None:
        """The device has answered what nobody waits for."""
        if slot.state == POSTED:
            self._count(slot)
        else:
            self._undo(slot)
        slot.check = None
        slot.answers = 0
        self._pool.put(slot)

    def _finish_own(self, pending: Pending) -> None:
        """A request of our own is through; a write or an open may have waited for it."""
        opened = self._opens.learned(pending)
        self._loan.arena.free(pending.block)
        if opened is not None:
            self._finish(opened)
        held = self._held.pop(pending, None)
        if held is not None and held.state == ABANDONED:
            self._opens.end_change()
            self._pool.put(held)
        elif held is not None:
            self._submit(held)
            self._queue.kick()

    def _retry_stalled(self) -> None:
        waiting, self._stalled = self._stalled, []
        for slot in waiting:
            self._submit(slot)
        self._queue.kick()

    def _answer(self, slot: Slot) -> None:
        """Write one reply to the kernel."""
        opcode = slot.opcode
        counter = self._counters.get(opcode)
        if counter is None or slot.errno:
            self._count(slot)
            if slot.errno:
                self._answer_error(slot)
                return
        else:  # _count, written out
            self._answered_ns = now = perf_counter_ns()
            counter.add(now - slot.started_ns)
        at, length = slot.data_at, slot.length
        rewrite = self._rewriters.get(opcode)
        if rewrite is not None:
            rewrite(self._map, at, length, slot.nodeid, slot.at)
        if slot.check is not None and not self._may_open(slot):
            return
        if slot.answers != slot.unique:
            self._write_header(slot.answers, 0)
            return
        try:
            self._write(self._view[at - _OUT : at + length])
        except OSError as error:
            self._refused(slot, error)

    def _may_open(self, slot: Slot) -> bool:
        """Put into an OPEN's answer what its check has found; False when it is refused."""
        verdict = self._opens.judge(slot)
        if verdict.replaced:
            # The kernel takes it as: look the name up again, then open what that finds.
            self._take_back(slot)
            self._reply_error(slot.answers, errno.ESTALE)
            return False
        if not verdict.keep_attributes:
            # Of attributes alone, which takes no lock that a request could hold.
            with suppress(OSError):  # forgotten meanwhile
                self._write(invalidation(slot.nodeid))
        return True

    def _count(self, slot: Slot) -> None:
        counter = self._counters.get(slot.opcode)
        if counter is None:
            counter = self._counters[slot.opcode] = OpcodeCounter()
        self._answered_ns = now = perf_counter_ns()
        counter.add(now - slot.started_ns)
        if slot.errno:
            counter.errors += 1

    def _answer_error(self, slot: Slot) -> None:
        number = slot.errno
        if number == errno.ENOENT and slot.opcode == _LOOKUP and self._negative is not None:
            _PUT_OUT_HEADER(self._absent, 0, len(self._absent), 0, slot.answers)
            with suppress(OSError):  # the caller is gone, or all is
                self._write(self._absent)
            return
        if slot.is_capability:
            slot.is_capability = False
            if number == CapabilityMemory.errno:
                self._capabilities.note_absent(slot.nodeid, slot.started_ns / 1e9)
        self._reply_error(slot.answers, number)

    def _reply_error(self, unique: int, number: int) -> None:
        self._write_header(unique, -number)

    def _write_header(self, unique: int, error: int) -> None:
        _PUT_OUT_HEADER(self._header, 0, _OUT, error, unique)
        # ENOENT: nobody waits any more; ENODEV: the read that comes next will tell.
        with suppress(OSError):
            self._write(self._header)

    def _refused(self, slot: Slot, error: OSError) -> None:
        """The kernel did not take a reply."""
        if error.errno == errno.EINVAL:
            # Its length does not fit the request; the kernel has failed that with EIO by itself,
            # or has left it alone, and then we do.
            self.refused += 1
            if self.refused == 1:
                log.warning("the kernel refused the daemon's reply to %s", slot)
            self._reply_error(slot.answers, errno.EIO)
        elif error.errno == errno.ENOENT:
            self._undo(slot)  # the request was aborted

    # --- requests answered before their time -----------------------------------------------------

    def _give_up(self, slot: Slot, number: int) -> None:
        """Answer a request with an error now; the device may keep it as long as it likes."""
        slot.state = ABANDONED
        unique, slot.answers = slot.answers, 0
        self._loan.abandoned += 1
        self._reply_error(unique, number)

    def _undo(self, slot: Slot) -> None:
        """Take back what a late reply has handed out."""
        if self._interrupts.settle(slot) and not slot.errno:
            self._take_back(slot)

    def _take_back(self, slot: Slot) -> None:
        """Have the daemon forget what a reply has handed out."""
        args = self._map[slot.at + _IN : slot.at + _IN + _LK_IN]
        reply = self._map[slot.data_at : slot.data_at + slot.length]
        undo = undo_late_reply(slot.opcode, slot.nodeid, args, reply)
        for nodeid in undo.forgets:
            self._forget(nodeid, 1)
        for opcode, nodeid, body in undo.requests:
            self._undone.append(Pending(opcode, nodeid, body, None, 0, 0, 0, 0, 0, None))
        self._send_undone()

    def _send_undone(self) -> None:
        while self._undone and self._queue.submit(self._undone[0]):
            self._undone.pop(0).state = ABANDONED

    # --- the end ---------------------------------------------------------------------------------

    def _violated(self, violation: ProtocolViolation) -> None:
        if self._error is None:
            self._error = violation
            self._on_violation(violation)

    def _serve_lost(self) -> None:
        """The loop when the daemon is gone: errors for everybody, until the mount ends."""
        number = errno.EIO if isinstance(self._error, ProtocolViolation) else errno.ENOTCONN
        for slot in (*self._in_flight(), *self._stalled):
            if slot.state not in (ABANDONED, POSTED):
                self._reply_error(slot.answers, number)
        # Where all slots are with the device, which is gone, any will do.
        slot = self._spare or self._pool.take() or self._in_flight()[0]
        while not self._stopping:
            try:
                got = self._readinto(slot.view)
            except OSError as error:
                if error.errno in _ENDED:
                    return
                if error.errno != errno.ENOENT:
                    raise
                continue
            if got == 0:
                return
            if got is None:
                self._all.poll()
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            _, opcode, unique, _ = _IN_HEADER(self._map, slot.at)
            if opcode not in _SILENT:
                self._reply_error(unique, number)

    def _drain(self) -> None:
        """Wait for what the device has: RELEASEs and writes nobody waits for. Bounded."""
        ring = self._queue.ring
        self._kick()
        deadline = perf_counter_ns() + int(DRAIN_SECONDS * 1e9)
        while ring.outstanding and self._error is None and not self._aborting:
            if not ring.arm():
                if perf_counter_ns() > deadline:
                    return
                self._replies.poll(LOOK_SECONDS)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if ring.has_used():
                self._collect()

    def _leave(self) -> None:
        """Let go of everything; what the device still has gets blocks that the channel can free."""
        for slot in self._in_flight():
            slot.state = ABANDONED
            slot.block = self._loan.arena.allocate(1)
        for watch in (self._all, self._replies):
            watch.close()
        self._pool.close()
        self.ended = True

    def close(self) -> None:
        """Close what ``stop`` and ``fail`` use; when ``run`` has returned."""
        wake, self._wake = self._wake, -1
        close_fd(wake)
