"""Guest memory: the regions that a front-end shares, mapped here, and addresses translated.

There are two address spaces: *guest* addresses stand in descriptors, *user* addresses in
SET_VRING_ADDR. Both are only keys here. A range must lie inside one region in full.

Rules:
* Regions do not overlap in either space and do not wrap; the descriptor must be as long as the
  region claims, or the first access beyond its end would kill the process with SIGBUS.
* For the same reason the descriptor is sealed against shrinking where it is a memfd that allows
  seals. A plain shared file cannot be sealed: its owner is trusted not to truncate it while mapped.
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

__all__ = ["MAX_MEM_SLOTS", "GuestMemory", "Region"]

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

    def __init__(self, record: MemoryRegion, fd: int) -> None:
        _check_record(record)
        _check_descriptor(record, fd)
        self.record = record
        self.guest_addr = record.guest_addr
        self.user_addr = record.user_addr
        self.size = record.size
        # mmap wants a page-aligned offset; the standard does not.
        lead = record.mmap_offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapping = mmap.mmap(fd, lead + record.size, offset=record.mmap_offset - lead)
        except (OSError, ValueError, OverflowError) as error:
            raise Refused(f"cannot map a region of {record.size} bytes: {error}") from None
        self.view = memoryview(mapping)[lead:]

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


def _check_descriptor(record: MemoryRegion, fd: int) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise Refused("memory region whose descriptor is no memory file")
    # No seals on other files (EINVAL), none more on a sealed memfd (EPERM): see the module's rules.
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    if record.mmap_offset + record.size > os.fstat(fd).st_size:
        raise Refused(f"memory region ends beyond its file of {info.st_size} bytes")


class GuestMemory:
    """The memory table of one guest.

    Invariants: at most MAX_MEM_SLOTS regions, none overlapping another in either address space.
    """

    __slots__ = ("_regions",)

    def __init__(self) -> None:
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
        fresh = GuestMemory()
        for record, fd in zip(records, fds, strict=True):
            fresh.add(record, fd)
        self._regions = fresh._regions

    def add(self, record: MemoryRegion, fd: int) -> None:
        """Add one region (ADD_MEM_REG). The descriptor stays the caller's.

        Raises:
            Refused: It overlaps, does not fit its descriptor, or the table is full.
        """
        if len(self._regions) >= MAX_MEM_SLOTS:
            raise Refused(f"more than {MAX_MEM_SLOTS} memory regions")
        if any(region.overlaps(record) for region in self._regions):
            raise Refused(f"memory region at {record.guest_addr:#x} overlaps another")
        self._regions.append(Region(record, fd))

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
