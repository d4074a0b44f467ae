"""Attributes that may be believed for a while, by node; bounded, the longest unused go first.

Kept as bytes, 144 of them for a node: a record of Python objects takes 600. The clock is passed in.

Who asks a daemon while somebody changes something cannot know whether the answer is from before or
after. So the one who keeps answers here counts changes, and keeps none that a change overtook.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Final

from vfsmount.wire.fuse import ATTR, Attr

__all__ = ["Attributes"]

_UNTIL: Final = struct.Struct("<d")


class Attributes:
    """What is known of nodes.

    Args:
        limit: Most nodes. A little more than that is given up at once, because looking for the
            oldest costs.
    """

    __slots__ = ("_known", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Nodes that something is kept of, expired or not."""
        return len(self._known)

    def get(self, nodeid: int, now: float) -> Attr | None:
        """Return a node's attributes if they are still believed at ``now`` seconds."""
        raw = self._known.pop(nodeid, None)
        if raw is None or _UNTIL.unpack_from(raw)[0] <= now:
            return None
        self._known[nodeid] = raw
        return ATTR.unpack(raw, _UNTIL.size)

    def left(self, nodeid: int, now: float) -> float:
        """Return for how many seconds they are still believed."""
        raw = self._known.get(nodeid)
        return 0.0 if raw is None else max(0.0, _UNTIL.unpack_from(raw)[0] - now)

    def put(self, nodeid: int, attr: Attr, until: float) -> None:
        """Believe attributes until then, clock seconds."""
        self._known.pop(nodeid, None)
        self._known[nodeid] = _UNTIL.pack(until) + ATTR.pack(attr)
        if len(self._known) > self._limit:
            for oldest in list(islice(self._known, 1 + self._limit // 64)):
                del self._known[oldest]

    def drop(self, nodeid: int) -> None:
        """They have changed, or the number may come back as another node's."""
        self._known.pop(nodeid, None)

    def clear(self) -> None:
        """Nothing of any node is to be believed any more."""
        self._known.clear()

    def check_invariants(self) -> None:
        """Raise AssertionError unless all is within bounds."""
        assert len(self._known) <= self._limit
        assert all(len(raw) == _UNTIL.size + ATTR.size for raw in self._known.values())
