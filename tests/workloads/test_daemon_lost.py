"""The daemon dies: operations fail soon and clearly, and the mount can be taken down."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.wait import wait_until
from tests.workloads.conftest import ENGINES, open_share
from vfsmount.client.mount.status import read_status
from vfsmount.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

#: Seconds until everything fails after the daemon's death.
SOON = 2.0
LOST = (errno.ENOTCONN, errno.EIO)


class Attempt(threading.Thread):
    """An operation in a thread of its own, because it may hang.

    Attributes:
        error: Its errno; 0 for success, -1 while it hangs.
        ended: When it came back, on time.monotonic's clock.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error = -1
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        number = 0
        try:
            self._call()
        except OSError as error:
            number = error.errno or 0
        self.ended = time.monotonic()
        self.error = number


@pytest.mark.parametrize("engine", ENGINES)
def test_daemon_killed(daemon_kind: str, engine: str) -> None:
    """Pending and new operations fail within 2 s, and umount works."""
    lost = ExitCode.DAEMON_LOST
    # Without a window: what is mapped does not need the daemon.
    options = ["--dax=off"]
    with open_share(daemon_kind, engine, "none", expected_status=lost, options=options) as share:
        (share.path / "file").write_bytes(b"content")
        fd = os.open(share.path / "file", os.O_RDWR)
        share.daemon.pause()
        pending = [
            Attempt(lambda: os.pread(fd, 10, 0)),
            Attempt(lambda: os.pwrite(fd, b"x", 0)),
            Attempt(lambda: os.stat(share.path / "other")),
            Attempt(lambda: os.listdir(share.path)),
            Attempt(lambda: os.mkdir(share.path / "new")),
        ]
        wait_until(lambda: in_flight(share.mount.path) >= 3, 20, "requests to be pending")
        assert [attempt.error for attempt in pending] == [-1] * 5

        killed = time.monotonic()
        share.daemon.kill()
        share.daemon.wait()

        for attempt in pending:
            attempt.join(2 * SOON)
            assert attempt.error in LOST
            assert attempt.ended - killed < SOON
        new = [
            Attempt(lambda: os.stat(share.path)),
            Attempt(lambda: os.stat(share.path / "file")),
            Attempt(lambda: os.open(share.path / "file", os.O_RDONLY)),
            Attempt(lambda: os.listdir(share.path)),
            Attempt(lambda: os.pread(fd, 10, 0)),
            Attempt(lambda: os.statvfs(share.path)),
        ]
        for attempt in new:
            attempt.join(SOON)
            assert attempt.error in LOST
        with suppress(OSError):  # a close says, too, that the daemon is lost
            os.close(fd)

        subprocess.run(["umount", share.path], check=True, timeout=10)
        share.mount.process.wait(10)
        assert not share.mount.is_mounted()


def in_flight(path: Path) -> int:
    """How many requests wait for the daemon; asks the mount's process, not the mount.

    Not by the command: a new process closes its copies of our descriptors before it starts, and
    closing a file of this mount waits for the daemon, too.
    """
    number = read_status(str(path))["in_flight"]
    assert isinstance(number, int)
    return number
