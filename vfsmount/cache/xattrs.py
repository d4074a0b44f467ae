"""Extended attributes that files are known not to have; bounded, the oldest go first.

``ls -l`` asks two or three of each file, and the kernel asks for ``security.capability`` before it
writes to a file, before each write where it clears set-id bits itself: one of 4 KiB took 101 us,
and 41 with this. "There is none" holds as long as attributes do. What there is, is asked for.

A question and a change that are on their way at the same time may be answered in any order, so the
one who asks notes ``changes`` before, and what a change has overtaken is not kept.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Final

__all__ = ["AbsentXattrs"]

_UNTIL: Final = struct.Struct("<d")
#: Bytes of names that are kept of one node: more than programs ask for by themselves.
_NAMES: Final = 256


class AbsentXattrs:
    """Names of absent extended attributes, by node.

    Args:
        seconds: How long attributes are valid; 0 remembers nothing.
        limit: Most nodes; 250 bytes each.

    Attributes:
        changes: How many changes of extended attributes are through.
    """

    __slots__ = ("_absent", "_limit", "_seconds", "changes")

    def __init__(self, seconds: float, limit: int = 1 << 16) -> None:
        self._seconds = seconds
        self._limit = limit
        #: Until when, and the names, each between NULs.
        self._absent: dict[int, bytes] = {}
        self.changes = 0

    def __len__(self) -> int:
        """Nodes that are remembered, expired ones included."""
        return len(self._absent)

    def is_absent(self, nodeid: int, name: bytes, now: float) -> bool:
        """Whether a node is known to have no attribute of that name at ``now`` seconds."""
        known = self._absent.get(nodeid)
        if known is None:
            return False
        if _UNTIL.unpack_from(known)[0] <= now:
            del self._absent[nodeid]
            return False
        return known.find(b"\0%b\0" % name, _UNTIL.size) >= 0

    def note_absent(self, nodeid: int, name: bytes, asked: float, changes: int) -> None:
        """The daemon says so.

        Args:
            nodeid: The node.
            name: Of the attribute.
            asked: When it was asked, clock seconds.
            changes: ``changes`` at that moment.
        """
        if not self._seconds or changes != self.changes or len(name) > _NAMES:
            return
        until, names = asked + self._seconds, b"\0"
        known = self._absent.get(nodeid)
        if known is not None and len(known) + len(name) < _NAMES:
            # The oldest answer decides for all.
            until, names = min(until, _UNTIL.unpack_from(known)[0]), known[_UNTIL.size :]
        self._absent[nodeid] = _UNTIL.pack(until) + names + name + b"\0"
        if len(self._absent) > self._limit:
            for oldest in list(islice(self._absent, 1 + self._limit // 64)):
                del self._absent[oldest]

    def changed(self, nodeid: int) -> None:
        """A change of the node's extended attributes begins, or is through."""
        self.changes += 1
        self._absent.pop(nodeid, None)

    def forget(self, nodeid: int) -> None:
        """The kernel knows the node no more; its number may come back as another's."""
        if self._absent:
            self._absent.pop(nodeid, None)
