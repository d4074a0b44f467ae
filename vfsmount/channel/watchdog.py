"""Requests that the device has had for too long.

A daemon can go mute while its process lives (a worker thread that panicked). The first time that a
request is without a reply for ``mute_after`` seconds, the log says so. With ``request_timeout`` it
fails as well; its buffers stay with the device.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vfsmount.channel.inflight import ABANDONED, NEW

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfsmount.channel.inflight import Pending

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)


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
        self.interval = min(1.0, min(limits) / 4)
        self._mute_after = mute_after
        self._timeout_ns = int(request_timeout * 1e9)

    def examine(self, requests: Iterable[Pending], now_ns: int) -> list[Pending]:
        """Report requests that have become mute, and return those that have timed out."""
        overdue = []
        for pending in requests:
            age_ns = now_ns - pending.started_ns
            if not pending.reported and pending.state != NEW and self.is_mute(pending, now_ns):
                pending.reported = True
                log.warning(
                    "no reply to %s for %.1f s: the daemon is mute, it may hang",
                    pending,
                    age_ns / 1e9,
                )
            if self._timeout_ns and age_ns >= self._timeout_ns and pending.state != ABANDONED:
                overdue.append(pending)
        return overdue

    def is_mute(self, pending: Pending, now_ns: int) -> bool:
        """Whether the device has had a request for ``mute_after`` seconds."""
        return now_ns - pending.started_ns >= self._mute_after * 1e9
