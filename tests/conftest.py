"""Fixtures and checks for all tests.

Every test is checked on its way out: no leaked FUSE mount, process or descriptor, and no log record
of level WARNING or above that it did not declare with the ``expect_log`` fixture.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.daemons import DAEMON_KINDS, daemon_marks, require_daemon
from tests.support.environment import TMPFS, fuse_problem, tmpfs_problem, unavailable
from tests.support.leaks import Footprint, check_footprint
from tests.support.logs import LogWatch
from tests.support.namespace import enter_mount_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# By default an example that takes over 0.2 s fails its test, and so do ten that take over a second
# to be made up: a process that had to wait for its CPU would be an error.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure() -> None:
    """Keep the mounts of the tests and those of everybody else apart."""
    enter_mount_namespace()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``needs_fuse`` run only where FUSE works."""
    if item.get_closest_marker("needs_fuse") and (problem := fuse_problem()):
        unavailable(problem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out combinations of parameters that a module's ``is_case(params)`` says no to.

    Such a test does not exist, so it is not skipped either.
    """
    absent = {item for item in items if not _is_case(item)}
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]


def _is_case(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return True
    judge = getattr(item.module, "is_case", None)
    return judge is None or bool(judge(item.callspec.params))


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the test when it leaves a mount, a process or a descriptor behind."""
    before = Footprint.take()
    yield
    check_footprint(before)


@pytest.fixture(autouse=True)
def _log_watch() -> Iterator[LogWatch]:
    """Fail the test when it logs a warning or error that it did not declare."""
    watch = LogWatch()
    root = logging.getLogger()
    root.addHandler(watch)
    yield watch
    root.removeHandler(watch)
    watch.check()


@pytest.fixture
def expect_log(_log_watch: LogWatch) -> Callable[[str], None]:
    """Declare a warning or error: ``expect_log("daemon is mute")``, a regular expression."""
    return _log_watch.expect


@pytest.fixture(params=[pytest.param(kind, marks=daemon_marks(kind)) for kind in DAEMON_KINDS])
def daemon_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of host daemon in turn, for `tests.support.daemons.start_daemon`."""
    kind: str = request.param
    require_daemon(kind)
    return kind


@pytest.fixture
def tmpfs_path() -> Iterator[Path]:
    """A fresh folder on tmpfs: fast, and in memory only."""
    if problem := tmpfs_problem():
        unavailable(problem)
    path = Path(tempfile.mkdtemp(prefix="vfsmount-", dir=TMPFS))
    yield path
    shutil.rmtree(path)
