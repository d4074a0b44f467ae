"""The window: which descriptors it takes, keeps, and hands on."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import TYPE_CHECKING

import pytest

from vfsmount.dax_shm.ranges import RANGE_SIZE
from vfsmount.dax_shm.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 4 * RANGE_SIZE


@pytest.fixture
def window() -> Iterator[Window]:
    window = Window(SIZE)
    window.offered(1 << 30)
    yield window
    window.check_invariants()
    window.clear()
    window.check_invariants()


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 1000)
    return str(path)


def give(window: Window, path: str, flags: int, moffset: int = 0, writable: bool = False) -> int:
    """Map the first range of a file, as a message would; returns the errno."""
    fd = os.open(path, flags)
    try:
        return window.map(moffset, RANGE_SIZE, 0, writable, fd)
    finally:
        os.close(fd)


def test_as_large_as_both_sides_want() -> None:
    window = Window(3 * RANGE_SIZE)
    for offered, used in ((1 << 40, 3), (RANGE_SIZE + 4096, 1), (4096, 0), (0, 0)):
        window.offered(offered)
        assert (window.size, len(window.ranges)) == (used * RANGE_SIZE, used)


def test_ranges_as_large_as_the_daemon_wants(window: Window) -> None:
    assert window.align(12)
    assert window.range_size == RANGE_SIZE
    assert window.align(22)
    assert (window.range_size, len(window.ranges)) == (2 * RANGE_SIZE, 2)
    assert not window.align(24)
    assert not window.align(0xFFFF)


def test_descriptors_are_kept_shared_and_handed_on(window: Window, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for at in range(3):
        assert give(window, path, os.O_RDONLY, at * RANGE_SIZE) == 0
    assert len(os.listdir("/proc/self/fd")) == before + 1

    fd = window.descriptor(RANGE_SIZE, write=False)
    assert fd is not None
    assert os.pread(fd, 10, 10) == b"0123456789"
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    os.close(fd)
    assert window.descriptor(RANGE_SIZE, write=True) is None
    assert window.descriptor(RANGE_SIZE + 4096, write=False) is None
    assert window.descriptor(3 * RANGE_SIZE, write=False) is None

    for at in range(3):
        assert window.unmap(at * RANGE_SIZE, RANGE_SIZE) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_writable_only_where_the_descriptor_and_the_mapping_are(window: Window, path: str) -> None:
    assert give(window, path, os.O_RDONLY, 0, writable=True) == errno.EACCES
    assert give(window, path, os.O_WRONLY, 0, writable=True) == errno.EACCES
    assert give(window, path, os.O_WRONLY, 0) == errno.EACCES
    assert give(window, path, os.O_RDWR, 0) == 0
    assert window.descriptor(0, write=True) is None
    assert give(window, path, os.O_RDWR, RANGE_SIZE, writable=True) == 0
    fd = window.descriptor(RANGE_SIZE, write=True)
    assert fd is not None
    os.close(fd)


def test_descriptors_that_do_not_write_where_they_are_told(window: Window, path: str) -> None:
    assert give(window, path, os.O_RDWR | os.O_APPEND, 0, writable=True) == errno.EINVAL
    assert window.mapped() == 0


def test_only_regular_files(window: Window, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert give(window, str(tmp_path), os.O_RDONLY | os.O_DIRECTORY) == errno.ENODEV
    assert give(window, str(tmp_path / "fifo"), os.O_RDWR, writable=True) == errno.ENODEV
    assert give(window, "/dev/zero", os.O_RDWR, writable=True) == errno.ENODEV
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert window.map(0, RANGE_SIZE, 0, False, ours.fileno()) == errno.ENODEV
    path = tmp_path / "file"
    path.touch()
    assert give(window, str(path), os.O_PATH) == errno.EBADF


def test_places_are_checked(window: Window, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        assert window.map(SIZE, RANGE_SIZE, 0, False, fd) == errno.EINVAL  # in the region, not ours
        assert window.map(0, SIZE + 4096, 0, False, fd) == errno.EINVAL
        assert window.map(4096, 4096, 4096, False, fd) == 0
        assert window.map(0, RANGE_SIZE, 0, False, fd) == errno.EEXIST
        assert window.unmap(0, RANGE_SIZE) == errno.EINVAL
        assert window.unmap(4096, 4096) == 0
        assert window.unmap(4096, 4096) == errno.EINVAL
    finally:
        os.close(fd)


def test_ranges_for_others(window: Window) -> None:
    taken = [window.reserve() for _ in range(5)]
    assert sorted(at for at in taken if at is not None) == [at * RANGE_SIZE for at in range(4)]
    assert taken[4] is None
    window.give_back(RANGE_SIZE)
    assert window.reserve() == RANGE_SIZE
