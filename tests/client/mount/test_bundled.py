"""Starting and stopping a daemon process; here it is a script in the daemon's place."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.wait import wait_until
from vfsmount.client.mount import bundled
from vfsmount.client.mount.bundled import bundled_daemon, describe_status
from vfsmount.client.mount.options import MountSettings
from vfsmount.errors import ConnectError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVES = """
import socket, sys, signal
signal.signal(signal.SIGTERM, STOPS)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
fd = int(sys.argv[sys.argv.index("--fd") + 1])
listener = socket.socket(fileno=fd)
link, _ = listener.accept()
sys.stderr.write("vfsmount serve: WARNING: careful\\nvfsmount serve: INFO: hello\\n")
sys.stderr.flush()
link.sendall(" ".join(sys.argv[5:]).encode())
signal.pause()
"""
STUBBORN = SERVES.replace("STOPS", "signal.SIG_IGN")
SERVES = SERVES.replace("STOPS", "lambda *_: sys.exit()")
REFUSES = """
import sys
sys.stderr.write("vfsmount serve: noise\\nvfsmount serve: /x is not a directory\\n")
sys.exit(1)
"""
FORBIDDEN = """
import ctypes
from vfsmount.hostd import seccomp, syscalls
restrict = seccomp.prepare("kill")
syscalls.set_no_new_privs()
restrict()
ctypes.CDLL(None).ptrace(0, 0, 0, 0)
"""
SETTINGS = MountSettings("/mnt", None, "/data", cache="none")
WAITS = "import signal\nsignal.pause()"


@pytest.fixture
def daemon_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Have another program run in the place of the daemon."""

    def put(program: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n{program}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        # Tests ask how it ended while it may not have begun yet.
        monkeypatch.setattr(bundled, "DEATH_SECONDS", 20.0)

    return put


def test_connected_served_and_stopped(daemon_is: Callable[[str], None]) -> None:
    daemon_is(SERVES)
    with bundled_daemon(SETTINGS) as daemon:
        daemon.sock.settimeout(10)
        words = daemon.sock.recv(1000).split()
        assert words[0] == b"--fd"
        assert (
            words[2:]
            == b"--once --sandbox auto --cache none --log-level warning "
            b"--dax 1073741824 -- /data".split()
        )
        pid = daemon.pid
        assert os.getsid(pid) == pid  # Ctrl-C in our terminal does not reach it
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_its_log_becomes_ours_once_it_has_started(
    daemon_is: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
    expect_log: Callable[[str], None],
) -> None:
    daemon_is(SERVES)
    expect_log("daemon: careful")
    with caplog.at_level(logging.INFO), bundled_daemon(SETTINGS) as daemon:
        daemon.sock.settimeout(10)
        daemon.sock.recv(100)
        assert caplog.records == []
        daemon.started()
        wait_until(lambda: len(caplog.records) == 2, 10, "the daemon's lines")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "daemon: careful"),
        ("INFO", "daemon: hello"),
    ]


def test_it_gets_what_the_mount_promises(daemon_is: Callable[[str], None]) -> None:
    daemon_is(SERVES)
    settings = replace(SETTINGS, writeback=True, kernel_flags=("ro",), poll_us=7)
    with bundled_daemon(settings) as daemon:
        daemon.sock.settimeout(10)
        assert b" --writeback --readonly --poll-us 7 -- /data" in daemon.sock.recv(1000)


def test_refusal_is_told_in_its_words(daemon_is: Callable[[str], None]) -> None:
    daemon_is(REFUSES)
    with bundled_daemon(SETTINGS) as daemon:
        failure = daemon.failure()
    assert isinstance(failure, UsageError)
    assert str(failure) == "/x is not a directory"


def test_death_is_told(daemon_is: Callable[[str], None]) -> None:
    daemon_is(WAITS)
    with bundled_daemon(SETTINGS) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        failure = daemon.failure()
        assert daemon.exit_status() == "signal SIGKILL"
    assert isinstance(failure, ConnectError)
    assert str(failure) == "the daemon ended with signal SIGKILL"


def test_a_forbidden_call_is_told_with_its_cure(daemon_is: Callable[[str], None]) -> None:
    daemon_is(FORBIDDEN)
    with bundled_daemon(SETTINGS) as daemon:
        failure = daemon.failure()
        status = daemon.exit_status()
    assert str(failure) == f"the daemon ended with {status}"
    assert status.startswith("signal SIGSYS, for a system call")
    assert "--seccomp log" in status


def test_signals_without_a_name() -> None:
    assert describe_status(-signal.SIGRTMIN - 2) == f"signal {signal.SIGRTMIN + 2}"


def test_no_failure_while_it_runs(
    daemon_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_is(SERVES)
    monkeypatch.setattr(bundled, "DEATH_SECONDS", 0.01)
    with bundled_daemon(SETTINGS) as daemon:
        assert daemon.failure() is None
        assert daemon.exit_status() == ""


def test_one_that_does_not_stop_is_killed(
    daemon_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "STOP_SECONDS", 0.05)
    daemon_is(STUBBORN)
    with bundled_daemon(SETTINGS) as daemon:
        daemon.sock.settimeout(10)
        daemon.sock.recv(100)
    assert daemon.exit_status() == "signal SIGKILL"


def test_program_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(ConnectError, match="cannot start the daemon"), bundled_daemon(SETTINGS):
        pass


def test_no_place_for_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ConnectError, match="cannot make a socket in"), bundled_daemon(SETTINGS):
        pass
    assert list(deep.iterdir()) == []


def test_nothing_is_left_in_the_temporary_folder(
    daemon_is: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    daemon_is(SERVES)
    with bundled_daemon(SETTINGS) as daemon:
        assert list(folder.iterdir()) == []  # from the first moment on
        assert daemon.sock.family == socket.AF_UNIX
