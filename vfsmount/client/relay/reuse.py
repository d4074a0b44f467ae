"""Opens that are answered with a handle which was closed a moment ago (``cache.kept_handles``).

An OPEN sends its question alone, and waits for the answer as if the daemon had replied already:

    RELEASE   kept, and answered here
    OPEN      question, unchanged: answered with the kept handle
              question, else: the handle goes back, and the OPEN to the daemon after all

So a file opened again costs the daemon one message in place of three. With DAX the kind of open is
what it would be without: by message, or passed through if the kernel has the backing file yet.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.cache.policy import FOREVER
from vfsmount.channel.inflight import DONE
from vfsmount.client.relay.opens import OPENER, invalidation
from vfsmount.client.relay.route import SendAgain
from vfsmount.wire import fuse
from vfsmount.wire.fuse import OpenOutFlag

if TYPE_CHECKING:
    from vfsmount.client.relay.opens import OpenCheck
    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.route import FailedHandler
    from vfsmount.client.relay.slots import Slot

__all__ = ["HandleReuse"]

logger = logging.getLogger(__name__)

_IN: Final = fuse.IN_HEADER.size
_OUT: Final = fuse.OUT_HEADER.size
_OPEN_OUT: Final = fuse.OPEN_OUT.size
_RELEASE_IN: Final = struct.Struct("<QII").unpack_from  # fh, flags, release_flags
_FH: Final = struct.Struct("<Q").unpack_from
_OUT_HEADER: Final = struct.Struct("<IiQ").pack
_OPEN_REPLY: Final = struct.Struct("<QII").pack  # open_out: fh, open_flags, backing_id
_KEEP_CACHE: Final = int(OpenOutFlag.KEEP_CACHE)
_PASSTHROUGH: Final = int(OpenOutFlag.PASSTHROUGH)
_NO_FLUSH: Final = int(OpenOutFlag.NOFLUSH)
_NO_DESCRIPTORS: Final = frozenset((errno.EMFILE, errno.ENFILE))
#: Handles given back at once when nobody closes any: 14 to 19 us each.
_AT_ONCE: Final = 256
#: Seconds to the rest of them.
_SOON: Final = 0.01


class HandleReuse:
    """Keeps handles, and answers OPENs with them.

    Args:
        parts: Of the relay, in a mode in which opens ask.
    """

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._kept = parts.memory.kept
        self._locked = parts.memory.locked
        self._kernel = parts.kernel
        self._device = parts.device
        self._opens = parts.opens
        self._passthrough = parts.passthrough
        self._stopped_ns = 0
        no_flush = _NO_FLUSH if parts.terms.quiet_reads else 0
        self._flags, self._passed_flags = no_flush | _KEEP_CACHE, no_flush | _PASSTHROUGH

    def keep(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """RELEASE: keep the handle, if an open may have it."""
        fh, flags, release_flags = _RELEASE_IN(self._map, at + _IN)
        if flags & os.O_ACCMODE or release_flags or nodeid in self._locked:
            return False
        now = perf_counter_ns()
        if not self._kept.keep(nodeid, fh, now):
            return False
        if self._passthrough is not None:
            self._passthrough.nodes.released(fh)
        self._kernel.answer(slot.answers)
        self._give_back(now, 2)  # one more than comes, so that they become fewer
        return True

    def begin(self, slot: Slot, at: int, nodeid: int) -> bool:
        """Ask whether a kept handle answers an OPEN; False when there is none."""
        if not self._kept:
            return False
        fh = self._kept.take(nodeid, OPENER(self._map, at), slot.started_ns)
        if fh is None:
            return False
        check = self._opens.begin_check(slot)
        if check.pending is None:  # no room for a question
            self._send_back(nodeid, fh)
            return False
        check.is_reused = check.replied = True
        check.reply = _OPEN_REPLY(fh, self._flags, 0)
        slot.state = DONE
        self._device.kick()
        return True

    def finish(self, slot: Slot, check: OpenCheck) -> bool:
        """Judge a kept handle by the answer; False when the OPEN goes to the daemon after all."""
        nodeid, (fh,) = slot.nodeid, _FH(check.reply)
        verdict, passthrough = self._opens.judge_again(nodeid, fh, check), self._passthrough
        backing_id = 0 if passthrough is None else passthrough.backing_again(nodeid)
        if not verdict.keep_pages or backing_id is None:
            self._send_back(nodeid, fh)
            slot.check = None
            self._opens.begin(slot)
            self._device.submit(slot)
            self._device.kick()
            return False
        reply = check.reply
        if backing_id:
            reply = _OPEN_REPLY(fh, self._passed_flags, backing_id)
        try:
            if not verdict.keep_attributes:
                with suppress(OSError):  # forgotten meanwhile
                    self._kernel.write(invalidation(nodeid))
            self._kernel.write(_OUT_HEADER(_OUT + _OPEN_OUT, 0, slot.answers) + reply)
        except OSError:  # nobody waits any more
            self._send_back(nodeid, fh)
        else:
            if passthrough is not None:
                passthrough.opened_again(nodeid, fh, backing_id)
            if backing_id:
                self._opens.unpark(nodeid)
        return True

    def retried(self, then: FailedHandler | None) -> FailedHandler:
        """Return what is done when a request has failed that changes nothing: it may be sent again.

        A daemon that has run out of descriptors gets those back that are kept, and no more are
        until the mount ends. All that was sent before is sent again, once.

        Args:
            then: What is done else.
        """

        def failed(slot: Slot, number: int) -> bool:
            if number in _NO_DESCRIPTORS:
                now = perf_counter_ns()
                if self._kept:
                    logger.warning(
                        "the daemon has run out of descriptors; from now on it is told at once of"
                        " each file that is closed, and opening files again is slower (allow it"
                        " more: ulimit -n, --rlimit-nofile)"
                    )
                    self._stopped_ns = now
                    self._kept.stop()
                    self._give_back(now, len(self._kept))
                if slot.started_ns < self._stopped_ns:
                    slot.started_ns = now
                    raise SendAgain
            return then is not None and then(slot, number)

        return failed

    def _send_back(self, nodeid: int, fh: int) -> None:
        """Give a handle back that was taken."""
        self._kept.released(fh)
        self._device.post_release(nodeid, fh)

    def forget(self, nodeid: int) -> None:
        """The kernel is about to forget a node."""
        fh = self._kept.forget(nodeid)
        if fh is not None:
            self._device.post_release(nodeid, fh)

    def due(self) -> float | None:
        """Return the seconds until something is due to be given back; None for never."""
        due = self._kept.due()
        return None if due is None else max((due - perf_counter_ns()) / 1e9, _SOON)

    def look(self) -> float:
        """Give back what is due; return the seconds until it should be looked again."""
        self._give_back(perf_counter_ns(), _AT_ONCE)
        return self.due() or FOREVER

    def _give_back(self, now: int, most: int) -> None:
        for _ in range(most):
            due = self._kept.pop_due(now)
            if due is None:
                return
            self._device.post_release(*due)
