"""Directories of which the kernel knows the names already, so that a listing need not tell again.

The kernel begins each listing with READDIRPLUS, and the daemon then looks every entry up, opens it
and asks for its attributes: 13 us an entry with virtiofsd, where a name alone takes 0.5. That is
wasted on names and attributes that the kernel has had a moment ago, by a listing or one by one.
It may be told names alone then, as by READDIR; what it does lack after all, it asks for.

So this is about time only, never about what is true: a listing is always the daemon's.
"""

from __future__ import annotations

from typing import Final

__all__ = ["KnownNames"]

#: Names told one by one that count as a listing; a shorter one costs less than its questions.
_MANY: Final = 16


class KnownNames:
    """Since when the kernel knows the names in each directory; bounded.

    Args:
        valid: Seconds that the kernel believes names and attributes; 0 remembers nothing. Three
            quarters of it count, so that what was listed is not stale when it is looked at.
        limit: Most directories.
    """

    __slots__ = ("_known", "_limit", "_seconds")

    def __init__(self, valid: float, limit: int = 1 << 14) -> None:
        self._seconds = valid * 3 / 4
        self._limit = limit
        #: Until when, and how many names at least.
        self._known: dict[int, tuple[float, int]] = {}

    def __len__(self) -> int:
        """Directories that are remembered, expired ones included."""
        return len(self._known)

    def listed(self, directory: int, now: float) -> None:
        """A listing with attributes begins at ``now`` seconds."""
        self._note(directory, now, _MANY)

    def named(self, directory: int, now: float) -> None:
        """One name and its attributes are told."""
        until, count = self._known.get(directory, (0.0, 0))
        if now >= until:
            self._note(directory, now, 1)
        elif count < _MANY:
            self._known[directory] = until, count + 1

    def is_known(self, directory: int, now: float) -> bool:
        """Whether names are enough for a listing that begins."""
        until, count = self._known.get(directory, (0.0, 0))
        return count >= _MANY and now < until

    def clear(self) -> None:
        """The kernel has given names up; it does not say of which directory."""
        self._known.clear()

    def _note(self, directory: int, now: float, count: int) -> None:
        if not self._seconds:
            return
        if len(self._known) >= self._limit:
            self._known.clear()  # among so many, hardly any is listed twice in time
        self._known[directory] = now + self._seconds, count
