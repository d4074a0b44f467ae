"""Operations on names, compared with what the host folder then holds."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.wire.fuse import AttrFlag, Opcode, RenameFlag

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BAD_NAMES = [b"", b".", b"..", b"a/b", b"/", b"/etc", b"../canary", b"a/", b"..\n/x"]
LONG = b"n" * 255
ODD_NAMES = [b"\xff\xfe", b" ", b"...", b"-rf", "größe".encode(), b"line\nbreak", LONG]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_lookup_finds_any_name(guest: DirectGuest, folder: Path, name: bytes) -> None:
    path = os.fsencode(folder) + b"/" + name
    with open(path, "wb") as file:
        file.write(b"12345")

    entry = guest.lookup(ROOT, name)

    info = os.stat(path)
    assert entry.nodeid > ROOT
    assert entry.generation == 0
    assert (entry.attr.ino, entry.attr.size, entry.attr.mode) == (info.st_ino, 5, info.st_mode)
    assert (entry.attr.uid, entry.attr.gid, entry.attr.nlink) == (info.st_uid, info.st_gid, 1)
    assert entry.attr.mtime * 10**9 + entry.attr.mtimensec == info.st_mtime_ns
    assert entry.attr.atime * 10**9 + entry.attr.atimensec == info.st_atime_ns
    assert entry.attr.ctime * 10**9 + entry.attr.ctimensec == info.st_ctime_ns
    assert (entry.attr.blocks, entry.attr.blksize) == (info.st_blocks, info.st_blksize)


def test_lookup_of_nothing(guest: DirectGuest) -> None:
    with expect_errno("ENOENT"):
        guest.lookup(ROOT, b"nothing")


def test_lookup_in_a_file(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    with expect_errno("ENOTDIR"):
        guest.lookup(guest.walk("file"), b"x")


def test_a_second_lookup_gives_the_same_node(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").touch()
    (folder / "b").hardlink_to(folder / "a")

    assert len({guest.walk("a"), guest.walk("a"), guest.walk("b")}) == 1


def test_name_of_256_bytes(guest: DirectGuest) -> None:
    with expect_errno("ENAMETOOLONG"):
        guest.lookup(ROOT, b"n" * 256)
    with expect_errno("ENAMETOOLONG"):
        guest.mkdir(ROOT, b"n" * 256)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused_everywhere(
    guest: DirectGuest, folder: Path, name: bytes
) -> None:
    (folder / "a").mkdir()
    (folder / "file").touch()
    nodeid, file = guest.walk("a"), guest.walk("file")
    attempts: list[Callable[[], object]] = [
        lambda: guest.lookup(nodeid, name),
        lambda: guest.mkdir(nodeid, name),
        lambda: guest.mknod(nodeid, name, stat.S_IFREG | 0o644),
        lambda: guest.symlink(nodeid, name, b"target"),
        lambda: guest.link(file, nodeid, name),
        lambda: guest.create(nodeid, name),
        lambda: guest.unlink(nodeid, name),
        lambda: guest.rmdir(nodeid, name),
        lambda: guest.rename(nodeid, name, nodeid, b"fine"),
        lambda: guest.rename(ROOT, b"file", nodeid, name),
        lambda: guest.rename2(nodeid, name, nodeid, b"fine", 0),
        lambda: guest.rename2(ROOT, b"file", nodeid, name, 0),
    ]
    for attempt in attempts:
        with expect_errno("EINVAL"):
            attempt()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "file"]


def test_mkdir(guest: DirectGuest, folder: Path) -> None:
    entry = guest.mkdir(ROOT, b"dir", 0o1777)

    mode = (folder / "dir").stat().st_mode
    assert entry.attr.mode == mode == stat.S_IFDIR | 0o1777, "the guest has applied the umask"
    with expect_errno("EEXIST"):
        guest.mkdir(ROOT, b"dir")


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK])
def test_mknod(guest: DirectGuest, folder: Path, kind: int) -> None:
    entry = guest.mknod(ROOT, b"node", kind | 0o640)

    assert entry.attr.mode == (folder / "node").stat().st_mode == kind | 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes takes root")
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
@pytest.mark.parametrize(("major", "minor"), [(0, 0), (8, 17), (259, 70000)])
def test_mknod_of_a_device(
    guest: DirectGuest, folder: Path, kind: int, major: int, minor: int
) -> None:
    # The kernel's 32-bit encoding (new_encode_dev), as guests send it.
    rdev = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)

    entry = guest.mknod(ROOT, b"dev", kind | 0o600, rdev)

    info = (folder / "dev").stat()
    assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == (major, minor)
    assert entry.attr.rdev == rdev
    assert stat.S_IFMT(info.st_mode) == kind


@pytest.mark.parametrize("target", [b"file", b"/etc/passwd", b"../canary", b"\xff", b"t" * 4095])
def test_symlink_and_readlink(guest: DirectGuest, folder: Path, target: bytes) -> None:
    entry = guest.symlink(ROOT, b"link", target)

    assert stat.S_ISLNK(entry.attr.mode)
    assert os.readlink(os.fsencode(folder / "link")) == target
    assert guest.readlink(entry.nodeid) == target


def test_symlinks_are_not_followed(guest: DirectGuest, folder: Path, tmp_path: Path) -> None:
    (folder / "out").symlink_to(tmp_path / "canary")
    (folder / "up").symlink_to("..")
    entry = guest.lookup(ROOT, b"out")

    assert stat.S_ISLNK(entry.attr.mode)
    with expect_errno("EBADF"):
        guest.open(entry.nodeid)
    with expect_errno("EBADF"):
        guest.create(ROOT, b"out", os.O_RDWR)
    with expect_errno("EEXIST"):
        guest.create(ROOT, b"out", os.O_RDWR | os.O_EXCL)
    with expect_errno("ENOTDIR"):
        guest.lookup(guest.walk("up"), b"canary")


def test_readlink_of_a_file(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    with expect_errno("EINVAL"):
        guest.readlink(guest.walk("file"))


def test_link(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").write_text("x")
    (folder / "dir").mkdir()

    entry = guest.link(guest.walk("a"), guest.walk("dir"), b"b")

    assert (folder / "dir" / "b").samefile(folder / "a")
    assert entry.attr.nlink == 2
    assert entry.nodeid == guest.walk("a")


def test_link_of_a_symlink_is_to_the_link(guest: DirectGuest, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")

    guest.link(guest.walk("link"), ROOT, b"twin")

    assert os.readlink(folder / "twin") == "/etc/passwd"
    assert os.lstat(folder / "twin").st_ino == os.lstat(folder / "link").st_ino


def test_link_of_a_directory(guest: DirectGuest) -> None:
    entry = guest.mkdir(ROOT, b"dir")
    with expect_errno("EPERM"):
        guest.link(entry.nodeid, ROOT, b"twin")


def test_unlink_and_rmdir(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    (folder / "dir").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()

    with expect_errno("EISDIR"):
        guest.unlink(ROOT, b"dir")
    with expect_errno("ENOTDIR"):
        guest.rmdir(ROOT, b"file")
    with expect_errno("ENOTEMPTY"):
        guest.rmdir(ROOT, b"full")
    guest.unlink(ROOT, b"file")
    guest.rmdir(ROOT, b"dir")

    assert [path.name for path in folder.iterdir()] == ["full"]
    for remove in (guest.unlink, guest.rmdir):
        with expect_errno("ENOENT"):
            remove(ROOT, b"file")


def test_rename(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
    (folder / "dir").mkdir()
    nodeid = guest.walk("a")

    guest.rename(ROOT, b"a", ROOT, b"b")
    assert (folder / "b").read_text() == "a"
    guest.rename(ROOT, b"b", guest.walk("dir"), b"c")

    assert (folder / "dir" / "c").read_text() == "a"
    assert guest.walk("dir/c") == nodeid
    with expect_errno("ENOENT"):
        guest.rename(ROOT, b"a", ROOT, b"b")


def test_rename_flags(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")

    with expect_errno("EEXIST"):
        guest.rename2(ROOT, b"a", ROOT, b"b", RenameFlag.NOREPLACE)
    guest.rename2(ROOT, b"a", ROOT, b"b", RenameFlag.EXCHANGE)
    assert (folder / "a").read_text() == "b"
    guest.rename2(ROOT, b"a", ROOT, b"c", RenameFlag.NOREPLACE)

    assert sorted(path.name for path in folder.iterdir()) == ["b", "c"]
    with expect_errno("EINVAL"):
        guest.rename2(ROOT, b"b", ROOT, b"c", 8)


def test_operations_in_a_removed_directory(guest: DirectGuest, folder: Path) -> None:
    entry = guest.mkdir(ROOT, b"gone")
    (folder / "gone").rmdir()

    with expect_errno("ENOENT"):
        guest.create(entry.nodeid, b"x")
    with expect_errno("ENOENT"):
        guest.lookup(entry.nodeid, b"x")
    assert guest.getattr(entry.nodeid).nlink == 0


def test_forgetting_gives_descriptors_back(guest: DirectGuest, folder: Path) -> None:
    for number in range(20):
        (folder / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))

    nodes = [guest.lookup(ROOT, b"%d" % number).nodeid for number in range(20)]
    again = [guest.lookup(ROOT, b"%d" % number).nodeid for number in range(10)]
    assert again == nodes[:10]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    guest.batch_forget(*[(nodeid, 1) for nodeid in nodes])
    assert len(os.listdir("/proc/self/fd")) == before + 10
    for nodeid in again:
        guest.forget(nodeid)

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forgotten_node_is_gone_and_its_number_never_comes_back(
    guest: DirectGuest, folder: Path
) -> None:
    (folder / "a").touch()
    nodeid = guest.walk("a")
    guest.forget(nodeid)

    with expect_errno("EBADF"):
        guest.getattr(nodeid)
    assert guest.walk("a") != nodeid


def test_forgetting_more_than_was_looked_up(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").touch()
    nodeid = guest.walk("a")

    guest.forget(nodeid, 2**63)
    guest.forget(nodeid, 1)
    guest.forget(ROOT, 2**64 - 1)
    guest.forget(12345)
    guest.batch_forget((nodeid, 1), (ROOT, 5), (0, 0))

    assert stat.S_ISDIR(guest.getattr(ROOT).mode)


@pytest.mark.parametrize("nodeid", [0, 2, 999, 2**63, 2**64 - 1])
def test_forged_nodeids(guest: DirectGuest, nodeid: int) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: guest.lookup(nodeid, b"x"),
        lambda: guest.getattr(nodeid),
        lambda: guest.setattr(nodeid, 1),
        lambda: guest.readlink(nodeid),
        lambda: guest.mkdir(nodeid, b"x"),
        lambda: guest.mknod(nodeid, b"x", stat.S_IFREG),
        lambda: guest.symlink(nodeid, b"x", b"y"),
        lambda: guest.link(nodeid, ROOT, b"x"),
        lambda: guest.link(ROOT, nodeid, b"x"),
        lambda: guest.create(nodeid, b"x"),
        lambda: guest.unlink(nodeid, b"x"),
        lambda: guest.rmdir(nodeid, b"x"),
        lambda: guest.rename(nodeid, b"x", ROOT, b"y"),
        lambda: guest.rename(ROOT, b"x", nodeid, b"y"),
        lambda: guest.open(nodeid),
        lambda: guest.opendir(nodeid),
        lambda: guest.getxattr(nodeid, b"user.x"),
        lambda: guest.listxattr(nodeid),
        lambda: guest.setxattr(nodeid, b"user.x", b""),
        lambda: guest.removexattr(nodeid, b"user.x"),
        lambda: guest.call(Opcode.STATFS, nodeid),
    ]
    for attempt in attempts:
        with expect_errno("EBADF"):
            attempt()


def test_another_filesystem_is_marked(guest: DirectGuest, folder: Path) -> None:
    (folder / "plain").mkdir()

    assert not guest.lookup(ROOT, b"plain").attr.flags & AttrFlag.SUBMOUNT
