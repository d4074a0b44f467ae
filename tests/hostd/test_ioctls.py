"""Inode flags by IOCTL, as the host has them, and every other command refused."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import IoctlFlag, Opcode

if TYPE_CHECKING:
    from pathlib import Path

GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
GETFLAGS32, SETFLAGS32 = 0x80046601, 0x40046602
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
TCGETS, FIFREEZE = 0x5401, 0xC0045877
NODUMP, XFLAG_NODUMP = 0x40, 0x80


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "file"
    path.touch()
    (folder / "dir").mkdir()
    try:
        flags_of(path)
    except OSError as error:
        pytest.skip(f"no inode flags here: {error}")
    return path


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(fd, GETFLAGS, bytes(4)), "little")
    finally:
        os.close(fd)


def ioctl(
    guest: DirectGuest, fh: int, command: int, data: bytes = b"", out: int = 0, flags: int = 0
) -> bytes:
    body = fuse.IOCTL_IN.values(fh, flags, command, 0, len(data), out) + data
    reply = guest.call(Opcode.IOCTL, ROOT, body)
    assert reply.records == (fuse.IoctlOut(0, 0, 0, 0),)
    return bytes(reply.data)


def test_flags_of_a_file(guest: DirectGuest, path: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDONLY)
    before = flags_of(path)

    assert ioctl(guest, fh, GETFLAGS, out=4) == before.to_bytes(4, "little")
    ioctl(guest, fh, SETFLAGS, (before | NODUMP).to_bytes(4, "little"))
    assert flags_of(path) == before | NODUMP
    assert ioctl(guest, fh, GETFLAGS, out=8) == (before | NODUMP).to_bytes(8, "little")
    assert ioctl(guest, fh, GETFLAGS32, out=4) == (before | NODUMP).to_bytes(4, "little")
    ioctl(guest, fh, SETFLAGS32, before.to_bytes(4, "little") + b"more")
    assert flags_of(path) == before


def test_flags_of_a_directory(guest: DirectGuest, path: Path) -> None:
    guest.open(guest.walk("file"))
    fh = guest.opendir(guest.walk("dir"))
    before = flags_of(path.parent / "dir")

    ioctl(guest, fh, SETFLAGS, (before | NODUMP).to_bytes(4, "little"), flags=IoctlFlag.DIR)

    assert flags_of(path.parent / "dir") == before | NODUMP
    assert ioctl(guest, fh, GETFLAGS, out=4, flags=IoctlFlag.DIR)[0] & NODUMP
    assert flags_of(path) & NODUMP == 0


def test_extended_flags(guest: DirectGuest, path: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDONLY)
    found = ioctl(guest, fh, FSGETXATTR, out=28)
    with path.open("rb") as file:
        assert found == fcntl.ioctl(file, FSGETXATTR, bytes(28))

    flags = struct.unpack_from("<I", found)[0] | XFLAG_NODUMP
    ioctl(guest, fh, FSSETXATTR, flags.to_bytes(4, "little") + found[4:])

    assert flags_of(path) & NODUMP


def test_the_project_of_a_file_cannot_be_changed(guest: DirectGuest, path: Path) -> None:
    """Else a guest could leave the quota that bounds the share."""
    fh = guest.opendir(guest.walk("dir"))
    before = ioctl(guest, fh, FSGETXATTR, out=28, flags=IoctlFlag.DIR)
    flags, size, extents, project = struct.unpack_from("<4I", before)
    for changed in ((flags, size, extents, project + 1), (flags ^ 0x200, size, extents, project)):
        with expect_errno("EPERM"):
            data = struct.pack("<4I", *changed) + before[16:]
            ioctl(guest, fh, FSSETXATTR, data, flags=IoctlFlag.DIR)
    inherit = (flags_of(path.parent / "dir") ^ 0x20000000).to_bytes(4, "little")
    for command in (SETFLAGS, SETFLAGS32):
        with expect_errno("EPERM"):
            ioctl(guest, fh, command, inherit, flags=IoctlFlag.DIR)
    assert ioctl(guest, fh, FSGETXATTR, out=28, flags=IoctlFlag.DIR) == before


@pytest.mark.parametrize("command", [TCGETS, FIFREEZE, 0, 0xFFFFFFFF, GETFLAGS + 1])
def test_other_commands_never_reach_the_host(guest: DirectGuest, path: Path, command: int) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDONLY)
    with expect_errno("ENOTTY"):
        ioctl(guest, fh, command, bytes(8), out=8)


@pytest.mark.parametrize(
    ("command", "data", "out"),
    [
        (GETFLAGS, b"", 0),
        (GETFLAGS, b"", 3),
        (GETFLAGS, b"", 1 << 31),
        (FSGETXATTR, b"", 27),
        (SETFLAGS, b"\0\0\0", 0),
        (FSSETXATTR, bytes(27), 0),
    ],
)
def test_arguments_of_another_size(
    guest: DirectGuest, path: Path, command: int, data: bytes, out: int
) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDONLY)
    with expect_errno("EINVAL"):
        ioctl(guest, fh, command, data, out)


def test_a_size_that_lies(guest: DirectGuest, path: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDONLY)
    body = fuse.IOCTL_IN.values(fh, 0, SETFLAGS, 0, 1 << 31, 0) + b"\0"
    with expect_errno("EINVAL"):
        guest.call(Opcode.IOCTL, ROOT, body)


@pytest.mark.parametrize("flags", [0, IoctlFlag.DIR])
def test_handles_of_the_other_kind(guest: DirectGuest, path: Path, flags: int) -> None:
    file, folder = guest.open(guest.walk("file")), guest.opendir()
    guest.release(file) if not flags else guest.releasedir(folder)
    with expect_errno("EBADF"):
        ioctl(guest, folder if flags else file, GETFLAGS, out=4, flags=flags)


def test_a_read_only_share_shows_flags_and_keeps_them(folder: Path, path: Path) -> None:
    with Share(folder, ShareOptions(readonly=True)) as share, DirectGuest(share) as guest:
        guest.init()
        fh = guest.open(guest.walk("file"), os.O_RDONLY)
        found = ioctl(guest, fh, GETFLAGS, out=4)
        for command, data in ((SETFLAGS, found), (FSSETXATTR, bytes(28))):
            with expect_errno("EROFS"):
                ioctl(guest, fh, command, data)
