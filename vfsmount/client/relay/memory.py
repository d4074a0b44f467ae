"""What the relay remembers of files, so that a request needs no question, or gets one asked first.

Entries go when the kernel forgets the node or closes the handle, so there are never more of them
than of those.
"""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.cache.known_names import KnownNames
from vfsmount.cache.policy import FOREVER
from vfsmount.cache.walkers import Walkers
from vfsmount.cache.xattrs import AbsentXattrs
from vfsmount.client.relay.unwritten import Unwritten
from vfsmount.wire import fuse

if TYPE_CHECKING:
    import mmap

    from vfsmount.cache.policy import CachePolicy

__all__ = ["Memory", "SetIdMemory", "flags_of_write"]

_IN: Final = fuse.IN_HEADER.size
_U32: Final = struct.Struct("<I")

_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_WRITE_FLAGS_AT: Final = _IN + 20


class Memory:
    """All that is remembered.

    Args:
        policy: What the kernel may believe.

    Attributes:
        modes: Files with set-id bits.
        xattrs: Extended attributes that files do not have.
        names: Directories of which the kernel knows the names.
        walkers: Who lists and looks at nothing.
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
        self.unwritten = Unwritten() if policy.writeback else None
        self.wrote: set[int] = set()
        self.locked: dict[int, set[int]] = {}

    def forget(self, nodeid: int) -> None:
        """References to a node are given back."""
        self.xattrs.forget(nodeid)
        self.modes.drop(nodeid)
        self.names.clear()
        self.walkers.forget(nodeid)
        if self.unwritten is not None:
            self.unwritten.forget(nodeid)

    def lock(self, nodeid: int, fh: int) -> None:
        """A lock is asked for, by a handle of a file."""
        self.locked.setdefault(nodeid, set()).add(fh)

    def released(self, nodeid: int, fh: int) -> None:
        """A handle of a file is given back."""
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
    """Which files have set-id bits that somebody's write would clear, as last seen.

    The kernel leaves that to the daemon for direct writes, even to one without HANDLE_KILLPRIV_V2,
    and virtiofsd (Rust) then does nothing. So the bits are taken off before such a write is passed
    on. Nearly always there is nothing here.
    """

    __slots__ = ("_modes",)

    def __init__(self) -> None:
        self._modes: dict[int, int] = {}

    def see(self, nodeid: int, mode: int) -> None:
        """The daemon says so of a node."""
        if mode & _SET_ID and stat.S_ISREG(mode):
            self._modes[nodeid] = mode
        elif self._modes:
            self._modes.pop(nodeid, None)

    def drop(self, nodeid: int) -> None:
        """The node is forgotten."""
        if self._modes:
            self._modes.pop(nodeid, None)

    def mode_to_set(self, nodeid: int) -> int | None:
        """Return the mode that a write leaves (``file_remove_privs``), None when that is the same.

        It counts as set from now on.
        """
        mode = self._modes.pop(nodeid, None)
        if mode is None:
            return None
        kept = mode & ~stat.S_ISUID
        if kept & stat.S_IXGRP:  # without, sgid means mandatory locking and stays
            kept &= ~stat.S_ISGID
        return stat.S_IMODE(kept) if kept != mode else None
