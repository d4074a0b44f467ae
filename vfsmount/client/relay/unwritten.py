"""Pages that the host would not take, and who is to be told. For the kernel's write-back alone.

The kernel writes for all who have a file open. Of a failure it tells the first who closes, whoever
that is (EIO, if it was not ENOSPC), and nobody after him; chmod(2) may use the telling up, too. So
the kernel is not told: a WRITE of its pages that fails is answered as if it had not, and the
relay has FSYNC and FLUSH fail, with the daemon's errno:

    every handle that was open for writing when it failed    by its next fsync, once; or by its
                                                             close(2), once for each process
    any other handle                                         by its fsync, when nobody's fsync has
                                                             told of this failure yet, as the
                                                             kernel does
    no handle was open for writing                           the kernel is told after all
    who copies from the file at the host (copy_file_range)   at once, until an fsync has told

Once for each process: a handle is closed by every process that has inherited it, at its end at the
latest, and nobody hears that. The kernel knows a process by its ``lock_owner``.

The pages stay in the kernel's cache, as clean ones; they are not written again.
"""

from __future__ import annotations

import logging
import os

__all__ = ["Unwritten"]

log = logging.getLogger(__name__)


class _Owed:
    """What a handle is to be told.

    Attributes:
        errno: The daemon's.
        told: Owners that have closed it since.
    """

    __slots__ = ("errno", "told")

    def __init__(self, number: int) -> None:
        self.errno = number
        self.told: set[int] = set()


class Unwritten:
    """The failures of a mount, and the handles that may write.

    Each method takes the daemon's numbers.
    """

    __slots__ = ("_owed", "_unseen", "_writers")

    def __init__(self) -> None:
        #: Handles that are open for writing: their nodes.
        self._writers: dict[int, int] = {}
        self._owed: dict[int, _Owed] = {}
        #: Nodes with a failure that no fsync has told of: its errno.
        self._unseen: dict[int, int] = {}

    def opened(self, nodeid: int, fh: int) -> None:
        """A handle that may write was given out."""
        self._writers[fh] = nodeid

    def released(self, fh: int) -> None:
        """A handle is given back."""
        nodeid = self._writers.pop(fh, None)
        owed = self._owed.pop(fh, None)
        if owed is not None and not owed.told:  # closed before, and written to through a mapping
            why = os.strerror(owed.errno)
            log.error("pages of node %s did not reach the host, nobody asked: %s", nodeid, why)

    def forget(self, nodeid: int) -> None:
        """The kernel gives references to a node back; not all, as long as somebody writes to it."""
        if nodeid in self._unseen and nodeid not in self._writers.values():
            del self._unseen[nodeid]

    def failed(self, nodeid: int, number: int) -> bool:
        """Pages of a node were refused with an errno; return whether somebody will be told."""
        writers = [fh for fh, node in self._writers.items() if node == nodeid]
        for fh in writers:
            self._owed[fh] = _Owed(number)
        if writers:
            self._unseen[nodeid] = number
        return bool(writers)

    def lacks(self, nodeid: int) -> int:
        """Return the errno for a copy of a node that is made at the host, or 0."""
        return self._unseen.get(nodeid, 0)

    def flushed(self, fh: int, owner: int) -> int:
        """A handle is closed by ``owner``; return the errno to tell, or 0."""
        owed = self._owed.get(fh)
        if owed is None or owner in owed.told:
            return 0
        owed.told.add(owner)
        return owed.errno

    def synced(self, nodeid: int, fh: int) -> int:
        """A handle is synced; return the errno to tell, or 0."""
        owed = self._owed.pop(fh, None)
        unseen = self._unseen.pop(nodeid, 0)
        return unseen if owed is None else owed.errno
