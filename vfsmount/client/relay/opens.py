"""What an open waits for besides its own reply.

In mode ``auto`` what the kernel knows of the file is checked: a GETATTR of ours goes ahead of
each OPEN, in the same kick. Its answer is judged by ``Freshness``:

    unchanged    the kernel keeps its pages and attributes
    changed      pages are dropped by the open (no KEEP_CACHE); the kernel is told that its
                 attributes are old, and asks again
    replaced     the node has no link left: ESTALE, at which the kernel looks the name up anew

With O_TRUNC nothing but a replacement is of interest, for what is written next would be lost with
the file that has no name: the kernel drops pages and size by itself.

What was found out is *parked* for 10 ms: programs that open a file ask for its attributes at once,
and the kernel passes that on after a change, and after any READ, which makes the time of access
unknown. One GETATTR is answered so, if nothing was changed here meanwhile (``grep -r`` again over
5,000 files: 1.2 to 1.3 times as long as passthrough_ll instead of 1.6, with what else is done for
opens here). A change that was on its way when we asked might or might not be in the answer, so then
nothing is parked. Nor is anything while the kernel writes to the file without our seeing it.

A directory that is opened is asked about likewise. Where it is unchanged, and the kernel knows what
its names stand for, too, or who opens it does not care, the kernel takes the names from the listing
that it has kept.

With DAX an open waits for its backing file as well (``passthrough``), in every mode.
"""

from __future__ import annotations

import os
import struct
from time import monotonic, perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Final

from vfsmount.cache.freshness import NOTHING_KNOWN, SIGNATURE_AT, SIGNATURE_SIZE, Freshness, Verdict
from vfsmount.cache.kept_listings import KeptListings
from vfsmount.client.relay.passthrough import CREATES
from vfsmount.client.relay.questions import Question, Questions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import NotifyCode, Opcode, OpenOutFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfsmount.cache.kept_handles import KeptHandles
    from vfsmount.cache.known_names import KnownNames
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.cache.walkers import Walkers
    from vfsmount.channel.inflight import Pending
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.passthrough import Passthrough
    from vfsmount.client.relay.slots import Slot

__all__ = ["CHANGES", "OPENER", "OpenCheck", "OpenChecks", "invalidation"]

#: Requests that may change attributes, also of nodes that they do not even name.
CHANGES: Final = frozenset(
    map(
        int,
        (
            Opcode.SETATTR, Opcode.WRITE, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE,
            Opcode.COPY_FILE_RANGE_64, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.LINK,
            Opcode.UNLINK, Opcode.RENAME, Opcode.RENAME2, Opcode.CREATE, Opcode.IOCTL,
            Opcode.MKDIR, Opcode.RMDIR, Opcode.SYMLINK, Opcode.MKNOD,
        ),
    )
)  # fmt: skip

_IN: Final = fuse.IN_HEADER.size
_U32: Final = struct.Struct("<I")
_PID_AT: Final = 32  # of fuse_in_header
_OPEN_FLAGS_AT: Final = 8
_SIGNATURE: Final = slice(16 + SIGNATURE_AT, 16 + SIGNATURE_AT + SIGNATURE_SIZE)  # of attr_out
_INVAL: Final = struct.Struct("<Qqq")  # fuse_notify_inval_inode_out: ino, off, len
#: Plain numbers: an operation on an IntFlag takes 0.5 us.
_KEEP_CACHE: Final = int(OpenOutFlag.KEEP_CACHE)
_DIRECT_IO: Final = int(OpenOutFlag.DIRECT_IO)
_CACHE_DIR: Final = int(OpenOutFlag.CACHE_DIR)
#: uid and gid of ``fuse_in_header``, flags of ``fuse_open_in``: a ``kept_handles.Opener``.
OPENER: Final = struct.Struct("<24xII8xI").unpack_from
_OPENED: Final = struct.Struct("<QI").unpack_from  # open_out: fh, open_flags
#: Handles of opens with any of these are not kept.
_UNLIKE: Final = os.O_ACCMODE | os.O_TRUNC | os.O_DIRECT
#: What may be said of a handle that is kept; all of it is for the policy to say.
_POLICY_FLAGS: Final = int(OpenOutFlag.KEEP_CACHE | OpenOutFlag.NOFLUSH | OpenOutFlag.CACHE_DIR)
#: Answers that may be parked; more only when the kernel never asks.
_PARKED: Final = 64
#: Nanoseconds for which they are: fstat(2) comes at once, or is somebody else's.
_PARKED_NS: Final = 10_000_000


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
        truncates: The file is to be emptied: what the GETATTR says is old by the time of the reply.
        is_gone: It said that the file had no name any more.
        is_reused: There is no OPEN: ``reply`` has a handle that was kept (``reuse``).
        body: The GETATTR's ``fuse_attr_out``; None when there is none, or it is old.
        reply: The body of the OPEN's reply, read once where it has to wait: node and handle are
            taken from here, because the daemon can still write to shared memory.
        fh: The handle, once it is counted as open; only with ``passthrough``.
        version: Changes begun when it was sent, or -1 when some were on their way.
        sent: When, ``perf_counter_ns``.
    """

    # Of the class, as most of them stay as they are: 0.09 us instead of 0.17 with slots.
    pending: Question | None = None
    replied = waits = asked = is_checked = truncates = is_gone = is_reused = False
    nodeid = wants = 0
    body: bytes | None = None
    reply = b""
    fh: int | None = None
    version = -1
    sent = 0

    def is_ready(self) -> bool:
        """Whether nothing is missing for the answer."""
        return self.replied and self.pending is None and not self.waits


class OpenChecks:
    """All checks that are on their way, and what the kernel was told.

    Args:
        loan: Where the GETATTRs go.
        policy: The cache policy; without ``revalidate`` nothing is checked.
        names: Directories of which the kernel knows the names.
        walkers: Who looks at nothing in them.
        kept: Is told of handles that may be kept.
        passthrough: Has backing files set up; None without DAX.

    Attributes:
        fresh: Is to be told the attributes that the kernel gets; None without ``revalidate``.
    """

    def __init__(
        self,
        loan: Loan,
        policy: CachePolicy,
        names: KnownNames,
        walkers: Walkers,
        kept: KeptHandles,
        passthrough: Passthrough | None = None,
    ) -> None:
        self.passthrough = passthrough
        self.fresh = Freshness() if policy.revalidate else None
        self._names, self._walkers, self._kept = names, walkers, kept
        self._listings = KeptListings()
        self._questions = Questions(loan)
        self._map = loan.memory.map
        self._attr_ns = int(policy.attr_timeout * 1e9)
        self._parked: dict[int, tuple[bytes, int]] = {}
        self._begun = self._ended = 0

    def waiting(self) -> list[Slot]:
        """Opens that the daemon has answered, but that wait for something else of it."""
        slots = [slot for slot in self._questions.waiting() if slot.check and slot.check.replied]
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

    def version(self) -> int:
        """Return how many changes have begun, or -1 while some are on their way."""
        return self._begun if self._begun == self._ended else -1

    # --- opens ---

    def begin(self, slot: Slot) -> None:
        """Send what goes with an OPEN that is to be submitted and kicked next."""
        if self.fresh is not None:
            self._begin_open(slot)
        if self.passthrough is not None:
            check = slot.check = slot.check or OpenCheck()
            if self.passthrough.begin(slot) and check.pending is None:
                check.pending = self._questions.ask(slot)

    def begin_create(self, slot: Slot) -> None:
        """The same for a CREATE; only with ``passthrough``."""
        assert self.passthrough is not None
        slot.check = OpenCheck()
        self.passthrough.begin_create(slot)

    def _begin_open(self, slot: Slot) -> None:
        flags: int = _U32.unpack_from(self._map, slot.at + _IN)[0]
        check = self.begin_check(slot)
        if flags & os.O_TRUNC:
            check.truncates = True
            self.unpark(slot.nodeid)

    def begin_check(self, slot: Slot) -> OpenCheck:
        """Ask about the node of an OPEN or OPENDIR that is to be submitted and kicked next."""
        check = slot.check = OpenCheck()
        check.is_checked = True
        if self._begun == self._ended:
            check.version = self._begun
        check.sent = slot.started_ns
        check.pending = self._questions.ask(slot)
        return check

    def replied(self, slot: Slot) -> bool:
        """An open is through; return whether it need not wait any more."""
        check = slot.check
        assert check is not None
        check.replied = True
        if self.passthrough is None and check.pending is None:
            return True
        if not slot.errno:
            check.reply = self._map[slot.data_at : slot.data_at + slot.length]
        if self.passthrough is not None and slot.opcode in CREATES:
            self.passthrough.created(check)
        return self._is_ready(slot, check)

    def put_back(self, slot: Slot, check: OpenCheck) -> None:
        """Have what was read of an open's reply in its place, for the answer that follows at once.

        Where it has waited, the daemon has had time to write there. The kernel gets the handle that
        is remembered here.
        """
        self._map[slot.data_at : slot.data_at + slot.length] = check.reply

    def _is_ready(self, slot: Slot, check: OpenCheck) -> bool:
        passthrough = self.passthrough
        return check.is_ready() and (passthrough is None or passthrough.settle(slot))

    def answered(self, question: Question) -> Slot | None:
        """A question is answered; return its open, if that need not wait any more."""
        slot = self._questions.answered(question)
        check = None if slot is None else slot.check
        if slot is None or check is None:
            return None
        if check.truncates:
            self._note_gone(slot.nodeid, check)
        if not check.replied:
            return None
        return slot if check.is_reused or self._is_ready(slot, check) else None

    def learned(self, pending: Pending) -> Sequence[Slot]:
        """Another request of our own is through; return the opens that need not wait any more."""
        return () if self.passthrough is None else self.passthrough.learned(pending)

    def _note_gone(self, nodeid: int, check: OpenCheck) -> None:
        """Of a file that is emptied, nothing is believed but that it was there."""
        body, check.body = check.body, None
        if body is not None and self.fresh is not None:
            raw = body[_SIGNATURE]
            check.is_gone = self.fresh.is_replaced(nodeid, raw)

    def judge(self, slot: Slot, check: OpenCheck) -> Verdict:
        """Judge an OPEN, put the flag into its reply, and park the answer for the kernel."""
        fresh = self.fresh
        assert fresh is not None
        if check.truncates:
            fresh.changed(slot.nodeid)
            return Verdict(keep_pages=False, keep_attributes=True, replaced=check.is_gone)
        body = check.body
        raw = None if body is None else body[_SIGNATURE]
        verdict = fresh.open(slot.nodeid, raw)
        if verdict.keep_pages and slot.length >= fuse.OPEN_OUT.size:
            at = slot.data_at + _OPEN_FLAGS_AT
            flags: int = _U32.unpack_from(self._map, at)[0]
            if not flags & _DIRECT_IO:
                _U32.pack_into(self._map, at, flags | _KEEP_CACHE)
        if body is not None and raw is not None and not verdict.replaced:
            self._park(slot.nodeid, body, check)
            self._note_handle(slot, raw, check.sent)
        return verdict

    def _note_handle(self, slot: Slot, raw: bytes, sent: int) -> None:
        """Take note of the handle in an OPEN's reply, if it may be kept when it is closed."""
        opener = OPENER(self._map, slot.at)
        fh, flags = _OPENED(self._map, slot.data_at)
        if opener[2] & _UNLIKE or flags & ~_POLICY_FLAGS or slot.length < fuse.OPEN_OUT.size:
            self._kept.released(fh)
        else:
            self._kept.opened(slot.nodeid, fh, opener, raw, sent)

    def judge_again(self, nodeid: int, fh: int, check: OpenCheck) -> Verdict:
        """Judge an OPEN that the daemon is spared if the file is what it was when it was opened.

        Both times: by the daemon, with that handle, and for the kernel, whose pages are from then.
        """
        if check.body is None or self.fresh is None:
            return NOTHING_KNOWN
        raw = check.body[_SIGNATURE]
        if not self._kept.is_as_opened(fh, raw):
            return NOTHING_KNOWN
        verdict = self.fresh.compare(nodeid, raw)
        if verdict.keep_pages:
            self._park(nodeid, check.body, check)
        return verdict

    def judge_directory(self, slot: Slot, check: OpenCheck) -> None:
        """Say in an OPENDIR's reply whether the kernel's listing is true, or is to be kept."""
        body, nodeid = check.body, slot.nodeid
        if body is None or slot.length < fuse.OPEN_OUT.size:
            self._listings.forget(nodeid)
            return
        raw = body[_SIGNATURE]
        if self._listings.is_unchanged(nodeid, raw) and self._is_listing_enough(slot):
            flags = _CACHE_DIR | _KEEP_CACHE
        else:
            flags = _CACHE_DIR if self._listings.begin(nodeid, raw, time_ns()) else 0
        at = slot.data_at + _OPEN_FLAGS_AT
        _U32.pack_into(self._map, at, _U32.unpack_from(self._map, at)[0] | flags)
        self._park(nodeid, body, check)

    def _is_listing_enough(self, slot: Slot) -> bool:
        """Whether names are enough: the kernel knows the rest, or who opens looks at nothing."""
        now = monotonic()
        if self._names.is_known(slot.nodeid, now):
            return True
        pid: int = _U32.unpack_from(self._map, slot.at + _PID_AT)[0]
        return self._walkers.is_enough(pid, slot.nodeid, now)

    def _park(self, nodeid: int, body: bytes, check: OpenCheck) -> None:
        """Keep the answer to the question that the kernel may have next."""
        if check.version == self._begun == self._ended:
            if len(self._parked) >= _PARKED:
                self._parked.clear()
            self._parked[nodeid] = body, check.sent

    def decide(self, slot: Slot, check: OpenCheck) -> int:
        """Say in an open's answer who reads and writes; return 0, or the errno to fail with."""
        assert self.passthrough is not None
        error = self.passthrough.decide(slot)
        if self._parked and self.passthrough.nodes.is_passed(check.nodeid):
            self._parked.pop(check.nodeid, None)
        return error

    def refused(self, slot: Slot) -> None:
        """The kernel has not taken an open's answer after all."""
        if self.passthrough is not None and slot.check is not None:
            self.passthrough.taken_back(slot.check)

    # --- what is known ---

    def take_parked(self, nodeid: int) -> tuple[bytes, int] | None:
        """Return the daemon's ``fuse_attr_out``, and the nanoseconds for which it is valid yet."""
        if not self._parked:
            return None
        found = self._parked.pop(nodeid, None)
        if found is None:
            return None
        body, sent = found
        age = perf_counter_ns() - sent
        left = self._attr_ns - age
        return (body, left) if age < _PARKED_NS and left > 0 else None

    def unpark(self, nodeid: int) -> None:
        """The node is about to change, at the host, a little: its time of access."""
        if self._parked:
            self._parked.pop(nodeid, None)

    def forget(self, nodeid: int) -> None:
        """The kernel forgets the node, or throws away what it knows of its contents."""
        self._parked.pop(nodeid, None)
        self._listings.forget(nodeid)
        if self.fresh is not None:
            self.fresh.forget(nodeid)


def invalidation(nodeid: int) -> bytes:
    """Return FUSE_NOTIFY_INVAL_INODE for the attributes of a node, and no pages."""
    return fuse.encode_notification(NotifyCode.INVAL_INODE, _INVAL.pack(nodeid, -1, 0))
