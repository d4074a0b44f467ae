"""A Linux guest mounts the share: each case as the guest saw it, and what the host sees of it.

One boot per daemon and cache mode runs all cases (``cases.c``); the tests here look at what it
told and at what it left in the shared folder. The real daemons are the control: what fails on the
bundled one alone is our fault, and what they cannot do stands in ``DEVIATIONS``.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.guest.machine import QUEUES, boot, build_initramfs, machine_problem
from tests.support.daemons import DAEMON_KINDS, require_daemon, start_daemon
from tests.support.environment import supports_user_xattr, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.guest.machine import Monitor, Report

pytestmark = [pytest.mark.guest, pytest.mark.slow]

GIB = 1 << 30
MIB = 1 << 20
CACHES = ("none", "auto", "always")
WRITEBACK = ("bundled", "writeback")

#: Daemon, cache mode and case: what the daemon cannot do there. Everything else has to work.
DEVIATIONS = {
    **{
        (kind, cache, "tmpfile"): "TMPFILE is not served"
        for kind in ("c", "rust")
        for cache in CACHES
    },
    **{
        (kind, "none", case): "no shared mappings without a cache"
        for kind in ("c", "rust")
        for case in ("mmap", "mmap-again")
    },
    **{("c", cache, "submount"): "not announced" for cache in CACHES},
    ("rust", "none", "permissions"): "a write by others leaves the set-user-id bit",
}


class Guest(NamedTuple):
    """A guest that has come and gone.

    Attributes:
        kind: Of daemon.
        cache: Cache mode.
        folder: What was shared.
        inner: Files in the filesystem that was mounted inside of it, and their contents.
        report: What it told.
        log: What the daemon printed.
    """

    kind: str
    cache: str
    folder: Path
    inner: dict[str, str]
    report: Report
    log: str


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem := machine_problem():
        unavailable(problem)
    return build_initramfs(tmp_path_factory.mktemp("initramfs"))


@pytest.fixture(
    scope="module",
    params=[(kind, cache) for kind in DAEMON_KINDS for cache in CACHES] + [WRITEBACK],
    ids=lambda param: "-".join(param),
)
def guest(
    request: pytest.FixtureRequest, initramfs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Guest:
    kind, cache = request.param
    require_daemon(kind)
    folder = tmp_path_factory.mktemp(f"{kind}-{cache}")
    if not supports_user_xattr(folder):
        unavailable(f"{folder} has no extended attributes of users")
    queues = QUEUES if kind == "bundled" else 1
    writeback = cache == "writeback"
    with (
        prepared(folder),
        start_daemon(
            kind,
            folder,
            cache="auto" if writeback else cache,
            writeback=writeback,
            extra=["--request-queues", str(QUEUES)] if kind == "bundled" else [],
        ) as daemon,
    ):
        report = boot(initramfs, daemon.socket, queues=queues)
        inner = {path.name: path.read_text() for path in (folder / "submount/inner").iterdir()}
        return Guest(kind, cache, folder, inner, report, daemon.stderr)


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """A share with another filesystem in it."""
    inner = folder / "submount/inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(inner)], check=True)
    (inner / "file").write_text("below")
    yield
    subprocess.run(["umount", str(inner)], check=True)


# --- what the host sees --------------------------------------------------------------------------


def created(folder: Path) -> None:
    assert (folder / "new").read_bytes() == b"hello world"
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o640
    assert os.listdir(folder) == ["new"]


def folders(folder: Path) -> None:
    assert (folder / "moved/b/file").read_bytes() == b"deep"
    assert stat.S_IMODE((folder / "moved").stat().st_mode) == 0o700
    assert os.listdir(folder) == ["moved"]


def renamed(folder: Path) -> None:
    names = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert names == {"one": b"3", "two": b"1"}


def linked(folder: Path) -> None:
    assert (folder / "file").stat().st_nlink == 2
    assert (folder / "file").samefile(folder / "hard")
    assert os.readlink(folder / "soft") == "file"
    assert os.readlink(folder / "dangling") == "nowhere"


def attributes(folder: Path) -> None:
    info = (folder / "file").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o604, 12, 34)
    assert (info.st_atime_ns, info.st_mtime_ns) == (
        1_000_000_000_123_456_789,
        1_100_000_000_987_654_321,
    )


def permissions(folder: Path) -> None:
    assert (folder / "open/mine").stat().st_uid == 65534
    assert stat.S_IMODE((folder / "set-id").stat().st_mode) == 0o777
    assert (folder / "set-id").read_bytes() == b"changed"


def attributed(folder: Path) -> None:
    assert os.listxattr(folder / "file") == ["user.one"]
    assert os.getxattr(folder / "file", "user.one") == b"first"


def truncated(folder: Path) -> None:
    assert (folder / "file").read_bytes() == b"01\0\0\0\0"
    assert (folder / "emptied").read_bytes() == b""


def mapped(folder: Path) -> None:
    data = (folder / "file").read_bytes()
    assert len(data) == 3 * 4096 + 100
    assert (data[4090:4102], data[100:107], data[-1:]) == (b"across pages", b"written", b"z")


def allocated(folder: Path) -> None:
    data = (folder / "file").read_bytes()
    assert data == b"x" * 8192 + bytes(16384) + b"x" * (65536 - 24576)


def sparse(folder: Path) -> None:
    info = (folder / "file").stat()
    assert info.st_size == GIB
    assert info.st_blocks * 512 < MIB
    with (folder / "file").open("rb") as file:
        assert os.pread(file.fileno(), 6, GIB // 2) == b"middle"
        assert os.pread(file.fileno(), 9, GIB - 3) == b"end"


def copied(folder: Path) -> None:
    assert (folder / "copy").read_bytes() == b"abcde234567"


def named(folder: Path) -> None:
    assert (folder / "named").read_bytes() == b"unnamed"


def special(folder: Path) -> None:
    assert stat.S_ISFIFO((folder / "fifo").stat().st_mode)
    assert stat.S_ISCHR((folder / "device").stat().st_mode)
    assert (folder / "device").stat().st_rdev == os.makedev(1, 3)


def big(folder: Path) -> None:
    data = (folder / "file").read_bytes()
    assert data == bytes((at * 7 + at // 4096) & 0xFF for at in range(16 * MIB))


def many(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == [f"{number:05}" for number in range(10_000)]


def several(folder: Path) -> None:
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == {
        f"{child}-{turn}.moved": f"child {child} turn {turn}"
        for child in range(4)
        for turn in range(0, 50, 5)
    }


def locked_in_turn(folder: Path) -> None:
    assert (folder / "file").read_bytes() == b"second"
    assert (folder / "meanwhile").read_bytes() == b"others are served"


def below(folder: Path) -> None:
    assert os.listdir(folder) == ["inner"]


def unseen(folder: Path) -> None:
    """Locks leave nothing; that the folder is there is all there is to see."""
    assert (folder / "file").read_bytes() == b"locked"


HOST_VIEW: dict[str, Callable[[Path], None]] = {
    "create": created,
    "folders": folders,
    "rename": renamed,
    "links": linked,
    "attributes": attributes,
    "permissions": permissions,
    "xattr": attributed,
    "truncate": truncated,
    "mmap": mapped,
    "locks": unseen,
    "waiting": locked_in_turn,
    "submount": below,
    "fallocate": allocated,
    "sparse": sparse,
    "copy_file_range": copied,
    "tmpfile": named,
    "special": special,
    "big_file": big,
    "many_names": many,
    "several_at_once": several,
}
MOUNTS = ("mount", "unmount", "mount-again", "unmount-again")
AGAIN = tuple(f"{case}-again" for case in ("create", "links", "mmap", "big_file", "many_names"))


# --- the tests -----------------------------------------------------------------------------------


def test_the_guest_came_to_its_end(guest: Guest) -> None:
    assert guest.report.ended, guest.report.console[-2000:]
    assert set(guest.report.cases) == {*HOST_VIEW, *MOUNTS, *AGAIN}


@pytest.mark.parametrize("case", [*MOUNTS, *AGAIN, *HOST_VIEW])
def test_case(guest: Guest, case: str) -> None:
    told = guest.report.cases.get(case, "not told")
    if (guest.kind, guest.cache, case) in DEVIATIONS:
        assert told != "ok", "it can do it now: take it out of DEVIATIONS"
        return
    assert told == "ok"
    if case in HOST_VIEW:
        HOST_VIEW[case](guest.folder / case)


def test_what_was_written_below(guest: Guest) -> None:
    assert guest.inner == {"file": "below", "new": "from the guest"}


def test_every_request_queue_is_used(guest: Guest) -> None:
    used = {name for name, count in guest.report.interrupts.items() if count > 100}
    queues = QUEUES if guest.kind == "bundled" else 1
    assert {f"requests.{number}" for number in range(queues)} <= used


def test_the_daemon_has_nothing_to_complain_about(guest: Guest) -> None:
    if guest.kind == "bundled":
        lines = guest.log.splitlines()[1:]
        assert not [line for line in lines if "going on without" not in line]


# --- a machine that is disturbed -----------------------------------------------------------------


def pause(monitor: Monitor) -> None:
    """Stop and go on: the rings are stopped and started under the guest."""
    monitor.say("stop")
    monitor.say("cont")


def plug_memory(monitor: Monitor) -> None:
    """Give the machine another piece of memory while its rings run."""
    size = 128 * MIB
    monitor.say(
        "object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": size}, share=True
    )
    monitor.say("device_add", driver="pc-dimm", id="dimm", memdev="more")


def test_paused_enlarged_and_reset(initramfs: Path, tmp_path: Path) -> None:
    """A reset leaves no time to unmount; the guest that boots then must find a daemon like new."""

    def reset(monitor: Monitor) -> None:
        monitor.say("stop")
        for path in tmp_path.iterdir():
            if path.name != "submount":
                shutil.rmtree(path)
        (tmp_path / "submount/inner/new").unlink()
        monitor.say("system_reset")
        monitor.say("cont")

    disturb = {"folders": pause, "rename": plug_memory, "xattr": pause, "big_file": reset}
    extra = ["--request-queues", str(QUEUES), "--log-level", "debug"]
    with prepared(tmp_path), start_daemon("bundled", tmp_path, cache="auto", extra=extra) as daemon:
        report = boot(initramfs, daemon.socket, disturb=disturb)
        log = daemon.stderr

    assert report.ended, report.console[-2000:]
    assert set(report.cases.values()) == {"ok"}, report.cases
    assert report.console.count("case rename ok") == 2
    assert "ADD_MEM_REG" in log
    assert "GET_VRING_BASE" in log
    for case, check in HOST_VIEW.items():
        check(tmp_path / case)
