"""Which node of the daemon each inode of the kernel is, and who owes whom how many lookups.

Two number spaces meet here. ``nodeid`` is the daemon's number for a node, ``inode`` the one that we
give the kernel (and that stat(2) shows). The inode is the host's own inode number wherever that is
free, so that ``ls -i`` here and at the host agree; where two nodes share one (two file systems
below one share, a number reused while the kernel remembers its old owner) the later gets a number
above 2^63.

Invariants (``check_invariants``):
    * nodeid to inode is one to one;
    * ``upper`` is what the kernel owes us, and whoever else holds the node, ``lower`` what we owe
      the daemon; both are positive for every node but the root, which is never looked up and never
      forgotten;
    * a node leaves the table when ``upper`` reaches 0, and then all of ``lower`` is given back.

A nodeid must not be used once its last FORGET is queued: virtiofsd (C) reuses it at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfsmount.wire.fuse import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfsmount.wire.fuse import Attr

__all__ = ["Node", "NodeTable"]

#: First inode number that we make up.
FIRST_MADE_UP: Final = 1 << 63


class Node:
    """One node that the kernel knows.

    Attributes:
        inode: Number towards the kernel.
        nodeid: Number towards the daemon.
        upper: Lookups that the kernel has yet to forget.
        lower: Lookups that we have yet to forget at the daemon.
        mode: As last seen; for set-id bits.
        gid: As last seen; for the group of what is made in a directory.
        parked: Attributes for the kernel's next question, when they were asked for (clock seconds),
            and how many changes there had been; old after the next one.
    """

    __slots__ = (
        "gid",
        "inode",
        "lower",
        "mode",
        "nodeid",
        "parked",
        "upper",
    )

    def __init__(self, inode: int, nodeid: int) -> None:
        self.inode = inode
        self.nodeid = nodeid
        self.upper = 0
        self.lower = 0
        self.mode = 0
        self.gid = 0
        self.parked: tuple[Attr, float, int] | None = None

    def __repr__(self) -> str:
        return f"<Node {self.nodeid} inode={self.inode} upper={self.upper} lower={self.lower}>"

    def saw(self, attr: Attr) -> None:
        """Keep what later requests need to know of the attributes."""
        self.mode = attr.mode
        self.gid = attr.gid


class NodeTable:
    """All nodes that the kernel knows, by both numbers."""

    def __init__(self) -> None:
        self.root = Node(ROOT_ID, ROOT_ID)
        self._by_inode = {ROOT_ID: self.root}
        self._by_nodeid = {ROOT_ID: self.root}
        self._made_up = FIRST_MADE_UP

    def __len__(self) -> int:
        return len(self._by_inode)

    def __getitem__(self, inode: int) -> Node:
        """Return the node of an inode that the kernel holds; KeyError is a bug of one of us."""
        return self._by_inode[inode]

    def nodes(self) -> Iterator[Node]:
        """Iterate over the nodes that the kernel knows, the root included."""
        return iter(self._by_inode.values())

    def enter(self, nodeid: int, attr: Attr) -> Node:
        """Count one lookup that the daemon gave us and that we hand to the kernel."""
        node = self._by_nodeid.get(nodeid)
        if node is None:
            inode = attr.ino
            if inode in self._by_inode or not 0 < inode < FIRST_MADE_UP:
                inode = self._made_up
                self._made_up += 1
            node = self._by_nodeid[nodeid] = self._by_inode[inode] = Node(inode, nodeid)
        if node is not self.root:
            node.upper += 1
            node.lower += 1
        return node

    def __contains__(self, nodeid: int) -> bool:
        """Whether the kernel, or who holds it, knows a node of the daemon."""
        return nodeid in self._by_nodeid

    def hold(self, nodeid: int) -> Node:
        """Count one more who must forget a node that is known; the daemon is not told."""
        node = self._by_nodeid[nodeid]
        if node is not self.root:
            node.upper += 1
        return node

    def release(self, nodeid: int) -> list[tuple[int, int]]:
        """Take one ``hold`` back; returns what ``forget`` does."""
        return self.forget([(self._by_nodeid[nodeid].inode, 1)])

    def leave(self, nodeid: int) -> None:
        """Take one ``enter`` back; the reference at the daemon stays with whoever had it."""
        node = self._by_nodeid[nodeid]
        if node is not self.root:
            node.upper -= 1
            node.lower -= 1
            if not node.upper:
                self._remove(node)

    def _remove(self, node: Node) -> None:
        del self._by_inode[node.inode]
        del self._by_nodeid[node.nodeid]

    def forget(self, forgets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Count what the kernel forgot.

        Args:
            forgets: Pairs of (inode, nlookup).

        Returns:
            Pairs of (nodeid, nlookup) to forget at the daemon.
        """
        owed = []
        for inode, nlookup in forgets:
            node = self._by_inode.get(inode)
            if node is None or node is self.root:
                continue
            node.upper -= nlookup
            if node.upper <= 0:
                self._remove(node)
                owed.append((node.nodeid, node.lower))
        return owed

    def check_invariants(self) -> None:
        """Raise AssertionError unless the table is as the module says."""
        assert len(self._by_inode) == len(self._by_nodeid)
        for inode, node in self._by_inode.items():
            assert node.inode == inode
            assert self._by_nodeid[node.nodeid] is node
            assert node is self.root or (node.upper > 0 and node.lower > 0), node
