"""Guest memory: the regions that a front-end shares, mapped here, and addresses translated.

There are two address spaces: *guest* addresses stand in descriptors, *user* addresses in
SET_VRING_ADDR. Both are only keys here. A range must lie inside one region in full.

Rules:
* Regions do not overlap in either space and do not wrap; the descriptor must be as long as the
  region claims, or the first access beyond its end would kill the process with SIGBUS.
* For the same reason it must stay that long, so a memfd is sealed against shrinking, and what can
  not be sealed is refused: a plain file, and huge pages, of which there may be none left. (A page
  of a file on the front-end's own FUSE mount could even keep us waiting for ever.) A guest that is
  alone on its daemon harms only itself, and may bring any file. There is no way to survive instead:
  Python cannot handle SIGBUS, and reaching each index and descriptor by system call costs more than
  serving the request.
* A region's mapping lives until its last view is gone, whoever holds it; ``close`` only lets go.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from vfsmount.hostd.faults import Refused, RingFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfsmount.wire.vhost_user import MemoryRegion

__all__ = ["MAX_MEM_SLOTS", "GuestMemory", "Region", "map_shared"]

#: Regions in one memory table (GET_MAX_MEM_SLOTS). Each holds a descriptor and is searched in line;
#: libvhost-user has 32 too.
MAX_MEM_SLOTS = 32

_ADDRESS_SPACE = 1 << 64


class Region:
    """One mapped region.

    Attributes:
        record: As the front-end described it.
        guest_addr: First guest address.
        user_addr: First user address.
        size: Bytes.
        view: All of it, writable.
    """

    __slots__ = ("guest_addr", "record", "size", "user_addr", "view")

    def __init__(self, record: MemoryRegion, fd: int, *, alone: bool) -> None:
        _check_record(record)
        self.record = record
        self.guest_addr = record.guest_addr
        self.user_addr = record.user_addr
        self.size = record.size
        self.view = map_shared(fd, record.mmap_offset, record.size, alone=alone)

    def overlaps(self, other: MemoryRegion) -> bool:
        """Whether a record has addresses of ours, in either space."""
        return _overlap(self.guest_addr, self.size, other.guest_addr, other.size) or _overlap(
            self.user_addr, self.size, other.user_addr, other.size
        )


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


def _check_record(record: MemoryRegion) -> None:
    if not record.size:
        raise Refused("memory region of 0 bytes")
    starts = (record.guest_addr, record.user_addr, record.mmap_offset)
    if max(starts) + record.size > _ADDRESS_SPACE:
        raise Refused(f"memory region of {record.size} bytes wraps around")


def map_shared(fd: int, offset: int, size: int, *, alone: bool) -> memoryview:
    """Map bytes of a front-end's file. The descriptor stays the caller's.

    Args:
        fd: The file.
        offset: Where in it, in bytes.
        size: Bytes.
        alone: See ``GuestMemory``.

    Raises:
        Refused: The file cannot back them, or could cease to.
    """
    if not _is_lasting(fd) and not alone:  # first: fstat(2) of other files may wait for ever
        raise Refused(
            "memory that its owner could take away under all guests; "
            "share a memfd (QEMU: memory-backend-memfd), or run a daemon per guest with --once"
        )
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Refused("memory region whose descriptor is no memory file")
    file_size = os.fstat(fd).st_size  # after sealing
    if offset + size > file_size:
        raise Refused(f"memory region ends beyond its file of {file_size} bytes")
    # mmap wants a page-aligned offset; the standard does not.
    lead = offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(fd, lead + size, offset=offset - lead)
    except (OSError, ValueError, OverflowError) as error:
        raise Refused(f"cannot map a region of {size} bytes: {error}") from None
    return memoryview(mapping)[lead:]


def _is_lasting(fd: int) -> bool:
    """Seal a file against shrinking; whether its pages can be reached from now on, come what may.

    False for everything but a memfd of ordinary pages that allows seals or is sealed.
    """
    # No seals on other files (EINVAL), none more on a sealed memfd (EPERM).
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        return False
    return bool(sealed) and os.fstatvfs(fd).f_bsize == mmap.PAGESIZE


class GuestMemory:
    """The memory table of one guest.

    Args:
        alone: The guest is the only one that this process will have.

    Invariants: at most MAX_MEM_SLOTS regions, none overlapping another in either address space.
    """

    __slots__ = ("_alone", "_regions")

    def __init__(self, *, alone: bool = False) -> None:
        self._alone = alone
        self._regions: list[Region] = []

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, in no particular order."""
        return tuple(self._regions)

    def replace(self, records: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Replace the whole table (SET_MEM_TABLE). The descriptors stay the caller's.

        Raises:
            Refused: A region cannot be; the old table is still in force.
        """
        fresh = GuestMemory(alone=self._alone)
        for record, fd in zip(records, fds, strict=True):
            fresh.add(record, fd)
        self._regions = fresh._regions

    def add(self, record: MemoryRegion, fd: int) -> None:
        """Add one region (ADD_MEM_REG). The descriptor stays the caller's.

        Raises:
            Refused: It overlaps, is not what its descriptor can back, or the table is full.
        """
        if len(self._regions) >= MAX_MEM_SLOTS:
            raise Refused(f"more than {MAX_MEM_SLOTS} memory regions")
        if any(region.overlaps(record) for region in self._regions):
            raise Refused(f"memory region at {record.guest_addr:#x} overlaps another")
        self._regions.append(Region(record, fd, alone=self._alone))

    def remove(self, record: MemoryRegion) -> None:
        """Remove one region (REM_MEM_REG), which ignores ``mmap_offset``.

        Raises:
            Refused: There is no such region.
        """
        for region in self._regions:
            if region.record[:3] == record[:3]:
                self._regions.remove(region)
                return
        raise Refused(f"no memory region at {record.guest_addr:#x} to remove")

    def close(self) -> None:
        """Forget all regions; the last view on one unmaps it."""
        self._regions = []

    def at_guest(self, guest_addr: int, length: int) -> memoryview:
        """Return ``length`` bytes at a guest address, writable, as they are in shared memory.

        Raises:
            RingFault: They are not inside one region.
        """
        for region in self._regions:
            start = guest_addr - region.guest_addr
            if 0 <= start <= region.size - length:
                return region.view[start : start + length]
        raise RingFault(f"{length} bytes at guest address {guest_addr:#x} are in no region")

    def at_user(self, user_addr: int, length: int) -> memoryview:
        """Return ``length`` bytes at a user address, as SET_VRING_ADDR names them.

        Raises:
            RingFault: They are not inside one region.
        """
        for region in self._regions:
            start = user_addr - region.user_addr
            if 0 <= start <= region.size - length:
                return region.view[start : start + length]
        raise RingFault(f"{length} bytes at user address {user_addr:#x} are in no region")
