"""What the relay remembers of files, so that a request needs no question, or gets one asked first.

Entries go when the kernel forgets the node or closes the handle, so there are never more of them
than of those.
"""

from __future__ import annotations

import stat
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final

from vfsmount.cache.kept_handles import KeptHandles
from vfsmount.cache.known_names import KnownNames
from vfsmount.cache.policy import FOREVER
from vfsmount.cache.walkers import Walkers
from vfsmount.cache.xattrs import AbsentXattrs
from vfsmount.client.relay.unwritten import Unwritten
from vfsmount.wire import fuse

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from vfsmount.cache.policy import CachePolicy

__all__ = ["Memory", "SetIdMemory", "flags_of_write", "mode_left"]

_IN: Final = fuse.IN_HEADER.size
_U32: Final = struct.Struct("<I")

_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_WRITE_FLAGS_AT: Final = _IN + 20
#: Files with set-id bits that are not many.
_FEW: Final = 1024
#: Seconds after which the kernel has surely done with a reply what it does.
_TAKEN_IN: Final = 60.0


class Memory:
    """All that is remembered.

    Args:
        policy: What the kernel may believe.

    Attributes:
        modes: Files that may have set-id bits; without any where the daemon sees to those.
        xattrs: Extended attributes that files do not have.
        names: Directories of which the kernel knows the names.
        walkers: Who lists and looks at nothing.
        kept: Handles that are closed and may be opened again.
        unwritten: Of the pages that the kernel keeps for a while; None without its write-back.
        wrote: Handles that wrote since their last FLUSH.
        locked: Nodes that the daemon may have POSIX locks on; a FLUSH gives its owner's up. With
            each the handles that locked: no lock outlives its handle, while a FORGET need not give
            back all references.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self.modes = SetIdMemory()
        self.xattrs = AbsentXattrs(policy.attr_timeout)
        # Where listings are kept by the kernel, it asks for none that it has.
        valid = min(policy.entry_timeout, policy.attr_timeout) if policy.revalidate else 0.0
        self.names = KnownNames(valid)
        # Where it keeps names for ever, it is to have them: a walk is paid once.
        self.walkers = Walkers(valid if valid < FOREVER else 0.0)
        self.kept = KeptHandles(valid)
        self.unwritten = Unwritten() if policy.writeback else None
        self.wrote: set[int] = set()
        self.locked: dict[int, set[int]] = {}

    def forget(self, nodeid: int) -> None:
        """References to a node are given back."""
        self.xattrs.forget(nodeid)
        self.names.clear()
        self.walkers.forget(nodeid)
        if self.unwritten is not None:
            self.unwritten.forget(nodeid)

    def lock(self, nodeid: int, fh: int) -> None:
        """A lock is asked for, by a handle of a file."""
        self.locked.setdefault(nodeid, set()).add(fh)

    def released(self, nodeid: int, fh: int) -> None:
        """A handle of a file is given back."""
        self.kept.released(fh)
        self.wrote.discard(fh)
        lockers = self.locked.get(nodeid)
        if lockers is not None:
            lockers.discard(fh)
            if not lockers:
                del self.locked[nodeid]
        if self.unwritten is not None:
            self.unwritten.released(fh)


def flags_of_write(memory: mmap.mmap, at: int) -> int:
    """Return ``write_flags`` of the WRITE at ``at``: whose it is, as ``WriteFlag``."""
    flags: int = _U32.unpack_from(memory, at + _WRITE_FLAGS_AT)[0]
    return flags


class SetIdMemory:
    """Which files may have set-id bits that somebody's write would clear.

    A reply that shows bits makes a file suspect, and nothing but a look of our own clears it: that
    another reply shows none says little, as it may be older. Nearly always there is nothing here.

    Attributes:
        suspects: By node, when the bits were last seen, ``monotonic`` seconds; 0 while the file is
            being looked into, and nothing was seen since.
    """

    __slots__ = ("_limit", "suspects")

    def __init__(self) -> None:
        self.suspects: dict[int, float] = {}
        self._limit = _FEW

    def see(self, nodeid: int, mode: int) -> None:
        """The daemon says so of a node, and the kernel may hear it."""
        if mode & _SET_ID and stat.S_ISREG(mode):
            self.suspects[nodeid] = monotonic()

    def look_into(self, nodeid: int) -> None:
        """The daemon is asked what a suspect has."""
        self.suspects[nodeid] = 0.0

    def looked_into(self, nodeid: int, *, is_clean: bool) -> None:
        """It has said so, or failed to."""
        if is_clean and not self.suspects.get(nodeid):
            self.suspects.pop(nodeid, None)

    def tidy(self, knows: Callable[[int], bool]) -> None:
        """Forget files that the kernel has forgotten, once they are many.

        It alone knows: a FORGET need not give all references back.

        Args:
            knows: Asks the kernel whether it knows a node.
        """
        if len(self.suspects) <= self._limit:
            return
        before = monotonic() - _TAKEN_IN
        for nodeid in [nodeid for nodeid, seen in self.suspects.items() if seen < before]:
            if not knows(nodeid):
                del self.suspects[nodeid]
        self._limit = max(_FEW, 2 * len(self.suspects))


def mode_left(mode: int) -> int | None:
    """Return the permissions that a write leaves (``file_remove_privs``), None when that is all."""
    if not stat.S_ISREG(mode):
        return None
    kept = mode & ~stat.S_ISUID
    if kept & stat.S_IXGRP:  # without, sgid means mandatory locking and stays
        kept &= ~stat.S_ISGID
    return stat.S_IMODE(kept) if kept != mode else None
