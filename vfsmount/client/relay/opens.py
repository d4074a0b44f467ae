"""What an open waits for besides its own reply.

In mode ``auto`` what the kernel knows of the file is checked: a GETATTR of ours goes ahead of
each OPEN, in the same kick. Its answer is judged by ``Freshness``:

    unchanged    the kernel keeps its pages and attributes
    changed      pages are dropped by the open (no KEEP_CACHE); the kernel is told that its
                 attributes are old, and asks again. What we know is *parked* for that question
    replaced     the node has no link left: ESTALE, at which the kernel looks the name up anew

With O_TRUNC there is nothing to check: the kernel drops pages and size by itself.

What is parked may answer one GETATTR, if nothing was changed here meanwhile: a change that was on
its way when we asked might or might not be in the answer, so then nothing is parked. Nor is
anything while the kernel writes to the file without our seeing it.

With DAX an open waits for its backing file as well (``passthrough``), in every mode.
"""

from __future__ import annotations

import os
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final

from vfsmount.cache.freshness import SIGNATURE_AT, SIGNATURE_SIZE, Freshness
from vfsmount.channel.inflight import Pending
from vfsmount.client.relay.passthrough import CREATES
from vfsmount.wire import fuse
from vfsmount.wire.fuse import NotifyCode, Opcode, OpenOutFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfsmount.cache.freshness import Verdict
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.passthrough import Passthrough
    from vfsmount.client.relay.slots import Slot

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
    """What belongs to an OPEN, or a CREATE.

    Attributes:
        pending: Its GETATTR, while that is on its way.
        replied: The OPEN itself is through.
        waits: For a backing file.
        asked: It has waited for one, or has to.
        wants: What it wants of that, see ``passthrough``.
        is_checked: There is to be a GETATTR.
        nodeid: Whose; 0 as long as nobody knows.
        body: The GETATTR's ``fuse_attr_out``; None when there is none.
        reply: The body of the OPEN's reply, read once: node and handle are taken from here, because
            the daemon can still write to shared memory.
        fh: The handle, once it is counted as open; only with ``passthrough``.
        version: Changes begun when it was sent, or -1 when some were on their way.
        sent: When, clock seconds.
    """

    __slots__ = (
        "asked", "body", "fh", "is_checked", "nodeid", "pending", "replied", "reply", "sent",
        "version", "waits", "wants",
    )  # fmt: skip

    def __init__(self, version: int = -1, sent: float = 0.0) -> None:
        self.is_checked = False
        self.pending: Pending | None = None
        self.replied = self.waits = self.asked = False
        self.nodeid = self.wants = 0
        self.body: bytes | None = None
        self.reply = b""
        self.fh: int | None = None
        self.version = version
        self.sent = sent

    def is_ready(self) -> bool:
        """Whether nothing is missing for the answer."""
        return self.replied and self.pending is None and not self.waits


class OpenChecks:
    """All checks that are on their way, and what the kernel was told.

    Args:
        loan: Where the GETATTRs go.
        policy: The cache policy; without ``revalidate`` nothing is checked.
        passthrough: Has backing files set up; None without DAX.

    Attributes:
        fresh: Is to be told the attributes that the kernel gets; None without ``revalidate``.
    """

    def __init__(
        self, loan: Loan, policy: CachePolicy, passthrough: Passthrough | None = None
    ) -> None:
        self.passthrough = passthrough
        self.fresh = Freshness() if policy.revalidate else None
        self._queue = loan.requests
        self._map = loan.memory.map
        self._attr_timeout = policy.attr_timeout
        self._slots: dict[Pending, Slot] = {}
        self._parked: dict[int, tuple[bytes, float]] = {}
        self._begun = self._ended = 0

    def waiting(self) -> list[Slot]:
        """Opens that the daemon has answered, but that wait for something else of it."""
        slots = [slot for slot in self._slots.values() if slot.check and slot.check.replied]
        if self.passthrough is not None:
            slots += [slot for slot in self.passthrough.waiting() if slot not in slots]
        return slots

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
        """Send what goes with an OPEN that is to be submitted and kicked next."""
        if self.fresh is not None:
            self._begin_check(slot)
        if self.passthrough is not None:
            check = slot.check = slot.check or OpenCheck()
            if self.passthrough.begin(slot) and check.pending is None:
                self._ask(slot, check)

    def begin_create(self, slot: Slot) -> None:
        """The same for a CREATE; only with ``passthrough``."""
        assert self.passthrough is not None
        slot.check = OpenCheck()
        self.passthrough.begin_create(slot)

    def _begin_check(self, slot: Slot) -> None:
        flags: int = _U32.unpack_from(self._map, slot.at + _IN)[0]
        if flags & os.O_TRUNC:
            self.forget(slot.nodeid)
            return
        version = self._begun if self._begun == self._ended else -1
        check = slot.check = OpenCheck(version, monotonic())
        check.is_checked = True
        self._ask(slot, check)

    def _ask(self, slot: Slot, check: OpenCheck) -> None:
        """Have a GETATTR go ahead of an OPEN."""
        size = fuse.ATTR_OUT.size
        pending = Pending(Opcode.GETATTR, slot.nodeid, _GETATTR_BODY, None, size, 0, 0, 0, 0, None)
        if self._queue.submit(pending, kick=False):
            check.pending = pending
            self._slots[pending] = slot

    def replied(self, slot: Slot) -> bool:
        """An open is through; return whether it need not wait any more."""
        check = slot.check
        assert check is not None
        check.replied = True
        if not slot.errno:
            check.reply = self._map[slot.data_at : slot.data_at + slot.length]
        if self.passthrough is not None and slot.opcode in CREATES:
            self.passthrough.created(check)
        return self._is_ready(slot, check)

    def put_back(self, slot: Slot) -> None:
        """Have what was read of an open's reply in its place, for the answer that follows at once.

        Where it has waited, the daemon has had time to write there. The kernel gets the handle that
        is remembered here.
        """
        if slot.check is not None and not slot.errno:
            self._map[slot.data_at : slot.data_at + slot.length] = slot.check.reply

    def _is_ready(self, slot: Slot, check: OpenCheck) -> bool:
        passthrough = self.passthrough
        return check.is_ready() and (passthrough is None or passthrough.settle(slot))

    def learned(self, pending: Pending) -> Sequence[Slot]:
        """A request of the relay's own is through; return the opens that need not wait any more."""
        slot = self._slots.pop(pending, None)
        if slot is None or slot.check is None:
            return () if self.passthrough is None else self.passthrough.learned(pending)
        check = slot.check
        check.pending = None
        if not pending.errno and pending.length >= fuse.ATTR_OUT.size:
            check.body = self._map[pending.data_at : pending.data_at + fuse.ATTR_OUT.size]
        return (slot,) if self._is_ready(slot, check) else ()

    def checks(self, slot: Slot) -> bool:
        """Whether there is something to judge."""
        return slot.check is not None and slot.check.is_checked

    def judge(self, slot: Slot) -> Verdict:
        """Judge an OPEN, put the flag into its reply, and park the answer for the kernel."""
        check, fresh = slot.check, self.fresh
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

    def decide(self, slot: Slot) -> int:
        """Say in an open's answer who reads and writes; return 0, or the errno to fail with."""
        if self.passthrough is None:
            return 0
        error = self.passthrough.decide(slot)
        check = slot.check
        if self._parked and check is not None and self.passthrough.nodes.is_passed(check.nodeid):
            self._parked.pop(check.nodeid, None)
        return error

    def refused(self, slot: Slot) -> None:
        """The kernel has not taken an open's answer after all."""
        if self.passthrough is not None and slot.check is not None:
            self.passthrough.taken_back(slot.check)

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
