"""The nodes that a guest knows: nodeid → O_PATH descriptor and lookup count.

Rules:
* One node per host inode, keyed by (device, inode number). While the descriptor is held the host
  cannot give the number to another file, so a key never means two files.
* A nodeid is never used again, so its generation is always 0.
* Every entry that a reply carries counts one lookup; FORGET takes them back. At zero the node goes
  and its descriptor is closed. Counts larger than given are forgiven: the guest harms itself.
* The root is nodeid 1, is held from the start, and cannot be forgotten.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from vfsmount.wire.fuse_flags import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Inode", "InodeTable"]

#: Nodes are held by a descriptor that can do nothing but name them, links included.
NODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Inode:
    """One node.

    Attributes:
        nodeid: The guest's name for it.
        fd: O_PATH descriptor; -1 once forgotten.
        device: ``st_dev``.
        number: ``st_ino``.
        kind: Type bits of its mode, which never change (``stat.S_IFREG``, ...).
        nlookup: Lookups that the guest owes.
    """

    __slots__ = ("device", "fd", "kind", "nlookup", "nodeid", "number")

    def __init__(self, nodeid: int, fd: int, attributes: os.stat_result) -> None:
        self.nodeid = nodeid
        self.fd = fd
        self.device = attributes.st_dev
        self.number = attributes.st_ino
        self.kind = stat.S_IFMT(attributes.st_mode)
        self.nlookup = 0

    @property
    def proc_name(self) -> bytes:
        """Its name in ``/proc/self/fd``: a link that leads to the node itself and no further."""
        return b"%d" % self.fd

    @property
    def proc_path(self) -> bytes:
        """The same as a path, for calls that take no directory descriptor."""
        return b"/proc/self/fd/%d" % self.fd


class InodeTable:
    """All nodes of one guest.

    Invariants: both maps hold the same nodes; every node but the root has ``nlookup`` > 0.

    Args:
        root_fd: O_PATH descriptor of the shared directory; stays the caller's.
    """

    __slots__ = ("_by_id", "_by_key", "_next_id")

    def __init__(self, root_fd: int) -> None:
        self._by_id: dict[int, Inode] = {}
        self._by_key: dict[tuple[int, int], Inode] = {}
        self._next_id = ROOT_ID
        # A reopened "." and not a dup, so that guests share no file description.
        self._insert(os.open(".", NODE_FLAGS, dir_fd=root_fd))

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_id.values())

    def get(self, nodeid: int) -> Inode:
        """Return a node that the guest may name.

        Raises:
            OSError: EBADF: it was never given out, or has been forgotten.
        """
        inode = self._by_id.get(nodeid)
        if inode is None:
            raise OSError(errno.EBADF, "no such nodeid")
        return inode

    def look_up(self, dir_fd: int, name: bytes) -> tuple[Inode, os.stat_result]:
        """Find a name, count one lookup of what it is, and return that with its attributes.

        A known node needs one system call: its number says which it is.

        Args:
            dir_fd: Descriptor of the directory.
            name: One component that has been checked.

        Raises:
            OSError: There is no such name, or no descriptor left to hold it.
        """
        attributes = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        inode = self._by_key.get((attributes.st_dev, attributes.st_ino))
        if inode is None:
            return self.adopt(os.open(name, NODE_FLAGS, dir_fd=dir_fd))
        inode.nlookup += 1
        return inode, attributes

    def adopt(self, fd: int) -> tuple[Inode, os.stat_result]:
        """Count one lookup of the node that an O_PATH descriptor names; takes the descriptor."""
        try:
            attributes = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        inode = self._by_key.get((attributes.st_dev, attributes.st_ino))
        if inode is None:
            inode = self._insert(fd, attributes)
        else:
            os.close(fd)
        inode.nlookup += 1
        return inode, attributes

    def _insert(self, fd: int, attributes: os.stat_result | None = None) -> Inode:
        inode = Inode(self._next_id, fd, attributes or os.fstat(fd))
        self._next_id += 1
        self._by_id[inode.nodeid] = inode
        self._by_key[inode.device, inode.number] = inode
        return inode

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Take back ``nlookup`` lookups; a node that nobody knows is none of our business."""
        inode = self._by_id.get(nodeid)
        if inode is None or nodeid == ROOT_ID:
            return
        inode.nlookup -= nlookup
        if inode.nlookup <= 0:
            self._drop(inode)

    def _drop(self, inode: Inode) -> None:
        del self._by_id[inode.nodeid]
        del self._by_key[inode.device, inode.number]
        fd, inode.fd = inode.fd, -1
        os.close(fd)

    def clear(self) -> None:
        """Forget everything but the root (INIT and DESTROY)."""
        for inode in list(self._by_id.values()):
            if inode.nodeid != ROOT_ID:
                self._drop(inode)
        self._by_id[ROOT_ID].nlookup = 0

    def close(self) -> None:
        """Forget everything, the root as well."""
        for inode in list(self._by_id.values()):
            self._drop(inode)

    def check_invariants(self) -> None:
        """Assert what the class promises; for tests."""
        assert set(self._by_key.values()) == set(self._by_id.values())
        for inode in self._by_id.values():
            assert inode.fd >= 0
            assert inode.nlookup > 0 or inode.nodeid == ROOT_ID
