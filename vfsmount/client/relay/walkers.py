"""Listings of who looks at nothing in them, and the sentinels that tell (``cache.walkers``).

A sentinel is the first file in a reply to READDIRPLUS that has many: the validity of its attributes
becomes 0, so that who looks at it has the kernel send a GETATTR. As it is the first that programs
look at, that comes at once, and is answered from here, with what the listing has said, unless

* anything was changed through this mount since the listing was asked for, as with what an open
  parks (``opens``); so nothing that was changed here is ever shown as it was before;
* the file has been passed through, when the kernel changes it without our seeing it;
* it has been opened since, as each open finds out anew;
* somebody else asks than who has listed, or not at once: it may want to know better, by statx with
  AT_STATX_FORCE_SYNC, which looks the same here.

The daemon is asked then, as for any file.
"""

from __future__ import annotations

import struct
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Final

from vfsmount.cache.walkers import Plan, Sentinel
from vfsmount.client.relay.listings import find_sentinel
from vfsmount.wire import fuse

if TYPE_CHECKING:
    import mmap

    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.slots import Slot

__all__ = ["WalkerRules"]

_PID_AT: Final = 32  # of fuse_in_header: the thread's, 0 for another pid namespace's
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_ENTRY: Final = fuse.ENTRY_OUT.size
_ENTRY_ATTR_AT: Final = 40
#: Of fuse_entry_out, at 24: attr_valid u64, entry_valid_nsec u32 that stays, attr_valid_nsec u32.
_VALID_AT: Final = 24
_VALID_NSEC_AT: Final = 36
#: What is before fuse_attr in fuse_attr_out: the validity, which is said by who answers.
_VALIDITY: Final = bytes(fuse.ATTR_OUT.size - fuse.ATTR.size)
#: Seconds after a listing for which it answers: programs on a busy machine look at the first file
#: that late.
_AT_ONCE: Final = 0.05


class WalkerRules:
    """What is done about walkers, to listings and GETATTRs."""

    def __init__(self, parts: Parts) -> None:
        self._map = parts.loan.memory.map
        self._opens = parts.opens
        self._walkers = parts.memory.walkers
        self._nodes = None if parts.passthrough is None else parts.passthrough.nodes

    def begins(self, slot: Slot, at: int, nodeid: int, now: float) -> bool:
        """Whether names are enough for a listing; where nobody knows, have a sentinel set in it."""
        pid: int = _U32(self._map, at + _PID_AT)[0]
        plan = self._walkers.begins(pid, nodeid, now)
        if plan is Plan.WATCHED and slot.route.rewrite is not None:
            rewrite = self._with_sentinel(slot.route.rewrite, pid, now)
            slot.route = copy(slot.route)  # this listing's own
            slot.route.rewrite = rewrite
        return plan is Plan.NAMES

    def _with_sentinel(self, full: Rewriter, pid: int, sent: float) -> Rewriter:
        """Return what sets a sentinel in a reply, after all that ``full`` does to it."""
        version = self._opens.version()

        def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, request: int) -> None:
            full(memory, at, length, nodeid, request)
            found = find_sentinel(memory, at, length)
            if found is None:
                return
            entry = memory[found : found + _ENTRY]
            memory[found + _VALID_AT : found + _VALID_AT + 8] = bytes(8)
            memory[found + _VALID_NSEC_AT : found + _VALID_NSEC_AT + 4] = bytes(4)
            node: int = _U64(entry)[0]
            known = -1 if self._is_passed(node) else version
            until, now = sent + self._walkers.valid, monotonic()
            self._walkers.placed(node, Sentinel(pid, until, entry[_ENTRY_ATTR_AT:], known, now))

        return rewrite

    def _is_passed(self, nodeid: int) -> bool:
        return self._nodes is not None and self._nodes.was_passed(nodeid)

    def asked(self, at: int, nodeid: int) -> tuple[bytes, int] | None:
        """Return what answers a GETATTR of a sentinel, None if it has to go to the daemon.

        Args:
            at: Where the request lies.
            nodeid: The sentinel.

        Returns:
            The daemon's ``fuse_attr_out``, and the nanoseconds for which it is valid yet.
        """
        now = monotonic()
        sentinel = self._walkers.asked(nodeid, now)
        if sentinel is None or sentinel.pid != _U32(self._map, at + _PID_AT)[0]:
            return None
        if sentinel.version < 0 or sentinel.version != self._opens.version():
            return None
        if now > sentinel.placed + _AT_ONCE or self._is_passed(nodeid):
            return None
        return _VALIDITY + sentinel.attributes, int((sentinel.until - now) * 1e9)
