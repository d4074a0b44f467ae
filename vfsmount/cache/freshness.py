"""What an open must know: whether the kernel's attributes and pages of a node are still true.

Close-to-open: an open after a change at the host sees the new content and size at once. So an open
asks the daemon for attributes and compares what tells of changes, a *signature*: size, mtime, ctime
and the number of links. Two memories answer two questions:

* ``given``: what the kernel was told last. Differs: its attributes are old, and have to be
  invalidated before the open is answered.
* ``opened``: what the last open found. The kernel's pages were read since. Same: they are the
  file's. The kernel itself drops pages when it sees another size or mtime; ctime it does not heed,
  and only ctime tells of a change whose mtime was set back.

Both are bounded; what was pushed out counts as changed, which costs a request but never a promise.
They give up several at once: the oldest of a table that has lost its oldest before takes long to
find (one by one an entry cost 70 us in a tree of 100,000 files, and 1 us now).
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Final, NamedTuple

from vfsmount.wire import fuse

__all__ = [
    "NOTHING_KNOWN",
    "SIGNATURE_AT",
    "SIGNATURE_SIZE",
    "Freshness",
    "Verdict",
    "is_same",
    "signature_of",
]

#: Offset in ``fuse_attr`` (88 bytes) and length of what a signature is made of: size u64 at 8, then
#: blocks, atime, mtime, ctime u64, their nanoseconds u32, mode u32, nlink u32 at 64.
SIGNATURE_AT: Final = 8
SIGNATURE_SIZE: Final = 60
_FIELDS: Final = struct.Struct("<Q16xQQ4xII4xI")
_NLINK: Final = struct.Struct("<56xI")


class Verdict(NamedTuple):
    """What an open has found out.

    Attributes:
        keep_pages: The kernel's pages are what is in the file.
        keep_attributes: So are its attributes.
        replaced: The node has no name any more: the name that led here may lead elsewhere by now.
    """

    keep_pages: bool
    keep_attributes: bool
    replaced: bool


NOTHING_KNOWN: Final = Verdict(keep_pages=False, keep_attributes=False, replaced=False)
#: By both questions; to make one takes longer than to find it.
_VERDICTS: Final = {
    (pages, attributes): Verdict(pages, attributes, replaced=False)
    for pages in (False, True)
    for attributes in (False, True)
}


def signature_of(attr: fuse.Attr) -> bytes:
    """Return the part of ``fuse_attr`` that signatures are cut from, as bytes."""
    return fuse.ATTR.pack(attr)[SIGNATURE_AT : SIGNATURE_AT + SIGNATURE_SIZE]


def _essence(raw: bytes) -> tuple[int, ...]:
    """Size, mtime, ctime; atime, blocks and mode apart."""
    fields: tuple[int, ...] = _FIELDS.unpack(raw)
    return fields[:-1]


def is_same(before: bytes | None, now: bytes) -> bool:
    """Whether two signatures tell of the same contents; no signature tells of nothing."""
    return before is not None and (before == now or _essence(before) == _essence(now))


def _give_up(memory: dict[int, bytes]) -> None:
    """Forget the oldest."""
    for nodeid in list(islice(memory, 1 + len(memory) // 64)):
        del memory[nodeid]


class Freshness:
    """Signatures by node.

    Args:
        limit: Most nodes in each memory; 100 bytes each.
    """

    __slots__ = ("_given", "_limit", "_opened", "_stale")

    def __init__(self, limit: int = 1 << 15) -> None:
        self._limit = limit
        self._given: dict[int, bytes] = {}
        self._opened: dict[int, bytes] = {}
        self._stale: set[int] = set()

    def gave(self, nodeid: int, raw: bytes) -> None:
        """The kernel is told attributes; ``raw`` is ``signature_of`` them."""
        given = self._given
        given[nodeid] = raw
        if len(given) > self._limit:
            _give_up(given)

    def was_not_given(self, nodeid: int) -> None:
        """What was said to be given did not get there: nobody knows what the kernel has."""
        self._given.pop(nodeid, None)

    def is_given(self, nodeid: int, raw: bytes) -> bool:
        """Whether the file is as the attributes say that the kernel was told last."""
        return is_same(self._given.get(nodeid), raw)

    def is_replaced(self, nodeid: int, raw: bytes) -> bool:
        """Whether a node that is opened has no name any more.

        That is said once, not again at the next open: there are ways to open a file without a
        name, and for those an error would be wrong.
        """
        if _NLINK.unpack(raw)[0] or nodeid in self._stale:
            return False
        self._stale.add(nodeid)
        return True

    def open(self, nodeid: int, raw: bytes | None) -> Verdict:
        """Judge an open by the attributes that the daemon has just given, None when it did not."""
        if raw is None:
            self._opened.pop(nodeid, None)
            return NOTHING_KNOWN
        if self.is_replaced(nodeid, raw):
            return Verdict(keep_pages=False, keep_attributes=False, replaced=True)
        verdict = self._verdict(nodeid, raw)
        self._opened.pop(nodeid, None)
        self._opened[nodeid] = raw
        if len(self._opened) > self._limit:
            _give_up(self._opened)
        return verdict

    def compare(self, nodeid: int, raw: bytes) -> Verdict:
        """Judge as ``open`` does, and remember nothing. What has no name any more has changed."""
        return self._verdict(nodeid, raw) if _NLINK.unpack(raw)[0] else NOTHING_KNOWN

    def _verdict(self, nodeid: int, raw: bytes) -> Verdict:
        keep_pages = is_same(self._opened.get(nodeid), raw)
        return _VERDICTS[keep_pages, self.is_given(nodeid, raw)]

    def changed(self, nodeid: int) -> None:
        """The contents change in a way that no page of the kernel has seen."""
        self._opened.pop(nodeid, None)

    def forget(self, nodeid: int) -> None:
        """The kernel knows the node no more; its number may come back as another's."""
        self._given.pop(nodeid, None)
        self._opened.pop(nodeid, None)
        self._stale.discard(nodeid)

    def check_invariants(self) -> None:
        """Raise AssertionError unless both memories keep within their bounds."""
        assert len(self._given) <= self._limit
        assert len(self._opened) <= self._limit
