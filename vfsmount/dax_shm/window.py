"""The window: descriptors of what the back-end maps, and the checks of what it asks.

The back-end maps a part of a file by sending its descriptor, which we keep. Reading and writing go
through it: that is the same page cache as a mapping would be, without what a mapping costs and
threatens. A load from a mapped page behind the end of a file that the host has truncated is SIGBUS,
while preadv(2) on the descriptor stops at the end of the file as it is now. It takes 1.0 us for
4 KiB and 74 us for 1 MiB; process_vm_readv(2) of a mapping, which would fail with EFAULT instead,
takes 3.3 us and 100 us. Into memory it is mapped for those alone who want to look without a copy
(``memory``).

The handler that maps and unmaps runs in the event loop, and a thread of an engine may ask for
descriptors at any time: one lock guards the table, and is never held over anything that waits.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import threading
from typing import TYPE_CHECKING, Final

from vfsmount.dax_shm.descriptors import MountTypes
from vfsmount.dax_shm.mappings import Mapping, MappingTable, OpenFile, check_place
from vfsmount.dax_shm.memory import WindowMemory
from vfsmount.dax_shm.ranges import RANGE_SIZE, RangeTable

if TYPE_CHECKING:
    from vfsmount.dax_shm.ranges import Range

__all__ = ["Window"]

log = logging.getLogger(__name__)

_O_PATH: Final = os.O_PATH
#: pwrite(2) would not write where it is told, or would demand aligned memory.
_UNWANTED: Final = os.O_APPEND | os.O_DIRECT


class Window:
    """The DAX window of one session.

    Invariants (``check_invariants``): those of its tables; a descriptor is open exactly while
    something is mapped from it.

    Args:
        limit: Bytes of the back-end's region to use at most.

    Attributes:
        size: Bytes that are used; 0 until the back-end has said how large its region is.
        ranges: Who uses which range; the event loop's alone.
        generation: Counts how often something was taken away: what was found before may be gone.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self.ranges = RangeTable(0)
        self.generation = 0
        self._limit = limit
        self._memory: WindowMemory | None = None
        # Out of descriptors, a message with one could not be received, which ends the channel.
        self._most_files = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1)
        self._mounts = MountTypes()
        self._lock = threading.Lock()
        self._table: MappingTable[OpenFile] = MappingTable(0)
        self._files: dict[tuple[int, int, int], OpenFile] = {}

    @property
    def range_size(self) -> int:
        """Bytes of one range."""
        return self.ranges.range_size

    # --- beginning and end -----------------------------------------------------------------------

    def offered(self, size: int) -> None:
        """The back-end has a region of ``size`` bytes, or none (0)."""
        self.clear()
        self.size = min(size, self._limit)
        self.size -= self.size % RANGE_SIZE
        self._table = MappingTable(self.size)
        self.ranges = RangeTable(self.size)

    def align(self, map_alignment: int) -> bool:
        """Cut the window into ranges that suit the daemon; before anything is mapped.

        Args:
            map_alignment: log2 of bytes, from INIT.

        Returns:
            Whether there is room for one.
        """
        if 1 << min(map_alignment, 63) > max(self.size, RANGE_SIZE):
            return False
        self.ranges = RangeTable(self.size, max(RANGE_SIZE, 1 << map_alignment))
        return len(self.ranges) > 0

    def clear(self) -> None:
        """Close everything: the device was reset, or the connection has ended."""
        with self._lock:
            self.generation += 1
            for one in self._table.clear():
                self._let_go(one.file)
            if self._memory is not None:
                self._memory.close()
                self._memory = None
        self.ranges.clear()

    # --- what the back-end asks ------------------------------------------------------------------

    def map(self, moffset: int, length: int, foffset: int, writable: bool, fd: int) -> int:
        """Take a mapping note of (SHMEM_MAP).

        Args:
            moffset: Where in the window.
            length: Bytes.
            foffset: Where in the file.
            writable: Whether we may write.
            fd: The file; stays the caller's.

        Returns:
            0, or an errno: EINVAL: outside the window, not on page boundaries, or a descriptor that
            appends; EEXIST: something is mapped there; ENODEV: no regular file; EOPNOTSUPP: of a
            file system that may not answer (``descriptors``), and so the descriptor must not be
            asked anything; EACCES: the descriptor does not allow it; EMFILE.
        """
        wrong = check_place(self.size, moffset, length, foffset)
        if wrong:
            return self._refuse(wrong, f"{length:#x} bytes at {moffset:#x}")
        try:
            key = self._key(fd, writable)
            with self._lock:
                return self._add(moffset, length, foffset, writable, fd, key)
        except OSError as error:
            return self._refuse(error.errno or errno.EIO, str(error))

    def _key(self, fd: int, writable: bool) -> tuple[int, int, int]:
        """Check a descriptor and return what tells its file and its rights from others.

        Raises:
            OSError: ENODEV, EOPNOTSUPP, EBADF, EACCES, EINVAL: it is not for mapping like that.
        """
        facts = self._mounts.check(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & _O_PATH:
            raise OSError(errno.EBADF, "a descriptor that can only name its file")
        allowed = (os.O_RDWR,) if writable else (os.O_RDONLY, os.O_RDWR)
        if flags & os.O_ACCMODE not in allowed:
            raise OSError(errno.EACCES, "the descriptor does not allow it")
        if flags & _UNWANTED:
            raise OSError(errno.EINVAL, "a descriptor with O_APPEND or O_DIRECT")
        return facts.dev, facts.ino, flags

    def _add(
        self,
        moffset: int,
        length: int,
        foffset: int,
        writable: bool,
        fd: int,
        key: tuple[int, int, int],
    ) -> int:
        if self._table.overlapping(moffset, length):
            return self._refuse(errno.EEXIST, f"something is mapped at {moffset:#x}")
        file = self._files.get(key)
        if file is None:
            if len(self._files) >= self._most_files:
                return self._refuse(errno.EMFILE, f"{len(self._files)} files are open already")
            file = self._files[key] = OpenFile(os.dup(fd), key)
        file.mappings += 1
        self._table.add(Mapping(moffset, length, foffset, writable, file))
        return 0

    def unmap(self, moffset: int, length: int) -> int:
        """Take a mapping away (SHMEM_UNMAP), as a whole.

        Returns:
            0, or EINVAL: there is none like that.
        """
        with self._lock:
            self.generation += 1
            gone = self._table.remove(moffset, length)
            if gone is not None:
                self._hide(gone)
        if gone is None:
            return self._refuse(errno.EINVAL, f"no mapping of {length:#x} bytes at {moffset:#x}")
        return 0

    def drop(self, moffset: int, length: int) -> None:
        """Take every mapping away that has a byte in a part of the window."""
        with self._lock:
            self.generation += 1
            for one in self._table.overlapping(moffset, length):
                self._table.remove(one.moffset, one.length)
                self._hide(one)

    def _hide(self, gone: Mapping[OpenFile]) -> None:
        if self._memory is not None:
            self._memory.unmap(gone.moffset, gone.length)
        self._let_go(gone.file)

    def _let_go(self, file: OpenFile) -> None:
        file.mappings -= 1
        if not file.mappings:
            del self._files[file.key]
            fd, file.fd = file.fd, -1
            os.close(fd)

    @staticmethod
    def _refuse(error: int, why: str) -> int:
        log.debug("refused a mapping: %s", why)
        return error

    # --- what is mapped --------------------------------------------------------------------------

    def mapping(self, moffset: int, length: int) -> Mapping[OpenFile] | None:
        """Return the mapping that holds a part of the window in full.

        Its descriptor is good until ``generation`` changes, in another step of the event loop.
        """
        with self._lock:
            return self._table.at(moffset, length)

    def view(self, one: Range, start: int, length: int) -> memoryview | None:
        """Return a read-only view of a mapped range, without a copy.

        It shows the file as it is whenever it is looked at; zeros behind its end, and once the
        range is for something else.

        Args:
            one: The range, ready.
            start: Bytes from its beginning.
            length: Bytes, inside it.

        Returns:
            None where the file cannot be mapped into memory.
        """
        try:
            with self._lock:
                if self._memory is None:
                    self._memory = WindowMemory(self.size)
                memory = self._memory
                if one.shown != (self.generation, memory.tears):
                    self._show(memory, one)
        except OSError as error:
            log.debug("%s cannot be mapped into memory: %s", one, error)
            return None
        return memory.view(one.moffset + start, length)

    def _show(self, memory: WindowMemory, one: Range) -> None:
        found = self._table.at(one.moffset, self.range_size)
        if found is None:
            raise OSError(errno.ENOENT, "nothing is mapped")
        mark = self.generation, memory.tears
        foffset = found.foffset + one.moffset - found.moffset
        memory.map(one.moffset, self.range_size, found.file.fd, foffset)
        one.shown = mark

    def descriptor(self, moffset: int, *, write: bool) -> int | None:
        """Return a new descriptor of the file that is mapped at ``moffset``; the caller owns it.

        Callable from any thread.

        Args:
            moffset: Where a mapping begins.
            write: Whether it must be one that may be written to.

        Returns:
            None when nothing is mapped there, or it is read-only.

        Raises:
            OSError: EMFILE: no descriptor left.
        """
        with self._lock:
            found = self._table.at(moffset)
            if found is None or found.moffset != moffset or (write and not found.writable):
                return None
            return fcntl.fcntl(found.file.fd, fcntl.F_DUPFD_CLOEXEC, 0)

    def reserve(self) -> int | None:
        """Take a range out of the common ones; returns where it begins, or None: none is free."""
        return self.ranges.reserve()

    def give_back(self, moffset: int) -> None:
        """Return a range that ``reserve`` gave; nothing may be mapped there any more."""
        self.ranges.give_back(moffset)

    def mapped(self) -> int:
        """Count the mappings."""
        return len(self._table)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the window is as the class says."""
        self._table.check_invariants()
        self.ranges.check_invariants()
        counts: dict[tuple[int, int, int], int] = {}
        for one in self._table:
            counts[one.file.key] = counts.get(one.file.key, 0) + 1
        assert counts == {key: file.mappings for key, file in self._files.items()}
        assert all(file.fd >= 0 for file in self._files.values())
