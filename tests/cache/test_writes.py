"""Writes on real mounts, with write-back and without: what the host gets, and when."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import each_daemon, require_daemon, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount
from tests.support.shares import messages
from vfsmount.client.mount.status import read_status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

MIB = 1 << 20
MODES = ("none", "auto", "always", "auto+writeback", "always+writeback")


class Place(NamedTuple):
    """A mounted share: mode, the folder at the host, where it is mounted, and by which engine."""

    engine: str
    mode: str
    host: Path
    path: Path
    mount: Mount


@pytest.fixture(
    scope="module",
    params=each_daemon(("relay", "pyfuse3"), MODES),
)
def here(request: pytest.FixtureRequest) -> Iterator[Place]:
    kind, engine, mode = request.param
    require_daemon(kind)
    cache, _, writeback = mode.partition("+")
    options = ("--dax=off", *(("--writeback",) if writeback else ()))
    with (
        quick_folders("writes", "host", "mnt") as (host, path),
        start_daemon(kind, host, writeback=bool(writeback)) as daemon,
        start_mount(path, daemon.socket, engine=engine, cache=cache, options=options) as mount,
    ):
        yield Place(engine, mode, host, path, mount)


def test_small_writes_are_gathered(here: Place) -> None:
    before = messages(here.mount)["WRITE"]
    with (here.path / "gathered").open("wb", buffering=0) as handle:
        for _ in range(256):
            handle.write(b"x" * 4096)
    sent = messages(here.mount)["WRITE"] - before
    assert (here.host / "gathered").read_bytes() == b"x" * MIB
    if "writeback" in here.mode and (here.engine == "pyfuse3" or is_kernels(here)):
        assert sent <= 2
    else:
        assert sent == 256


def is_kernels(here: Place) -> bool:
    """Whether the daemon has accepted the kernel's write-back."""
    return "WRITEBACK_CACHE" in read_status(str(here.path))["daemon"]["init_flags"]


def test_fsync_brings_it_to_the_host(here: Place) -> None:
    with (here.path / "synced").open("wb", buffering=0) as handle:
        handle.write(b"safe")
        os.fsync(handle.fileno())
        assert (here.host / "synced").read_bytes() == b"safe"


def test_without_writeback_a_write_is_at_the_host(here: Place) -> None:
    with (here.path / "through").open("wb", buffering=0) as handle:
        handle.write(b"there")
        if "writeback" not in here.mode:
            assert (here.host / "through").read_bytes() == b"there"


def test_renamed_and_removed_while_dirty(here: Place) -> None:
    old, new, gone = (here.path / name for name in ("old", "new", "gone"))
    with old.open("wb", buffering=0) as one, gone.open("w+b", buffering=0) as two:
        one.write(b"moved")
        two.write(b"removed")
        old.rename(new)
        gone.unlink()
        two.seek(0)
        assert two.read() == b"removed"
    assert (here.host / "new").read_bytes() == b"moved"
    assert not (here.host / "gone").exists()


def test_times_set_after_writing_stay(here: Place) -> None:
    with (here.path / "dated").open("wb", buffering=0) as handle:
        handle.write(b"old news")
        os.utime(handle.fileno(), ns=(10**18, 10**18))
    assert (here.host / "dated").stat().st_mtime_ns == 10**18
    assert (here.path / "dated").stat().st_mtime_ns == 10**18


def test_holes(here: Place) -> None:
    with (here.path / "holes").open("wb", buffering=0) as handle:
        for at in (5 * MIB, MIB, 3 * MIB):
            os.pwrite(handle.fileno(), b"island", at)
        assert os.fstat(handle.fileno()).st_size == 5 * MIB + 6
    content = (here.host / "holes").read_bytes()
    assert len(content) == 5 * MIB + 6
    assert content.count(b"island") == 3
    assert content[MIB : MIB + 6] == b"island"
