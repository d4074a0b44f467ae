"""The memory table: what can be mapped, and that an address is inside of it or nowhere."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.hostd.faults import Refused, RingFault
from vfsmount.hostd.memory import MAX_MEM_SLOTS, GuestMemory
from vfsmount.wire.vhost_user import MemoryRegion

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096
GUEST, USER = 0x1_0000_0000, 0x7F00_0000_0000


@pytest.fixture
def fd() -> Iterator[int]:
    """A memfd of 8 pages, each filled with its number."""
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    for number in range(8):
        os.write(fd, bytes([number]) * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.close()


def region(
    guest: int = GUEST, size: int = 2 * PAGE, user: int = USER, offset: int = 0
) -> MemoryRegion:
    return MemoryRegion(guest, size, user, offset)


def test_addresses_of_both_kinds(memory: GuestMemory, fd: int) -> None:
    memory.add(region(offset=3 * PAGE), fd)

    assert bytes(memory.at_guest(GUEST + PAGE - 1, 2)) == b"\3\4"
    assert bytes(memory.at_user(USER + PAGE - 1, 2)) == b"\3\4"
    memory.at_guest(GUEST, 3)[:] = b"abc"
    assert os.pread(fd, 3, 3 * PAGE) == b"abc"


def test_offset_inside_a_page(memory: GuestMemory, fd: int) -> None:
    memory.add(region(offset=2 * PAGE - 1), fd)

    assert bytes(memory.at_guest(GUEST, 2)) == b"\1\2"


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (-1, 2), (2 * PAGE, 1), (2 * PAGE - 1, 2), (0, 2 * PAGE + 1), (0, 2**32 - 1)],
)
def test_outside(memory: GuestMemory, fd: int, offset: int, length: int) -> None:
    memory.add(region(), fd)

    with pytest.raises(RingFault, match="no region"):
        memory.at_guest(GUEST + offset, length)
    with pytest.raises(RingFault, match="no region"):
        memory.at_user(USER + offset, length)


def test_nothing_crosses_from_one_region_into_the_next(memory: GuestMemory, fd: int) -> None:
    memory.add(region(), fd)
    memory.add(region(GUEST + 2 * PAGE, user=USER + 2 * PAGE, offset=2 * PAGE), fd)

    assert bytes(memory.at_guest(GUEST + 2 * PAGE, 1)) == b"\2"
    with pytest.raises(RingFault):
        memory.at_guest(GUEST + 2 * PAGE - 1, 2)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (region(size=0), "0 bytes"),
        (region(size=8 * PAGE + 1), "beyond its file"),
        (region(offset=7 * PAGE), "beyond its file"),
        (region(offset=2**63), "beyond its file"),
        (region(guest=2**64 - PAGE), "wraps"),
        (region(user=2**64 - PAGE), "wraps"),
        (region(offset=2**64 - PAGE), "wraps"),
        (region(size=2**64 - 1), "wraps"),
    ],
)
def test_regions_that_cannot_be(
    memory: GuestMemory, fd: int, record: MemoryRegion, reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        memory.add(record, fd)
    assert memory.regions == ()


def test_the_last_address_may_be_used(memory: GuestMemory, fd: int) -> None:
    memory.add(region(guest=2**64 - 2 * PAGE), fd)

    assert bytes(memory.at_guest(2**64 - 1, 1)) == b"\1"


@pytest.mark.parametrize(("guest", "user"), [(GUEST + PAGE, 0), (0, USER - PAGE), (GUEST, USER)])
def test_overlaps_in_either_space(memory: GuestMemory, fd: int, guest: int, user: int) -> None:
    memory.add(region(), fd)
    with pytest.raises(Refused, match="overlaps"):
        memory.add(region(guest, user=user), fd)


@pytest.mark.parametrize(("alone", "why"), [(False, "could take away"), (True, "no memory file")])
def test_what_is_no_memory_file(alone: bool, why: str) -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(Refused, match=why):
            GuestMemory(alone=alone).add(region(), read_end)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_file_that_is_not_writable(memory: GuestMemory, fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(Refused, match="cannot map"):
            memory.add(region(), read_only)
    finally:
        os.close(read_only)


def test_memory_can_no_longer_be_taken_away(memory: GuestMemory, fd: int) -> None:
    memory.add(region(), fd)

    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE)


def test_memory_that_could_be_taken_away(memory: GuestMemory, tmp_path: Path) -> None:
    """Not to be sealed: a memfd made so, and every plain file. Only a lone guest may bring it."""
    with (tmp_path / "file").open("w+b") as file:
        unsealable = os.memfd_create("guest")
        for fd in (unsealable, file.fileno()):
            os.ftruncate(fd, 2 * PAGE)
            with pytest.raises(Refused, match=r"could take away.*--once"):
                memory.add(region(), fd)
            assert memory.regions == ()
            lone = GuestMemory(alone=True)
            lone.add(region(), fd)
            lone.replace([region()], [fd])
            assert len(lone.regions) == 1
        os.close(unsealable)


def test_memory_of_huge_pages_could_run_out(memory: GuestMemory) -> None:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    try:
        os.ftruncate(fd, 2 << 20)
        with pytest.raises(Refused, match="could take away"):
            memory.add(region(), fd)
    finally:
        os.close(fd)


def test_memory_that_its_owner_has_sealed(memory: GuestMemory, fd: int) -> None:
    """As QEMU and crosvm do: we may add no seal, and need not."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    memory.add(region(), fd)

    assert len(memory.regions) == 1


def test_replace_is_all_or_nothing(memory: GuestMemory, fd: int) -> None:
    memory.add(region(), fd)
    with pytest.raises(Refused):
        memory.replace([region(0x1000, user=0x1000), region(size=0)], [fd, fd])
    assert [found.guest_addr for found in memory.regions] == [GUEST]

    memory.replace([region(0x1000, user=0x1000), region(0x9000, user=0x9000)], [fd, fd])

    assert [found.guest_addr for found in memory.regions] == [0x1000, 0x9000]
    with pytest.raises(RingFault):
        memory.at_guest(GUEST, 1)


def test_remove(memory: GuestMemory, fd: int) -> None:
    memory.add(region(), fd)
    for other in (region(GUEST + 1), region(user=USER + 1), region(size=PAGE)):
        with pytest.raises(Refused, match="no memory region"):
            memory.remove(other)

    memory.remove(region(offset=12345))  # the offset does not count

    assert memory.regions == ()


def test_full_table(memory: GuestMemory, fd: int) -> None:
    for number in range(MAX_MEM_SLOTS):
        memory.add(region(number * 4 * PAGE, user=number * 4 * PAGE), fd)
    with pytest.raises(Refused, match="more than"):
        memory.add(region(), fd)


def test_views_outlive_their_region(memory: GuestMemory, fd: int) -> None:
    memory.add(region(), fd)
    view = memory.at_guest(GUEST, 4)
    memory.close()

    assert bytes(view) == bytes(4)


@given(
    guest=st.integers(0, 2**64 - 1),
    size=st.integers(0, 2**64 - 1),
    user=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
)
def test_any_region_is_mapped_or_refused(guest: int, size: int, user: int, offset: int) -> None:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4 * PAGE)
        memory = GuestMemory()
        try:
            memory.add(MemoryRegion(guest, size, user, offset), fd)
        except Refused:
            return
        assert memory.at_guest(guest, size).nbytes == size
    finally:
        os.close(fd)
