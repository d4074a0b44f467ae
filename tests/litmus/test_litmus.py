"""The litmus table on real mounts, for every pair of a writer and an observer.

Others' changes are made at the host or through a second mount of the folder, and looked at in a
mount; a mount's own changes are looked at in itself and at the host. Mode ``auto`` runs twice: with
a timeout that never ends in a test, so that what must be seen at once or on the next open is not
seen just because time has passed, and with a short one, which must end.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.litmus.rows import MODES, ROWS, Row, When, look_at
from tests.support.daemons import daemon_marks, require_daemon
from tests.support.shares import Shared, open_shared
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

ENGINES = ("relay", "pyfuse3")
#: Seconds.
LONG, SHORT = 600.0, 0.1
#: Seconds that a change may take to be seen after its timeout; a busy machine is late.
GRACE = 5.0


class Site(NamedTuple):
    """A kind of mount that the table is tried on."""

    kind: str
    engine: str
    mode: str
    timeout: float
    writeback: bool = False
    daemon_cache: str = "auto"

    def __str__(self) -> str:
        parts = [self.kind, self.engine, self.mode]
        if self.mode == "auto":
            parts.append("long" if self.timeout == LONG else "short")
        if self.mode == "host":
            parts.append(self.daemon_cache)
        return "-".join(parts + ["writeback"] * self.writeback)


def sites() -> Iterator[Site]:
    """All of it with the bundled daemon; with the others, what is different with them.

    They differ in how they number nodes and in what they can open, which shows behind caches.
    """
    for engine in ENGINES:
        for mode in MODES:
            yield Site("bundled", engine, mode, LONG)
        yield Site("bundled", engine, "auto", SHORT)
        yield Site("bundled", engine, "auto", LONG, writeback=True)
        yield Site("rust", engine, "auto", LONG)
        yield Site("bundled", engine, "host", LONG, daemon_cache="none")
        yield Site("rust", engine, "host", LONG, daemon_cache="always")
        yield Site("c", engine, "host", SHORT, daemon_cache="auto")
    yield Site("c", "relay", "auto", LONG)
    yield Site("rust", "relay", "none", LONG)
    yield Site("rust", "relay", "always", LONG)
    yield Site("rust", "relay", "auto", LONG, writeback=True)


def when(row: Row, site: Site) -> When:
    """When a row is seen; in mode ``host`` as the daemon would have it.

    A daemon that is in its mode ``auto`` does not say whether a file has changed, so that an open
    sees at once what is within the size that is believed.
    """
    if site.mode != "host":
        return row.when(site.mode)
    promised = row.when(site.daemon_cache)
    return When.WITHIN_TIMEOUT if promised == When.NEXT_OPEN else promised


def is_case(params: dict[str, Any]) -> bool:
    """With write-back only own changes are of interest; the short timeout is for what waits."""
    site: Site = params["shared"]
    if "writer" not in params:
        return site.timeout == LONG
    if site.timeout == SHORT:
        return when(params["row"], site) == When.WITHIN_TIMEOUT
    return not site.writeback


@pytest.fixture(
    scope="module",
    params=[pytest.param(site, marks=daemon_marks(site.kind), id=str(site)) for site in sites()],
)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Two mounts of one folder."""
    kind, engine, mode, timeout, writeback, daemon_cache = request.param
    require_daemon(kind)
    options = ["--timeout", str(timeout)]
    its_own = mode == "host" and kind == "c"
    with open_shared(
        kind,
        engine,
        mode,
        mounts=2,
        options=options,
        writeback=writeback,
        daemon_cache=daemon_cache,
        daemon_options=["-o", f"timeout={timeout}"] if its_own else [],
    ) as shared:
        yield shared


@contextmanager
def holding(row: Row, folder: Path) -> Iterator[int]:
    """Have the row's file open."""
    if not row.held:
        yield -1
        return
    fd = os.open(folder / row.held, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("writer", ["host", "other"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_changed_elsewhere(
    shared: Shared, row: Row, writer: str, request: pytest.FixtureRequest
) -> None:
    shared.check_alive()
    site: Site = request.node.callspec.params["shared"]
    host, here, other = shared.folder()
    row.prepare(host)
    with holding(row, host) as host_fd, holding(row, here) as fd:
        old = look_at(row, here, fd)
        assert old == look_at(row, host, host_fd)

        row.act(host if writer == "host" else other)
        new = look_at(row, host, host_fd)

        if when(row, site) in (When.AT_ONCE, When.NEXT_OPEN):
            assert look_at(row, here, fd) == new
            return
        # Before it must be seen it may be seen, but never something else.
        assert look_at(row, here, fd) in (old, new)
        if site.timeout == SHORT:
            wait_until(lambda: look_at(row, here, fd) == new, SHORT + GRACE, f"{new!r} to be seen")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_changed_here(shared: Shared, row: Row) -> None:
    """A mount's own changes are seen at once in it and at the host, in every mode.

    With write-back: once the file is closed, and all that change contents here do that.
    """
    shared.check_alive()
    host, here, _ = shared.folder()
    row.prepare(host)
    with holding(row, host) as host_fd, holding(row, here) as fd:
        old = look_at(row, here, fd)
        assert old == look_at(row, host, host_fd)

        row.act(here)

        new = look_at(row, here, fd)
        assert new == look_at(row, host, host_fd)
        assert new != old or "open before" in row.look


def test_own_change_after_open_of_a_changed_file(shared: Shared) -> None:
    """What an open learns about a file is old as soon as the file is changed here."""
    host, here, _ = shared.folder()
    (host / "x").write_bytes(b"old")
    (here / "x").read_bytes()
    (host / "x").write_bytes(b"changed there")
    fd = os.open(here / "x", os.O_RDWR)
    try:
        os.ftruncate(fd, 500)
        os.fchmod(fd, 0o604)
        os.link(here / "x", here / "y")
        os.rename(here / "x", here / "z")  # its time of change makes the kernel ask again
        found, at_host = os.fstat(fd), os.stat(host / "z")
    finally:
        os.close(fd)
    assert (found.st_size, found.st_mode, found.st_nlink) == (
        at_host.st_size,
        at_host.st_mode,
        at_host.st_nlink,
    )
