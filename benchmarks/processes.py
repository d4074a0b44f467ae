"""Starting, pinning, waiting for and ending processes; nothing here waits without a deadline.

This process never touches a mounted tree itself: a filesystem that does not answer would hang it
beyond the reach of Ctrl-C. The load generator does, as a child that can be killed.

Every child inherits this process's CPU affinity, and every mount is below one folder, so that
`sweep` can clean up after whatever has gone wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.peers import load_generator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Failure",
    "Hung",
    "Mounted",
    "Timing",
    "enter_private_mounts",
    "mounted",
    "pin",
    "run_load",
    "sweep",
]

MOUNT_DEADLINE = 30.0
# Churning on a slow subject takes a tenth of it.
LOAD_DEADLINE = 60.0
END_DEADLINE = 10.0
MOMENT = 0.2
# Short beside any time measured over it; each look costs some 10 us of the subject's CPU.
LOOK = 0.005


class Failure(Exception):
    """A subject did not do what it was asked; the text says what and why."""


class Hung(Failure):
    """It did not answer in time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What the load generator says about one operation.

    Attributes:
        count: Units of work: calls, or entries of listings.
        total_ns: For all of them.
        p50_ns: Median over calls.
        p99_ns: 99th percentile over calls.
    """

    count: int
    total_ns: int
    p50_ns: int
    p99_ns: int

    @property
    def mean_us(self) -> float:
        return self.total_ns / self.count / 1000


@dataclass(frozen=True, slots=True)
class Mounted:
    """A subject that has mounted its stage and has answered a read.

    Attributes:
        process: The process that serves the mount.
        log: What it prints.
        first_read_ms: From the start of its command to the first bytes read from the mount.
    """

    process: subprocess.Popen[bytes]
    log: Path
    first_read_ms: float

    def check(self) -> None:
        """Raise `Failure` if the process has ended, or does so within `MOMENT`."""
        try:
            status = self.process.wait(MOMENT)
        except subprocess.TimeoutExpired:
            return
        raise Failure(f"ended with status {status}: {_last_words(self.log)}")

    def resident(self) -> dict[str, float]:
        """Its memory in MiB: the lines VmRSS, VmHWM and Rss* of /proc/PID/status.

        Raises:
            Failure: it has ended.
        """
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = (line.split() for line in lines if line.startswith(("VmRSS", "VmHWM", "Rss")))
        memory = {name.rstrip(":"): int(kibibytes) / 1024 for name, kibibytes, _ in fields}
        if not memory:  # a process that has ended has none
            raise Failure(f"has just ended: {_last_words(self.log)}")
        return memory


def pin(cpu: int | None) -> None:
    """Let this process, and so its children to come, run on one processor, or on all."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1) if cpu is None else {cpu})


def enter_private_mounts() -> None:
    """As root, start this program anew where its mounts are nobody else's business.

    In a mount namespace of its own, no mount outlives the program whatever ends it, and nothing
    that looks after the machine's mounts, an indexer say or a test that checks for leaks, touches
    one while it is measured. Where that cannot be had, nothing happens.
    """
    own, parent = (Path(f"/proc/{pid}/ns/mnt") for pid in ("self", os.getppid()))
    command = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return
    if own.readlink() != parent.readlink():
        return  # this is the second start
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        os.execvp(command[0], [*command, sys.executable, *sys.orig_argv[1:]])


def run_load(operation: str, warm: bool, count: int, root: Path) -> Timing:
    """Run one operation on a mounted tree.

    Raises:
        Hung: it took over `LOAD_DEADLINE` seconds.
        Failure: it failed.
    """
    with _start_load(operation, warm, count, root) as load:
        try:
            output, complaint = load.communicate(timeout=LOAD_DEADLINE)
        except subprocess.TimeoutExpired:
            raise Hung(f"{operation}: not done in {LOAD_DEADLINE:g} s") from None
        return _timing(load, operation, output, complaint)


@contextmanager
def mounted(command: Sequence[str], mountpoint: Path, log: Path) -> Iterator[Mounted]:
    """Mount by running a command; unmounted and ended when the block is left.

    Raises:
        Failure: it ended, or did not answer a read in `MOUNT_DEADLINE` seconds.
    """
    with log.open("wb") as output, _start_load("first_read", False, 1, mountpoint) as load:
        begun = time.perf_counter_ns()  # CLOCK_MONOTONIC, as in load.c
        subject = _spawn(command, output)
        try:
            _wait_for(load, subject, log)
            timing = _timing(load, "first_read", *load.communicate())
            yield Mounted(subject, log, (timing.total_ns - begun) / 1e6)
        finally:
            _end(subject, mountpoint)


def sweep(folder: Path) -> None:
    """Kill every child of this process and unmount everything below a folder."""
    for child in _children():
        os.kill(child, signal.SIGKILL)
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        mountpoint = Path(line.split()[4])
        if mountpoint.is_relative_to(folder):
            _unmount(mountpoint, lazily=True)
    deadline = time.monotonic() + END_DEADLINE
    while _children() and time.monotonic() < deadline:
        os.waitpid(-1, os.WNOHANG)
        time.sleep(LOOK)


def _children() -> list[int]:
    return [int(word) for word in Path("/proc/thread-self/children").read_text().split()]


def _spawn(command: Sequence[str], output: IO[bytes] | int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for us, who unmount before we kill.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output != subprocess.PIPE else subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[1],
    )


@contextmanager
def _start_load(
    operation: str, warm: bool, count: int, root: Path
) -> Iterator[subprocess.Popen[bytes]]:
    words = [str(load_generator()), operation, "warm" if warm else "cold", str(count), str(root)]
    with _spawn(words, subprocess.PIPE) as load:
        try:
            yield load
        finally:
            load.kill()


def _wait_for(load: subprocess.Popen[bytes], subject: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + MOUNT_DEADLINE
    while load.poll() is None:
        if subject.poll() is not None:
            raise Failure(f"ended with status {subject.returncode}: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise Failure(f"no read answered in {MOUNT_DEADLINE:g} s: {_last_words(log)}")
        time.sleep(LOOK)


def _timing(
    load: subprocess.Popen[bytes], operation: str, output: bytes, complaint: bytes
) -> Timing:
    if load.returncode:
        raise Failure(complaint.decode().strip() or f"{operation}: status {load.returncode}")
    return Timing(*map(int, output.split()))


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "(it printed nothing)")


def _end(subject: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Unmount, which ends every subject by itself; what does not end is killed."""
    if not _unmount(mountpoint):
        _unmount(mountpoint, lazily=True)
    for way in (None, signal.SIGTERM, signal.SIGKILL):
        if way is not None:
            subject.send_signal(way)
        try:
            subject.wait(END_DEADLINE)
        except subprocess.TimeoutExpired:
            continue
        return


def _unmount(mountpoint: Path, *, lazily: bool = False) -> bool:
    """Whether the folder is no mount point any more."""
    command = ["umount"] if os.geteuid() == 0 else [shutil.which("fusermount3") or "", "-u"]
    command += ["-l"] if lazily and os.geteuid() == 0 else ["-z"] if lazily else []
    try:
        subprocess.run(
            [*command, str(mountpoint)], capture_output=True, timeout=END_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return all(
        line.split()[4] != str(mountpoint)
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )
