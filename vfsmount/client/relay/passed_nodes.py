"""Which inodes have backing files, which handles use them, and how long an id is kept: no I/O.

All opens of an inode are of one kind at a time, passed through with one id or served by message.
They are counted from the moment that they are answered until their RELEASE, which is never sooner
than the kernel's own count. An id is kept for a while after the last one (``_KEPT``), and never
longer than the kernel knows the inode. The daemon keeps the inode that long in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfsmount.client.relay.slots import Slot

__all__ = ["READ", "WRITE", "PassedNode", "PassedNodes"]

#: What opens want, and descriptors allow.
READ: Final = 1
WRITE: Final = 2
#: Ids that are kept of files that nobody has open.
_KEPT: Final = 1024


class PassedNode:
    """What is known of one inode.

    Attributes:
        backing_id: 0 for none.
        file: Device and inode number of the backing file.
        granted: What it was granted for, ``READ | WRITE``.
        refused: What the daemon or the kernel will not do.
        error: The errno of the last refusal.
        forgotten: The kernel has given references back while it was in use: it goes when it can.
        opens: Opens that are passed through.
        messages: Opens that are served by message.
        passed: It has been passed through before: pages that the kernel has cached may be old.
        asking: What a SETUPMAPPING on its way asks for.
        waiting: Opens that wait for it.
    """

    __slots__ = (
        "asking", "backing_id", "error", "file", "forgotten", "granted", "messages", "nodeid",
        "opens", "passed", "refused", "waiting",
    )  # fmt: skip

    def __init__(self, nodeid: int) -> None:
        self.nodeid = nodeid
        self.backing_id = self.granted = self.refused = self.error = 0
        self.opens = self.messages = self.asking = 0
        self.file = (0, 0)
        self.passed = self.forgotten = False
        self.waiting: list[Slot] = []

    def is_used(self) -> bool:
        """Whether it is open, or about to be."""
        return bool(self.opens or self.messages or self.asking or self.waiting)


class PassedNodes:
    """All inodes of a mount that matter, and the handles; ``check_invariants`` says what holds.

    Args:
        close: Has the kernel forget an id.
    """

    def __init__(self, close: Callable[[int], None]) -> None:
        self._close_id = close
        self._nodes: dict[int, PassedNode] = {}
        #: Nodes with an id that nobody has open, longest first.
        self._kept: dict[int, PassedNode] = {}
        #: Handles, and whether each is passed through.
        self._handles: dict[int, tuple[PassedNode, bool]] = {}
        self._writers: set[int] = set()

    def __iter__(self) -> Iterator[PassedNode]:
        """Iterate over all."""
        return iter(self._nodes.values())

    @property
    def kept(self) -> int:
        """Ids of files that nobody has open."""
        return len(self._kept)

    def get(self, nodeid: int) -> PassedNode | None:
        """Return what is known of an inode, None when that is nothing."""
        return self._nodes.get(nodeid)

    def make(self, nodeid: int) -> PassedNode:
        """Return what is known of an inode; from now on it is."""
        node = self._nodes.get(nodeid)
        if node is None:
            node = self._nodes[nodeid] = PassedNode(nodeid)
        return node

    def is_passed(self, nodeid: int) -> bool:
        """Whether an inode changes without our seeing it."""
        node = self._nodes.get(nodeid)
        return node is not None and node.opens > 0

    def was_passed(self, nodeid: int) -> bool:
        """Whether it may have done so at any time since the kernel has known it."""
        node = self._nodes.get(nodeid)
        return node is not None and node.passed

    def is_writer(self, fh: int) -> bool:
        """Whether a handle may have written, without our seeing it."""
        return fh in self._writers

    # --- what they get -----------------------------------------------------------------------

    def backed(self, node: PassedNode, backing_id: int, file: tuple[int, int]) -> None:
        """A node has a backing file now, and nobody uses it yet."""
        node.backing_id, node.file, node.granted = backing_id, file, 0
        self._keep(node)

    def opened(self, node: PassedNode, fh: int, wants: int) -> None:
        """An open is answered that is passed through."""
        node.opens += 1
        node.passed = True
        self._kept.pop(node.nodeid, None)
        self._handles[fh] = node, True
        if wants & WRITE:
            self._writers.add(fh)

    def opened_by_message(self, node: PassedNode, fh: int) -> None:
        """An open is answered that is not."""
        node.messages += 1
        self._handles[fh] = node, False

    def has_set_id(self, nodeid: int) -> None:
        """A file gets set-id bits: whoever writes to it next has to be looked at."""
        node = self._nodes.get(nodeid)
        if node is not None and not node.opens:
            node.granted &= ~WRITE

    # --- and its end -------------------------------------------------------------------------

    def released(self, fh: int) -> None:
        """A handle is closed; unknown ones are none of ours."""
        node, passed = self._handles.pop(fh, (None, False))
        if node is None:
            return
        self._writers.discard(fh)
        if not passed:
            node.messages -= 1
        else:
            node.opens -= 1
            if not node.opens:
                self._keep(node)
        self.drop_idle(node)

    def forget(self, nodeid: int) -> None:
        """The kernel gives references to an inode back, usually all."""
        node = self._nodes.get(nodeid)
        if node is not None:
            node.forgotten = True
            self.drop_idle(node)

    def drop_idle(self, node: PassedNode) -> None:
        """Forget a node that nobody uses, if the kernel has, or if nothing is known of it."""
        if node.is_used():
            return
        if node.forgotten or not (node.backing_id or node.passed or node.refused):
            if node.backing_id:
                self._close(node)
            self._nodes.pop(node.nodeid, None)

    def _keep(self, node: PassedNode) -> None:
        self._kept[node.nodeid] = node
        if len(self._kept) > _KEPT:
            self._close(self._kept[next(iter(self._kept))])

    def _close(self, node: PassedNode) -> None:
        del self._kept[node.nodeid]
        backing_id, node.backing_id, node.granted = node.backing_id, 0, 0
        self._close_id(backing_id)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the tables agree."""
        for nodeid, node in self._nodes.items():
            assert node.nodeid == nodeid
            assert not (node.opens and node.messages)
            assert (nodeid in self._kept) == bool(node.backing_id and not node.opens)
            assert not node.opens or node.backing_id
            assert not node.waiting or node.asking
        kinds = list(self._handles.values())
        for node in self._nodes.values():
            assert node.opens == kinds.count((node, True))
            assert node.messages == kinds.count((node, False))
        assert len(self._kept) <= _KEPT
