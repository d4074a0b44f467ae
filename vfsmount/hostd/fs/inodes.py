"""The nodes that a guest knows: nodeid → O_PATH descriptor, or a few bytes, and lookup count.

Rules:
* One node per host inode, keyed by inode number, device and, for directories, mount: what is below
  a directory depends on the way to it. While a node's descriptor is held the host cannot give its
  number to another file, so the key of an open node never means two files.
* A node that is kept closed has no such hold. Before its key is believed, the file found is
  compared with what is kept; if it is another, the number means another file now, and the node
  gives up the key.
* A nodeid is never used again, so its generation is always 0.
* Every entry that a reply carries counts one lookup; FORGET takes them back. At zero the node goes
  and its descriptor is closed. Counts larger than given are forgiven: the guest harms itself.
* The root is nodeid 1, is held from the start, and cannot be forgotten.
* A descriptor stays open from ``get`` or ``adopt`` until ``trim``, which comes between requests:
  the least recently used are closed (a clock with one hand), except the root's and those of nodes
  that are open as files or directories (an unlinked one could not be found again).

Open nodes are objects; all the others are packed into bytes, which the garbage collector need not
look at. With 700,000 and 1,000,000 files of ext4 known, each costs 266 and 230 bytes of memory,
everything included, and 529 descriptors are open at most.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfsmount.hostd import syscalls
from vfsmount.wire.fuse_flags import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.hostd.fs.keeping import NodeKeeper

__all__ = ["MAX_NODE_FDS", "NODE_FLAGS", "Inode", "InodeTable"]

#: Nodes are held by a descriptor that can do nothing but name them, links included.
NODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

#: Descriptors that one guest's nodes may hold between requests, besides those that it has open.
#: Opening one again takes 4 us, so what matters is that a busy guest's working set of directories
#: fits.
MAX_NODE_FDS = 512

_S_IFMT: Final = 0o170000
#: A key is the inode number with the number of its place above it.
_PLACE_SHIFT: Final = 64
_NUMBER_MASK: Final = (1 << _PLACE_SHIFT) - 1
#: A closed node: inode number, lookups, place, type; what it is kept by follows.
_RECORD: Final = struct.Struct("<QQIH")


class Inode:
    """A node that is open, or was when somebody took hold of it.

    Attributes:
        nodeid: The guest's name for it.
        fd: O_PATH descriptor; -1 once it has been closed.
        key: Number and place.
        kind: Type bits of its mode, which never change (``stat.S_IFREG``, ...).
        nlookup: Lookups that the guest owes.
        opens: File handles that the guest has of it.
        recent: Used since the clock's hand came by.
        clocked: Whether the hand will come by.
    """

    __slots__ = ("clocked", "fd", "key", "kind", "nlookup", "nodeid", "opens", "recent")

    def __init__(self, nodeid: int, fd: int, key: int, kind: int, nlookup: int = 0) -> None:
        self.nodeid = nodeid
        self.fd = fd
        self.key = key
        self.kind = kind
        self.nlookup = nlookup
        self.opens = 0
        self.recent = True
        self.clocked = False

    @property
    def number(self) -> int:
        """``st_ino``."""
        return self.key & _NUMBER_MASK

    @property
    def place(self) -> int:
        """Which file system and mount; 0 is the root's. To be compared, no more."""
        return self.key >> _PLACE_SHIFT

    @property
    def proc_name(self) -> bytes:
        """Its name in ``/proc/self/fd``: a link that leads to the node itself and no further."""
        return b"%d" % self.fd


class InodeTable:
    """All nodes of one guest.

    Invariants: every node is in ``_open`` or ``_records`` (an open one may have an old record as
    well) and, but for the root, has lookups; a node that has its key is in ``_by_key`` under it; an
    open node is in the clock, or somebody has it open, or it is the root.

    Args:
        root_fd: O_PATH descriptor of the shared directory; stays the caller's.
        keeper: How to keep nodes without descriptors.
        limit: Descriptors to hold between requests.
    """

    __slots__ = (
        "_by_key",
        "_clock",
        "_device",
        "_keeper",
        "_limit",
        "_mount_ids",
        "_next_id",
        "_open",
        "_places",
        "_records",
    )

    def __init__(self, root_fd: int, keeper: NodeKeeper, limit: int = MAX_NODE_FDS) -> None:
        self._open: dict[int, Inode] = {}
        self._records: dict[int, bytes] = {}
        self._by_key: dict[int, int] = {}
        self._clock: deque[Inode] = deque()
        self._keeper = keeper
        self._limit = limit
        self._next_id = ROOT_ID
        # A reopened "." and not a dup, so that guests share no file description.
        fd = os.open(".", NODE_FLAGS, dir_fd=root_fd)
        attributes = os.fstat(fd)
        self._device = attributes.st_dev
        self._mount_ids = syscalls.MountIds()
        #: (device, mount) → number above inode numbers. A guest cannot make new ones.
        self._places = {(self._device, 0): 0, (self._device, self._mount_ids.of(fd)): 0}
        self._insert(fd, attributes, self._key(attributes, fd))

    def __len__(self) -> int:
        return len(self._open.keys() | self._records.keys())

    def __iter__(self) -> Iterator[int]:
        return iter(self._open.keys() | self._records.keys())

    def get(self, nodeid: int) -> Inode:
        """Return a node that the guest may name, open.

        Raises:
            OSError: EBADF: it was never given out, or has been forgotten; ESTALE: the file is no
                more, or not to be found; EMFILE.
        """
        inode = self._open.get(nodeid)
        if inode is None:
            return self._reopen(nodeid)
        inode.recent = True
        return inode

    def look_up(self, dir_fd: int, name: bytes, number: int = 0) -> tuple[int, os.stat_result, int]:
        """Find a name, and count one lookup of what it is.

        A known node needs one system call, because its number says which it is; one more if it is a
        directory or closed.

        Args:
            dir_fd: Descriptor of the directory.
            name: One component that has been checked.
            number: Inode number that a listing gave, 0 if none did. A hint: that of a mount's root
                is another, and so are all of them on some file systems.

        Returns:
            The node, which may be closed, its attributes, and its place (see ``Inode``).

        Raises:
            OSError: There is no such name, or no descriptor left to look closely.
        """
        if not number or number in self._by_key:
            attributes = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            key = self._key(attributes, dir_fd, name)
            nodeid = self._by_key.get(key)
            if nodeid is not None and self._count(nodeid, dir_fd, name):
                return nodeid, attributes, key >> _PLACE_SHIFT
        inode, attributes = self.adopt(os.open(name, NODE_FLAGS, dir_fd=dir_fd))
        return inode.nodeid, attributes, inode.place

    def _count(self, nodeid: int, dir_fd: int, name: bytes) -> bool:
        """Count a lookup of a known node, if it surely is what the name leads to."""
        inode = self._open.get(nodeid)
        if inode is not None:
            inode.nlookup += 1
            inode.recent = True
            return True
        record = self._records[nodeid]
        kept = record[_RECORD.size :]
        # Between stat and here the name may have changed, but not the file with this number: if it
        # is the kept one now, it has been all the time since that was known.
        if not self._keeper.is_named(kept, dir_fd, name):
            return False
        number, nlookup, place, kind = _RECORD.unpack_from(record)
        self._records[nodeid] = _RECORD.pack(number, nlookup + 1, place, kind) + kept
        return True

    def adopt(self, fd: int) -> tuple[Inode, os.stat_result]:
        """Count one lookup of the node that an O_PATH descriptor names; takes the descriptor.

        Returns:
            The node, open, and its attributes.
        """
        try:
            attributes = os.fstat(fd)
            key = self._key(attributes, fd)
        except OSError:
            os.close(fd)
            raise
        nodeid = self._by_key.get(key)
        inode = None if nodeid is None else self._open.get(nodeid)
        if inode is not None:
            os.close(fd)
        elif nodeid is not None and self._is_kept(nodeid, fd):
            inode = self._revive(nodeid, fd)
        else:
            inode = self._insert(fd, attributes, key)
        inode.nlookup += 1
        inode.recent = True
        return inode, attributes

    def _key(self, attributes: os.stat_result, fd: int, name: bytes = b"") -> int:
        """Key of the file that a descriptor, or a name in it, leads to."""
        number, device = attributes.st_ino, attributes.st_dev
        if attributes.st_mode & _S_IFMT == stat.S_IFDIR:
            place = device, self._mount_ids.of(fd, name)
        elif device == self._device:
            return number
        else:
            place = device, 0
        return number | self._places.setdefault(place, len(self._places)) << _PLACE_SHIFT

    def _insert(self, fd: int, attributes: os.stat_result, key: int) -> Inode:
        """Take in a node that is new, or whose key another one has had."""
        nodeid = self._next_id
        self._next_id += 1
        inode = Inode(nodeid, fd, key, stat.S_IFMT(attributes.st_mode))
        self._open[nodeid] = inode
        self._by_key[key] = nodeid
        self._rest(inode)
        return inode

    # --- keeping nodes without descriptors -------------------------------------------------------

    def _reopen(self, nodeid: int) -> Inode:
        record = self._records.get(nodeid)
        if record is None:
            raise OSError(errno.EBADF, "no such nodeid")
        return self._revive(nodeid, self._keeper.open(record[_RECORD.size :]))

    def _is_kept(self, nodeid: int, fd: int) -> bool:
        """Whether a descriptor names a closed node, and not another file with its number."""
        return self._keeper.is_same(self._records[nodeid][_RECORD.size :], fd)

    def _revive(self, nodeid: int, fd: int) -> Inode:
        """Open a node again; its record stays where it is until it is written anew."""
        number, nlookup, place, kind = _RECORD.unpack_from(self._records[nodeid])
        inode = Inode(nodeid, fd, number | place << _PLACE_SHIFT, kind, nlookup)
        self._open[nodeid] = inode
        self._rest(inode)
        return inode

    def about_to_move(self, dir_fd: int, name: bytes) -> None:
        """Open what the guest renames, if its path is all that is known: it is found again later.

        What lies below a directory that moves has to be looked up again.
        """
        if self._keeper.by_handle:
            return
        with suppress(OSError):  # then the renaming will fail, too, or the node be looked up again
            attributes = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            nodeid = self._by_key.get(self._key(attributes, dir_fd, name))
            if nodeid is not None and nodeid not in self._open:
                inode, _ = self.adopt(os.open(name, NODE_FLAGS, dir_fd=dir_fd))
                self.forget(inode.nodeid, 1)

    def pin(self, inode: Inode) -> None:
        """Keep a node open because there is one more file handle of it."""
        inode.opens += 1

    def unpin(self, inode: Inode) -> None:
        """There is one file handle less; the node may have been forgotten since."""
        inode.opens -= 1
        if not inode.opens and not inode.clocked and inode.fd >= 0:
            self._rest(inode)

    def _rest(self, inode: Inode) -> None:
        """Let the clock's hand come by a node; the root stays open."""
        if inode.nodeid != ROOT_ID:
            inode.clocked = True
            self._clock.append(inode)

    def trim(self) -> None:
        """Close nodes beyond the limit; to be called between requests."""
        while len(self._clock) > self._limit:
            self._turn(self._clock.popleft())

    def _turn(self, inode: Inode) -> None:
        """Move the clock's hand: a node is let be once if it was used, then closed."""
        if inode.opens or inode.fd < 0:
            inode.clocked = False  # ``unpin`` brings it back; a forgotten one is gone
        elif inode.recent:
            inode.recent = False
            self._clock.append(inode)
        else:
            inode.clocked = False
            self._close(inode)

    def _close(self, inode: Inode) -> None:
        key = inode.key
        numbers = _RECORD.pack(key & _NUMBER_MASK, inode.nlookup, key >> _PLACE_SHIFT, inode.kind)
        self._records[inode.nodeid] = numbers + self._keeper.make(inode.fd)
        del self._open[inode.nodeid]
        fd, inode.fd = inode.fd, -1
        os.close(fd)

    # --- forgetting ------------------------------------------------------------------------------

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Take back ``nlookup`` lookups; a node that nobody knows is none of our business."""
        if nodeid == ROOT_ID:
            return
        inode = self._open.get(nodeid)
        if inode is not None:
            inode.nlookup -= nlookup
            if inode.nlookup <= 0:
                self._drop(nodeid, inode.key)
            return
        record = self._records.get(nodeid)
        if record is None:
            return
        number, owed, place, kind = _RECORD.unpack_from(record)
        if owed <= nlookup:
            self._drop(nodeid, number | place << _PLACE_SHIFT)
        else:
            numbers = _RECORD.pack(number, owed - nlookup, place, kind)
            self._records[nodeid] = numbers + record[_RECORD.size :]

    def _drop(self, nodeid: int, key: int) -> None:
        if self._by_key.get(key) == nodeid:
            del self._by_key[key]
        self._records.pop(nodeid, None)
        inode = self._open.pop(nodeid, None)
        if inode is not None:
            fd, inode.fd = inode.fd, -1
            os.close(fd)

    def clear(self) -> None:
        """Forget everything but the root (INIT and DESTROY)."""
        root = self._open.pop(ROOT_ID)
        self.close()
        self._open[ROOT_ID] = root
        self._by_key[root.key] = ROOT_ID
        root.nlookup = 0

    def close(self) -> None:
        """Forget everything, the root as well."""
        for inode in self._open.values():
            fd, inode.fd = inode.fd, -1
            os.close(fd)
        self._open.clear()
        self._records.clear()
        self._by_key.clear()
        self._clock.clear()

    # --- for tests -------------------------------------------------------------------------------

    def open_nodes(self) -> list[Inode]:
        """Return the nodes that are open, the root among them."""
        return list(self._open.values())

    def check_invariants(self) -> None:
        """Assert what the class promises."""
        assert ROOT_ID in self._open
        assert set(self._by_key.values()) <= self._open.keys() | self._records.keys()
        clock = [id(inode) for inode in self._clock if inode.fd >= 0]
        assert all(inode.nodeid != ROOT_ID for inode in self._clock)
        assert len(clock) == len(set(clock))
        for inode in self._open.values():
            assert inode.fd >= 0
            assert inode.nlookup > 0 or inode.nodeid == ROOT_ID
            assert inode.nodeid == ROOT_ID or inode.opens or id(inode) in clock
        for nodeid, record in self._records.items():
            assert nodeid in self._open or _RECORD.unpack_from(record)[1] > 0
