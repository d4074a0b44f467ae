"""Each test of this folder runs on every daemon, by the session API and mounted.

A daemon with its session or mount is started once for all tests (a *site*); each test has a folder
of its own in the share, and a twin of it at the host.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tests.contract.session_tree import SessionThread, SessionTree
from tests.contract.trees import PathTree
from tests.contract.twin import Twin
from tests.support.daemons import DAEMON_KINDS, Daemon, daemon_marks, require_daemon, start_daemon
from tests.support.environment import quick_folders, unavailable
from tests.support.mounts import Mount, start_mount
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: How a share is reached: by the session API, or mounted, with an engine and a cache mode.
WAYS = ("session", "pyfuse3-none", "pyfuse3-auto", "relay-none", "relay-auto")

# Seconds until FORGETs, which travel in batches, have been obeyed.
FORGET_DEADLINE = 15.0

_numbers = count()


@dataclass
class Site:
    """A daemon, and one way to what it shares.

    Attributes:
        shared: The folder that the daemon shares.
        twins: A host folder for what is compared with it.
        idle_fds: Files that the daemon holds open when the guest knows nothing but the root.
    """

    kind: str
    way: str
    shared: Path
    twins: Path
    daemon: Daemon
    mount: Mount | None = None
    session: SessionThread | None = None
    idle_fds: int = 0

    def check_alive(self) -> None:
        """Fail at once, and say why, when an earlier test was the end of the daemon or mount."""
        assert self.daemon.is_running(), f"the daemon has ended:\n{self.daemon.stderr}"
        if self.mount is not None:
            assert self.mount.is_running(), f"the mount has ended:\n{self.mount.log}"
        if self.session is not None:
            assert self.session.is_alive(), "the session has ended"

    @contextmanager
    def twin(self) -> Iterator[Twin]:
        """Make a folder for one test, and its twin; compare both at the end."""
        name = f"test-{next(_numbers)}"
        shared, host = self.shared / name, self.twins / name
        for folder in (shared, host):
            folder.mkdir()
        try:
            twin = Twin(self.kind, self.way, self._tree(name), shared, host)
            yield twin
            twin.check()
        finally:
            for folder in (shared, host):
                shutil.rmtree(folder)

    def _tree(self, name: str) -> PathTree | SessionTree:
        if self.mount is not None:
            return PathTree(os.fsencode(self.mount.path / name))
        assert self.session is not None
        return SessionTree(self.session, os.fsencode(name))

    def check_forgotten(self) -> None:
        """After a test by the session API the daemon must hold nothing but the root."""
        if self.session is not None:
            wait_until(
                lambda: self.daemon.fd_count() <= self.idle_fds,
                FORGET_DEADLINE,
                f"the daemon to close all but {self.idle_fds} of {self.daemon.open_files()}",
            )


@contextmanager
def open_site(kind: str, way: str) -> Iterator[Site]:
    """Start a daemon and a session or mount."""
    require_daemon(kind)
    with quick_folders("contract", "shared", "twin", "mnt") as folders, ExitStack() as stack:
        shared, twins, path = folders
        daemon = stack.enter_context(start_daemon(kind, shared))
        site = Site(kind, way, shared, twins, daemon)
        if way == "session":
            site.session = SessionThread(daemon.socket)
            stack.callback(site.session.stop)
        else:
            engine, cache = way.split("-")
            site.mount = stack.enter_context(
                start_mount(path, daemon.socket, cache=cache, engine=engine)
            )
        site.idle_fds = daemon.fd_count()
        yield site
        assert "Traceback" not in daemon.stderr, daemon.stderr


def site_parameters() -> list[object]:
    """Every daemon in every way, with the marks that each needs."""
    return [
        pytest.param(
            (kind, way),
            marks=[
                *daemon_marks(kind),
                *([] if way == "session" else [pytest.mark.needs_fuse]),
            ],
            id=f"{kind}-{way}",
        )
        for kind in DAEMON_KINDS
        for way in WAYS
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker that limits a case to some ways."""
    config.addinivalue_line("markers", "only(*ways): a case for these ways, or cache modes, only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``only`` excludes: such a case does not exist, so it is not skipped either."""
    excluded = [item for item in items if _is_excluded(item)]
    config.hook.pytest_deselected(items=excluded)
    items[:] = [item for item in items if item not in set(excluded)]


def _is_excluded(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("only")
    if marker is None or not isinstance(item, pytest.Function):
        return False
    site = item.callspec.params["running_site"]
    assert isinstance(site, tuple)
    way = site[1]
    return not {way, way.partition("-")[2]} & set(marker.args)


@pytest.fixture(scope="session", params=site_parameters())
def running_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A daemon and a way to it, for all tests."""
    with open_site(*request.param) as site:
        yield site


@pytest.fixture
def site(running_site: Site) -> Site:
    """The same, after a look whether it still works."""
    running_site.check_alive()
    return running_site


@pytest.fixture
def twin(site: Site) -> Iterator[Twin]:
    """A folder of the share and its twin at the host; both are compared after the test."""
    with site.twin() as twin:
        yield twin
    site.check_forgotten()


@pytest.fixture
def as_root() -> None:
    """For tests that change owners, make devices, or act as somebody else."""
    if os.geteuid() != 0:
        unavailable("needs root")
