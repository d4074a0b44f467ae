"""A mount as a user has it: the command as a process that is watched from outside."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.support.daemons import REPOSITORY
from tests.support.wait import wait_until
from vfsmount.client.mount.mountinfo import locate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READY_SECONDS = 30.0
END_SECONDS = 20.0

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


class RunningMount:
    """A ``vfsmount`` process in the foreground.

    Attributes:
        path: The mount point.
        process: The command.
    """

    def __init__(self, path: Path, words: list[str], environment: dict[str, str]) -> None:
        self.path = path
        reader, writer = os.pipe()
        self._log = path.with_name(path.name + ".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vfsmount", str(path), *words, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                env=ENVIRONMENT | environment,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        os.close(writer)
        try:
            readable, _, _ = select.select([reader], [], [], READY_SECONDS)
            said = os.read(reader, 100) if readable else b"(nothing in time)"
        finally:
            os.close(reader)
        if said != b"READY\n":
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no mount, {said!r}: {self.log}")

    @property
    def log(self) -> str:
        """What the command has printed so far."""
        return self._log.read_text()

    @property
    def is_mounted(self) -> bool:
        """Whether anything is mounted at our place."""
        return locate(str(self.path))[1] is not None

    def kill(self, number: int) -> None:
        """Send a signal to the command."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; returns the exit status."""
        wait_until(lambda: self.process.poll() is not None, END_SECONDS, f"the end of: {self.log}")
        return self.process.returncode

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it gently and return its exit status."""
        self.kill(number)
        return self.wait()

    def status(self) -> dict[str, Any]:
        """What ``vfsmount status --json`` says."""
        done = subprocess.run(
            [sys.executable, "-m", "vfsmount", "status", str(self.path), "--json"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document


@contextmanager
def running_mount(
    path: Path, *words: str | os.PathLike[str], environment: dict[str, str] | None = None
) -> Iterator[RunningMount]:
    """Mount at ``path``, wait until it is ready, and end whatever is left of it."""
    path.mkdir(exist_ok=True)
    mount = RunningMount(path, [os.fspath(word) for word in words], environment or {})
    try:
        yield mount
    finally:
        if mount.process.poll() is None:
            mount.kill(signal.SIGTERM)
            try:
                mount.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                mount.process.kill()
                mount.process.wait()
