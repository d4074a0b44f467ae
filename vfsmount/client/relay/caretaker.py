"""What has to be done now and then, and so how long the relay's thread may sleep.

requests that take too long             reported, or failed (``channel.watchdog``)
callers that were interrupted           let go of when they are being killed (``interrupts``)
FORGETs, and what undoes late replies   sent, in company or when there is room
memory, and files that stay mapped      given back when there is nothing else to do
files that may have set-id bits         forgotten as the kernel does (``set_id``)
handles that nobody has opened again    given back (``reuse``)
"""

from __future__ import annotations

import errno
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.client.relay.interrupts import LOOK_SECONDS

if TYPE_CHECKING:
    from vfsmount.client.relay.parts import Parts

__all__ = ["Caretaker"]

#: Seconds that a FORGET may wait for company, as in the channel.
_FORGET_SECONDS: Final = 0.01
#: Seconds of idleness after which memory is given back, when it is more than _KEEP bytes.
_TRIM_SECONDS: Final = 1.0
_KEEP: Final = 4 << 20
#: Seconds of sleep while the daemon has files open for writing that we are done with.
_LINGER_SECONDS: Final = 0.001


class Caretaker:
    """Looks after a relay, in its thread.

    Args:
        parts: Of the relay.
    """

    __slots__ = ("_device", "_late", "_loan", "_pool", "_reuse", "_ring", "_set_id", "_set_ups")

    def __init__(self, parts: Parts) -> None:
        self._loan = parts.loan
        self._ring = parts.loan.requests.ring
        self._device = parts.device
        self._late = parts.late
        self._set_id, self._reuse = parts.set_id, parts.reuse
        self._set_ups = None if parts.passthrough is None else parts.passthrough.set_ups
        self._pool = parts.pool

    def patience(self) -> float | None:
        """Return the seconds until ``look`` is due although nothing happens; None for never."""
        due = None if self._reuse is None else self._reuse.due()
        return min((one for one in (due, self._patience()) if one is not None), default=None)

    def _patience(self) -> float | None:
        if self._set_ups is not None and self._set_ups.lingering:
            return _LINGER_SECONDS
        if self._late.interrupts:
            return LOOK_SECONDS
        if len(self._loan.forgets) or self._device.undoing:
            return _FORGET_SECONDS
        if self._loan.hiprio.ring.outstanding:
            return LOOK_SECONDS  # to have the buffers of FORGETs back; the device does not call
        if self._ring.outstanding:
            return self._loan.watchdog.interval
        untidy = self._set_ups is not None and self._set_ups.untidy
        return _TRIM_SECONDS if untidy or self._pool.is_bloated(_KEEP) else None

    def look(self, *, idle: bool) -> int:
        """Do what is due.

        Args:
            idle: Nothing has happened for ``patience``.

        Returns:
            When to look again, however much happens: ``perf_counter_ns``.
        """
        now = perf_counter_ns()
        self._device.flush_forgets()
        self._device.send_undoing()
        self._late.interrupts.look()
        self._set_id.tidy()
        overdue = set(self._loan.watchdog.examine(self._device.in_flight(), now))
        for slot in self._device.in_flight():
            if slot in overdue:
                self._late.give_up(slot, errno.ETIMEDOUT)
        again = self._loan.watchdog.interval
        if self._reuse is not None:
            again = min(again, self._reuse.look())
        if idle:
            self._give_back()
        return now + int(again * 1e9)

    def _give_back(self) -> None:
        if self._set_ups is not None:
            if self._set_ups.lingering:
                return
            self._set_ups.tidy()
        if not self._ring.outstanding and self._pool.is_bloated(_KEEP):
            self._pool.trim()
