"""Ten guests at once on one daemon, at random: `VFSMOUNT_LOAD_SECONDS` says how long (4)."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import Frontend
from tests.hostd.load import SHARED, Load
from tests.support.daemons import start_daemon
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemons import Daemon

pytestmark = pytest.mark.slow

GUESTS = 10
SECONDS = float(os.environ.get("VFSMOUNT_LOAD_SECONDS", "4"))
DEADLINE = 20.0


class Visit(threading.Thread):
    """One guest's stay, in a thread."""

    def __init__(self, daemon: Daemon, number: int, everybody: threading.Barrier) -> None:
        super().__init__()
        self.number = number
        self.error: BaseException | None = None
        self.load: Load | None = None
        self._daemon = daemon
        self._everybody = everybody

    def run(self) -> None:
        try:
            self._visit()
        except BaseException as error:  # for the test to raise
            self._everybody.abort()
            self.error = error

    def _visit(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._daemon.socket))
        with Frontend(sock) as guest:
            guest.handshake()
            guest.init()
            load = Load(guest, self.number, seed=self.number)
            self._everybody.wait(DEADLINE)
            load.run(time.monotonic() + SECONDS)
            if self.number % 2:  # the others just go, with all that they hold
                load.leave()
            self.load = load


def test_ten_guests(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    with start_daemon("bundled", tmp_path) as daemon:
        before = daemon.fd_count()
        everybody = threading.Barrier(GUESTS)
        visits = [Visit(daemon, number, everybody) for number in range(GUESTS)]
        for visit in visits:
            visit.start()
        for visit in visits:
            visit.join(SECONDS + 2 * DEADLINE)
        for visit in visits:
            if visit.error is not None:
                visit.error.add_note(f"the daemon said: {daemon.stderr}")
                raise visit.error
        wait_until(lambda: daemon.fd_count() == before, DEADLINE, "all descriptors to return")
        assert daemon.is_running()
        assert "Traceback" not in daemon.stderr
        assert "WARNING" not in daemon.stderr
    for visit in visits:
        assert visit.load is not None
        visit.load.compare(tmp_path)
    print(f"{sum(visit.load.steps for visit in visits if visit.load)} steps")
