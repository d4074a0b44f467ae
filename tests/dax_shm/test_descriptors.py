"""Whose files may be mapped, found out without asking their file systems."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support.silent_fuse import answered_within, silent_file
from vfsmount.dax_shm.descriptors import MountTypes, look
from vfsmount.dax_shm.ranges import RANGE_SIZE
from vfsmount.dax_shm.window import Window

if TYPE_CHECKING:
    from pathlib import Path

#: Seconds in which anything local is done many times over.
SOON = 20.0

#: Opens a file, and one in a file system that nobody else sees, and sends both.
ELSEWHERE = """
import os, socket, subprocess, sys
files = [os.open(sys.argv[2], os.O_RDONLY)]
subprocess.run(["mount", "-t", "tmpfs", "none", sys.argv[3]], check=True)
files.append(os.open(sys.argv[3] + "/file", os.O_RDWR | os.O_CREAT))
with socket.socket(fileno=int(sys.argv[1])) as sock:
    socket.send_fds(sock, [b"x"], files)
"""


def test_what_is_seen_is_what_fstat_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("rb") as file:
        info, facts = os.fstat(file.fileno()), look(file.fileno())
        assert facts[:3] == (info.st_mode, info.st_dev, info.st_ino)
        mount = f"mnt_id:\t{facts.mount}\n"
        with open(f"/proc/self/fdinfo/{file.fileno()}", encoding="utf-8") as fdinfo:
            assert mount in fdinfo.readlines()
        assert MountTypes().check(file.fileno())[:3] == facts[:3]


def test_what_is_no_file_is_refused() -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="not a regular file"):
        MountTypes().check(sock.fileno())
    with pytest.raises(OSError, match="statx"):
        MountTypes().check(1 << 20)


@pytest.mark.parametrize("kind", ["proc", "sysfs"])
def test_other_file_systems_are_refused(kind: str) -> None:
    path = {"proc": "/proc/self/status", "sysfs": "/sys/kernel/uevent_seqnum"}[kind]
    mounts = MountTypes()
    with open(path, "rb") as file:
        for _ in range(2):  # and stay so
            with pytest.raises(OSError, match=kind) as caught:
                mounts.check(file.fileno())
            assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.needs_fuse
def test_a_file_system_that_does_not_answer_is_not_asked(tmp_path: Path) -> None:
    window = Window(4 * RANGE_SIZE)
    window.offered(4 * RANGE_SIZE)
    with silent_file(tmp_path / "mnt") as fd:
        error = answered_within(SOON, lambda: window.map(0, RANGE_SIZE, 0, False, fd))
        assert error == errno.EOPNOTSUPP
        assert window.mapped() == 0


@pytest.mark.slow
def test_a_daemon_in_a_mount_namespace_of_its_own(tmp_path: Path) -> None:
    """Its mounts have other numbers, but the device is known; or it is not, and then nothing is."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "hidden").mkdir()
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as stack:
        program = [sys.executable, "-c", ELSEWHERE, str(theirs.fileno())]
        paths = [tmp_path / "file", tmp_path / "hidden"]
        child = subprocess.run(
            ["unshare", "-m", *program, *paths], pass_fds=[theirs.fileno()], check=False
        )
        if child.returncode:
            pytest.skip("no mount namespace to be had here")
        _, (known, hidden), _, _ = socket.recv_fds(ours, 1, 2)
        stack.callback(os.close, known)
        stack.callback(os.close, hidden)
        with (tmp_path / "file").open("rb") as file:
            assert look(known).mount != look(file.fileno()).mount
        assert MountTypes().check(known).ino == (tmp_path / "file").stat().st_ino
        with pytest.raises(OSError, match="not mounted here"):
            MountTypes().check(hidden)
