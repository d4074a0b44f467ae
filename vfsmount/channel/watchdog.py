"""Requests that the device has had for too long.

A daemon can go mute while its process lives (a worker thread that panicked). The first time that a
request is without a reply for ``mute_after`` seconds, the log says so; those that become mute
together share a line. With ``request_timeout`` they fail as well; their buffers stay with the
device. Waiting for a file lock may last as long as it will and is none of this.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import ABANDONED, NEW, POSTED
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfsmount.channel.inflight import Pending

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)

_WAITS_FOR_LOCK: Final = int(Opcode.SETLKW)
#: Seconds: nobody looks more often than that, and none waits longer than 31 years.
_SHORTEST: Final = 0.005
_LONGEST: Final = 1e9


class Watchdog:
    """Judges ages.

    Args:
        mute_after: Seconds until a request is reported.
        request_timeout: Seconds until it fails; 0 for never.

    Attributes:
        interval: Seconds between two looks, while anything is in flight.
    """

    def __init__(self, mute_after: float, request_timeout: float) -> None:
        limits = [mute_after, request_timeout] if request_timeout else [mute_after]
        self.interval = max(_SHORTEST, min(1.0, min(limits) / 4))
        self._mute_after = mute_after
        self._timeout_ns = math.ceil(min(request_timeout, _LONGEST) * 1e9)

    def examine(self, requests: Iterable[Pending], now_ns: int) -> list[Pending]:
        """Report requests that have become mute, and return those that have timed out."""
        mute, overdue = [], []
        for pending in requests:
            if not pending.reported and self.is_mute(pending, now_ns):
                pending.reported = True
                mute.append(pending)
            if self._timeout_ns and self._is_overdue(pending, now_ns):
                overdue.append(pending)
        if mute:
            oldest = min(mute, key=lambda pending: pending.started_ns)
            age = (now_ns - oldest.started_ns) / 1e9
            others = f" and {len(mute) - 1} more requests" if len(mute) > 1 else ""
            log.warning("no reply to %s%s for %.1f s: the daemon is mute", oldest, others, age)
        return overdue

    def is_mute(self, pending: Pending, now_ns: int) -> bool:
        """Whether the device has had a request for ``mute_after`` seconds."""
        if pending.state == NEW or pending.opcode == _WAITS_FOR_LOCK:
            return False
        return now_ns - pending.started_ns >= self._mute_after * 1e9

    def _is_overdue(self, pending: Pending, now_ns: int) -> bool:
        if pending.state in (ABANDONED, POSTED) or pending.opcode == _WAITS_FOR_LOCK:
            return False
        return now_ns - pending.started_ns >= self._timeout_ns
