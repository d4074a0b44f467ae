"""Handles that programs have closed and the daemon has not: who opens the same file again gets one.

A compiler opens the same headers, an interpreter the same modules, again and again. With a kept
handle an open costs the question that it asks anyway (``freshness``), and no OPEN and RELEASE. That
cannot be told from an open of its own, because:

* It is for reading only, and has one user at a time: no locks, no position.
* Who opens is who opened, with the same flags: the daemon has let that user in.
* The file is what it was when the daemon opened it (ctime), so its permissions are, too.
* The daemon opened it less than a second ago: what it asks of others at an open is no older.

The host sees a file open for up to a second longer, and is not told of each open. Pure; bounded.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from vfsmount.cache.freshness import is_same

__all__ = ["KeptHandles", "Opener"]

#: Seconds, if names and attributes are believed that long.
_SECONDS: Final = 1.0
#: Handles in use that are remembered; of more than that, none is kept when it is closed.
_IN_USE: Final = 1 << 16


#: Who has opened, and how: ``uid`` and ``gid`` of the request, and its open flags.
Opener: TypeAlias = tuple[int, int, int]


class _Handle(NamedTuple):
    """A handle for reading: of which node, whose, the file's signature then, and nanoseconds."""

    nodeid: int
    opener: Opener
    raw: bytes
    opened: int


class KeptHandles:
    """Handles for reading by node, one for each, the last that was closed; the oldest goes first.

    Args:
        valid: Seconds that the kernel believes attributes; 0 keeps nothing.
        limit: Most handles kept. Each is a descriptor of the daemon's.
    """

    __slots__ = ("_in_use", "_kept", "_limit", "_ns", "_replaced")

    def __init__(self, valid: float, limit: int = 1 << 13) -> None:
        self._ns = int(min(valid, _SECONDS) * 1e9)
        self._limit = limit
        self._in_use: dict[int, _Handle] = {}
        self._kept: dict[int, tuple[int, _Handle]] = {}
        self._replaced: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Handles that the daemon does not know to be closed."""
        return len(self._kept) + len(self._replaced)

    def opened(self, nodeid: int, fh: int, opener: Opener, raw: bytes, now: int) -> None:
        """The daemon has given out a handle that may be kept.

        Args:
            nodeid: Of the file.
            fh: The handle.
            opener: Whose it is.
            raw: The file's signature (``freshness``), asked for before.
            now: Nanoseconds.
        """
        if self._ns and len(self._in_use) < _IN_USE:
            self._in_use[fh] = _Handle(nodeid, opener, raw, now)

    def released(self, fh: int) -> None:
        """The daemon has a handle back, or is about to; or has given it out, and it is no such."""
        self._in_use.pop(fh, None)

    def keep(self, nodeid: int, fh: int, now: int) -> bool:
        """Keep a handle that is closed at ``now`` nanoseconds; False: give it back."""
        handle = self._in_use.get(fh)
        if handle is None or handle.nodeid != nodeid or now - handle.opened >= self._ns:
            return False
        del self._in_use[fh]
        older = self._kept.pop(nodeid, None)
        if older is not None:
            self._replaced.append((nodeid, older[0]))
        self._kept[nodeid] = fh, handle
        return True

    def take(self, nodeid: int, opener: Opener, now: int) -> int | None:
        """Return the handle for an open like the one that it comes from, None without any.

        It is in use then, if it ``is_as_opened``; else it is to be given back.
        """
        kept = self._kept.get(nodeid)
        if kept is None:
            return None
        fh, handle = kept
        if handle.opener != opener or now - handle.opened >= self._ns:
            return None
        del self._kept[nodeid]
        self._in_use[fh] = handle
        return fh

    def is_as_opened(self, fh: int, raw: bytes) -> bool:
        """Whether the file of a handle in use is by its signature what it was."""
        handle = self._in_use.get(fh)
        return handle is not None and is_same(handle.raw, raw)

    def pop_due(self, now: int) -> tuple[int, int] | None:
        """Return node and handle of one that is to be given back, and forget it; None without any.

        At the latest a second after it was closed.
        """
        if self._replaced:
            return self._replaced.pop()
        for nodeid, (fh, handle) in self._kept.items():
            if now - handle.opened < self._ns and len(self._kept) <= self._limit:
                return None
            del self._kept[nodeid]
            return nodeid, fh
        return None

    def due(self) -> int | None:
        """Return when the next is to be given back, nanoseconds; None without any."""
        if self._replaced:
            return 0
        for _, handle in self._kept.values():
            return handle.opened + self._ns
        return None

    def forget(self, nodeid: int) -> int | None:
        """Return the handle of a node, to be given back; the kernel forgets the node."""
        kept = self._kept.pop(nodeid, None)
        return None if kept is None else kept[0]

    def stop(self) -> None:
        """Keep nothing any more; what is kept is due."""
        self._ns = 0

    def check_invariants(self) -> None:
        """Raise AssertionError unless no handle is in use and kept, and all keeps its bounds."""
        handles = [fh for fh, _ in self._kept.values()] + [fh for _, fh in self._replaced]
        assert len(set(handles)) == len(handles)
        assert not self._in_use.keys() & set(handles)
        assert len(self._in_use) <= _IN_USE
        assert all(nodeid == handle.nodeid for nodeid, (_, handle) in self._kept.items())
