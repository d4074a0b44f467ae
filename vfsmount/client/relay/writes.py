"""Requests that write: what is noted of them, and whether they have to wait for set-id bits."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.client.relay.memory import flags_of_write
from vfsmount.wire import fuse
from vfsmount.wire.fuse import WriteFlag

if TYPE_CHECKING:
    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.route import Route
    from vfsmount.client.relay.slots import Slot

__all__ = ["WriteRules"]

_IN: Final = fuse.IN_HEADER.size
_U64: Final = struct.Struct("<Q").unpack_from
_OF_PAGES: Final = int(WriteFlag.CACHE)
_CLEARS_SET_ID: Final = int(WriteFlag.KILL_SUIDGID)
_COPY_TARGET_AT: Final = 24  # copy_file_range_in: fh_in, off_in, nodeid_out, fh_out


class WriteRules:
    """WRITE, FALLOCATE and COPY_FILE_RANGE.

    Attributes:
        of_pages: The route of a WRITE of the kernel's pages, whose caller sees errors alone.
    """

    of_pages: Route

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._suspects = parts.memory.modes.suspects
        self._clear = parts.set_id.clear
        self._wrote = parts.memory.wrote

    def write(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """WRITE."""
        used = at - slot.base + size
        if used > slot.touched:
            slot.touched = used
        self._wrote.add(_U64(self._map, at + _IN)[0])
        flags = flags_of_write(self._map, at)
        if flags & _OF_PAGES:
            slot.route = self.of_pages
        return bool(self._suspects and flags & _CLEARS_SET_ID) and self._clear(slot, nodeid)

    def fallocate(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """FALLOCATE."""
        self._wrote.add(_U64(self._map, at + _IN)[0])
        return False

    def copy(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """COPY_FILE_RANGE, of both kinds."""
        self._wrote.add(_U64(self._map, at + _IN + _COPY_TARGET_AT)[0])
        return False
