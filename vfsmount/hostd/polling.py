"""How long to look at a ring before going to sleep: adapted to how long the guest takes.

Waking a sleeping thread costs more than serving most requests, so looking on a little while pays
when the next request comes soon, and is waste when it does not. The window grows while waits end
within reach, and shrinks to nothing while they do not. (KVM's ``halt_poll_ns`` works like this.)

Pure: times are given, in nanoseconds.
"""

from __future__ import annotations

__all__ = ["PollWindow"]

#: The first step up from nothing: five looks or so.
_FIRST = 8_000


class PollWindow:
    """The window of one guest.

    Args:
        limit: Longest window in nanoseconds; 0 never polls.

    Attributes:
        length: The window now, 0 to ``limit``.
    """

    __slots__ = ("_limit", "length")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.length = limit

    def waited(self, duration: int) -> None:
        """Learn from a wait: the time between the last work and the next, polling included."""
        if duration <= self.length:
            return
        if duration > self._limit:
            self.length = self.length // 2 if self.length > _FIRST else 0
        else:
            self.length = min(max(2 * self.length, _FIRST), self._limit)
