"""Mode ``auto`` on real mounts: an open sees what the host has, long before any timeout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import each_daemon, require_daemon, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount
from tests.support.pages import while_pages_stay
from tests.support.shares import messages

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs_fuse

#: Seconds: nothing in these tests may be seen because of it.
LONG = "1000"


class Place(NamedTuple):
    """A folder of a mounted share: at the host, and in the mount."""

    host: Path
    path: Path
    mount: Mount


@pytest.fixture(
    scope="module",
    params=each_daemon(("relay", "pyfuse3")),
)
def mounted(request: pytest.FixtureRequest) -> Iterator[Place]:
    kind, engine = request.param
    require_daemon(kind)
    # What is cached is counted: with a window nothing has to be.
    options = ("--timeout", LONG, "--dax=off")
    with (
        quick_folders("auto", "host", "mnt") as (host, path),
        start_daemon(kind, host) as daemon,
        start_mount(path, daemon.socket, engine=engine, options=options) as mount,
    ):
        yield Place(host, path, mount)


@pytest.fixture
def here(mounted: Place) -> Place:
    """A folder that no test has used before."""
    name = f"{len(os.listdir(mounted.host))}"
    (mounted.path / name).mkdir()
    return Place(mounted.host / name, mounted.path / name, mounted.mount)


def primed(here: Place, content: bytes) -> tuple[Path, Path]:
    """A file of which the kernel knows name, attributes and pages."""
    (here.host / "file").write_bytes(content)
    seen = here.path / "file"
    assert seen.read_bytes() == content
    assert seen.read_bytes() == content
    return here.host / "file", seen


@pytest.mark.parametrize("new", [b"new and much longer", b"2", b"", b"same size here!!"])
def test_an_open_sees_a_change_at_once(here: Place, new: bytes) -> None:
    at_host, seen = primed(here, b"the old contents")
    at_host.write_bytes(new)
    descriptor = os.open(seen, os.O_RDONLY)
    try:
        assert os.fstat(descriptor).st_size == len(new)
        assert os.read(descriptor, 100) == new
    finally:
        os.close(descriptor)
    assert seen.stat().st_size == len(new)


def test_a_change_whose_mtime_was_set_back_is_seen(here: Place) -> None:
    at_host, seen = primed(here, b"before")
    times = at_host.stat()
    at_host.write_bytes(b"after!")
    os.utime(at_host, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert seen.read_bytes() == b"after!"


def test_a_replaced_file_is_seen(here: Place) -> None:
    at_host, seen = primed(here, b"the first")
    other = here.host / "other"
    other.write_bytes(b"another file of that name")
    other.rename(at_host)
    assert seen.read_bytes() == b"another file of that name"
    assert seen.stat().st_ino == at_host.stat().st_ino


def test_a_removed_file_cannot_be_opened(here: Place) -> None:
    at_host, seen = primed(here, b"doomed")
    at_host.unlink()
    with pytest.raises(FileNotFoundError):
        seen.open("rb")


def test_a_removed_file_can_be_opened_through_its_descriptor(here: Place) -> None:
    at_host, seen = primed(here, b"doomed")
    with seen.open("rb") as held:
        at_host.unlink()
        again = Path(f"/proc/self/fd/{held.fileno()}")
        assert again.read_bytes() == b"doomed"
        assert again.read_bytes() == b"doomed"


def test_an_unchanged_file_keeps_its_pages(here: Place) -> None:
    def read_often() -> int:
        _, seen = primed(here, os.urandom(1_000_000))
        before = messages(here.mount)["READ"]
        assert before
        for _ in range(5):
            seen.read_bytes()
        return messages(here.mount)["READ"] - before

    assert while_pages_stay(read_often) == 0


def test_own_changes_are_seen(here: Place) -> None:
    _, seen = primed(here, b"one")
    seen.write_bytes(b"two and three")
    assert seen.read_bytes() == b"two and three"
    with seen.open("ab") as handle:
        handle.write(b", four")
        handle.flush()
        assert seen.read_bytes() == b"two and three, four"
        assert seen.stat().st_size == 19
    assert (here.host / "file").read_bytes() == b"two and three, four"
