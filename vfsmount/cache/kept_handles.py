"""Handles that programs have closed and the daemon has not: who opens the same file again gets one.

A compiler opens the same headers, an interpreter the same modules, again and again. With a kept
handle an open costs the question that it asks anyway (``freshness``), and no OPEN and RELEASE. That
cannot be told from an open of its own, because:

* It is for reading only, and has had one user at a time: no locks, no position.
* Who opens is who opened, with the same flags: the daemon has let that user in.
* The file has not changed since (ctime), so neither have its permissions; whoever asks here checks.

The host sees a file open for up to a second longer, and is not told of each open. Pure; bounded.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["KeptHandles", "Opener"]

#: Seconds, if names and attributes are believed that long.
_SECONDS: Final = 1.0
#: Handles in use that are remembered; of more than that, none is kept when it is closed.
_IN_USE: Final = 1 << 16


class Opener(NamedTuple):
    """Who has opened, and how: ``uid`` and ``gid`` of the request, and its open flags."""

    uid: int
    gid: int
    flags: int


class KeptHandles:
    """Handles for reading by node, one for each; the oldest goes first.

    Args:
        valid: Seconds that the kernel believes attributes; 0 keeps nothing.
        limit: Most handles kept. Each is a descriptor of the daemon's.

    Attributes:
        seconds: How long one is kept.
    """

    __slots__ = ("_in_use", "_kept", "_limit", "_ns", "seconds")

    def __init__(self, valid: float, limit: int = 1 << 13) -> None:
        self.seconds = min(valid, _SECONDS)
        self._ns = int(self.seconds * 1e9)
        self._limit = limit
        self._in_use: dict[int, tuple[int, tuple[int, ...]]] = {}
        #: Handle, opener, and when it was closed, nanoseconds.
        self._kept: dict[int, tuple[int, tuple[int, ...], int]] = {}

    def __len__(self) -> int:
        """Handles that are kept."""
        return len(self._kept)

    def opened(self, nodeid: int, fh: int, opener: tuple[int, ...] | None) -> None:
        """The daemon has given out a handle.

        Args:
            nodeid: Of the file.
            fh: The handle.
            opener: An ``Opener``; None when it must not be kept.
        """
        if opener is None or len(self._in_use) >= _IN_USE:
            self._in_use.pop(fh, None)
        else:
            self._in_use[fh] = nodeid, opener

    def released(self, fh: int) -> None:
        """The daemon has a handle back, or is about to."""
        self._in_use.pop(fh, None)

    def keep(self, nodeid: int, fh: int, now: int) -> bool:
        """Keep a handle that is closed at ``now`` nanoseconds; False: give it back."""
        known = self._in_use.pop(fh, None)
        if known is None or known[0] != nodeid or nodeid in self._kept or not self._ns:
            return False
        self._kept[nodeid] = fh, known[1], now
        return True

    def take(self, nodeid: int, opener: tuple[int, ...], now: int) -> int | None:
        """Return the handle for an open like the one that it comes from, None without any.

        It is in use then, and is to be ``opened`` or given back.
        """
        kept = self._kept.get(nodeid)
        if kept is None or kept[1] != opener or now - kept[2] >= self._ns:
            return None
        del self._kept[nodeid]
        return kept[0]

    def pop_due(self, now: int) -> tuple[int, int] | None:
        """Return node and handle of the oldest, if it is due, or too many are.

        None when nothing is due; else it is forgotten here, and to be given back.
        """
        if not self._kept:
            return None
        nodeid = next(iter(self._kept))
        fh, _, since = self._kept[nodeid]
        if now - since < self._ns and len(self._kept) <= self._limit:
            return None
        del self._kept[nodeid]
        return nodeid, fh

    def due(self) -> int | None:
        """Return when the oldest has been kept for long enough, nanoseconds; None without any."""
        for _, _, since in self._kept.values():
            return since + self._ns
        return None

    def forget(self, nodeid: int) -> int | None:
        """Return the handle of a node, to be given back; the kernel forgets the node."""
        kept = self._kept.pop(nodeid, None)
        return None if kept is None else kept[0]

    def stop(self) -> None:
        """Keep nothing any more; what is kept is due."""
        self.seconds, self._ns = 0.0, 0

    def check_invariants(self) -> None:
        """Raise AssertionError unless no handle is in use and kept, and all keeps its bounds."""
        handles = [fh for fh, _, _ in self._kept.values()]
        assert len(set(handles)) == len(handles)
        assert not self._in_use.keys() & set(handles)
        assert len(self._in_use) <= _IN_USE
        closed = [since for _, _, since in self._kept.values()]
        assert closed == sorted(closed)
