"""The daemon as an object in a program: started in a thread, stopped from outside."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import Frontend
from tests.hostd.guest import ROOT
from tests.support.wait import wait_until
from vfsmount.errors import UsageError
from vfsmount.hostd import Server, listen, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfsmount.hostd import Share

DEADLINE = 20.0


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hostd-") as folder:
        yield f"{folder}/s"


@contextmanager
def running(share: Share, path: str) -> Iterator[Server]:
    server = Server(share, listen(path), path=path)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def connect(path: str) -> Frontend:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return Frontend(sock)


def test_start_and_stop(share: Share, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with running(share, path), connect(path) as guest:
        guest.handshake()
        guest.init()
        assert guest.getattr(ROOT).ino
    assert not Path(path).exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_stopping_sends_guests_away(share: Share, path: str) -> None:
    with running(share, path) as server, connect(path) as one, connect(path) as two:
        one.handshake()
        two.negotiate()
        server.stop()

        assert one.is_disconnected()
        assert two.is_disconnected()


def test_stopping_twice_and_before_running(share: Share, path: str) -> None:
    server = Server(share, listen(path), path=path)
    server.stop()
    server.run()
    server.stop()
    server.close()


def test_guests_that_leave_at_once(share: Share, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with running(share, path):
        for _ in range(20):
            connect(path).close()
        with connect(path) as guest:
            guest.handshake()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("threading.Thread.start", RuntimeError("can't start new thread")),
        ("os.eventfd", OSError(errno.EMFILE, "Too many open files")),
        ("select.epoll", OSError(errno.EMFILE, "Too many open files")),
    ],
)
def test_no_room_for_another_guest(
    share: Share,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
    name: str,
    error: Exception,
) -> None:
    """It is sent away, nothing of it stays, and the daemon goes on."""
    expect_log(f"cannot serve guest 1: .*{error.args[-1]}")

    def fail(*_: object, **__: object) -> None:
        raise type(error)(*error.args)  # anew: with its traceback it would keep a descriptor

    with running(share, path):
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(DEADLINE)
                sock.connect(path)
                assert sock.recv(1) == b""
        wait_until(
            lambda: len(os.listdir("/proc/self/fd")) == before, DEADLINE, "descriptors to be closed"
        )
        with connect(path) as guest:
            guest.handshake()


@pytest.mark.slow
def test_too_many_guests(share: Share, path: str, expect_log: Callable[[str], None]) -> None:
    expect_log("turned a guest away")
    with running(share, path) as server:
        socks = [socket.socket(socket.AF_UNIX) for _ in range(65)]
        for sock in socks:
            sock.connect(path)
        socks[-1].settimeout(DEADLINE)
        assert socks[-1].recv(1) == b""
        for sock in socks:
            sock.close()
        wait_until(lambda: not server._guests, DEADLINE, "the guests to be gone")
        with connect(path) as guest:
            guest.handshake()


def test_the_umask_stays_as_it_was(share: Share, path: str) -> None:
    umask = os.umask(0o022)
    try:
        with running(share, path), connect(path) as guest:
            guest.handshake()
            assert os.stat(path).st_mode & 0o777 == 0o700
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)


def test_serve_is_all_of_it(share: Share, folder: Path, path: str) -> None:
    with running(share, path), pytest.raises(UsageError, match="another process"):
        serve(folder, path)
    with pytest.raises(UsageError, match="cannot share"):
        serve(folder / "missing", path)
