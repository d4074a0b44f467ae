"""Which files the kernel reads and writes by itself unless all are asked for."""

from __future__ import annotations

import mmap
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.shares import Shared, messages, open_shared
from tests.support.wait import wait_until
from vfsmount.client.mount.status import read_status
from vfsmount.client.relay.passthrough import PASS_FROM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]


@pytest.fixture(scope="module", params=["none", "auto", "always"])
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    with open_shared("bundled", "relay", request.param) as shared:
        facts = read_status(str(shared.mounts[0].path))["dax"]
        if not facts["active"]:
            pytest.skip(f"no FUSE passthrough here: {facts['why']}")
        assert facts["pass_from_bytes"] == PASS_FROM
        yield shared


@pytest.fixture
def here(shared: Shared) -> tuple[Path, Path]:
    """A folder: at the host, and in the mount."""
    shared.check_alive()
    host, path = shared.folder()
    return host, path


def opens(shared: Shared) -> tuple[int, int]:
    """Opens that were passed through, and by message."""
    facts = read_status(str(shared.mounts[0].path))["dax"]
    return facts["opens"], facts["opens_by_message"]


def test_size_decides(shared: Shared, here: tuple[Path, Path]) -> None:
    host, path = here
    for size in (0, 1, PASS_FROM - 1, PASS_FROM, 2 * PASS_FROM):
        (host / "file").write_bytes(b"x" * size)
        os.replace(host / "file", host / f"{size}")
        for flags in (os.O_RDONLY, os.O_RDWR):
            passed, by_message = opens(shared)
            fd = os.open(path / f"{size}", flags)
            assert os.pread(fd, 2 << 20, 0) == b"x" * size
            os.close(fd)
            large = size >= PASS_FROM
            assert opens(shared) == (passed + large, by_message + (not large)), size


def test_what_is_passed_needs_no_message(shared: Shared, here: tuple[Path, Path]) -> None:
    host, path = here
    (host / "file").write_bytes(bytes(PASS_FROM))
    fd = os.open(path / "file", os.O_RDWR)
    os.pwrite(fd, b"first", 0)  # the kernel asks for capabilities once
    before = messages(shared.mounts[0])
    for at in range(0, PASS_FROM, 65536):
        assert os.pwrite(fd, b"more", at) == len(os.pread(fd, 4, at))
    sent = messages(shared.mounts[0]) - before
    os.close(fd)
    assert sent["READ"] + sent["WRITE"] == 0


def test_new_and_truncated_files_go_by_message(shared: Shared, here: tuple[Path, Path]) -> None:
    host, path = here
    passed, by_message = opens(shared)
    for turn in range(3):
        (path / "file").write_bytes(b"%d" % turn * PASS_FROM)
        assert (host / "file").read_bytes() == b"%d" % turn * PASS_FROM
    fd = os.open(path, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, bytes(PASS_FROM))
    os.close(fd)
    assert opens(shared) == (passed, by_message + 4)
    # Now it is large; and as it has a backing file, it keeps that.
    assert (path / "file").read_bytes() == b"2" * PASS_FROM
    os.truncate(path / "file", 3)
    assert (path / "file").read_bytes() == b"222"
    assert opens(shared) == (passed + 2, by_message + 4)


def test_opens_of_one_file_are_of_one_kind(shared: Shared, here: tuple[Path, Path]) -> None:
    host, path = here
    (host / "small").write_bytes(b"small")
    (host / "large").write_bytes(bytes(PASS_FROM))
    passed, by_message = opens(shared)
    small = os.open(path / "small", os.O_RDWR)
    os.pwrite(small, b"x" * PASS_FROM, 5)
    large = os.open(path / "large", os.O_RDONLY)
    os.truncate(host / "large", 1)
    more = [os.open(path / "small", os.O_RDONLY), os.open(path / "large", os.O_RDWR)]
    assert opens(shared) == (passed + 2, by_message + 2)
    os.pwrite(more[1], b"by another", 0)
    assert os.pread(large, 100, 0) == (host / "large").read_bytes() == b"by another"
    assert os.pread(more[0], 9, 0) == b"smallxxxx"
    for fd in (small, large, *more):
        os.close(fd)
    # All closed: now the one is large. What the kernel had of it has not become old.
    (host / "small").write_bytes(b"y" * PASS_FROM)
    fd = os.open(path / "small", os.O_RDONLY)
    assert os.pread(fd, 2 << 20, 0) == b"y" * PASS_FROM
    os.close(fd)
    assert opens(shared) == (passed + 3, by_message + 2)


def test_from_one_kind_to_the_other_and_back(here: tuple[Path, Path]) -> None:
    """No page that the kernel kept of the one is shown by the other."""
    host, path = here
    (path / "file").write_bytes(b"a" * PASS_FROM)  # by message
    with (path / "file").open("r+b", buffering=0) as file:  # passed through
        file.write(b"b" * 10)
        with mmap.mmap(file.fileno(), 0) as pages:
            pages[10:20] = b"c" * 10
    fd = os.open(path / "file", os.O_RDWR | os.O_TRUNC)
    os.pwrite(fd, b"d", 4096)
    assert os.pread(fd, 5000, 0) == (host / "file").read_bytes() == bytes(4096) + b"d"
    os.close(fd)
    assert (path / "file").read_bytes() == bytes(4096) + b"d"
    (path / "file").write_bytes(b"e" * PASS_FROM)
    assert (path / "file").read_bytes() == (host / "file").read_bytes() == b"e" * PASS_FROM


@pytest.mark.parametrize("size", [20, 2 * PASS_FROM])
def test_open_here_and_executed_at_the_host(here: tuple[Path, Path], size: int) -> None:
    """What is read here can be executed there; what was written here, once it is closed."""
    host, path = here
    script = b"#!/bin/sh\necho ran\n".ljust(size, b"\n")
    (path / "program").write_bytes(script)
    (path / "program").chmod(0o755)

    def runs(folder: Path = host) -> bool:
        try:
            done = subprocess.run([folder / "program"], capture_output=True, check=True)
        except OSError:  # ETXTBSY
            return False
        return done.stdout == b"ran\n"

    wait_until(runs, 5, "the program to be free")
    with (path / "program").open("rb", buffering=0) as reader:
        assert reader.read() == script
        assert runs()
    writer = os.open(path / "program", os.O_RDWR)
    assert not runs()
    os.close(writer)
    wait_until(runs, 5, "the program to be free")
    assert runs(path)
