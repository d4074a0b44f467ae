"""DAX below a mount: no messages inside mapped files, and a host that truncates them."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.hammer import hammered
from tests.support.mounts import start_mount
from tests.support.shares import Shared, messages, open_shared
from vfsmount.client.mount.status import read_status
from vfsmount.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """A mount that caches nothing, so that each access comes to us."""
    with open_shared("bundled", "pyfuse3", "none", options=["--dax=64M"]) as shared:
        yield shared


@contextmanager
def mapped_file(shared: Shared, size: int) -> Iterator[tuple[Path, int]]:
    """A file of the letter a, open and used until it is mapped; its path at the host."""
    host, folder = shared.folder()
    (host / "file").write_bytes(b"a" * size)
    fd = os.open(folder / "file", os.O_RDWR)
    try:
        for at in range(0, size, 2 * MIB):
            for _ in range(30):
                os.pwrite(fd, b"a", at)
        yield host / "file", fd
    finally:
        os.close(fd)


def test_no_messages(shared: Shared) -> None:
    size, steps = 6 * MIB, 5000
    with mapped_file(shared, size) as (path, fd):
        before = messages(shared.mounts[0])
        numbers = random.Random(1)
        model = bytearray(b"a" * size)
        for _ in range(steps):
            at = numbers.randrange(size - 4096)
            if numbers.random() < 0.5:
                data = numbers.randbytes(numbers.randrange(1, 4096))
                assert os.pwrite(fd, data, at) == len(data)
                model[at : at + len(data)] = data
            else:
                assert os.pread(fd, 4096, at) == model[at : at + 4096]
        counted = messages(shared.mounts[0]) - before
        assert path.read_bytes() == model
    assert not {"READ", "WRITE", "GETXATTR"} & set(counted), counted
    facts = read_status(str(shared.mounts[0].path))["dax"]
    assert facts["active"]
    assert facts["hits"] >= steps
    assert facts["window_bytes"] == 64 * MIB


def test_capabilities_are_not_hidden(shared: Shared) -> None:
    """The kernel asks for them before each write; for mapped files we look for ourselves."""
    if os.geteuid() != 0:
        pytest.skip("only root sets capabilities")
    value = bytes.fromhex("0100000200200000000000000000000000000000")
    with mapped_file(shared, MIB) as (path, fd):
        with pytest.raises(OSError, match="No data"):
            os.getxattr(fd, "security.capability")
        os.setxattr(path, "security.capability", value)
        assert os.getxattr(fd, "security.capability") == value
        os.pwrite(fd, b"b", 0)
        assert "security.capability" not in os.listxattr(path)


def test_truncated_by_the_host_all_the_time(shared: Shared) -> None:
    size = 3 * MIB
    with mapped_file(shared, size) as (path, fd):
        with hammered(path, size):
            for at in range(2000):
                assert not os.pread(fd, 8192, at * 977 % size).strip(b"a\0b")
                os.pwrite(fd, b"bbbb", at * 1009 % (size - 4))
        path.write_bytes(b"short")
        assert os.pread(fd, 100, 0) == b"short"
        assert os.pread(fd, 100, 2 * MIB) == b""
        shared.check_alive()


def test_daemon_killed_with_mappings_live() -> None:
    """What is mapped stays; what is not fails, and the mount can be taken down as ever."""
    with (
        quick_folders("dax", "host", "mnt") as (path, mnt),
        start_daemon("bundled", path) as daemon,
        start_mount(
            mnt,
            daemon.socket,
            cache="none",
            engine="pyfuse3",
            expected_status=ExitCode.DAEMON_LOST,
            expected_complaint="daemon",
        ),
    ):
        (path / "file").write_bytes(b"a" * 5 * MIB)
        fd = os.open(mnt / "file", os.O_RDWR)
        for _ in range(30):
            os.pwrite(fd, b"a", 0)
        daemon.kill()
        daemon.wait()
        assert os.pread(fd, 3, 0) == b"aaa"
        for call in (
            lambda: os.pread(fd, 3, 4 * MIB),
            lambda: os.pwrite(fd, b"b", 5 * MIB),
            lambda: os.stat(mnt / "file"),
        ):
            with pytest.raises(OSError, match=r"not connected|Input/output error"):
                call()
        assert os.pread(fd, 3, 0) == b"aaa"
        with suppress(OSError):
            os.close(fd)
