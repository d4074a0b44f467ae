"""The nodes that a guest knows: nodeid → O_PATH descriptor, or file handle, and lookup count.

Rules:
* One node per host inode, keyed by (device, inode number). While the descriptor is held the host
  cannot give the number to another file, so a key never means two files.
* A node kept as a file handle has no such hold. It is opened again before its key is believed: if
  it is ESTALE, its number means another file now, and it gives up the key.
* A nodeid is never used again, so its generation is always 0.
* Every entry that a reply carries counts one lookup; FORGET takes them back. At zero the node goes
  and its descriptor is closed. Counts larger than given are forgiven: the guest harms itself.
* The root is nodeid 1, is held from the start, and cannot be forgotten.
* A descriptor stays open from ``get`` or ``look_up`` until ``trim``, which comes between requests:
  the least recently used give theirs up (a clock with one hand), except the root's, those of files
  that the guest has open (an unlinked one could not be found again), and those without a handle.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from typing import TYPE_CHECKING

from vfsmount.wire.fuse_flags import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.hostd.fs.filehandles import FileHandles

__all__ = ["MAX_NODE_FDS", "Inode", "InodeTable"]

#: Nodes are held by a descriptor that can do nothing but name them, links included.
NODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

#: Types of files, as objects to share: one of its own would cost each node 28 bytes.
_KINDS = {
    kind: kind
    for kind in (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    )
}

#: Descriptors that one guest's nodes may hold between requests, where they can be opened again.
#: That takes 4 us, so what matters is that a busy guest's working set of directories fits.
MAX_NODE_FDS = 512


class Inode:
    """One node.

    Attributes:
        nodeid: The guest's name for it.
        fd: O_PATH descriptor; -1 while it is kept as a handle, and once it is forgotten.
        device: ``st_dev``.
        number: ``st_ino``.
        kind: Type bits of its mode, which never change (``stat.S_IFREG``, ...).
        nlookup: Lookups that the guest owes.
        opens: File handles that the guest has of it.
        handle: File handle, once it was needed.
        recent: Used since the clock's hand came by.
    """

    __slots__ = (
        "device",
        "fd",
        "handle",
        "kind",
        "nlookup",
        "nodeid",
        "number",
        "opens",
        "recent",
    )

    def __init__(self, nodeid: int, fd: int, device: int, number: int, mode: int) -> None:
        kind = stat.S_IFMT(mode)
        self.nodeid = nodeid
        self.fd = fd
        self.device = device
        self.number = number
        self.kind = _KINDS.get(kind, kind)
        self.nlookup = 0
        self.opens = 0
        self.handle: bytes | None = None
        self.recent = True

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

    Invariants: every node but the root has ``nlookup`` > 0; a node that has its key is in the map
    of keys under it; every node with a descriptor is in ``_clock`` once, except those that stay
    open for ever.

    Args:
        root_fd: O_PATH descriptor of the shared directory; stays the caller's.
        handles: How to keep nodes without descriptors; None keeps them all open.
        limit: Descriptors to hold between requests.
    """

    __slots__ = ("_by_id", "_by_key", "_clock", "_device", "_handles", "_limit", "_next_id")

    def __init__(
        self, root_fd: int, handles: FileHandles | None = None, limit: int = MAX_NODE_FDS
    ) -> None:
        self._by_id: dict[int, Inode] = {}
        # Nearly all nodes are on the root's device, where the bare number is the key: no tuple.
        self._by_key: dict[int | tuple[int, int], Inode] = {}
        self._clock: deque[Inode] = deque()
        self._handles = handles
        self._limit = limit
        self._next_id = ROOT_ID
        # A reopened "." and not a dup, so that guests share no file description.
        fd = os.open(".", NODE_FLAGS, dir_fd=root_fd)
        attributes = os.fstat(fd)
        self._device = attributes.st_dev
        self._insert(fd, attributes)
        self._clock.clear()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_id.values())

    def get(self, nodeid: int) -> Inode:
        """Return a node that the guest may name, open.

        Raises:
            OSError: EBADF: it was never given out, or has been forgotten; ESTALE: the file is no
                more; EMFILE.
        """
        inode = self._by_id.get(nodeid)
        if inode is None:
            raise OSError(errno.EBADF, "no such nodeid")
        if inode.fd < 0:
            self._open(inode)
        inode.recent = True
        return inode

    def look_up(self, dir_fd: int, name: bytes) -> tuple[Inode, os.stat_result]:
        """Find a name, count one lookup of what it is, and return that, open, with its attributes.

        A known node needs one system call: its number says which it is.

        Args:
            dir_fd: Descriptor of the directory.
            name: One component that has been checked.

        Raises:
            OSError: There is no such name, or no descriptor left to hold it.
        """
        attributes = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        inode = self._by_key.get(self._key(attributes.st_dev, attributes.st_ino))
        if inode is None or (inode.fd < 0 and not self._is_current(inode)):
            return self.adopt(os.open(name, NODE_FLAGS, dir_fd=dir_fd))
        inode.nlookup += 1
        inode.recent = True
        return inode, attributes

    def adopt(self, fd: int) -> tuple[Inode, os.stat_result]:
        """Count one lookup of the node that an O_PATH descriptor names; takes the descriptor."""
        try:
            attributes = os.fstat(fd)
            inode = self._by_key.get(self._key(attributes.st_dev, attributes.st_ino))
            known = inode is not None and (inode.fd >= 0 or self._is_current(inode))
        except OSError:
            os.close(fd)
            raise
        if inode is None or not known:
            inode = self._insert(fd, attributes)
        else:
            os.close(fd)
        inode.nlookup += 1
        inode.recent = True
        return inode, attributes

    def _key(self, device: int, number: int) -> int | tuple[int, int]:
        return number if device == self._device else (device, number)

    def _insert(self, fd: int, attributes: os.stat_result) -> Inode:
        device, number = attributes.st_dev, attributes.st_ino
        if device == self._device:
            device = self._device  # the same object for all
        inode = Inode(self._next_id, fd, device, number, attributes.st_mode)
        self._next_id += 1
        self._by_id[inode.nodeid] = inode
        self._by_key[self._key(device, number)] = inode
        self._clock.append(inode)
        return inode

    # --- keeping nodes without descriptors -------------------------------------------------------

    def _open(self, inode: Inode) -> None:
        """Open a node that is kept as a handle."""
        assert self._handles is not None
        assert inode.handle is not None
        inode.fd = self._handles.open(inode.handle)
        self._clock.append(inode)

    def _is_current(self, inode: Inode) -> bool:
        """Whether a node kept as a handle still is the file that its key says; opens it.

        Raises:
            OSError: It cannot be told, EMFILE most likely.
        """
        try:
            self._open(inode)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            del self._by_key[self._key(inode.device, inode.number)]
            return False
        return True

    def trim(self) -> None:
        """Give up descriptors beyond the limit; to be called between requests."""
        excess = len(self._clock) - self._limit
        if excess <= 0 or self._handles is None:
            return
        # Once round for those with a second chance, once more to take it.
        for _ in range(2 * len(self._clock)):
            if excess <= 0:
                return
            excess -= self._turn(self._clock.popleft())

    def _turn(self, inode: Inode) -> bool:
        """Let the clock's hand come by a node; True when it has left the clock."""
        assert self._handles is not None
        if inode.fd < 0:
            return True  # forgotten since
        if inode.recent or inode.opens:
            inode.recent = False
            self._clock.append(inode)
            return False
        inode.handle = inode.handle or self._handles.make(inode.fd)
        if inode.handle is not None:
            fd, inode.fd = inode.fd, -1
            os.close(fd)
        return True

    # --- forgetting ------------------------------------------------------------------------------

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
        key = self._key(inode.device, inode.number)
        if self._by_key.get(key) is inode:
            del self._by_key[key]
        fd, inode.fd = inode.fd, -1
        if fd >= 0:
            os.close(fd)

    def clear(self) -> None:
        """Forget everything but the root (INIT and DESTROY)."""
        for inode in list(self._by_id.values()):
            if inode.nodeid != ROOT_ID:
                self._drop(inode)
        self._clock.clear()
        self._by_id[ROOT_ID].nlookup = 0

    def close(self) -> None:
        """Forget everything, the root as well."""
        self.clear()
        self._drop(self._by_id[ROOT_ID])

    def check_invariants(self) -> None:
        """Assert what the class promises; for tests."""
        ids = set(map(id, self._by_id.values()))
        assert all(id(inode) in ids for inode in self._by_key.values())
        open_nodes = {id(inode) for inode in self._by_id.values() if inode.fd >= 0}
        clock = [id(inode) for inode in self._clock if inode.fd >= 0]
        assert len(clock) == len(set(clock))
        assert set(clock) <= open_nodes
        for inode in self._by_id.values():
            assert inode.fd >= 0 or inode.handle is not None
            assert inode.nlookup > 0 or inode.nodeid == ROOT_ID
