"""Real programs on a mount of every daemon, with the default cache mode."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import Daemon, each_daemon, require_daemon, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ENGINES = ("relay", "pyfuse3")

_numbers = count()


@dataclass
class Share:
    """A mounted share.

    Attributes:
        host: The folder that the daemon shares.
        path: The same folder, mounted.
        local: A folder that has nothing to do with it.
    """

    host: Path
    path: Path
    local: Path
    daemon: Daemon
    mount: Mount


@contextmanager
def open_share(
    kind: str,
    engine: str,
    cache: str = "auto",
    expected_status: int = 0,
    options: Sequence[str] = (),
) -> Iterator[Share]:
    """Start a daemon and mount what it shares."""
    require_daemon(kind)
    with (
        quick_folders("work", "shared", "mnt", "local") as (host, path, local),
        start_daemon(kind, host) as daemon,
        start_mount(
            path,
            daemon.socket,
            cache=cache,
            engine=engine,
            options=options,
            expected_status=expected_status,
        ) as mount,
    ):
        yield Share(host, path, local, daemon, mount)


@pytest.fixture(
    scope="module",
    params=each_daemon(ENGINES),
)
def running_share(request: pytest.FixtureRequest) -> Iterator[Share]:
    """A share for all tests of a module."""
    with open_share(*request.param) as share:
        yield share


@pytest.fixture
def share(running_share: Share) -> Iterator[Share]:
    """The same, in a folder for one test."""
    running = running_share
    assert running.mount.is_running(), running.mount.log
    # A fresh name: the mount may remember the last one, which is removed at the host, for a second.
    name = f"test-{next(_numbers)}"
    folders = [running.host / name, running.local / name]
    for folder in folders:
        folder.mkdir()
    yield Share(folders[0], running.path / name, folders[1], running.daemon, running.mount)
    for folder in folders:
        shutil.rmtree(folder)
