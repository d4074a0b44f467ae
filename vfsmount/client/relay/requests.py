"""What the relay does with the kernel's requests besides handing them on, opcode by opcode.

A ``Route`` says it all of one opcode. Two functions of it see the request:

    local      first of all: answers it here, changes it in place, or takes a note of it
    special    when the slot is ready to go: hands it over in another way than the rest

and a third, ``failed``, sees the error with which it ends, before the kernel does. Most opcodes
have none of them. Each returns whether that is all.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import suppress
from copy import copy
from functools import partial
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.cache.known_names import KnownNames
from vfsmount.cache.xattrs import AbsentXattrs
from vfsmount.channel.inflight import POSTED, SENT, Pending
from vfsmount.client.relay.listings import OFFSET_AT, SIZE_AT, room_for_names
from vfsmount.client.relay.memory import (
    SetIdMemory,
    flags_of_write,
)
from vfsmount.client.relay.opens import CHANGES, invalidation
from vfsmount.client.relay.rewrite import FailsHere, flags_below_writeback, judge_write_back
from vfsmount.client.relay.rooms import named_rooms, small_rooms
from vfsmount.client.relay.slots import SMALL_REPLY
from vfsmount.client.relay.unwritten import Unwritten
from vfsmount.client.session import setattr_in
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode, WriteFlag

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import TypeAlias

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.channel.statistics import OpcodeCounter
    from vfsmount.client.relay.device import DevicePort
    from vfsmount.client.relay.kernel import KernelPort
    from vfsmount.client.relay.late import LateReplies
    from vfsmount.client.relay.opens import OpenChecks
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.slots import Slot

    #: Slot, offset of the request, its bytes, its nodeid; whether it has been dealt with.
    Handler: TypeAlias = Callable[[Slot, int, int, int], bool]

__all__ = ["RequestRules", "Route", "make_routes"]

_EIO: Final = 5
_IN: Final = fuse.IN_HEADER.size
_XATTR_NAME_AT: Final = _IN + fuse.GETXATTR_IN.size
_PUT_U32: Final = struct.Struct("<I").pack_into
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_SETLKW: Final = int(Opcode.SETLKW)
_OPCODE_AT: Final = 4
_FORGET_ONE: Final = struct.Struct("<QQ").unpack_from
_RELEASE_FLAGS_AT: Final = _IN + 12  # release_in: fh, flags, release_flags
_FLOCK_UNLOCK: Final = int(fuse.ReleaseFlag.FLOCK_UNLOCK)
_MODE: Final = int(fuse.SetattrValid.MODE)
_MODE_AT: Final = 68  # of setattr_in
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_OF_PAGES: Final = int(WriteFlag.CACHE)
_CLEARS_SET_ID: Final = int(WriteFlag.KILL_SUIDGID)
_WRITE_SIZE_AT: Final = 16  # write_in: fh, offset, size
_FLUSH_IN: Final = struct.Struct("<Q8xQ").unpack_from  # flush_in: fh, unused, lock_owner
_COPY_TARGET_AT: Final = 24  # copy_file_range_in: fh_in, off_in, nodeid_out, fh_out

#: RELEASEs that wait for a kick without company.
_POSTED_AT_ONCE: Final = 16

#: Routes that are made; opcodes above share one, on which the daemon decides.
ROUTES: Final = max(Opcode.COPY_FILE_RANGE_64, 63) + 1


class Route:
    """What happens to the requests of one opcode, and to their replies.

    Attributes:
        local: Sees a request first; None for most.
        special: Sees a slot that is ready to go; None for most.
        failed: Sees the errno with which a slot ends; None for most.
        room: Bytes of the reply, header included, where that is always the same and little; 0
            where it has to be found out.
        size_at: Offset in the request of the bytes that the reply may have besides its header; 0
            where that is not all.
        changes: It may change attributes.
        is_known: It is the route of this opcode alone.
        rewrite: Puts the cache policy's values into the reply; None for most.
        counter: Counts replies, from the first one on.
        names_alone: The reply has names where the kernel has asked for more.
    """

    __slots__ = (
        "changes",
        "counter",
        "failed",
        "is_known",
        "local",
        "names_alone",
        "rewrite",
        "room",
        "size_at",
        "special",
    )

    def __init__(self, *, is_known: bool) -> None:
        self.is_known = is_known
        self.local: Handler | None = None
        self.special: Handler | None = None
        self.failed: Callable[[Slot, int], bool] | None = None
        self.room = 0
        self.size_at = 0
        self.changes = False
        self.rewrite: Rewriter | None = None
        self.counter: OpcodeCounter | None = None
        self.names_alone = False


def make_routes(
    rules: RequestRules, rewriters: dict[int, Rewriter], *, checks_opens: bool
) -> list[Route]:
    """Return the routes by opcode; the last one is for all opcodes that are unknown.

    Args:
        rules: Has the functions.
        rewriters: What is to be done to replies.
        checks_opens: What the kernel knows is checked when it opens a file.
    """
    routes = [Route(is_known=opcode < ROUTES) for opcode in range(ROUTES + 1)]
    for opcode, room in small_rooms(SMALL_REPLY).items():
        routes[opcode].room = room
    for opcode, size_at in named_rooms().items():
        routes[opcode].size_at = size_at
    for opcode, handler in rules.local().items():
        routes[opcode].local = handler
    for opcode, handler in rules.special(checks_opens=checks_opens).items():
        routes[opcode].special = handler
    for opcode, rewriter in rewriters.items():
        routes[opcode].rewrite = rewriter
    for opcode in (Opcode.SETXATTR, Opcode.REMOVEXATTR):
        routes[opcode].rewrite = rules.xattr_changed
    for opcode in CHANGES if checks_opens else ():
        routes[opcode].changes = True
    # The kernel writes pages back in all modes: maps that are shared can be had in ``none`` too.
    rules.write_back = copy(routes[Opcode.WRITE])
    rules.write_back.rewrite = judge_write_back
    if rules.unwritten is not None:
        rules.write_back.failed = rules.pages_failed
        for opcode in (Opcode.FLUSH, Opcode.FSYNC):
            routes[opcode].failed = rules.not_known
    return routes


class RequestRules:
    """The functions, and what they remember.

    Args:
        loan: The queues.
        policy: What the kernel may believe.
        kernel: Answers what needs no daemon.
        device: Gets what is handed over in another way.
        opens: Checks OPENs.
        late: Knows waits for locks that go on without their callers.
        quiet_flush: Where nothing was locked, a FLUSH means nothing to the daemon but "tell me of
            errors in writing".
        heeds_interrupts: The daemon ends a wait for a lock when it is told of an interrupt.

    Attributes:
        modes: Files with set-id bits.
        absent: Extended attributes that files do not have.
        known: Directories of which the kernel knows the names.
        write_back: The route of a WRITE of the kernel's pages, whose caller sees errors alone.
        unwritten: Of the pages that the kernel keeps for a while; None without its write-back.
        passthrough: Files that the kernel reads and writes by itself; None without DAX.
    """

    def __init__(
        self,
        loan: Loan,
        policy: CachePolicy,
        kernel: KernelPort,
        device: DevicePort,
        opens: OpenChecks,
        *,
        quiet_flush: bool,
        heeds_interrupts: bool,
    ) -> None:
        self.modes = SetIdMemory()
        self.absent = AbsentXattrs(policy.attr_timeout)
        # Where listings are kept by the kernel, it asks for none that it has.
        valid = min(policy.entry_timeout, policy.attr_timeout) if policy.revalidate else 0.0
        self.known = KnownNames(valid)
        self._names_alone = Route(is_known=True)
        self._names_alone.names_alone = True
        self.late: LateReplies
        self.write_back: Route
        self.passthrough = opens.passthrough
        self._map = loan.memory.map
        self._queue = loan.requests
        self._kernel = kernel
        self._device = device
        self._opens = opens
        self._quiet_flush = quiet_flush
        self._heeds_interrupts = heeds_interrupts
        self.unwritten = Unwritten() if policy.writeback else None
        #: Handles that wrote since their last FLUSH.
        self._wrote: set[int] = set()
        #: Nodes that the daemon may have POSIX locks on; a FLUSH gives its owner's up.
        self._locked: set[int] = set()

    def local(self) -> dict[int, Handler]:
        """Return what sees requests first, by opcode."""
        flush = self._flush if self.passthrough is None else self._flush_passed
        quiet = {Opcode.FLUSH: flush} if self._quiet_flush else {}
        below: dict[Opcode, Handler] = {}
        if self.unwritten is not None:
            below = dict.fromkeys((Opcode.OPEN, Opcode.CREATE), self._open)
            below |= {Opcode.FLUSH: self._flush_unwritten, Opcode.FSYNC: self._fsync_unwritten}
        table: dict[Opcode, Handler] = {
            Opcode.FALLOCATE: self._fallocate,
            Opcode.COPY_FILE_RANGE: self._copy,
            Opcode.COPY_FILE_RANGE_64: self._copy,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.CREATE: self._create,
            Opcode.GETATTR: self._getattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.SETXATTR: self._xattr_change,
            Opcode.REMOVEXATTR: self._xattr_change,
            Opcode.SETLK: self._lock,
            Opcode.SETLKW: self._lock_wait,
            Opcode.NOTIFY_REPLY: lambda *_: True,  # we never ask
            Opcode.INIT: self._unexpected,
            Opcode.DESTROY: self._unexpected,  # only fuseblk mounts send it
            **quiet,
            **below,
        }
        return {int(opcode): handler for opcode, handler in table.items()}

    def special(self, *, checks_opens: bool) -> dict[int, Handler]:
        """Return what sees slots that are ready to go, by opcode."""
        table: dict[Opcode, Handler] = {
            Opcode.RELEASE: self._release,
            Opcode.RELEASEDIR: self._post,
            Opcode.WRITE: self._note_write,
            Opcode.READDIRPLUS: self._list,
        }
        if checks_opens or self.passthrough is not None:
            table[Opcode.OPEN] = self._check_open
        if self.passthrough is not None:
            table |= dict.fromkeys((Opcode.CREATE, Opcode.TMPFILE), self._check_create)
            table[Opcode.SETATTR] = self._note_mode
            table[Opcode.RELEASE] = self._post_passed
        return {int(opcode): handler for opcode, handler in table.items()}

    # --- forgetting and giving up ---

    def forget(self, nodeid: int, nlookup: int) -> None:
        """References to a node are given back; so is what is known of it."""
        self.absent.forget(nodeid)
        self.modes.drop(nodeid)
        self.known.clear()
        self._locked.discard(nodeid)
        self._opens.forget(nodeid)
        if self.unwritten is not None:
            self.unwritten.forget(nodeid)
        if self.passthrough is not None:
            self.passthrough.nodes.forget(nodeid)
        self._device.forget(nodeid, nlookup)

    def _forget(self, _slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        self.forget(nodeid, _U64(self._map, at + _IN)[0])
        return True

    def _batch_forget(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        start = at + _IN + fuse.BATCH_FORGET_IN.size
        for number in range(_U32(self._map, at + _IN)[0]):
            self.forget(*_FORGET_ONE(self._map, start + 16 * number))
        return True

    def _interrupt(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        unique = _U64(self._map, at + _IN)[0]
        victim = next((one for one in self._device.in_flight() if one.answers == unique), None)
        # One that was answered meanwhile needs nothing: the kernel has the reply, or will.
        if victim is not None and not self._forward(victim):
            self.late.interrupts.interrupt(victim)
        return True

    def _forward(self, victim: Slot) -> bool:
        """Have the daemon end a wait for a lock, if it does such things."""
        if not self._heeds_interrupts or victim.opcode != _SETLKW:
            return False
        body = fuse.INTERRUPT_IN.values(victim.unique)
        return self._device.send_aside(Opcode.INTERRUPT, body)

    # --- handles ---

    def _flush(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        handle = _U64(self._map, at + _IN)[0]
        if handle in self._wrote or nodeid in self._locked:
            self._wrote.discard(handle)
            return False
        self._kernel.answer(slot.answers)
        return True

    def _flush_passed(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """FLUSH where the kernel writes by itself, perhaps through a mapping, unseen."""
        if self.passthrough is None or not self.passthrough.nodes.is_writer(
            _U64(self._map, at + _IN)[0]
        ):
            return self._flush(slot, at, size, nodeid)
        with suppress(OSError):  # forgotten meanwhile
            self._kernel.write(invalidation(nodeid))
        return False

    def _fallocate(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        self._wrote.add(_U64(self._map, at + _IN)[0])
        return False

    def _copy(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        lacks = 0 if self.unwritten is None else self.unwritten.lacks(nodeid)
        if lacks:
            self._kernel.answer(slot.answers, lacks)
            return True
        self._wrote.add(_U64(self._map, at + _IN + _COPY_TARGET_AT)[0])
        return False

    def _create(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        flags: int = _U32(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags & ~os.O_CREAT)
        return False

    def _open(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """OPEN and CREATE below the kernel's write-back."""
        flags: int = _U32(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags_below_writeback(flags) & ~os.O_CREAT)
        return False

    def _check_open(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        self._opens.begin(slot)
        return False

    def released(self, fh: int) -> None:
        """The handle of a file is given back."""
        self._wrote.discard(fh)
        if self.unwritten is not None:
            self.unwritten.released(fh)

    def _release(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        self.released(_U64(self._map, at + _IN)[0])
        return self._post(slot, at, size, nodeid)

    def _post(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """Answer a RELEASE now, and let the device have it with the next kick.

        Not one that gives locks up: somebody may wait for them.
        """
        if slot.head < 0 or _U32(self._map, at + _RELEASE_FLAGS_AT)[0] & _FLOCK_UNLOCK:
            return False
        unique, slot.answers = slot.answers, 0
        self._queue.submit_reserved(slot, slot.head, False)
        slot.state = POSTED
        self._device.posted += 1
        self._kernel.answer(unique)
        if self._device.posted >= _POSTED_AT_ONCE:
            self._device.kick()
        return True

    def _check_create(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        self._opens.begin_create(slot)
        return False

    def _note_mode(self, _slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        mode = _U32(self._map, at + _IN + _MODE_AT)[0]
        if self.passthrough is not None and mode & _SET_ID and _U32(self._map, at + _IN)[0] & _MODE:
            self.passthrough.nodes.has_set_id(nodeid)
        return False

    def _post_passed(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        if self.passthrough is not None:
            self.passthrough.nodes.released(_U64(self._map, at + _IN)[0])
        return self._release(slot, at, size, nodeid)

    def _note_write(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        used = at - slot.base + size
        if used > slot.touched:
            slot.touched = used
        self._wrote.add(_U64(self._map, at + _IN)[0])
        flags = flags_of_write(self._map, at)
        if flags & _OF_PAGES:
            slot.route = self.write_back
        return bool(flags & _CLEARS_SET_ID) and self._must_wait_for_mode(slot, nodeid)

    # --- pages that the host would not take ---

    def pages_failed(self, slot: Slot, number: int) -> bool:
        """A WRITE of the kernel's pages failed: the kernel need not know, if others are told."""
        if self.unwritten is None or not self.unwritten.failed(slot.nodeid, number):
            return False
        size = _U32(self._map, slot.at + _IN + _WRITE_SIZE_AT)[0]
        self._kernel.answer_body(slot.answers, fuse.WRITE_OUT.values(size))
        return True

    def not_known(self, slot: Slot, number: int) -> bool:
        """A FLUSH or FSYNC failed. The kernel must not learn that the daemon has no such thing.

        It would send no more of them.
        """
        if number == errno.ENOSYS:
            self._kernel.answer(slot.answers)
        return number == errno.ENOSYS

    def _flush_unwritten(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        assert self.unwritten is not None
        fh, owner = _FLUSH_IN(self._map, at + _IN)
        return self._tell(slot, self.unwritten.flushed(fh, owner))

    def _fsync_unwritten(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        assert self.unwritten is not None
        return self._tell(slot, self.unwritten.synced(nodeid, _U64(self._map, at + _IN)[0]))

    def _tell(self, slot: Slot, number: int) -> bool:
        """Have a request fail with an errno, if there is one, whatever the daemon says to it.

        It is sent all the same: there may be locks to give up, and what can be synced should be.
        """
        if number:
            slot.route = Route(is_known=True)
            slot.route.rewrite = _failing(number)
            slot.route.failed = partial(self._answer_told, number)
        return False

    def _answer_told(self, number: int, slot: Slot, _theirs: int) -> bool:
        self._kernel.answer(slot.answers, number)
        return True

    def _must_wait_for_mode(self, slot: Slot, nodeid: int) -> bool:
        """Send a SETATTR ahead of a write that clears set-id bits; return whether there was one."""
        mode = self.modes.mode_to_set(nodeid)
        if mode is None:
            return False
        body = fuse.SETATTR_IN.pack(setattr_in(mode=mode))
        ahead = Pending(Opcode.SETATTR, nodeid, body, None, fuse.ATTR_OUT.size, 0, 0, 0, 0, None)
        # When the ring is full, the bits go with the next write.
        return self._device.hold(slot, ahead)

    # --- listings ---

    def _list(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """Ask for names alone, if they are enough."""
        if _U64(self._map, at + OFFSET_AT)[0]:
            return False
        now = monotonic()
        if not self.known.is_known(nodeid, now):
            self.known.listed(nodeid, now)
            return False
        size = room_for_names(_U32(self._map, at + SIZE_AT)[0])
        _PUT_U32(self._map, at + SIZE_AT, size)
        _PUT_U32(self._map, at + _OPCODE_AT, Opcode.READDIR)
        slot.opcode = Opcode.READDIR
        slot.route = self._names_alone
        return False

    # --- attributes ---

    def _getattr(self, slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        body = self._opens.take_parked(nodeid)
        if body is None:
            return False
        self._kernel.answer_body(slot.answers, body)
        return True

    def _getxattr(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        name = self._map[at + _XATTR_NAME_AT : at + size - 1]  # a NUL follows
        if self.absent.is_absent(nodeid, name, perf_counter_ns() / 1e9):
            self._kernel.answer(slot.answers, errno.ENODATA)
            return True
        slot.xattr = name, self.absent.changes
        return False

    def _xattr_change(self, _slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        self.absent.changed(nodeid)
        return False

    def xattr_changed(
        self, _memory: mmap.mmap, _at: int, _length: int, nodeid: int, _request: int
    ) -> None:
        """As a rewriter: a change is through."""
        self.absent.changed(nodeid)

    # --- locks ---

    def _lock(self, slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        self._locked.add(nodeid)
        self.late.interrupts.note_lock(nodeid, self.late.lock_of(slot))
        return False

    def _lock_wait(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        self._locked.add(nodeid)
        lock = self.late.lock_of(slot)
        if fuse.LK_IN.unpack(lock).type == LockType.UNLOCK:
            # Never waits; virtiofsd (C), which has no waiting, refuses it all the same.
            _PUT_U32(self._map, at + _OPCODE_AT, Opcode.SETLK)
            return False
        orphan = self.late.interrupts.adopt(nodeid, lock)
        if orphan is None:
            self.late.interrupts.note_lock(nodeid, lock)
            return False
        orphan.answers = slot.answers
        orphan.state = SENT
        return True

    def _unexpected(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        self._kernel.answer(slot.answers, _EIO)
        return True


def _failing(number: int) -> Rewriter:
    """Return what makes a failure of a success."""

    def fail(_memory: mmap.mmap, _at: int, _length: int, _nodeid: int, _request: int) -> None:
        raise FailsHere(number)

    return fail
