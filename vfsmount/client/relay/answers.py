"""What the relay does with the device's replies: judged, rewritten where need be, to the kernel.

A reply is written from where the device put it. The kernel checks its length against the request;
what it refuses has failed for the caller with EIO by then, and is counted.
"""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.channel.statistics import OpcodeCounter
from vfsmount.channel.trace import is_traced, trace_request
from vfsmount.client.relay.listings import names_as_plus
from vfsmount.client.relay.opens import invalidation
from vfsmount.client.relay.rewrite import FailsHere, negative_entry
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.cache.xattrs import AbsentXattrs
    from vfsmount.channel.inflight import Pending
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.kernel import KernelPort
    from vfsmount.client.relay.late import LateReplies
    from vfsmount.client.relay.opens import OpenCheck, OpenChecks
    from vfsmount.client.relay.slots import Slot

__all__ = ["Answers"]

log = logging.getLogger(__name__)

_OUT: Final = fuse.OUT_HEADER.size
_LOOKUP: Final = int(Opcode.LOOKUP)
_GETXATTR: Final = int(Opcode.GETXATTR)
_OPENDIR: Final = int(Opcode.OPENDIR)


class Answers:
    """The way back.

    Args:
        loan: The queues; replies are counted in its counters.
        policy: What the kernel may believe.
        kernel: Takes the answers.
        opens: Judges OPENs.
        late: Undoes what the kernel would not take.
        absent: Is told of extended attributes that there are none of.

    Attributes:
        counted_ns: When the last reply was counted, ``perf_counter_ns``.
        refused: Replies that the kernel would not take.
    """

    __slots__ = (
        "_absent",
        "_counters",
        "_is_traced",
        "_kernel",
        "_late",
        "_map",
        "_negative",
        "_opens",
        "_view",
        "_write",
        "counted_ns",
        "refused",
    )

    def __init__(
        self,
        loan: Loan,
        policy: CachePolicy,
        kernel: KernelPort,
        opens: OpenChecks,
        late: LateReplies,
        absent: AbsentXattrs,
    ) -> None:
        self.counted_ns = 0
        self.refused = 0
        self._map = loan.memory.map
        self._view = loan.memory.view
        self._counters = loan.counters
        self._is_traced = is_traced()
        self._kernel = kernel
        self._write = kernel.write
        self._opens = opens
        self._late = late
        self._absent = absent
        self._negative = negative_entry(policy)

    def answer(self, slot: Slot) -> None:
        """Write one reply to the kernel.

        Raises:
            TookPart: Not yet: there is a rest to be written.
            SendAgain: Not yet: it is to be asked for in another way.
        """
        route = slot.route
        counter = route.counter
        if counter is None or slot.errno:
            self.count(slot)
            if slot.errno:
                self._answer_error(slot)
                return
        else:
            self.counted_ns = now = perf_counter_ns()
            counter.add(now - slot.started_ns)
        at, length = slot.data_at, slot.length
        rewrite = route.rewrite
        if rewrite is not None:
            try:
                rewrite(self._map, at, length, slot.nodeid, slot.at)
            except FailsHere as failure:
                self.fail(slot, failure.errno)
                return
        if slot.check is not None and not self._may_open(slot, slot.check):
            return
        if route.names_alone:
            self._kernel.answer_body(slot.answers, names_as_plus(self._map, at, length))
            return
        if slot.answers != slot.unique:
            self._kernel.answer(slot.answers)
            return
        if at == slot.small and length in slot.views:
            view = slot.views[length]
        elif at == slot.wide_at and length == slot.wide_length:
            view = slot.wide
        else:
            view = slot.reply(self._view)
        try:
            self._write(view)
        except OSError as error:
            self._refused(slot, error)

    def fail(self, slot: Slot, number: int) -> None:
        """Answer a request that has succeeded at the daemon with an errno."""
        slot.errno = number
        self._answer_error(slot)

    def count(self, slot: Slot) -> None:
        """Count a reply, whatever becomes of it."""
        counter = self.count_own(slot)
        # Without it in the route each reply comes here, where it can be traced.
        if slot.route.is_known and not self._is_traced:
            slot.route.counter = counter

    def count_own(self, pending: Pending) -> OpcodeCounter:
        """Count a reply to a request of our own that stands for one of the kernel's."""
        counter = self._counters.get(pending.opcode)
        if counter is None:
            counter = self._counters[pending.opcode] = OpcodeCounter()
        self.counted_ns = now = perf_counter_ns()
        counter.add(now - pending.started_ns)
        if pending.errno:
            counter.errors += 1
        if self._is_traced:
            trace_request(pending, now - pending.started_ns)
        return counter

    def _may_open(self, slot: Slot, check: OpenCheck) -> bool:
        """Put into an open's answer what its check has found; False when it is refused."""
        error = self._judge(slot, check) if check.is_checked else 0
        if self._opens.passthrough is not None and not error:
            error = self._opens.decide(slot, check)
        if error:
            self._late.take_back(slot)
            self._kernel.answer(slot.answers, error)
        return not error

    def _judge(self, slot: Slot, check: OpenCheck) -> int:
        """Check what the kernel knows of a file that it opens; return 0 or an errno for it."""
        if slot.opcode == _OPENDIR:
            self._opens.judge_directory(slot, check)
            return 0
        verdict = self._opens.judge(slot, check)
        if verdict.replaced:
            return errno.ESTALE  # the kernel looks the name up again, then opens what that finds
        if not verdict.keep_attributes:
            # Of attributes alone, which takes no lock that a request could hold.
            with suppress(OSError):  # forgotten meanwhile
                self._write(invalidation(slot.nodeid))
        return 0

    def _answer_error(self, slot: Slot) -> None:
        number = slot.errno
        if slot.route.failed is not None and slot.route.failed(slot, number):
            return
        if number == errno.ENOENT and slot.opcode == _LOOKUP and self._negative is not None:
            self._kernel.answer_body(slot.answers, self._negative)
            return
        if number == errno.ENODATA and slot.opcode == _GETXATTR and slot.xattr is not None:
            name, changes = slot.xattr
            self._absent.note_absent(slot.nodeid, name, slot.started_ns / 1e9, changes)
        self._kernel.answer(slot.answers, number)

    def _refused(self, slot: Slot, error: OSError) -> None:
        """The kernel did not take a reply."""
        if slot.check is not None:
            self._opens.refused(slot)
        if error.errno == errno.EINVAL:
            # Its length does not fit the request; the kernel has failed that with EIO by itself,
            # or has left it alone, and then we do.
            self.refused += 1
            if self.refused == 1:
                log.warning("the kernel refused the daemon's reply to %s", slot)
            self._kernel.answer(slot.answers, errno.EIO)
        elif error.errno == errno.ENOENT:
            self._late.undo(slot)  # the request was aborted
