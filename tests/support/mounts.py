"""The command under test, mounted: start ``vfsmount``, wait until it is ready, end it.

    with start_mount(folder, daemon.socket, cache="none") as mount:
        ... use mount.path ...

When the block is entered, the mount can be used. When it is left, the mount is gone: by SIGTERM as
users would, which must work within a deadline, and by force where that fails.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.daemons import REPOSITORY
from tests.support.namespace import detach

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Mount", "start_mount"]

# What the log of a mount in which nothing went wrong does not hold.
COMPLAINT = re.compile(r"Traceback|\berror: |\bwarning: ")

# Python, pyfuse3 and trio take half a second to import on a machine with nothing else to do.
READY_DEADLINE = 30.0
STOP_DEADLINE = 20.0


class Mount:
    """A running ``vfsmount`` process and its mount point.

    Attributes:
        path: Where it is mounted.
        process: The process.
        log_path: The file that receives its stdout and stderr.
    """

    def __init__(self, path: Path, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.path = path
        self.process = process
        self.log_path = log_path

    @property
    def log(self) -> str:
        """Everything that it has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def rss(self) -> int:
        """Resident memory in bytes, the part shared with the daemon included."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the vfsmount process has ended")

    def is_mounted(self) -> bool:
        """Whether something is mounted there, dead or alive; never touches the mount."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return str(self.path) in {line.split()[4] for line in lines}

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def stop(self, deadline: float = STOP_DEADLINE) -> int:
        """End it as a user would, with SIGTERM, and return its exit status."""
        self.process.terminate()
        return self.process.wait(deadline)


@contextmanager
def start_mount(
    path: Path,
    socket: str | os.PathLike[str],
    *,
    cache: str = "auto",
    engine: str = "auto",
    options: Sequence[str] = (),
    expected_status: int = 0,
    expected_complaint: str = "",
) -> Iterator[Mount]:
    """Mount a running daemon's share for the length of a ``with`` block.

    Args:
        path: Mount point, an empty directory.
        socket: The daemon's vhost-user socket.
        cache: Cache mode.
        engine: ``relay``, ``pyfuse3``, or ``auto`` for the command's own choice.
        options: More arguments of the command.
        expected_status: Exit status at the end.
        expected_complaint: A line of the log, as a regular expression, that is no complaint.

    Raises:
        AssertionError: It does not get ready, or does not end as it should; with its log.
    """
    log_path = Path(tempfile.mkdtemp(prefix="vfsmount-log-")) / "log"
    ready, announce = os.pipe()
    command = [sys.executable, "-m", "vfsmount", str(path), "--socket", str(socket)]
    command += ["--engine", engine] if engine != "auto" else []
    command += ["--cache", cache, "--ready-fd", str(announce), *options]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            pass_fds=[announce],
        )
    os.close(announce)
    mount = Mount(path, process, log_path)
    try:
        _wait_ready(mount, ready)
        yield mount
        if mount.is_running():
            mount.process.terminate()
        status = mount.process.wait(STOP_DEADLINE)
        assert status == expected_status, f"vfsmount ended with {status}:\n{mount.log}"
        assert not mount.is_mounted(), f"still mounted after its end:\n{mount.log}"
        if expected_status == 0:
            log_text = (
                re.sub(expected_complaint, "", mount.log) if expected_complaint else mount.log
            )
            assert not COMPLAINT.search(log_text), f"it complained:\n{mount.log}"
    finally:
        _make_sure(mount)
        os.close(ready)
        log_path.unlink()
        log_path.parent.rmdir()


def _wait_ready(mount: Mount, ready: int) -> None:
    """Wait for the announcement; the pipe's end without one means that the process has ended."""
    end = time.monotonic() + READY_DEADLINE
    readable, _, _ = select.select([ready], [], [], READY_DEADLINE)
    word = os.read(ready, 16) if readable else b""
    assert word == b"READY\n", (
        f"vfsmount is not ready ({READY_DEADLINE - (end - time.monotonic()):.1f} s):\n{mount.log}"
    )


def _make_sure(mount: Mount) -> None:
    """Leave neither process nor mount, whatever happened."""
    if mount.is_running():
        mount.process.send_signal(signal.SIGKILL)
        mount.process.wait()
    if mount.is_mounted():
        detach(mount.path)
