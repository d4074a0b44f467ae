"""The relay with a DAX window: files that the kernel reads, writes and maps by itself."""

from __future__ import annotations

import mmap
import os
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import REPOSITORY, start_daemon
from tests.support.mounts import start_mount
from tests.support.shares import Shared, messages, open_shared
from tests.support.wait import wait_until
from vfsmount.client.mount.status import read_status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

MODES = ("none", "auto", "always")
DATA = ("READ", "WRITE", "GETXATTR")


def dax_of(shared: Shared, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = read_status(str(shared.mounts[number].path))["dax"]
    return found


@pytest.fixture(scope="module", params=MODES)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Two mounts of one daemon, each with a window."""
    options = ["--dax", "1G"]
    with open_shared("bundled", "relay", request.param, mounts=2, options=options) as shared:
        facts = dax_of(shared)
        if not facts["active"]:
            pytest.skip(f"no FUSE passthrough here: {facts['why']}")
        yield shared


@pytest.fixture
def here(shared: Shared) -> list[Path]:
    """A folder: at the host, and in both mounts."""
    shared.check_alive()
    return shared.folder()


def test_reads_and_writes_need_no_message(shared: Shared, here: list[Path]) -> None:
    host, path, _ = here
    (host / "file").write_bytes(bytes(1 << 20))
    with (path / "file").open("r+b", buffering=0) as handle:
        os.pwrite(handle.fileno(), b"first", 0)  # the kernel asks for capabilities once
        before = messages(shared.mounts[0])
        for number in range(5000):
            at = number * 7919 % (1 << 20)
            os.pwrite(handle.fileno(), struct.pack("<I", number), at)
            assert os.pread(handle.fileno(), 4, at) == struct.pack("<I", number)
        sent = messages(shared.mounts[0]) - before
    assert {name: sent[name] for name in DATA if sent[name]} == {}
    assert dax_of(shared)["opens_by_message"] == 0
    assert (host / "file").read_bytes() == (path / "file").read_bytes()


def test_attributes_are_right_after_writes(here: list[Path]) -> None:
    host, path, _ = here
    with (path / "file").open("wb", buffering=0) as handle:
        for size in (10, 5000, 100_000):
            handle.write(bytes(size - os.fstat(handle.fileno()).st_size))
            mine, real = os.fstat(handle.fileno()), (host / "file").stat()
            assert (mine.st_size, mine.st_mtime_ns) == (size, real.st_mtime_ns)
            assert mine.st_blocks == real.st_blocks


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_attributes_are_right_after_a_listing(here: list[Path], before: bool) -> None:
    """A listing has one file of which the relay keeps attributes: not when others change them."""
    host, path, _ = here
    names = [f"file-{number}" for number in range(10)]
    for name in names:
        (host / name).touch()
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write_and_look() -> list[int]:
        with ExitStack() as stack:
            files = []
            for is_listing in (before, not before):
                if is_listing:
                    assert sorted(os.listdir(folder)) == names
                else:
                    files = [stack.enter_context((path / name).open("r+b", 0)) for name in names]
            for file in files:
                file.write(b"12345")
        return [os.stat(name, dir_fd=folder).st_size for name in names]

    try:
        with ThreadPoolExecutor(1) as pool:  # a thread that has not listed anything yet
            assert pool.submit(write_and_look).result() == [5] * 10
    finally:
        os.close(folder)


def test_append_truncate_and_holes(here: list[Path]) -> None:
    host, path, other = here
    (path / "file").write_bytes(b"0123456789")
    ends = [os.open(name / "file", os.O_WRONLY | os.O_APPEND) for name in (path, other, path)]
    for number, fd in enumerate(ends):
        os.write(fd, b"%d" % number)
        os.pwrite(fd, b"%d" % number, 0)  # Linux appends in any case
        os.close(fd)
    assert (host / "file").read_bytes() == b"0123456789001122"
    with (path / "file").open("r+b", buffering=0) as handle:
        handle.truncate(4)
        assert (handle.read(100), (host / "file").stat().st_size) == (b"0123", 4)
        os.pwrite(handle.fileno(), b"end", 9000)
        assert os.lseek(handle.fileno(), 0, os.SEEK_END) == 9003
    assert (host / "file").read_bytes() == b"0123" + bytes(8996) + b"end"
    with (path / "file").open("wb"):
        assert (host / "file").stat().st_size == 0


def test_what_the_host_does_is_seen_at_once(here: list[Path]) -> None:
    """In every mode: contents are the host's page cache."""
    host, path, _ = here
    (host / "file").write_bytes(b"before")
    with (path / "file").open("rb", buffering=0) as handle:
        assert os.pread(handle.fileno(), 10, 0) == b"before"
        (host / "file").write_bytes(b"after and more")
        assert os.pread(handle.fileno(), 20, 0) == b"after and more"
        os.truncate(host / "file", 3)
        assert os.pread(handle.fileno(), 20, 0) == b"aft"
        os.replace(host / "file", host / "moved")
        (host / "file").write_bytes(b"another")
        assert os.pread(handle.fileno(), 20, 0) == b"aft"
        os.unlink(host / "moved")
        assert os.pread(handle.fileno(), 20, 0) == b"aft"


def test_a_file_made_anew_is_not_the_old_one(here: list[Path]) -> None:
    _, path, _ = here
    for number in range(20):
        (path / "file").write_bytes(b"%d" % number)
        assert (path / "file").read_bytes() == b"%d" % number
        (path / "file").unlink()


def test_a_write_needs_a_descriptor_that_allows_it(shared: Shared, here: list[Path]) -> None:
    """A file that was opened to be read is asked for again when somebody wants to write."""
    host, path, _ = here
    (host / "file").write_bytes(b"content")
    with (path / "file").open("rb", buffering=0) as reader:
        known = dax_of(shared)["backing_files"]
        with (path / "file").open("r+b", buffering=0) as writer:
            writer.write(b"C")
        assert reader.read(7) == b"Content"
        assert dax_of(shared)["backing_files"] == known  # one for all its opens


@contextmanager
def busy(path: Path) -> Iterator[None]:
    """Keep a mount at work, so that nothing waits until there is time."""
    command = [
        sys.executable,
        "-c",
        "import os, sys\nwhile True: os.statvfs(sys.argv[1])",
        str(path),
    ]
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("at_work", [False, True])
def test_files_are_not_held_open_for_writing(here: list[Path], at_work: bool) -> None:
    host, path, _ = here
    script = b"#!/bin/sh\necho ran\n"
    (host / "program").touch(0o755)

    def runs() -> bool:
        with suppress(OSError):  # ETXTBSY
            return subprocess.run([host / "program"], capture_output=True).stdout == b"ran\n"
        return False

    # The daemon lets go of it soon after, and the kernel has it open for nobody.
    with busy(path) if at_work else nullcontext():
        (path / "program").write_bytes(script)
        wait_until(runs, 5, "the program to be free")
    assert subprocess.run([path / "program"], capture_output=True).stdout == b"ran\n"


def test_shared_mappings_are_one_memory(here: list[Path]) -> None:
    host, path, other = here
    (host / "file").write_bytes(bytes(8192))
    with ExitStack() as stack:
        maps = []
        for name in (host, path, other):
            handle = stack.enter_context((name / "file").open("r+b"))
            maps.append(stack.enter_context(mmap.mmap(handle.fileno(), 8192)))
        for number, one in enumerate(maps):
            one[number : number + 1] = b"%d" % number
        assert [one[:3] for one in maps] == [b"012"] * 3
        private = stack.enter_context((path / "file").open("r+b"))
        with mmap.mmap(private.fileno(), 8192, flags=mmap.MAP_PRIVATE) as own:
            own[0:1] = b"x"
        assert maps[0][0:1] == b"0"


COUNT = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
# Loaded and stored as a whole: of two bytes, 0x6ff and 0x700 may look like 0x7ff.
turns = memoryview(mmap.mmap(fd, 4096)).cast("I")
mine, end = int(sys.argv[2]), 2000
while True:
    now = turns[0]
    if now >= end:
        break
    if now % 2 == mine:
        turns[0] = now + 1
    else:
        os.sched_yield()
"""


def test_two_processes_count_through_two_mounts(shared: Shared, here: list[Path]) -> None:
    """Each adds one when it sees what the other has stored. No call, no lock, no message."""
    host, path, other = here
    (host / "turns").write_bytes(bytes(4096))
    before = [messages(mount) for mount in shared.mounts]
    with ExitStack() as stack:
        counters = []
        for mine, name in enumerate((path, other)):
            command = [sys.executable, "-c", COUNT, str(name / "turns"), str(mine)]
            counters.append(stack.enter_context(subprocess.Popen(command, cwd=REPOSITORY)))
            stack.callback(counters[-1].kill)
        assert [process.wait(60) for process in counters] == [0, 0]
    assert (host / "turns").read_bytes()[:4] == struct.pack("=I", 2000)
    for mount, earlier in zip(shared.mounts, before, strict=True):
        sent = messages(mount) - earlier
        assert sum(sent[name] for name in DATA) == 0
        assert sum(sent.values()) < 30  # to find, open and close it


FAULT = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
pages = mmap.mmap(fd, 8192)
print(pages[4096], flush=True)
sys.stdin.readline()
print(pages[0], flush=True)
print(pages[4096], flush=True)
"""


def test_truncated_by_the_host_under_a_mapping(here: list[Path]) -> None:
    """As on any file system: SIGBUS for who looks behind the end, and for nobody else."""
    host, path, _ = here
    (host / "file").write_bytes(b"\x07" * 8192)
    command = [sys.executable, "-c", FAULT, str(path / "file")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"7\n"
        os.truncate(host / "file", 4096)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"7\n"
        assert process.wait(10) == -7
    assert (path / "file").read_bytes() == b"\x07" * 4096


def test_set_id_bits_go_when_somebody_writes(shared: Shared, here: list[Path]) -> None:
    """Also through a file that is passed through already, where root's writes take them off too."""
    host, path, _ = here
    shared.host.parent.chmod(0o755)
    for name in (host, host.parent):
        name.chmod(0o777)
    file = path / "program"
    file.write_bytes(b"content")
    write = 'printf C 1<> "$0"'
    for hold in (False, True):
        file.chmod(0o777)
        handle = file.open("rb") if hold else None
        file.chmod(0o6777)
        subprocess.run(["sh", "-c", write, file], user=1000, group=1000, check=True)
        assert stat.S_IMODE((host / "program").stat().st_mode) == 0o777, hold
        if handle is not None:
            handle.close()


def test_direct_and_other_kinds_of_open(here: list[Path]) -> None:
    host, path, _ = here
    (host / "file").write_bytes(bytes(8192))
    page = mmap.mmap(-1, 4096)
    page.write(b"d" * 4096)
    for flags in (os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_NOATIME):
        fd = os.open(path / "file", os.O_RDWR | flags)
        assert os.pwrite(fd, page, 4096) == 4096
        assert os.preadv(fd, [page], 4096) == 4096
        os.fsync(fd)
        os.close(fd)
    assert (host / "file").read_bytes() == bytes(4096) + b"d" * 4096
    fd = os.open(path, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"nameless")
    assert os.pread(fd, 20, 0) == b"nameless"
    os.close(fd)


def test_many_files(shared: Shared, here: list[Path]) -> None:
    """More than are kept, so that ids come and go."""
    host, path, _ = here
    before = dax_of(shared)["opens_by_message"]
    many = 1200 if shared.cache == "auto" else 40
    for number in range(many):
        (host / f"{number}").write_bytes(b"%d" % number)
    for _ in range(2):
        for number in range(many):
            assert (path / f"{number}").read_bytes() == b"%d" % number
    facts = dax_of(shared)
    assert facts["opens_by_message"] == before
    assert facts["kept"] <= 1024


def test_daemon_killed_with_files_open() -> None:
    """What is open goes on; everything else fails, and the mount can be taken off."""
    with ExitStack() as stack:
        options = ["--dax", "1G"]
        shared = stack.enter_context(open_shared("bundled", "relay", "auto", options=options))
        if not dax_of(shared)["active"]:
            pytest.skip("no FUSE passthrough here")
        host, path = shared.folder()
        (path / "file").write_bytes(b"content")
        fd = os.open(path / "file", os.O_RDWR)
        pages = mmap.mmap(fd, 7)
        shared.daemons[0].kill()
        shared.daemons[0].wait()
        pages[0:1] = b"C"
        assert os.pwrite(fd, b"T", 6) == 1
        assert os.pread(fd, 10, 0) == (host / "file").read_bytes() == b"ContenT"
        with pytest.raises(OSError, match="not connected"):
            os.open(path / "file", os.O_RDONLY)
        pages.close()
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)
        subprocess.run(["umount", shared.mounts[0].path], check=True, timeout=10)
        assert shared.mounts[0].process.wait(10) == 5
        stack.pop_all()


# --- where it does not work ----------------------------------------------------------------------


@contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """An overlay file system, which cannot be below a FUSE file."""
    lower, upper, work, merged = (folder / name for name in ("lower", "upper", "work", "merged"))
    for one in (lower, upper, work, merged):
        one.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    made = subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged])
    if made.returncode:
        pytest.skip("overlayfs cannot be mounted here")
    try:
        yield merged
    finally:
        subprocess.run(["umount", "-l", merged], check=True)


def test_files_that_cannot_be_below_go_by_message(tmpfs_path: Path) -> None:
    path = tmpfs_path / "mnt"
    path.mkdir()
    with (
        overlay(tmpfs_path) as merged,
        start_daemon("bundled", merged) as daemon,
        start_mount(path, daemon.socket, options=["--dax", "1G"]) as mount,
    ):
        if not read_status(str(path))["dax"]["active"]:
            pytest.skip("no FUSE passthrough here")
        for number in range(20):
            (merged / f"{number}").write_bytes(b"%d" % number)
        for number in range(20):
            assert (path / f"{number}").read_bytes() == b"%d" % number
        (path / "new").write_bytes(b"written")
        assert (merged / "new").read_bytes() == b"written"
        facts = read_status(str(path))["dax"]
        assert facts["opens_by_message"] == 21
        assert (facts["active"], "symbolic links" in facts["why"]) == (False, True)
        assert mount.log.count("goes by message") == 1


def test_write_back_of_the_kernel_excludes_it() -> None:
    with open_shared("bundled", "relay", "auto", writeback=True) as shared:
        host, path = shared.folder()
        (path / "file").write_bytes(b"content")
        assert (path / "file").read_bytes() == (host / "file").read_bytes() == b"content"
        facts = dax_of(shared)
        assert not facts["active"]
        assert "--writeback" in facts["why"]


def test_a_share_that_is_a_fuse_mount_itself(tmp_path: Path) -> None:
    """Its descriptors are asked nothing, because such a file system may never answer."""
    host, lower, path = (tmp_path / name for name in ("host", "lower", "mnt"))
    for folder in (host, lower, path):
        folder.mkdir()
    with (
        start_daemon("bundled", host) as first,
        start_mount(lower, first.socket, options=["--dax=off"]),
        start_daemon("bundled", lower) as second,
        start_mount(path, second.socket, options=["--dax", "1G"]),
    ):
        if not read_status(str(path))["dax"]["active"]:
            pytest.skip("no FUSE passthrough here")
        for number in range(20):
            (path / f"{number}").write_bytes(b"%d" % number)
            assert (path / f"{number}").read_bytes() == b"%d" % number
            assert (host / f"{number}").read_bytes() == b"%d" % number
        facts = read_status(str(path))["dax"]
        assert (facts["opens"], facts["opens_by_message"]) == (0, 40)
        assert (facts["active"], "not supported" in facts["why"]) == (False, True)
