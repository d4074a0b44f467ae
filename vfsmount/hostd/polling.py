"""How long to look at a ring before going to sleep: adapted to how long the guest takes.

Waking a sleeping thread costs more than serving most requests, so looking on a little while pays
when the next request comes soon, and is waste when it does not. The window grows while waits end
within reach, and shrinks to nothing while they do not. (KVM's ``halt_poll_ns`` works like this.)

Where the guest has to share our processor, looking keeps it from its work: sched_yield(2) offers
the processor, but Linux comes back to us some ten times before the guest is through. Asleep after
one look, we are woken by its kick. On one processor, with all of it in one session (autogroups), an
open takes 265 us instead of 307, a read of 4 KiB 32 instead of 38; with applications of another
session a read takes 30 instead of 35, and an open as long as before. Such a processor shows in that
we do not get all of it though we never sleep. Requests that sleep on a disk look the same, but
beside that a wake-up is nothing.

Pure: times are given, in nanoseconds.
"""

from __future__ import annotations

__all__ = ["ONE_LOOK", "PollWindow"]

#: The first step up from nothing: five looks or so.
_FIRST = 8_000
#: A window that ends with its first look.
ONE_LOOK = 1
#: Waits until it is tried again whether the processor is ours alone.
_REST = 256


class PollWindow:
    """The window of one guest.

    Args:
        limit: Longest window in nanoseconds; 0 never polls.

    Attributes:
        length: The window now, 0 to ``limit``.
    """

    __slots__ = ("_limit", "_rest", "length")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = 0
        self.length = limit

    def worked(self, elapsed: int, spent: int) -> None:
        """Learn from a time without sleep, of which ``spent`` was on a processor: else not ours."""
        if self.length > ONE_LOOK and 8 * spent < 7 * elapsed:
            self.length = ONE_LOOK
            self._rest = _REST

    def waited(self, duration: int) -> None:
        """Learn from a wait: the time between the last work and the next, polling included."""
        if self._rest:
            self._rest -= 1
            if not self._rest:
                self.length = self._limit
            return
        if duration <= self.length:
            return
        if duration > self._limit:
            self.length = self.length // 2 if self.length > _FIRST else 0
        else:
            self.length = min(max(2 * self.length, _FIRST), self._limit)
