"""Requests for POSIX locks, and INTERRUPT, which ends the wait for one (``interrupts``)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import SENT
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.slots import Slot

__all__ = ["LockRules"]

_IN: Final = fuse.IN_HEADER.size
_PUT_U32: Final = struct.Struct("<I").pack_into
_U64: Final = struct.Struct("<Q").unpack_from
_OPCODE_AT: Final = 4
_SETLKW: Final = int(Opcode.SETLKW)


class LockRules:
    """SETLK, SETLKW and INTERRUPT."""

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._device = parts.device
        self._late = parts.late
        self._note_lock = parts.memory.lock
        self._heeds_interrupts = parts.terms.heeds_interrupts

    def lock(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """SETLK, which does not wait: take note."""
        self._note_lock(nodeid, _U64(self._map, at + _IN)[0])
        self._late.interrupts.note_lock(nodeid, self._late.lock_of(slot))
        return False

    def wait_for_lock(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """SETLKW: go on with a wait that was interrupted, if it is the same."""
        self._note_lock(nodeid, _U64(self._map, at + _IN)[0])
        lock = self._late.lock_of(slot)
        if fuse.LK_IN.unpack(lock).type == LockType.UNLOCK:
            # Never waits; virtiofsd (C), which has no waiting, refuses it all the same.
            _PUT_U32(self._map, at + _OPCODE_AT, Opcode.SETLK)
            return False
        orphan = self._late.interrupts.adopt(nodeid, lock)
        if orphan is None:
            self._late.interrupts.note_lock(nodeid, lock)
            return False
        orphan.answers = slot.answers
        orphan.state = SENT
        return True

    def interrupt(self, _slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """INTERRUPT: the caller of a request got a signal."""
        unique = _U64(self._map, at + _IN)[0]
        victim = next((one for one in self._device.in_flight() if one.answers == unique), None)
        # One that was answered meanwhile needs nothing: the kernel has the reply, or will.
        if victim is not None and not self._forward(victim):
            self._late.interrupts.interrupt(victim)
        return True

    def _forward(self, victim: Slot) -> bool:
        """Have the daemon end a wait for a lock, if it does such things."""
        if not self._heeds_interrupts or victim.opcode != _SETLKW:
            return False
        body = fuse.INTERRUPT_IN.values(victim.unique)
        return self._device.send_aside(Opcode.INTERRUPT, body)
