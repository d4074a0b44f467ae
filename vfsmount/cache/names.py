"""Names that may be believed for a while: what they lead to, that they are absent, and listings.

Rules:

* Each name that leads to a node holds one reference of that node, which ``put`` takes over. It is
  given back (``forget``) when the name is dropped, replaced or pushed out. So what is remembered
  here is alive at the daemon, and the limit of names is a limit of what the daemon holds for us.
* A node without a name may be another one soon: with the name of a directory goes all that is
  known below it.
* The directory that was used longest ago gives up its longest unused names first.

The clock is passed in.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ABSENT", "Names"]

#: In place of a nodeid: there is no such name.
ABSENT: Final = 0

#: nodeid, and clock seconds until which it is believed: 64 bytes as an object, a tuple takes 96.
_ENTRY: Final = struct.Struct("<Qd")
_NODEID: Final = struct.Struct("<Q")


class _Folder:
    """What is known of one directory.

    Attributes:
        names: ``_ENTRY`` by name.
        listing: All names of the directory, in the daemon's order; None when not known.
        listed_until: How long the listing is believed.
    """

    __slots__ = ("listed_until", "listing", "names")

    def __init__(self) -> None:
        self.names: dict[bytes, bytes] = {}
        self.listing: tuple[bytes, ...] | None = None
        self.listed_until = 0.0


class Names:
    """Names of all directories.

    Args:
        limit: Most names, absent and listed ones included. A little more than what is too much is
            given up at once, because looking for the oldest costs.
        forget: Is told each node of which one reference is given back, and whether the name leads
            there no more; the node may have no other.
    """

    __slots__ = ("_count", "_folders", "_forget", "_limit")

    def __init__(self, limit: int, forget: Callable[[int, bool], None]) -> None:
        self._limit = limit
        self._forget = forget
        self._folders: dict[int, _Folder] = {}
        self._count = 0

    def __len__(self) -> int:
        """Names, listed ones counted apart."""
        return self._count

    def _used(self, parent: int) -> _Folder | None:
        folder = self._folders.pop(parent, None)
        if folder is not None:
            self._folders[parent] = folder
        return folder

    def _made(self, parent: int) -> _Folder:
        folder = self._used(parent)
        if folder is None:
            folder = self._folders[parent] = _Folder()
        return folder

    # --- single names ---

    def find(self, parent: int, name: bytes, now: float) -> int | None:
        """Return the nodeid that a name leads to, ABSENT, or None when that has to be asked."""
        folder = self._used(parent)
        if folder is None:
            return None
        found = folder.names.get(name)
        if found is None:
            return None
        nodeid: int
        nodeid, until = _ENTRY.unpack(found)
        if until <= now:
            return None
        del folder.names[name]
        folder.names[name] = found
        return nodeid

    def put(self, parent: int, name: bytes, nodeid: int, until: float) -> None:
        """Believe until then, clock seconds, that a name leads to a node, or is ABSENT.

        One reference to the node comes along.
        """
        folder = self._made(parent)
        before = folder.names.pop(name, None)
        folder.names[name] = _ENTRY.pack(nodeid, until)
        if before is None:
            self._count += 1
            self._keep_within()
        elif led := _nodeid(before):
            self._left(led, gone=led != nodeid)

    def drop(self, parent: int, name: bytes) -> None:
        """A name was made, removed or changed: neither it nor the listing is believed any more."""
        folder = self._folders.get(parent)
        if folder is None:
            return
        self._unlist(folder)
        self._remove(folder, name)
        self._tidy(parent, folder)

    # --- listings ---

    def listing(self, parent: int, now: float) -> Sequence[bytes] | None:
        """Return all names of a directory, in the daemon's order, if they are still believed."""
        folder = self._used(parent)
        if folder is None or folder.listing is None or folder.listed_until <= now:
            return None
        return folder.listing

    def list(self, parent: int, names: Sequence[bytes], until: float) -> None:
        """Believe a listing until then, clock seconds."""
        folder = self._made(parent)
        self._unlist(folder)
        folder.listing, folder.listed_until = tuple(names), until
        self._count += len(names)
        self._keep_within()

    # --- giving up ---

    def _unlist(self, folder: _Folder) -> None:
        if folder.listing is not None:
            self._count -= len(folder.listing)
            folder.listing = None

    def _tidy(self, parent: int, folder: _Folder) -> None:
        if not folder.names and folder.listing is None:
            self._folders.pop(parent, None)

    def _remove(self, folder: _Folder, name: bytes) -> None:
        """Take a name out; it may be gone already, with a directory given up meanwhile."""
        found = folder.names.pop(name, None)
        if found is None:
            return
        self._count -= 1
        if nodeid := _nodeid(found):
            self._left(nodeid, gone=True)

    def _left(self, nodeid: int, *, gone: bool) -> None:
        """Give one reference back; when the name is ``gone``, so is what was below it."""
        self._forget(nodeid, gone)
        if gone:
            self.gone(nodeid)

    def gone(self, nodeid: int) -> None:
        """A node is no longer what it was: forget all that is known below it."""
        below = [nodeid]
        while below:
            folder = self._folders.pop(below.pop(), None)
            if folder is None:
                continue
            self._unlist(folder)
            names, folder.names = folder.names, {}  # who goes through them meanwhile finds none
            self._count -= len(names)
            for entry in names.values():
                if child := _nodeid(entry):
                    self._forget(child, True)
                    below.append(child)

    def _keep_within(self) -> None:
        """Give up the oldest until there is room for some more."""
        if self._count <= self._limit:
            return
        enough = self._limit - self._limit // 64
        while self._count > enough:
            parent, folder = next(iter(self._folders.items()))
            self._unlist(folder)
            for name in list(islice(folder.names, max(0, self._count - enough))):
                self._remove(folder, name)
            self._tidy(parent, folder)

    def clear(self) -> None:
        """Give everything back."""
        folders, self._folders = self._folders, {}
        self._count = 0
        for folder in folders.values():
            for entry in folder.names.values():
                if nodeid := _nodeid(entry):
                    self._forget(nodeid, True)

    def check_invariants(self) -> None:
        """Raise AssertionError unless all is counted and within bounds."""
        listed = sum(len(folder.listing or ()) for folder in self._folders.values())
        assert self._count == listed + sum(len(folder.names) for folder in self._folders.values())
        assert self._count <= self._limit
        assert all(folder.names or folder.listing is not None for folder in self._folders.values())


def _nodeid(entry: bytes) -> int:
    nodeid: int = _NODEID.unpack_from(entry)[0]
    return nodeid
