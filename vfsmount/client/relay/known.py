"""Requests about what is known: answered from memory, asked for less, or forgotten."""

from __future__ import annotations

import errno
import os
import struct
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.client.relay.listings import OFFSET_AT, SIZE_AT, room_for_names
from vfsmount.client.relay.route import Route, SendAgain
from vfsmount.client.relay.walkers import WalkerRules
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    import mmap

    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.slots import Slot

__all__ = ["KnownRules"]

_IN: Final = fuse.IN_HEADER.size
_OUT: Final = fuse.OUT_HEADER.size
_XATTR_NAME_AT: Final = _IN + fuse.GETXATTR_IN.size
_PUT_U32: Final = struct.Struct("<I").pack_into
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_PUT_VALID: Final = struct.Struct("<QI").pack_into
_OPCODE_AT: Final = 4
_ENTRY: Final = fuse.ENTRY_OUT.size
_CAPABILITY: Final = b"security.capability"
_FORGET_ONE: Final = struct.Struct("<QQ").unpack_from


class KnownRules:
    """FORGET, attributes, extended attributes and listings."""

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._kernel = parts.kernel
        self._opens = parts.opens
        self._forget = parts.forget
        self._xattrs = parts.memory.xattrs
        self._names = parts.memory.names
        self._walkers = WalkerRules(parts)
        self._sentinels = parts.memory.walkers.sentinels
        self._names_alone = Route(is_known=True)
        self._names_alone.names_alone = True

    def forget(self, _slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """FORGET."""
        self._forget(nodeid, _U64(self._map, at + _IN)[0])
        return True

    def batch_forget(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """BATCH_FORGET."""
        start = at + _IN + fuse.BATCH_FORGET_IN.size
        for number in range(_U32(self._map, at + _IN)[0]):
            self._forget(*_FORGET_ONE(self._map, start + 16 * number))
        return True

    def getattr(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """GETATTR: what an open or a listing has just found out answers it."""
        found = self._walkers.asked(at, nodeid) if nodeid in self._sentinels else None
        parked = self._opens.take_parked(nodeid) or found
        if parked is None:
            return False
        body, left = parked
        at, end = slot.small, slot.small + len(body)
        self._map[at:end] = body
        if slot.route.rewrite is not None:
            slot.route.rewrite(self._map, at, len(body), nodeid, slot.at)
        _PUT_VALID(self._map, at, *divmod(left, 1_000_000_000))
        self._kernel.answer_body(slot.answers, self._map[at:end])
        return True

    def getxattr(self, slot: Slot, at: int, size: int, nodeid: int) -> bool:
        """GETXATTR of one that the file does not have."""
        name = self._map[at + _XATTR_NAME_AT : at + size - 1]  # a NUL follows
        if self._xattrs.is_absent(nodeid, name, perf_counter_ns() / 1e9):
            self._kernel.answer(slot.answers, errno.ENODATA)
            return True
        slot.xattr = name, self._xattrs.changes
        return False

    def change_xattr(self, _slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        """SETXATTR and REMOVEXATTR: a change begins."""
        self._xattrs.changed(nodeid)
        return False

    def xattr_changed(
        self, _memory: mmap.mmap, _at: int, _length: int, nodeid: int, _request: int
    ) -> None:
        """As a rewriter: a change is through."""
        self._xattrs.changed(nodeid)

    def created(self, then: Rewriter) -> Rewriter:
        """Return a rewriter of CREATE that sees new files: they have no capabilities.

        The kernel asks before it first writes to one. Only a file that had to be new (O_EXCL)
        surely is; and where nothing was ever found absent, nobody serves attributes.

        Args:
            then: What is done besides.
        """
        xattrs = self._xattrs

        def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, request: int) -> None:
            then(memory, at, length, nodeid, request)
            if len(xattrs) and length >= _ENTRY and _U32(memory, request + _IN)[0] & os.O_EXCL:
                now = perf_counter_ns() / 1e9
                xattrs.note_absent(_U64(memory, at)[0], _CAPABILITY, now, xattrs.changes)

        return rewrite

    def list(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """READDIRPLUS: ask for names alone, if they are enough."""
        self._opens.unpark(nodeid)
        if _U64(self._map, at + OFFSET_AT)[0]:
            return False
        now = monotonic()
        if self._names.is_known(nodeid, now) or self._walkers.begins(slot, at, nodeid, now):
            self._ask_for_names(slot, at)
        else:
            self._names.listed(nodeid, now)
        return False

    def list_names(self, _slot: Slot, _at: int, _size: int, nodeid: int) -> bool:
        """READDIR."""
        self._opens.unpark(nodeid)
        return False

    def list_failed(self, slot: Slot, number: int) -> bool:
        """READDIRPLUS has failed: ask for names alone, if it came upon one that has gone.

        virtiofsd (C) reads a name, looks it up, and says ENOENT when it was removed in between.
        The C library takes that for the end of the directory. By names alone it goes on.

        Raises:
            SendAgain: It is a READDIR now.
        """
        if number != errno.ENOENT:
            return False
        self._ask_for_names(slot, slot.at)
        raise SendAgain

    def _ask_for_names(self, slot: Slot, at: int) -> None:
        """Make a READDIRPLUS that lies ready in its slot a READDIR."""
        # The device may have had it: how much was asked for is not read from there again.
        _PUT_U32(self._map, at + SIZE_AT, room_for_names(slot.writable - _OUT))
        _PUT_U32(self._map, at + _OPCODE_AT, Opcode.READDIR)
        slot.opcode = Opcode.READDIR
        slot.route = self._names_alone

    def unexpected(self, slot: Slot, _at: int, _size: int, _nodeid: int) -> bool:
        """What the kernel does not send."""
        self._kernel.answer(slot.answers, errno.EIO)
        return True
