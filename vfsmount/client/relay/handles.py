"""Requests that open and close files, and the same where the kernel has backing files."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import POSTED
from vfsmount.client.relay.opens import invalidation
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.slots import Slot

__all__ = ["HandleRules", "PassedHandleRules"]

_IN: Final = fuse.IN_HEADER.size
_PUT_U32: Final = struct.Struct("<I").pack_into
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_RELEASE_FLAGS_AT: Final = _IN + 12  # release_in: fh, flags, release_flags
_FLOCK_UNLOCK: Final = int(fuse.ReleaseFlag.FLOCK_UNLOCK)
_MODE: Final = int(fuse.SetattrValid.MODE)
_MODE_AT: Final = 68  # of setattr_in
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID

#: RELEASEs that wait for a kick without company.
_POSTED_AT_ONCE: Final = 16


class HandleRules:
    """OPEN, CREATE, FLUSH and RELEASE."""

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._queue = parts.loan.requests
        self._kernel = parts.kernel
        self._device = parts.device
        self._opens = parts.opens
        self._released = parts.memory.released
        self._wrote = parts.memory.wrote
        self._locked = parts.memory.locked
        self._sentinels = parts.memory.walkers.sentinels
        self._reuse = parts.reuse

    def create(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """CREATE goes without O_CREAT (``rewrite``)."""
        flags: int = _U32(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags & ~os.O_CREAT)
        return False

    def open(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """OPEN, where something has to go along. What was known before it answers nothing more."""
        if nodeid in self._sentinels:
            del self._sentinels[nodeid]
        if self._reuse is not None and self._reuse.begin(slot, at, nodeid):
            return True
        self._opens.begin(slot)
        return False

    def opendir(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        """OPENDIR, where listings are kept as long as they are true."""
        self._opens.begin_check(slot)
        return False

    def flush(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """FLUSH is answered here, if nothing was written and no lock is to be given up."""
        handle = _U64(self._map, at + _IN)[0]
        if handle in self._wrote or nodeid in self._locked:
            self._wrote.discard(handle)
            return False
        self._kernel.answer(slot.answers)
        return True

    def release(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """RELEASE."""
        self._released(nodeid, _U64(self._map, at + _IN)[0])
        return self.post(slot, at, size, nodeid)

    def post(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """Answer a RELEASE now, and let the device have it with the next kick.

        Not one that gives locks up: somebody may wait for them.
        """
        if slot.head < 0 or _U32(self._map, at + _RELEASE_FLAGS_AT)[0] & _FLOCK_UNLOCK:
            return False
        unique, slot.answers = slot.answers, 0
        self._queue.submit_reserved(slot, slot.head, False)
        slot.state = POSTED
        self._device.posted += 1
        self._kernel.answer(unique)
        if self._device.posted >= _POSTED_AT_ONCE:
            self._device.kick()
        return True


class PassedHandleRules:
    """What is different where the kernel reads and writes by itself (``passthrough``).

    Args:
        parts: Of the relay, with passthrough.
        handles: What is done besides.
    """

    def __init__(self, parts: Parts, handles: HandleRules) -> None:
        assert parts.passthrough is not None
        self._map = parts.loan.memory.map
        self._kernel = parts.kernel
        self._opens = parts.opens
        self._nodes = parts.passthrough.nodes
        self._handles = handles

    def create(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        """CREATE and TMPFILE."""
        self._opens.begin_create(slot)
        return False

    def flush(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """FLUSH: the file may have been written to, perhaps through a mapping, unseen."""
        if not self._nodes.is_writer(_U64(self._map, at + _IN)[0]):
            return self._handles.flush(slot, at, size, nodeid)
        with suppress(OSError):  # forgotten meanwhile
            self._kernel.write(invalidation(nodeid))
        return False

    def release(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """RELEASE."""
        self._nodes.released(_U64(self._map, at + _IN)[0])
        return self._handles.release(slot, at, size, nodeid)

    def setattr(self, _slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """SETATTR: take note of set-id bits."""
        mode = _U32(self._map, at + _IN + _MODE_AT)[0]
        if mode & _SET_ID and _U32(self._map, at + _IN)[0] & _MODE:
            self._nodes.has_set_id(nodeid)
        return False
