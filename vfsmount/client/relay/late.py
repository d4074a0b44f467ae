"""Requests answered before their time, and what becomes of the replies that come too late.

The device keeps the slot of such a request as long as it likes. What its reply hands out
(references, handles, locks) is given back then; ``undo`` says how. And what the kernel has asked
meanwhile may be from before a change that comes so late: it is told that the attributes are old,
and drops the pages of a file that has another size or time then.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import ABANDONED
from vfsmount.client.relay.interrupts import Interrupts
from vfsmount.client.relay.opens import CHANGES, invalidation
from vfsmount.client.relay.undo import undo_late_reply
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.device import DevicePort
    from vfsmount.client.relay.kernel import KernelPort
    from vfsmount.client.relay.slots import Slot

__all__ = ["LateReplies"]

_IN: Final = fuse.IN_HEADER.size
_LK_IN: Final = fuse.LK_IN.size
_PID: Final = struct.Struct("<I").unpack_from
_PID_AT: Final = 32
_FH: Final = struct.Struct("<Q").unpack_from  # release_in
_RELEASE: Final = int(Opcode.RELEASE)


class LateReplies:
    """Who gives up, and who cleans up.

    Args:
        loan: The queues; counts what is abandoned.
        kernel: Answers callers.
        device: Sends what undoes.
        forget: Gives references to a node back.
        released: Is told of handles that are given back.

    Attributes:
        interrupts: Who was interrupted.
    """

    __slots__ = ("_device", "_forget", "_kernel", "_loan", "_map", "_released", "interrupts")

    def __init__(
        self,
        loan: Loan,
        kernel: KernelPort,
        device: DevicePort,
        forget: Callable[[int, int], None],
        released: Callable[[int, int], None],
    ) -> None:
        self._loan = loan
        self._map = loan.memory.map
        self._kernel = kernel
        self._device = device
        self._forget = forget
        self._released = released
        self.interrupts = Interrupts(self.give_up, self.lock_of, self._pid_of)

    def give_up(self, slot: Slot, number: int) -> None:
        """Answer a request with an error now; the device may keep it as long as it likes."""
        slot.state = ABANDONED
        self._loan.abandoned += 1
        if slot.route.failed is None or not slot.route.failed(slot, number):
            self._kernel.answer(slot.answers, number)
        slot.answers = 0

    def undo(self, slot: Slot) -> None:
        """Take back what a reply has handed out that nobody took; tell of what has changed."""
        if self.interrupts.settle(slot) and not slot.errno:
            self.take_back(slot)
            if slot.opcode in CHANGES:
                with suppress(OSError):  # forgotten meanwhile
                    self._kernel.write(invalidation(slot.nodeid))

    def take_back(self, slot: Slot) -> None:
        """Have the daemon forget what a reply has handed out."""
        reply = slot.check.reply if slot.check is not None else b""
        reply = reply or self._map[slot.data_at : slot.data_at + slot.length]
        undo = undo_late_reply(slot.opcode, slot.nodeid, self.lock_of(slot), reply)
        for nodeid in undo.forgets:
            self._forget(nodeid, 1)
        for opcode, nodeid, body in undo.requests:
            if opcode == _RELEASE:
                self._released(nodeid, _FH(body)[0])
            self._device.undo(opcode, nodeid, body)

    def lock_of(self, slot: Slot) -> bytes:
        """The first 48 bytes of a request's body: ``fuse_lk_in``, where it is about a lock."""
        return self._map[slot.at + _IN : slot.at + _IN + _LK_IN]

    def _pid_of(self, slot: Slot) -> int:
        pid: int = _PID(self._map, slot.at + _PID_AT)[0]
        return pid
