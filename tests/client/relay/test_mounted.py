"""The relay on real mounts: what only it can do, each compared with the host directory.

What both engines do is in ``tests/contract``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.errors import outcome
from tests.support.mounts import start_mount
from tests.support.namespace import detach
from tests.support.shares import messages
from tests.support.wait import wait_until
from vfsmount.client.mount.status import read_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.daemons import Daemon
    from tests.support.mounts import Mount

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_daemon]

MIB = 1 << 20
LOCKING = ("-o", "posix_lock,flock")


class Place:
    """A mounted share.

    Attributes:
        host: The folder at the host.
        path: The same, mounted.
        other: A host folder that nobody shares, for comparison.
    """

    def __init__(self, host: Path, path: Path, other: Path, mount: Mount) -> None:
        self.host = host
        self.path = path
        self.other = other
        self.mount = mount

    def same(self, call: Callable[[Path], object]) -> object:
        """Do something in a comparable host folder and here; results or errors must be equal."""
        expected, found = outcome(call, self.other), outcome(call, self.path)
        assert found == expected
        return found


@contextmanager
def place(
    kind: str, cache: str = "auto", extra: tuple[str, ...] = (), mounts: int = 1
) -> Iterator[list[Place]]:
    """Mount one share, or the same one several times, each over a daemon of its own."""
    names = [f"mnt{number}" for number in range(mounts)]
    with quick_folders("relay", "host", "other", *names) as folders, ExitStack() as stack:
        host, other, *paths = folders
        places = []
        for path in paths:
            daemon = stack.enter_context(start_daemon(kind, host, extra=extra))
            mount = stack.enter_context(
                start_mount(path, daemon.socket, cache=cache, engine="relay")
            )
            places.append(Place(host, path, other, mount))
        yield places


@pytest.fixture(scope="module", params=["c-none", "c-auto", "rust-none", "rust-auto"])
def shared_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    kind, _, cache = request.param.partition("-")
    with place(kind, cache) as (one,):
        yield one


@pytest.fixture
def here(shared_place: Place) -> Iterator[Place]:
    """An empty place."""
    assert shared_place.mount.is_running(), shared_place.mount.log
    yield shared_place
    for folder in (shared_place.host, shared_place.other):
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


# --- what pyfuse3 has no handler for ---

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
libc = ctypes.CDLL(None, use_errno=True)


@pytest.mark.parametrize(
    "mode", [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO, ZERO | KEEP_SIZE, COLLAPSE, INSERT]
)
def test_fallocate(here: Place, mode: int) -> None:
    def allocate(folder: Path) -> object:
        path = folder / "file"
        path.write_bytes(b"x" * 20000)
        with path.open("r+b") as file:
            result = libc.fallocate(file.fileno(), mode, ctypes.c_long(4096), ctypes.c_long(40960))
            number = ctypes.get_errno() if result else 0
        return number, path.read_bytes(), path.stat().st_size

    here.same(allocate)


def test_seek_data_and_hole(here: Place) -> None:
    def seek(folder: Path) -> object:
        with (folder / "file").open("w+b") as file:
            file.truncate(MIB)
            os.pwrite(file.fileno(), b"x" * 4096, 512 << 10)
            os.fsync(file.fileno())
            fd = file.fileno()
            found = [os.lseek(fd, at, os.SEEK_DATA) for at in (0, 4096)]
            found += [os.lseek(fd, at, os.SEEK_HOLE) for at in (0, 512 << 10)]
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(fd, MIB, os.SEEK_DATA)
            return found

    here.same(seek)


def test_copy_file_range(here: Place) -> None:
    def copy(folder: Path) -> object:
        content = os.urandom(3 * MIB)
        (folder / "from").write_bytes(content)
        with (folder / "from").open("rb") as source, (folder / "to").open("w+b") as target:
            done = 0
            while copied := os.copy_file_range(source.fileno(), target.fileno(), MIB, done, done):
                done += copied
        return done, (folder / "to").read_bytes() == content

    assert here.same(copy) == (3 * MIB, True)
    assert "COPY_FILE_RANGE" in messages(here.mount)


def test_tmpfile(here: Place) -> None:
    """No daemon of today has it, and applications must understand the refusal."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the errno is looked at below
        os.open(here.path, os.O_TMPFILE | os.O_RDWR)
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.ENOTSUP)


def test_inode_flags(here: Place) -> None:
    (here.path / "file").write_bytes(b"")
    with (here.path / "file").open("rb") as file, pytest.raises(OSError) as caught:  # noqa: PT011
        fcntl.ioctl(file, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
    assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_mmap(here: Place, flags: int) -> None:
    def map_it(folder: Path) -> object:
        path = folder / "file"
        path.write_bytes(b"a" * 10000)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 10000, flags) as mapping:
            mapping[5000:5003] = b"xyz"
            mapping.flush()
            seen = bytes(mapping[4998:5005])
        return seen, path.read_bytes().count(b"xyz")

    here.same(map_it)


def test_direct_io(here: Place) -> None:
    def direct(folder: Path) -> object:
        path = folder / "file"
        path.write_bytes(b"b" * 65536)
        buffer = mmap.mmap(-1, 8192)  # aligned
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            count = os.preadv(fd, [buffer], 4096)
            buffer[:] = b"c" * 8192
            return count, os.pwritev(fd, [buffer], 8192), path.read_bytes().count(b"c")
        finally:
            os.close(fd)

    assert outcome(direct, here.path) == (8192, 8192, 8192)


def test_a_program_runs_from_the_mount(here: Place) -> None:
    shutil.copy2(shutil.which("true") or "/bin/true", here.host / "program")

    assert subprocess.run([here.path / "program"], check=False).returncode == 0


def test_calls_of_8_mib(here: Place) -> None:
    def both_ways(folder: Path) -> object:
        content = os.urandom(8 * MIB)
        fd = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        try:
            written = os.write(fd, content)
            return written, os.pread(fd, 8 * MIB, 0) == content
        finally:
            os.close(fd)

    assert here.same(both_ways) == (8 * MIB, True)


def test_rename_exchanges(here: Place) -> None:
    def exchange(folder: Path) -> object:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
        names = [os.fsencode(folder / name) for name in "ab"]
        assert libc.renameat2(-100, names[0], -100, names[1], 2) == 0
        return (folder / "a").read_text(), (folder / "b").read_text()

    assert here.same(exchange) == ("b", "a")


def test_status_says_which_engine_and_why(here: Place) -> None:
    status = read_status(str(here.path))

    assert status["engine"] == "relay"
    assert status["engine_reason"]
    json.dumps(status)


# --- locks: the C daemon has those that do not block ---

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path, kind: str) -> Iterator[None]:
    """Another process holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


@pytest.mark.parametrize("kind", ["lockf", "flock"])
def test_locks_between_two_mounts(kind: str) -> None:
    lock = getattr(fcntl, kind)
    with place("c", extra=LOCKING, mounts=2) as (one, two):
        (one.host / "file").write_bytes(b"content")
        with (two.path / "file").open("r+b") as file:
            with held(one.path / "file", kind), pytest.raises(BlockingIOError):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

            def is_given_up() -> bool:
                try:
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            # The kernel gives a flock up with the RELEASE, for which no close waits.
            wait_until(is_given_up, 5, "the lock to be given up")
            lock(file, fcntl.LOCK_UN)


def test_a_blocking_lock_is_refused_as_the_daemon_refuses_it() -> None:
    with place("c", extra=LOCKING) as (one,):
        (one.host / "file").write_bytes(b"content")
        with (
            held(one.path / "file", "lockf"),
            (one.path / "file").open("r+b") as file,
            pytest.raises(OSError) as caught,  # noqa: PT011
        ):
            fcntl.lockf(file, fcntl.LOCK_EX)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_who_holds_a_lock_is_told() -> None:
    with place("c", extra=LOCKING, mounts=2) as (one, two):
        (one.host / "file").write_bytes(b"content")
        with held(one.path / "file", "lockf"), (two.path / "file").open("r+b") as file:
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
            assert struct.unpack("hhqqi4x", answer)[0] == fcntl.F_WRLCK


# --- callers that die, daemons that die, and we ---


@pytest.mark.parametrize("kind", ["c", "rust"])
def test_a_killed_caller_gets_away_from_a_mute_daemon(kind: str) -> None:
    with (
        place_with_daemon(kind) as (one, daemon),
    ):
        (one.host / "file").write_bytes(b"content")
        daemon.pause()
        reader = subprocess.Popen(["cat", one.path / "file"], stdout=subprocess.DEVNULL)
        wait_until(lambda: read_status(str(one.path))["in_flight"], 20, "a request to be pending")
        reader.kill()
        reader.wait(20)
        daemon.resume()
        assert (one.path / "file").read_bytes() == b"content"


@contextmanager
def place_with_daemon(kind: str, status: int = 0) -> Iterator[tuple[Place, Daemon]]:
    with (
        quick_folders("relay", "host", "mnt", "other") as (host, path, other),
        start_daemon(kind, host) as daemon,
        start_mount(
            path, daemon.socket, cache="none", engine="relay", expected_status=status
        ) as mount,
    ):
        yield Place(host, path, other, mount), daemon


@pytest.mark.parametrize("kind", ["c", "rust"])
def test_a_hundred_requests_fail_when_the_daemon_is_killed(kind: str) -> None:
    with place_with_daemon(kind, status=5) as (one, daemon):
        (one.host / "file").write_bytes(b"content")
        fd = os.open(one.path / "file", os.O_RDONLY)
        daemon.pause()
        numbers: list[int] = []

        def read() -> None:
            try:
                os.pread(fd, 10, 0)
            except OSError as error:
                numbers.append(error.errno or 0)

        threads = [threading.Thread(target=read, daemon=True) for _ in range(100)]
        for thread in threads:
            thread.start()
        wait_until(
            lambda: read_status(str(one.path))["in_flight"] >= 100, 20, "100 requests to be pending"
        )
        daemon.kill()
        for thread in threads:
            thread.join(10)
        assert numbers == [errno.ENOTCONN] * 100
        with suppress(OSError):
            os.close(fd)
        one.mount.process.terminate()
        one.mount.process.wait(10)


def test_killed_ourselves_leaves_nobody_hanging() -> None:
    with place_with_daemon("rust", status=-signal.SIGKILL) as (one, daemon):
        (one.host / "file").write_bytes(b"content")
        daemon.pause()
        reader = subprocess.Popen(
            ["cat", one.path / "file"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: read_status(str(one.path))["in_flight"], 20, "a request to be pending")
        one.mount.process.kill()
        assert reader.wait(20) == 1
        with pytest.raises(OSError, match="Transport endpoint is not connected"):
            os.stat(one.path)
        detach(one.path)
        one.mount.process.wait()
