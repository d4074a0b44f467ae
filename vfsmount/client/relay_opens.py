"""OPEN in mode ``auto``: what the kernel knows of the file is checked before it is opened.

A GETATTR of ours goes ahead of each OPEN, in the same kick. Its answer is judged by ``Freshness``:

    unchanged    the kernel keeps its pages and attributes
    changed      pages are dropped by the open (no KEEP_CACHE); the kernel is told that its
                 attributes are old, and asks again. What we know is *parked* for that question
    replaced     the node has no link left: ESTALE, at which the kernel looks the name up anew

With O_TRUNC there is nothing to check: the kernel drops pages and size by itself.

What is parked may answer one GETATTR, if nothing was changed here meanwhile: a change that was on
its way when we asked might or might not be in the answer, so then nothing is parked.
"""

from __future__ import annotations

import os
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final

from vfsmount.cache.freshness import SIGNATURE_AT, SIGNATURE_SIZE, Freshness
from vfsmount.channel.inflight import Pending
from vfsmount.wire import fuse
from vfsmount.wire.fuse import NotifyCode, Opcode, OpenOutFlag

if TYPE_CHECKING:
    from vfsmount.cache.freshness import Verdict
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay_slots import Slot

__all__ = ["CHANGES", "OpenCheck", "OpenChecks", "invalidation"]

#: Requests that may change attributes of a node that they do not even name.
CHANGES: Final = frozenset(
    map(
        int,
        (
            Opcode.SETATTR, Opcode.WRITE, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE,
            Opcode.COPY_FILE_RANGE_64, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.LINK,
            Opcode.UNLINK, Opcode.RENAME, Opcode.RENAME2, Opcode.CREATE, Opcode.IOCTL,
        ),
    )
)  # fmt: skip

_IN: Final = fuse.IN_HEADER.size
_U32: Final = struct.Struct("<I")
_OPEN_FLAGS_AT: Final = 8
_GETATTR_BODY: Final = fuse.GETATTR_IN.values(0, 0)
_SIGNATURE: Final = 16 + SIGNATURE_AT
_INVAL: Final = struct.Struct("<Qqq")  # fuse_notify_inval_inode_out: ino, off, len
_VALID: Final = struct.Struct("<QI")
#: Answers that may be parked; more only when the kernel never asks.
_PARKED: Final = 64


class OpenCheck:
    """The GETATTR that belongs to an OPEN.

    Attributes:
        pending: It, while it is on its way.
        replied: The OPEN itself is through.
        body: Its ``fuse_attr_out``; None when there is none.
        version: Changes begun when it was sent, or -1 when some were on their way.
        sent: When, clock seconds.
    """

    __slots__ = ("body", "pending", "replied", "sent", "version")

    def __init__(self, version: int, sent: float) -> None:
        self.pending: Pending | None = None
        self.replied = False
        self.body: bytes | None = None
        self.version = version
        self.sent = sent


class OpenChecks:
    """All checks that are on their way, and what the kernel was told.

    Args:
        loan: Where the GETATTRs go.
        policy: The cache policy; without ``revalidate`` nothing here does anything.

    Attributes:
        fresh: Is to be told the attributes that the kernel gets; None without ``revalidate``.
    """

    def __init__(self, loan: Loan, policy: CachePolicy) -> None:
        self.fresh = Freshness() if policy.revalidate else None
        self._queue = loan.requests
        self._map = loan.memory.map
        self._attr_timeout = policy.attr_timeout
        self._slots: dict[Pending, Slot] = {}
        self._parked: dict[int, tuple[bytes, float]] = {}
        self._begun = self._ended = 0

    def waiting(self) -> list[Slot]:
        """OPENs that the daemon has answered, but not yet their GETATTRs."""
        return [slot for slot in self._slots.values() if slot.check and slot.check.replied]

    # --- changes ---

    def begin_change(self) -> None:
        """A request that changes something is handed on."""
        self._begun += 1
        self._parked.clear()

    def end_change(self) -> None:
        """It is through."""
        self._ended += 1

    # --- opens ---

    def begin(self, slot: Slot) -> None:
        """Send the GETATTR of an OPEN that is to be submitted and kicked next."""
        flags: int = _U32.unpack_from(self._map, slot.at + _IN)[0]
        if flags & os.O_TRUNC:
            self.forget(slot.nodeid)
            return
        version = self._begun if self._begun == self._ended else -1
        check = slot.check = OpenCheck(version, monotonic())
        size = fuse.ATTR_OUT.size
        pending = Pending(Opcode.GETATTR, slot.nodeid, _GETATTR_BODY, None, size, 0, 0, 0, 0, None)
        if self._queue.submit(pending, kick=False):
            check.pending = pending
            self._slots[pending] = slot

    def replied(self, slot: Slot) -> bool:
        """The OPEN is through; return whether its GETATTR is too."""
        check = slot.check
        assert check is not None
        check.replied = True
        return check.pending is None

    def learned(self, pending: Pending) -> Slot | None:
        """A GETATTR is through, if it is one of these; return the OPEN that need not wait more."""
        slot = self._slots.pop(pending, None)
        if slot is None or slot.check is None:
            return None
        check = slot.check
        check.pending = None
        if not pending.errno and pending.length >= fuse.ATTR_OUT.size:
            check.body = self._map[pending.data_at : pending.data_at + fuse.ATTR_OUT.size]
        return slot if check.replied else None

    def judge(self, slot: Slot) -> Verdict:
        """Judge an OPEN, put the flag into its reply, and park the answer for the kernel."""
        check, fresh, body = slot.check, self.fresh, None
        assert check is not None
        assert fresh is not None
        body = check.body
        raw = None if body is None else body[_SIGNATURE : _SIGNATURE + SIGNATURE_SIZE]
        verdict = fresh.open(slot.nodeid, raw)
        if verdict.keep_pages and slot.length >= fuse.OPEN_OUT.size:
            at = slot.data_at + _OPEN_FLAGS_AT
            flags: int = _U32.unpack_from(self._map, at)[0]
            if not flags & OpenOutFlag.DIRECT_IO:
                _U32.pack_into(self._map, at, flags | OpenOutFlag.KEEP_CACHE)
        quiet = check.version == self._begun == self._ended
        if body is not None and quiet and not verdict.keep_attributes and not verdict.replaced:
            if len(self._parked) >= _PARKED:
                self._parked.clear()
            self._parked[slot.nodeid] = body, check.sent
        return verdict

    # --- what is known ---

    def take_parked(self, nodeid: int) -> bytes | None:
        """Return a ``fuse_attr_out`` for the kernel, valid as long as it still is, or None."""
        if not self._parked:
            return None
        found = self._parked.pop(nodeid, None)
        if found is None or self.fresh is None:
            return None
        body, sent = found
        left = self._attr_timeout - (monotonic() - sent)
        if left <= 0:
            return None
        self.fresh.gave(nodeid, body[_SIGNATURE : _SIGNATURE + SIGNATURE_SIZE])
        seconds = int(left)
        valid = _VALID.pack(seconds, int((left - seconds) * 1e9))
        return valid + body[_VALID.size :]

    def forget(self, nodeid: int) -> None:
        """The kernel forgets the node, or throws away what it knows of its contents."""
        self._parked.pop(nodeid, None)
        if self.fresh is not None:
            self.fresh.forget(nodeid)


def invalidation(nodeid: int) -> bytes:
    """Return FUSE_NOTIFY_INVAL_INODE for the attributes of a node, and no pages."""
    return fuse.encode_notification(NotifyCode.INVAL_INODE, _INVAL.pack(nodeid, -1, 0))
