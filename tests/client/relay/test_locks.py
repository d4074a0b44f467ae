"""fcntl and flock between two mounts of one bundled daemon, as on the host directory itself.

Processes run a history of calls, each from its own side: both sides are the host directory first,
then one mount each. What every call returns must be the same.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import Daemon, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import start_mount
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_daemon]

DEADLINE = 10.0

#: Reads calls, one a line, and says what came of each.
PROGRAM = """
import errno, fcntl, os, signal, struct, sys
FLOCK = struct.Struct("hhqqi0q")
KINDS = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
SHAPES = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}
files = {}

def lock(name, command, kind, start="0", length="0"):
    wanted = FLOCK.pack(KINDS[kind], 0, int(start), int(length), 0)
    return FLOCK.unpack(fcntl.fcntl(files[name], getattr(fcntl, command), wanted))

def flock(name, kind, more="0"):
    fcntl.flock(files[name], SHAPES[kind] | int(more))

def opened(name, path):
    files[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

def close(name):
    os.close(files.pop(name))

def alarm(signum, frame):
    raise InterruptedError(errno.EINTR, "alarm")

def getlk(name, kind, start="0", length="0"):
    kind, _, start, length, pid = lock(name, "F_GETLK", kind, start, length)
    return f"{kind} {start} {length}" if kind != fcntl.F_UNLCK else "free"

def pid(name):
    return str(lock(name, "F_GETLK", "w")[4])

def duplicate(name, other):
    files[other] = os.dup(files[name])

CALLS = {
    "open": opened, "close": close, "dup": duplicate, "getlk": getlk, "flock": flock, "pid": pid,
    "try": lambda name, *rest: lock(name, "F_SETLK", *rest) and "",
    "ofd": lambda name, *rest: lock(name, "F_OFD_SETLK", *rest) and "",
    "ofdwait": lambda name, *rest: lock(name, "F_OFD_SETLKW", *rest) and "",
    "wait": lambda name, *rest: lock(name, "F_SETLKW", *rest) and "",
}
signal.signal(signal.SIGALRM, alarm)
for line in sys.stdin:
    name, *words = line.split()
    print("...", flush=True)
    try:
        print(CALLS[name](*words) or "done", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


class Process:
    """A process that calls what it is told to.

    Args:
        folder: Where its files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.calls, self.answers = self.process.stdin, self.process.stdout
        self.read = b""

    def begin(self, call: str) -> None:
        """Start a call that may wait; it has been started when this returns."""
        self.calls.write(call.replace("@", f"{self.folder}/").encode() + b"\n")
        assert self.line() == "..."

    def line(self) -> str:
        assert self.ready(DEADLINE), "no answer"
        line, _, self.read = self.read.partition(b"\n")
        return line.decode()

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether the call has come to an end."""
        while b"\n" not in self.read:
            if not select.select([self.answers], [], [], seconds)[0]:
                return False
            self.read += os.read(self.answers.fileno(), 4096) or b"ended\n"
        return True

    def call(self, call: str) -> str:
        self.begin(call)
        return self.line()

    def is_asleep(self) -> bool:
        """Whether it sits in a system call, which is the one that it was told to make."""
        with open(f"/proc/{self.process.pid}/wchan") as file:
            text = file.read()
        return any(word in text for word in ("lock", "setlk", "request_wait"))

    def wait(self, call: str) -> None:
        """Start a call that has to wait, and see it wait."""
        self.begin(call)
        wait_until(self.is_asleep, DEADLINE, f"{call} to wait")
        assert not self.ready()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.calls.close()
        self.answers.close()


def first_to_answer(*processes: Process) -> Process:
    """Wait until one of several calls has come to an end; return whose it was."""
    # Not by select: the answer may have been read together with the line before.
    wait_until(lambda: any(process.ready() for process in processes), DEADLINE, "an answer")
    return next(process for process in processes if process.ready())


class Sides(NamedTuple):
    """The host directory, and two mounts of it.

    Attributes:
        host: The directory.
        one: A mount.
        two: Another one, of the same daemon.
        daemon: The daemon.
    """

    host: Path
    one: Path
    two: Path
    daemon: Daemon


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with (
        quick_folders("locks", "host", "one", "two") as (host, one, two),
        start_daemon("bundled", host) as daemon,
        start_mount(one, daemon.socket, engine="relay"),
        start_mount(two, daemon.socket, engine="relay"),
    ):
        yield Sides(host, one, two, daemon)


@contextmanager
def two_processes(first: Path, second: Path) -> Iterator[tuple[Process, Process]]:
    """Two processes with ``f`` open, each on its side; the file is new."""
    (first / "file").unlink(missing_ok=True)
    with Process(first) as one, Process(second) as two:
        assert one.call("open f @file") == two.call("open f @file") == "done"
        yield one, two


HISTORIES = {
    "ranges": """
        1 try f w 10 10
        2 try f w 0 10
        2 try f w 19 1
        2 try f r 20 0
        2 getlk f w 5 100
        1 getlk f w 15 0
        1 try f u 15 5
        2 try f w 15 5
        2 getlk f r 0 0
        1 try f w 0 10
    """,
    "readers": """
        1 try f r
        2 try f r
        2 try f w
        1 try f u
        2 try f w
        1 try f r
        2 try f r 0 100
        1 try f r 0 100
        1 try f r 0 101
    """,
    "any close gives all up": """
        1 open g @file
        1 try f w
        2 try f r
        1 close g
        2 try f r
        1 try f r
        1 dup f h
        1 close h
        2 try f w
    """,
    "open file descriptions": """
        1 open g @file
        1 ofd f w
        1 ofd g r
        2 try f r
        2 open h @file
        1 close f
        2 ofdwait f r
        2 ofd h r
        2 ofd h w
        2 close f
        2 ofdwait h w
        1 ofd g r
        1 close g
        2 close h
    """,
    "flock": """
        1 flock f w 4
        2 flock f r 4
        2 try f w
        1 flock f r 4
        2 flock f r 4
        2 flock f w 4
        1 dup f g
        1 close f
        2 flock f w 4
        1 close g
        2 flock f w
    """,
    "flock of one process": """
        1 open g @file
        1 flock f w 4
        1 flock g r 4
        1 close f
        1 flock g w
        2 flock f r 4
    """,
    "bad ranges": """
        1 try f w 9223372036854775807 0
        1 try f w 9223372036854775806 1
        2 try f w 9223372036854775807 1
        1 try f w 0 -1
        1 try f w 5 -3
        2 getlk f w 0 0
    """,
}


def play(history: str, first: Path, second: Path) -> list[str]:
    """Return each call of a history with what it returned."""
    with two_processes(first, second) as processes:
        steps = [line.strip() for line in history.strip().splitlines()]
        return [f"{step}: {processes[int(step[0]) - 1].call(step[2:])}" for step in steps]


@pytest.mark.parametrize("name", HISTORIES)
def test_as_at_the_host(sides: Sides, name: str) -> None:
    expected = play(HISTORIES[name], sides.host, sides.host)
    assert len({line.rpartition(" ")[2] for line in expected}) > 1
    for first, second in [(sides.one, sides.two), (sides.one, sides.one), (sides.one, sides.host)]:
        assert play(HISTORIES[name], first, second) == expected


def test_who_has_a_lock(sides: Sides) -> None:
    """As its number in another process table would mean nothing, only one mount knows."""
    for path in (sides.host, sides.one):
        with two_processes(path, path) as (one, two):
            assert one.call("try f w") == "done"
            assert two.call("pid f") == str(one.process.pid)
    with two_processes(sides.one, sides.two) as (one, two):
        assert one.call("try f w") == "done"
        assert two.call("pid f") == "0"


def both(sides: Sides) -> list[tuple[Path, Path]]:
    return [(sides.host, sides.host), (sides.one, sides.two), (sides.two, sides.two)]


@pytest.mark.parametrize(("lock", "unlock"), [("wait f w", "try f u"), ("flock f w", "flock f u")])
def test_whoever_waits_gets_it_when_it_is_free(sides: Sides, lock: str, unlock: str) -> None:
    for first, second in [*both(sides), (sides.host, sides.one)]:
        with two_processes(first, second) as (one, two):
            assert one.call(lock) == "done"
            two.wait(lock)
            assert one.call("getlk f w") == "free"  # the mount serves on
            assert one.call(unlock) == "done"
            assert two.line() == "done"
            assert one.call(lock.replace("wait", "try") + " 4" * ("flock" in lock)) == "EAGAIN"


@pytest.mark.parametrize("lock", ["wait f w", "flock f w"])
def test_a_holder_that_is_killed(sides: Sides, lock: str) -> None:
    for first, second in both(sides):
        with two_processes(first, second) as (one, two):
            assert one.call(lock) == "done"
            two.wait(lock)
            one.kill()
            assert two.line() == "done"


@pytest.mark.parametrize("lock", ["wait f w", "flock f w"])
def test_a_waiter_that_is_killed_stands_in_nobodys_way(sides: Sides, lock: str) -> None:
    for first, second in both(sides):
        with two_processes(first, second) as (one, two), Process(second) as three:
            assert one.call(lock) == "done"
            two.wait(lock)
            two.kill()
            assert three.call("open f @file") == "done"
            three.wait(lock)
            assert one.call("close f") == "done"
            assert three.line() == "done"


@pytest.mark.parametrize("lock", ["wait f w", "flock f w"])
def test_a_waiter_that_gets_a_signal(sides: Sides, lock: str) -> None:
    for first, second in both(sides):
        with two_processes(first, second) as (one, two):
            assert one.call(lock) == "done"
            two.wait(lock)
            two.process.send_signal(signal.SIGALRM)
            assert two.line() == "EINTR"
            two.wait(lock)
            two.process.send_signal(signal.SIGSTOP)
            two.process.send_signal(signal.SIGCONT)
            wait_until(two.is_asleep, DEADLINE, "it to wait again")
            assert not two.ready()
            assert one.call("close f") == "done"
            assert two.line() == "done"


def test_a_deadlock_is_told(sides: Sides) -> None:
    for first, second in both(sides):
        with two_processes(first, second) as (one, two):
            assert one.call("try f w 0 1") == two.call("try f w 1 1") == "done"
            one.begin("wait f w 1 1")
            two.begin("wait f w 0 1")
            # Who closes the circle is told: who comes second to the daemon, not here.
            told, other = (one, two) if first_to_answer(one, two) is one else (two, one)
            assert told.line() == "EDEADLOCK"  # another name of EDEADLK
            assert not other.ready()
            assert told.call("try f u") == "done"
            assert other.line() == "done"


def test_waits_given_up_leave_nothing_with_the_daemon(sides: Sides) -> None:
    """However often somebody gives up, the request's place is free again."""
    with two_processes(sides.one, sides.two) as (one, two):
        assert one.call("wait f w") == "done"
        before = sides.daemon.fd_count()
        for _ in range(200):
            two.wait("wait f w")
            two.process.send_signal(signal.SIGALRM)
            assert two.line() == "EINTR"
        assert sides.daemon.fd_count() <= before + 2


def test_a_mount_that_ends_gives_its_locks_up(sides: Sides, tmp_path: Path) -> None:
    with (
        start_mount(tmp_path, sides.daemon.socket, engine="relay", expected_status=-9) as third,
        two_processes(tmp_path, sides.one) as (one, two),
    ):
        assert one.call("wait f w") == "done"
        two.wait("wait f w")
        third.process.kill()
        assert two.line() == "done"
        one.kill()
        subprocess.run(["umount", "-l", tmp_path], check=True)
