"""Writes that the host has no room for: nobody who wrote is left in the belief that all is well."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import DAEMON_KINDS, each_daemon, require_daemon, start_daemon
from tests.support.environment import quick_folders, unavailable
from tests.support.errors import error_of
from tests.support.mounts import start_mount
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

KIB = 1 << 10
#: Bytes of the host's file system, and of what two handles write in all.
ROOM, WRITTEN = 256 * KIB, 400 * KIB
GIVEN_UP = r".*bytes written to node \d+ did not reach the host.*"


class Place(NamedTuple):
    """A mounted share of little room."""

    engine: str
    host: Path
    path: Path


@contextmanager
def little_room(
    kind: str, engine: str, *, writeback: bool, options: tuple[str, ...] = ()
) -> Iterator[Place]:
    require_daemon(kind)
    if os.geteuid():
        unavailable("only root can mount a tmpfs of little room")
    with quick_folders("full", "host", "mnt") as (host, path):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", host], check=True)
        try:
            with (
                start_daemon(kind, host, writeback=writeback) as daemon,
                start_mount(
                    path,
                    daemon.socket,
                    engine=engine,
                    options=[*options, *(["--writeback"] if writeback else [])],
                    expected_complaint=GIVEN_UP,
                ),
            ):
                yield Place(engine, host, path)
        finally:
            subprocess.run(["umount", host], check=True)


@pytest.fixture(
    scope="module",
    params=each_daemon(("relay", "pyfuse3")),
)
def here(request: pytest.FixtureRequest) -> Iterator[Place]:
    with little_room(*request.param, writeback=True) as place:
        yield place


@contextmanager
def overfull(here: Place, name: str) -> Iterator[list[int]]:
    """Two handles that have written more in all than there is room for, and one that has not."""
    handles = [os.open(here.path / name, os.O_RDWR | os.O_CREAT) for _ in range(3)]
    try:
        for number, fd in enumerate(handles[:2]):
            os.pwrite(fd, b"%d" % number * (WRITTEN // 2), number * WRITTEN // 2)
        yield handles
    finally:
        for fd in handles:
            error_of(os.close, fd)
        (here.path / name).unlink()


def has_room(here: Place) -> bool:
    """Whether nothing is left of removed files, which the daemon holds until they are forgotten."""
    state = os.statvfs(here.host)
    return state.f_bfree * state.f_bsize >= ROOM - 8 * KIB


def test_fsync_tells_each_handle_that_wrote(here: Place) -> None:
    with overfull(here, "fsync") as (one, two, _):
        assert error_of(os.fsync, one) == "ENOSPC"
        assert error_of(os.fsync, two) == "ENOSPC"


#: A and B have written and R only reads; what is done, and what it tells. Write-behind, which tries
#: again each time, would tell again each time.
ORDERS = {
    "close A, close B": "ENOSPC ENOSPC",
    "fsync A, close A, close B": "ENOSPC - ENOSPC",
    "fsync A, fsync A, fsync B, fsync B, close B, close A": "ENOSPC - ENOSPC - - -",
    "close B, fsync A, close A": "ENOSPC ENOSPC -",
    "close R, chmod, close A, close B": "- - ENOSPC ENOSPC",
    "dup A, close A, close B": "ENOSPC - ENOSPC",
    # A process that has inherited a handle, and ends, has not heard of anything.
    "exit A, close A, close B": "- ENOSPC ENOSPC",
    # Closes are seldom looked at, so who syncs later is told, as on any file system.
    "close A, close B, fsync R, fsync R": "ENOSPC ENOSPC ENOSPC -",
    "fsync A, close B, fsync R": "ENOSPC ENOSPC -",
}


def is_case(params: Mapping[str, object]) -> bool:
    return "order" not in params or params["here"] in [(kind, "relay") for kind in DAEMON_KINDS]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mapped", [False, True], ids=["written", "mapped"])
def test_each_handle_is_told_once(here: Place, order: str, mapped: bool) -> None:
    """In whatever order. The kernel by itself would tell the first who asks, and nobody else."""
    path = here.path / "order"
    wait_until(lambda: has_room(here), 10, "the files of other tests to be gone")
    handles = {name: os.open(path, os.O_RDWR | os.O_CREAT) for name in "AB"}
    handles["R"] = os.open(path, os.O_RDONLY)
    do: dict[str, Callable[..., object]] = {
        "fsync": lambda name: os.fsync(handles[name]),
        "close": lambda name: os.close(handles.pop(name)),
        "dup": lambda name: os.close(os.dup(handles[name])),
        "exit": lambda name: subprocess.run(["true"], check=True, pass_fds=[handles[name]]),
        "chmod": lambda: path.chmod(0o600),
    }
    try:
        with fill(handles["A"], 0, mapped), fill(handles["B"], 1, mapped):
            steps = [step.split() for step in order.split(", ")]
            found = [error_of(do[what], *whose) or "-" for what, *whose in steps]
    finally:
        for fd in handles.values():
            error_of(os.close, fd)
        path.unlink()
    assert " ".join(found) == ORDERS[order]


@contextmanager
def fill(fd: int, part: int, mapped: bool) -> Iterator[None]:
    """Write one half of more than there is room for, by write(2) or through a mapping."""
    if not mapped:
        os.pwrite(fd, b"%d" % part * (WRITTEN // 2), part * WRITTEN // 2)
        yield
        return
    os.ftruncate(fd, WRITTEN)
    with mmap.mmap(fd, WRITTEN) as pages:
        pages[part * WRITTEN // 2 : (part + 1) * WRITTEN // 2] = b"m" * (WRITTEN // 2)
        yield


def test_writes_that_are_synced_tell_at_once(here: Place) -> None:
    wait_until(lambda: has_room(here), 10, "the files of other tests to be gone")
    path = here.path / "synced"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_SYNC)
    try:
        assert error_of(os.pwrite, fd, bytes(WRITTEN), 0) == "ENOSPC"
    finally:
        error_of(os.close, fd)
        path.unlink()


def test_a_file_that_is_removed_and_synced_with_all_others(here: Place) -> None:
    """sync(2) and sync_file_range(2) cannot tell; they do not use up what close(2) tells either."""
    wait_until(lambda: has_room(here), 10, "the files of other tests to be gone")
    fd = os.open(here.path / "removed", os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, bytes(WRITTEN), 0)
    (here.path / "removed").unlink()
    os.sync()
    ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 7)
    assert error_of(os.close, fd) == "ENOSPC"


def test_close_tells(here: Place) -> None:
    with overfull(here, "close") as handles:
        assert [error_of(os.close, handles.pop(0)) for _ in range(2)] == ["ENOSPC", "ENOSPC"]


def test_each_is_told_once_and_nothing_is_forgotten(here: Place) -> None:
    """By write-behind, which tries again; the kernel drops the pages once it has told."""
    filler = here.host / "filler"
    wait_until(lambda: has_room(here), 10, "the files of other tests to be gone")
    filler.write_bytes(bytes(ROOM - 16 * KIB))
    one, two = (os.open(here.path / "kept", os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        os.pwrite(one, b"1" * 64 * KIB, 0)
        os.pwrite(two, b"2" * 64 * KIB, 64 * KIB)
        assert error_of(os.fsync, one) == "ENOSPC"
        filler.unlink()
        assert error_of(os.fsync, one) == ""
        assert error_of(os.fsync, two) == "ENOSPC"
        assert error_of(os.fsync, two) == ""
        if here.engine == "pyfuse3":
            expected = b"1" * 64 * KIB + b"2" * 64 * KIB
            assert (here.path / "kept").read_bytes() == expected
            assert (here.host / "kept").read_bytes() == expected
    finally:
        assert error_of(os.close, one) == error_of(os.close, two) == ""
        (here.path / "kept").unlink()


def test_what_is_cut_off_is_not_written_later(here: Place) -> None:
    """Also if it could not be written before."""
    with overfull(here, "cut") as (one, two, other):
        os.ftruncate(other, 1000)
        error_of(os.fsync, one)
        assert error_of(os.fsync, one) == ""
        assert (here.host / "cut").read_bytes() == b"0" * 1000
        error_of(os.fsync, two)
        os.close(os.open(here.path / "cut", os.O_WRONLY | os.O_TRUNC))
        assert error_of(os.fsync, two) == ""
        assert (here.host / "cut").read_bytes() == b""


@pytest.mark.parametrize(
    ("engine", "cache"), [("relay", "none"), ("relay", "auto"), ("pyfuse3", "auto")]
)
def test_mapped_pages_without_writeback(daemon_kind: str, engine: str, cache: str) -> None:
    """The kernel does not notice when it is told that less was written than there was."""
    options = ("--dax=off", "--cache", cache)
    with (
        little_room(daemon_kind, engine, writeback=False, options=options) as here,
        (here.path / "mapped").open("w+b", buffering=0) as file,
    ):
        file.truncate(WRITTEN)
        if cache == "none" and error_of(lambda: mmap.mmap(file.fileno(), 1).close()) == "ENODEV":
            pytest.skip("this kernel has no shared maps of files that it does not cache")
        with mmap.mmap(file.fileno(), WRITTEN) as pages:
            pages[:] = b"m" * WRITTEN
            assert error_of(pages.flush) == "ENOSPC"


def test_errno_is_the_hosts() -> None:
    """The kernel has ENOSPC, and EIO for all the rest."""
    with (
        quick_folders("limit", "host", "mnt") as (host, path),
        start_daemon("bundled", host, writeback=True) as daemon,
    ):
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (ROOM, ROOM))
        with start_mount(path, daemon.socket, engine="relay", options=["--writeback"]):
            one, two = (os.open(path / "file", os.O_WRONLY | os.O_CREAT) for _ in range(2))
            os.pwrite(one, b"1" * WRITTEN, 0)
            assert [error_of(os.close, fd) for fd in (one, two)] == ["EFBIG", "EFBIG"]
