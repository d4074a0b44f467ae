"""Whether a mapping pays: when to set one up, and when to leave the window as it is. Pure.

Everything is counted in messages. Setting a range up costs about eight times what a small message
costs, so a part of a file is set up when as much has been spent on messages for it: whatever comes,
no more than twice the least possible is spent ("ski rental").

Taking a range from another part costs that other part its mapping, too. It is paid by hits: a file
may take one range for every 256 accesses that needed no message. A file whose working set exceeds
the window has few hits, so its mappings stay as they are and the rest goes by message; it is
*bypassed*. A trickle for misses lets it move on when its old ranges are never used again; ranges
that nobody has used for long cost nothing, which is for the owner of the ranges to see.

Invariants (``check_invariants``): sizes of both tables are bounded; no credit beyond its limit.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["Benefit", "Verdict"]

#: Cost of a set-up: 200 us, where a message takes 25.
SET_UP_COST: Final = 8
#: Bytes that cost as much as a message by itself: a READ of 1 MiB takes 5 to 10 times a small one.
MESSAGE_BYTES: Final = 128 << 10
#: Hits that pay for taking a range from another part of a file, and as how much a miss counts. With
#: 32 random reads over four times the window had 0.75 times the speed of messages, now 1.0.
RECLAIM_COST: Final = 256.0
MISS_CREDIT: Final = 1 / 8
_MOST_CREDIT: Final = 4 * RECLAIM_COST
#: Messages before a part is tried again that could not be set up.
FAILURE_COST: Final = 256
#: Parts and files that are remembered; then all are forgotten.
_MOST_PARTS: Final = 8192
_MOST_FILES: Final = 8192


class Verdict(Enum):
    """What to do after a miss."""

    WAIT = "too early to tell"
    SET_UP = "set it up"
    BYPASS = "go by message, for there is no room that pays"


class Benefit:
    """The books of one window."""

    def __init__(self) -> None:
        self._spent: dict[tuple[int, int], int] = {}
        self._credit: dict[int, float] = {}

    def hit(self, nodeid: int) -> None:
        """Note an access that needed no message."""
        credit = self._credit.get(nodeid, 0.0)
        if credit < _MOST_CREDIT:
            self._credit[nodeid] = credit + 1

    def missed(self, nodeid: int, index: int, size: int, full: bool) -> Verdict:
        """Note an access by message, and say whether to set the part up now.

        Args:
            nodeid: The file.
            index: Which part of it.
            size: Bytes that were asked for.
            full: Whether another part would have to go that may be of use.
        """
        if len(self._spent) >= _MOST_PARTS:
            self._spent.clear()
        key = nodeid, index
        spent = self._spent[key] = self._spent.get(key, 0) + 1 + size // MESSAGE_BYTES
        if full and not self._can_pay(nodeid):
            return Verdict.BYPASS
        if spent < SET_UP_COST:
            return Verdict.WAIT
        del self._spent[key]
        if full:
            self._credit[nodeid] -= RECLAIM_COST
        return Verdict.SET_UP

    def _can_pay(self, nodeid: int) -> bool:
        credit = self._credit.get(nodeid, 0.0)
        if credit >= RECLAIM_COST:
            return True
        if len(self._credit) >= _MOST_FILES:
            self._credit.clear()
        self._credit[nodeid] = credit + MISS_CREDIT
        return False

    def failed(self, nodeid: int, index: int) -> None:
        """A part could not be set up: leave it alone for a while."""
        self._spent[nodeid, index] = -FAILURE_COST

    def forget(self, nodeid: int) -> None:
        """A file has gone."""
        self._credit.pop(nodeid, None)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the books are as the module says."""
        assert len(self._spent) <= _MOST_PARTS + 1
        assert len(self._credit) <= _MOST_FILES + 1
        assert all(0 <= credit <= _MOST_CREDIT for credit in self._credit.values())
