"""Attributes: reading them, every way of changing them, and what a handle is good for."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from pathlib import Path

    from vfsmount.wire.fuse import Kstatfs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
V = SetattrValid


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(b"0123456789")
    path.chmod(0o644)
    return path


def test_getattr_of_the_root(guest: DirectGuest, folder: Path) -> None:
    attr = guest.getattr(ROOT)

    assert (attr.ino, attr.mode) == (folder.stat().st_ino, folder.stat().st_mode)


def test_getattr_by_handle_after_unlink_and_forget(guest: DirectGuest, file: Path) -> None:
    nodeid = guest.walk("file")
    fh = guest.open(nodeid)
    guest.unlink(ROOT, b"file")
    assert guest.getattr(nodeid).nlink == 0
    guest.forget(nodeid)

    assert guest.getattr(nodeid, fh).size == 10
    with expect_errno("EBADF"):
        guest.getattr(nodeid)


def test_chmod(guest: DirectGuest, file: Path) -> None:
    attr = guest.setattr(guest.walk("file"), V.MODE, mode=stat.S_IFREG | 0o4711)

    assert attr.mode == file.stat().st_mode == stat.S_IFREG | 0o4711


@as_root
@pytest.mark.parametrize(
    ("valid", "owner"), [(V.UID, (12, 0)), (V.GID, (0, 34)), (V.UID | V.GID, (12, 34))]
)
def test_chown(guest: DirectGuest, file: Path, valid: int, owner: tuple[int, int]) -> None:
    attr = guest.setattr(guest.walk("file"), valid, uid=12, gid=34)

    assert (attr.uid, attr.gid) == owner == (file.stat().st_uid, file.stat().st_gid)


@as_root
def test_chown_of_a_symlink_leaves_its_target_alone(guest: DirectGuest, file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to("file")

    guest.setattr(guest.walk("link"), V.UID, uid=12)

    assert (link.lstat().st_uid, file.stat().st_uid) == (12, 0)


@as_root
def test_chown_clears_set_id_bits(guest: DirectGuest, file: Path) -> None:
    file.chmod(0o6755)

    assert guest.setattr(guest.walk("file"), V.UID, uid=12).mode & 0o7777 == 0o755


@pytest.mark.parametrize("field", ["uid", "gid"])
def test_nobody_cannot_own(guest: DirectGuest, file: Path, field: str) -> None:
    with expect_errno("EINVAL"):
        guest.setattr(guest.walk("file"), getattr(V, field.upper()), **{field: 2**32 - 1})


@pytest.mark.parametrize("size", [0, 3, 10, 5000, 5 * 2**30])
@pytest.mark.parametrize("how", ["node", "handle", "read-only handle"])
def test_truncate(guest: DirectGuest, file: Path, size: int, how: str) -> None:
    nodeid = guest.walk("file")
    if how == "node":
        attr = guest.setattr(nodeid, V.SIZE, size=size)
    else:
        fh = guest.open(nodeid, os.O_RDWR if how == "handle" else os.O_RDONLY)
        attr = guest.setattr(nodeid, V.SIZE | V.FH, size=size, fh=fh)

    assert attr.size == file.stat().st_size == size
    with file.open("rb") as stream:
        assert stream.read(20) == b"0123456789"[:size].ljust(min(size, 20), b"\0")


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_truncate_beyond_what_a_file_can_be(guest: DirectGuest, file: Path, size: int) -> None:
    with expect_errno("EINVAL", "EFBIG"):
        guest.setattr(guest.walk("file"), V.SIZE, size=size)


def test_truncate_of_other_kinds(guest: DirectGuest, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    with expect_errno("EISDIR"):
        guest.setattr(ROOT, V.SIZE, size=0)
    with expect_errno("EBADF"):
        guest.setattr(guest.walk("fifo"), V.SIZE, size=0)


def test_times(guest: DirectGuest, file: Path) -> None:
    nodeid = guest.walk("file")
    old = file.stat()

    guest.setattr(nodeid, V.MTIME, mtime=12345, mtimensec=678)
    assert file.stat().st_mtime_ns == 12345 * 10**9 + 678
    assert file.stat().st_atime_ns == old.st_atime_ns
    guest.setattr(nodeid, V.ATIME, atime=-5, atimensec=999_999_999)
    assert file.stat().st_atime_ns == -5 * 10**9 + 999_999_999
    assert guest.getattr(nodeid).atime == -5
    assert guest.getattr(nodeid).atimensec == 999_999_999
    guest.setattr(nodeid, V.ATIME | V.MTIME, atime=1, mtime=2)

    assert (file.stat().st_atime, file.stat().st_mtime) == (1, 2)


def test_times_now(guest: DirectGuest, file: Path) -> None:
    os.utime(file, (1, 1))
    # File times are the kernel's tick, which lags a few milliseconds behind the clock.
    start = time.time() - 1

    guest.setattr(guest.walk("file"), V.MTIME | V.MTIME_NOW, mtime=55)
    assert file.stat().st_mtime >= start
    assert file.stat().st_atime == 1
    guest.setattr(guest.walk("file"), V.ATIME | V.ATIME_NOW | V.MTIME, mtime=55)

    assert file.stat().st_mtime == 55
    assert file.stat().st_atime >= start


def test_times_of_a_symlink(guest: DirectGuest, file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to("file")

    guest.setattr(guest.walk("link"), V.MTIME, mtime=77)

    assert link.lstat().st_mtime == 77
    assert file.stat().st_mtime != 77


@pytest.mark.parametrize("nanoseconds", [10**9, (1 << 30) - 1, (1 << 30) - 2, 2**32 - 1])
def test_times_that_the_kernel_would_take_for_something_else(
    guest: DirectGuest, file: Path, nanoseconds: int
) -> None:
    with expect_errno("EINVAL"):
        guest.setattr(guest.walk("file"), V.MTIME, mtime=1, mtimensec=nanoseconds)


def test_everything_at_once(guest: DirectGuest, file: Path) -> None:
    valid = V.MODE | V.SIZE | V.ATIME | V.MTIME
    attr = guest.setattr(guest.walk("file"), valid, mode=0o600, size=4, atime=10, mtime=20)

    assert (attr.mode & 0o7777, attr.size, attr.atime, attr.mtime) == (0o600, 4, 10, 20)


def test_setattr_of_nothing_is_getattr(guest: DirectGuest, file: Path) -> None:
    assert guest.setattr(guest.walk("file"), 0) == guest.getattr(guest.walk("file"))
    assert guest.setattr(guest.walk("file"), V.CTIME | V.LOCKOWNER, ctime=5).ctime != 5


def test_setattr_with_a_forged_handle(guest: DirectGuest, file: Path) -> None:
    with expect_errno("EBADF"):
        guest.setattr(guest.walk("file"), V.SIZE | V.FH, fh=99, size=0)
    assert file.stat().st_size == 10


@as_root
@pytest.mark.parametrize(("kill", "left"), [(0, 0o6755), (V.KILL_SUIDGID, 0o755)])
def test_truncate_kills_set_id_bits_when_told(
    guest: DirectGuest, file: Path, kill: int, left: int
) -> None:
    file.chmod(0o6755)

    assert guest.setattr(guest.walk("file"), V.SIZE | kill, size=1).mode & 0o7777 == left


def test_statfs(guest: DirectGuest, folder: Path) -> None:
    found: Kstatfs = guest.record(Opcode.STATFS, ROOT)

    host = os.statvfs(folder)
    assert (found.blocks, found.files) == (host.f_blocks, host.f_files)
    assert (found.bsize, found.frsize, found.namelen) == (
        host.f_bsize,
        host.f_frsize,
        host.f_namemax,
    )


def test_statx(guest: DirectGuest, file: Path) -> None:
    body = fuse.STATX_IN.values(0, 0, 0, 0x7FF | 0x800)
    found = guest.record(Opcode.STATX, guest.walk("file"), body).stat

    info = file.stat()
    assert (found.ino, found.size, found.mode, found.nlink) == (
        info.st_ino,
        10,
        info.st_mode,
        1,
    )
    assert found.mtime * 10**9 + found.mtimensec == info.st_mtime_ns
    assert (found.dev_major, found.dev_minor) == (os.major(info.st_dev), os.minor(info.st_dev))


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "mask", "granted"),
    [
        (0, 0, 0o000, 6, True),
        (0, 0, 0o000, 1, False),
        (0, 0, 0o001, 1, True),
        (77, 77, 0o604, 4, True),
        (77, 77, 0o640, 4, False),
        (77, 0, 0o640, 4, True),
        (77, 0, 0o604, 4, False),
        (77, 77, 0o000, 0, True),
    ],
)
@as_root
def test_access(
    guest: DirectGuest, file: Path, uid: int, gid: int, mode: int, mask: int, granted: bool
) -> None:
    file.chmod(mode)
    nodeid = guest.walk("file")
    guest.uid, guest.gid = uid, gid
    body = fuse.ACCESS_IN.values(mask)
    if granted:
        guest.call(Opcode.ACCESS, nodeid, body)
        return
    with expect_errno("EACCES"):
        guest.call(Opcode.ACCESS, nodeid, body)
