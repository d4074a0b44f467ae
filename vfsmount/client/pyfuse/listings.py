"""Listings that the pyfuse3 engine keeps, where the cache policy has a time for them.

pyfuse3 cannot tell the kernel to keep listings, so the kernel asks for each anew, and is answered
from here: names in the daemon's order, the node of each, and its attributes, because the kernel
takes what a listing says for the truth. So they must be as new as what the kernel has:

* a change made here drops them when it is through, and what was asked before is not kept;
* those of a file with several names are never kept: a change may come by a name unknown here;
* those of a file with dirty data are not either.

Each kept name holds its node as a lookup of the kernel would. Cookies are positions in the listing.
"""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.cache.attributes import Attributes
from vfsmount.cache.names import Names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.pyfuse.nodes import NodeTable
    from vfsmount.wire.fuse import Attr

__all__ = ["KeptListings", "Known", "dot_line", "read_dot_line"]

#: Most names and places in listings: of 100,000 files, which take 45 MiB.
LIMIT: Final = 200_000
#: Unknown nodes that are looked up one by one, beside an eighth of all; else the daemon lists anew.
_FEW: Final = 8


class Known(NamedTuple):
    """What a name leads to.

    Attributes:
        nodeid: Towards the daemon.
        attr: As last seen.
        age: Seconds since they were asked for.
    """

    nodeid: int
    attr: Attr
    age: float


class KeptListings:
    """Kept listings of a mount.

    Args:
        policy: For how long.
        nodes: What the kernel knows.
        release: Is told each node whose hold, one of ``nodes.hold``, is given back.
        limit: Most names and places in listings.
    """

    def __init__(
        self,
        policy: CachePolicy,
        nodes: NodeTable,
        release: Callable[[int], None],
        limit: int = LIMIT,
    ) -> None:
        self._policy = policy
        self._nodes = nodes
        self._release = release
        self._names = Names(limit, self._give_back)
        self._attributes = Attributes(limit)

    def _give_back(self, nodeid: int, gone: bool) -> None:
        if gone:
            self._attributes.drop(nodeid)
        self._release(nodeid)

    def find(self, parent: int) -> Sequence[bytes] | None:
        """Return the listing of a directory if it can be served with few questions, or none.

        A line is a name; that of "." or ".." goes on with "/" and its inode, see ``dot_line``.
        """
        now = time.monotonic()
        listing = self._names.listing(parent, now)
        if listing is None:
            return None
        unknown = sum(self.known(parent, line) is None for line in listing if b"/" not in line)
        return listing if unknown <= _FEW + len(listing) // 8 else None

    def known(self, parent: int, name: bytes) -> Known | None:
        """Return what is known of a name, if name and attributes are both believed."""
        now = time.monotonic()
        nodeid = self._names.find(parent, name, now)
        attr = self._attributes.get(nodeid, now) if nodeid else None
        if not nodeid or attr is None:
            return None
        left = self._attributes.left(nodeid, now)
        return Known(nodeid, attr, max(0.0, self._policy.attr_timeout - left))

    def keep(self, parent: int, lines: Sequence[bytes], sent: float) -> None:
        """Keep a whole listing that was asked for at ``sent`` seconds and is still true."""
        self._names.list(parent, lines, sent + self._policy.dir_timeout)

    def keep_name(self, parent: int, name: bytes, nodeid: int, attr: Attr, sent: float) -> None:
        """Keep a name and the attributes of its node, which is known to the kernel or held."""
        if attr.nlink == 1 or stat.S_ISDIR(attr.mode):
            self._nodes.hold(nodeid)
            self._names.put(parent, name, nodeid, sent + self._policy.entry_timeout)
            if nodeid in self._nodes:  # else it was pushed out again at once
                self._attributes.put(nodeid, attr, sent + self._policy.attr_timeout)

    def changed(self, nodeid: int) -> None:
        """A change of a node's attributes is through."""
        self._attributes.drop(nodeid)

    def changed_name(self, parent: int, name: bytes) -> None:
        """A name was made, removed or changed."""
        nodeid = self._names.find(parent, name, 0.0)
        if nodeid:
            self._attributes.drop(nodeid)
        self._attributes.drop(parent)
        self._names.drop(parent, name)

    def gone(self, nodeid: int) -> None:
        """Nobody holds a node any more."""
        self._attributes.drop(nodeid)
        self._names.gone(nodeid)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the caches are as they say."""
        self._names.check_invariants()
        self._attributes.check_invariants()


def dot_line(name: bytes, inode: int) -> bytes:
    """Return the line of "." or "..", told apart by the one byte that no name has."""
    return b"%b/%d" % (name, inode)


def read_dot_line(line: bytes) -> tuple[bytes, int] | None:
    """Return what ``dot_line`` was given, or None for a line that is a name."""
    name, slash, inode = line.partition(b"/")
    return (name, int(inode)) if slash else None
