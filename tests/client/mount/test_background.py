"""Telling that the mount is ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import REPOSITORY
from tests.support.wait import wait_until
from vfsmount.client.mount.background import Announcer, check_targets, sd_notify
from vfsmount.client.mount.options import MountSettings
from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PLAIN = MountSettings(mountpoint="/m", socket="/s", source=None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue  # the code under test has closed it


class TestSystemd:
    @pytest.mark.parametrize("abstract", [False, True])
    def test_notify(self, tmp_path: Path, abstract: bool) -> None:
        address = f"@vfsmount-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("\0" + address[1:] if abstract else address)
            manager.settimeout(5)
            sd_notify("READY=1", {"NOTIFY_SOCKET": address})
            assert manager.recv(100) == b"READY=1"

    @pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "/no/such/socket"])
    def test_nobody_to_notify(self, address: str) -> None:
        sd_notify("READY=1", {"NOTIFY_SOCKET": address})
        sd_notify("READY=1", {})


class TestReadyDescriptor:
    def test_told_and_closed(self, pipe: tuple[int, int]) -> None:
        reader, writer = pipe
        Announcer(replace(PLAIN, ready_fd=writer), None).ready()
        assert os.read(reader, 100) == b"READY\n"
        assert os.read(reader, 100) == b""

    def test_reader_that_has_gone(self, pipe: tuple[int, int]) -> None:
        reader, writer = pipe
        os.close(reader)
        Announcer(replace(PLAIN, ready_fd=writer), None).ready()

    def test_must_be_open_for_writing(self, pipe: tuple[int, int]) -> None:
        reader, writer = pipe
        check_targets(replace(PLAIN, ready_fd=writer))
        assert not os.get_inheritable(writer)
        with pytest.raises(UsageError, match="is not a descriptor open for writing"):
            check_targets(replace(PLAIN, ready_fd=reader))
        with pytest.raises(UsageError, match="is not a descriptor open for writing"):
            check_targets(replace(PLAIN, ready_fd=999_999))


class TestPidFile:
    def test_written_when_ready_and_removed_in_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        path.write_text("1\n")  # left by a process that was killed
        announcer = Announcer(replace(PLAIN, pid_file=str(path)), None)
        announcer.ready()
        assert path.read_text() == f"{os.getpid()}\n"
        assert list(tmp_path.iterdir()) == [path]
        announcer.close()
        assert list(tmp_path.iterdir()) == []

    def test_not_removed_when_it_is_somebody_elses(self, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        announcer = Announcer(replace(PLAIN, pid_file=str(path)), None)
        path.write_text("1\n")
        announcer.close()
        announcer.ready()
        path.write_text("1\n")
        announcer.close()
        assert path.read_text() == "1\n"

    @pytest.mark.parametrize("name", ["no/such/folder", "folder"])
    def test_place_that_cannot_be(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(UsageError, match="--pid-file"):
            check_targets(replace(PLAIN, pid_file=str(tmp_path / name)))

    def test_folder_that_vanishes(self, tmp_path: Path) -> None:
        announcer = Announcer(replace(PLAIN, pid_file=str(tmp_path / "gone" / "pid")), None)
        with pytest.raises(UsageError, match="No such file"):
            announcer.ready()

    def test_nothing_is_left_where_it_cannot_be_written(self, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        path.mkdir()
        with pytest.raises(UsageError, match="Is a directory"):
            Announcer(replace(PLAIN, pid_file=str(path)), None).ready()
        assert list(tmp_path.iterdir()) == [path]


SCRIPT = """
import os, signal, sys, time
from vfsmount.client.mount.background import Announcer, go_to_background
from vfsmount.client.mount.logs import start_logging
from vfsmount.client.mount.options import MountSettings
settings = MountSettings(mountpoint="/m", socket="/s", source=None, pid_file=sys.argv[2])
start_logging("info")
announcer = Announcer(settings, go_to_background())
if sys.argv[1] == "fail":
    sys.stderr.write("vfsmount: error: reason\\n")
    sys.exit(32)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "hang":
    sys.stderr.write("waiting\\n")
    try:
        signal.pause()
    finally:
        announcer.close()
announcer.ready()
print("never seen", file=sys.stderr, flush=True)
assert os.getcwd() == "/" and os.getsid(0) == os.getpid()
signal.pause()
"""


class TestBackground:
    def command(self, mode: str, pid_file: Path) -> list[str]:
        return [sys.executable, "-c", SCRIPT, mode, str(pid_file)]

    def run(self, mode: str, pid_file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(mode, pid_file),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=20,
            check=False,
        )

    def test_returns_when_ready_and_keeps_no_terminal(self, tmp_path: Path) -> None:
        # capture_output reads until the pipes are closed: the child must have let go of them.
        done = self.run("ready", tmp_path / "pid")
        assert (done.returncode, done.stderr) == (0, "")
        process = os.pidfd_open(int((tmp_path / "pid").read_text()))
        signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)

    def test_failure_has_its_line_and_status(self, tmp_path: Path) -> None:
        done = self.run("fail", tmp_path / "pid")
        assert (done.returncode, done.stderr) == (32, "vfsmount: error: reason\n")

    def test_death_is_told(self, tmp_path: Path) -> None:
        done = self.run("die", tmp_path / "pid")
        assert done.returncode == 2
        assert done.stderr == "vfsmount: error: the background process was killed by SIGKILL\n"

    def test_ctrl_c_while_waiting_ends_both(self, tmp_path: Path) -> None:
        with subprocess.Popen(
            self.command("hang", tmp_path / "pid"), stderr=subprocess.PIPE, cwd=REPOSITORY
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == b"waiting\n"
            process.send_signal(signal.SIGINT)
            # The end of stderr: the child that held it as well is gone.
            assert process.stderr.read() == b""
            assert wait_until(lambda: process.poll() is not None, 10, "the parent to end")
        assert process.returncode == 130
