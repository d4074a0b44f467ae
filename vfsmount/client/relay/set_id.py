"""Set-id bits, where the daemon leaves them to us: off they go before what must clear them.

The kernel is told HANDLE_KILLPRIV_V2, whether the daemon has that or not (``init``). It then clears
no bits by itself, and says in its requests when somebody without CAP_FSETID changes a file:

    WRITE, SETATTR of the size    a flag; O_TRUNC is a SETATTR, without ATOMIC_O_TRUNC
    SETATTR of the owner          the same flag, whoever asks: chown(2) clears
    SETATTR of nothing at all     what is left of "clear the bits", which its fallocate(2) and
                                  copy_file_range(2) ask for first
    FALLOCATE, COPY_FILE_RANGE    nothing: taken as said for all users but root

Such a request on a file that may have set-id bits (``SetIdMemory``) is held until the daemon has
said in a GETATTR of ours which bits it really has, and has cleared those in a SETATTR. What is
remembered decides only whether to ask: a mode from memory could undo a chmod at the host. If either
fails, so does the request; bits never survive because of an error. The kernel is told that its
attributes are old before the request goes on.

A CREATE makes a file. Should its name exist after all, the bits go with the first write.

``security.capability`` is removed by the host's kernel, whoever writes.
"""

from __future__ import annotations

import errno
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import SENT, Pending
from vfsmount.client.relay.memory import mode_left
from vfsmount.client.relay.opens import invalidation
from vfsmount.client.session import setattr_in
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.device import DevicePort
    from vfsmount.client.relay.kernel import KernelPort
    from vfsmount.client.relay.memory import SetIdMemory
    from vfsmount.client.relay.opens import OpenChecks
    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.slots import Slot

__all__ = ["SetIdBits", "SetIdRules"]

_IN: Final = fuse.IN_HEADER.size
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_PUT_U32: Final = struct.Struct("<I").pack_into
_UID_AT: Final = 24  # of fuse_in_header
_COPY_NODEID_AT: Final = _IN + 16  # copy_file_range_in: fh_in, off_in, nodeid_out
_MODE_AT: Final = 76  # of attr_out: 16 and 60
_GETATTR_BODY: Final = fuse.GETATTR_IN.values(0, 0)

_GETATTR: Final = int(Opcode.GETATTR)
_KILL: Final = int(SetattrValid.KILL_SUIDGID)
#: Say who sets attributes, not which.
_ABOUT: Final = int(SetattrValid.FH | SetattrValid.LOCKOWNER)


class SetIdBits:
    """Takes the bits off, and keeps what has to wait for that.

    Args:
        loan: Where GETATTR and SETATTR go.
        device: Has what is kept.
        kernel: Is told that attributes are old.
        opens: Is told of changes.
        memory: Which files may have the bits.
    """

    def __init__(
        self,
        loan: Loan,
        device: DevicePort,
        kernel: KernelPort,
        opens: OpenChecks,
        memory: SetIdMemory,
    ) -> None:
        self._map = loan.memory.map
        self._device = device
        self._kernel = kernel
        self._opens = opens
        self._memory = memory
        #: By node, what waits; and the request of ours that is under way for each.
        self._waiting: dict[int, list[Slot]] = {}
        self._asked: dict[Pending, int] = {}

    def clear(self, slot: Slot, nodeid: int) -> bool:
        """Have a request wait until a file has no bits to lose; False when it need not.

        Args:
            slot: Ready to go.
            nodeid: The file that it changes.
        """
        if nodeid not in self._memory.suspects:
            return False
        slot.state = SENT
        self._device.held.add(slot)
        waiting = self._waiting.get(nodeid)
        if waiting is not None:
            waiting.append(slot)
            return True
        self._waiting[nodeid] = [slot]
        self._memory.look_into(nodeid)
        self._opens.begin_change()
        self._ask(Opcode.GETATTR, nodeid, _GETATTR_BODY)
        return True

    def _ask(self, opcode: Opcode, nodeid: int, body: bytes) -> None:
        pending = Pending(opcode, nodeid, body, None, fuse.ATTR_OUT.size, 0, 0, 0, 0, None)
        self._asked[pending] = nodeid
        self._device.send_own(pending)

    def learned(self, pending: Pending) -> tuple[list[Slot], int]:
        """A request of the relay's own is through.

        Returns:
            The requests that need not wait any more, and the errno that they fail with, or 0.
        """
        nodeid = self._asked.pop(pending, 0)
        if not nodeid:
            return [], 0
        error = pending.errno
        if not error and pending.length < fuse.ATTR_OUT.size:
            error = errno.EIO
        if not error and pending.opcode == _GETATTR:
            left = mode_left(_U32(self._map, pending.data_at + _MODE_AT)[0])
            if left is not None:
                self._ask(Opcode.SETATTR, nodeid, fuse.SETATTR_IN.pack(setattr_in(mode=left)))
                return [], 0
        self._opens.end_change()
        self._memory.looked_into(nodeid, is_clean=not error)
        with suppress(OSError):  # forgotten meanwhile
            self._kernel.write(invalidation(nodeid))
        slots = self._waiting.pop(nodeid)
        self._device.held.difference_update(slots)
        return slots, error

    def tidy(self) -> None:
        """Forget files that the kernel has forgotten."""
        self._memory.tidy(self._kernel_knows)

    def _kernel_knows(self, nodeid: int) -> bool:
        try:
            self._kernel.write(invalidation(nodeid))
        except OSError as error:
            return error.errno != errno.ENOENT
        return True


class SetIdRules:
    """Requests that clear set-id bits, but for WRITE (``writes``).

    Args:
        parts: Of a relay that has to see to the bits.
    """

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._suspects = parts.memory.modes.suspects
        self._clear = parts.set_id.clear

    def setattr(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """SETATTR goes without the flag, which would ask the daemon for what it does not know."""
        valid: int = _U32(self._map, at + _IN)[0]
        if valid & _KILL:
            _PUT_U32(self._map, at + _IN, valid & ~_KILL)
        elif valid & ~_ABOUT:
            return False
        return bool(self._suspects) and self._clear(slot, nodeid)

    def fallocate(self, slot: Slot, at: int, _size: int, nodeid: int) -> bool:
        """FALLOCATE."""
        return (
            bool(self._suspects)
            and bool(_U32(self._map, at + _UID_AT)[0])
            and self._clear(slot, nodeid)
        )

    def copy(self, slot: Slot, at: int, _size: int, _nodeid: int) -> bool:
        """COPY_FILE_RANGE, of both kinds."""
        return (
            bool(self._suspects)
            and bool(_U32(self._map, at + _UID_AT)[0])
            and self._clear(slot, _U64(self._map, at + _COPY_NODEID_AT)[0])
        )
