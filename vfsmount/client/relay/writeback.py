"""Requests below the kernel's write-back: what is different there.

The kernel reads around what it writes, and appends by itself (``rewrite``); and whoever is to be
told that pages did not reach the host is told here (``unwritten``).
"""

from __future__ import annotations

import errno
import os
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

from vfsmount.client.relay.rewrite import FailsHere, flags_below_writeback
from vfsmount.client.relay.route import Route
from vfsmount.wire import fuse

if TYPE_CHECKING:
    import mmap

    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.slots import Slot
    from vfsmount.client.relay.unwritten import Unwritten
    from vfsmount.client.relay.writes import WriteRules

__all__ = ["WritebackRules"]

_IN: Final = fuse.IN_HEADER.size
_PUT_U32: Final = struct.Struct("<I").pack_into
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_WRITE_SIZE_AT: Final = 16  # write_in: fh, offset, size
_FLUSH_IN: Final = struct.Struct("<Q8xQ").unpack_from  # flush_in: fh, unused, lock_owner


class WritebackRules:
    """What opens, FLUSH, FSYNC and COPY_FILE_RANGE, and failures to write.

    Args:
        parts: Of the relay.
        unwritten: Who is to be told.
        writes: What is done to a copy besides.
    """

    def __init__(self, parts: Parts, unwritten: Unwritten, writes: WriteRules) -> None:
        self._map = parts.loan.memory.map
        self._kernel = parts.kernel
        self._unwritten = unwritten
        self._writes = writes

    def open(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """OPEN, CREATE and TMPFILE."""
        flags: int = _U32(self._map, at + _IN)[0]
        _PUT_U32(self._map, at + _IN, flags_below_writeback(flags) & ~os.O_CREAT)
        return False

    def copy(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """COPY_FILE_RANGE, of both kinds, of what the host may lack."""
        lacks = self._unwritten.lacks(nodeid)
        if lacks:
            self._kernel.answer(slot.answers, lacks)
            return True
        return self._writes.copy(slot, at, size, nodeid)

    def flush(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """FLUSH."""
        fh, owner = _FLUSH_IN(self._map, at + _IN)
        return self._tell(slot, self._unwritten.flushed(fh, owner))

    def fsync(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """FSYNC."""
        return self._tell(slot, self._unwritten.synced(nodeid, _U64(self._map, at + _IN)[0]))

    def _tell(self, slot: Slot, number: int) -> bool:
        """Have a request fail with an errno, if there is one, whatever the daemon says to it.

        It is sent all the same: there may be locks to give up, and what can be synced should be.
        """
        if number:
            slot.route = Route(is_known=True)
            slot.route.rewrite = _failing(number)
            slot.route.failed = partial(self._answer_told, number)
        return False

    def _answer_told(self, number: int, slot: Slot, _theirs: int) -> bool:
        self._kernel.answer(slot.answers, number)
        return True

    # --- as ``failed`` of a route ---

    def pages_failed(self, slot: Slot, number: int) -> bool:
        """A WRITE of the kernel's pages failed: the kernel need not know, if others are told."""
        if not self._unwritten.failed(slot.nodeid, number):
            return False
        size = _U32(self._map, slot.at + _IN + _WRITE_SIZE_AT)[0]
        self._kernel.answer_body(slot.answers, fuse.WRITE_OUT.values(size))
        return True

    def not_known(self, slot: Slot, number: int) -> bool:
        """A FLUSH or FSYNC failed. The kernel must not learn that the daemon has no such thing.

        It would send no more of them.
        """
        if number == errno.ENOSYS:
            self._kernel.answer(slot.answers)
        return number == errno.ENOSYS


def _failing(number: int) -> Rewriter:
    """Return what makes a failure of a success."""

    def fail(_memory: mmap.mmap, _at: int, _length: int, _nodeid: int, _request: int) -> None:
        raise FailsHere(number)

    return fail
