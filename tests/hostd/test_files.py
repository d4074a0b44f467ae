"""Contents of files: open flags, reading and writing anywhere, and all that a handle can do."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode, OpenInFlag, WriteFlag

if TYPE_CHECKING:
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
GIB = 1 << 30


@pytest.fixture
def file(folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(b"0123456789")
    return path


def flags_of(guest: DirectGuest, fh: int) -> int:
    return fcntl.fcntl(guest.session.files.get(fh).fd, fcntl.F_GETFL)


def test_read(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"))

    assert guest.read(fh, 0, 100) == b"0123456789"
    assert guest.read(fh, 3, 4) == b"3456"
    assert guest.read(fh, 10, 4) == b""
    assert guest.read(fh, 0, 0) == b""


def test_read_is_bounded_by_the_room_for_it(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"))

    assert guest.read(fh, 0, 10, room=16 + 4) == b"0123"
    assert guest.read(fh, 0, 4, room=16 + 100) == b"0123"
    assert guest.read(fh, 0, 1 << 24, room=16 + 7) == b"0123456"
    assert guest.read(fh, 0, 10, room=16) == b""


def test_write(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    assert guest.write(fh, 2, b"ab") == 2
    assert guest.write(fh, 12, b"cd") == 2
    assert guest.write(fh, 0, b"") == 0

    assert file.read_bytes() == b"01ab456789\0\0cd"


@pytest.mark.parametrize("pieces", [1, 7, 16, 40, 4096])
def test_buffers_in_pieces(share: Share, file: Path, pieces: int) -> None:
    data = os.urandom(5000)
    with DirectGuest(share, pieces=pieces) as guest:
        guest.init()
        fh = guest.open(guest.walk("file"), os.O_RDWR)

        assert guest.write(fh, 3, data) == 5000
        assert guest.read(fh, 3, 6000) == data
    assert file.read_bytes() == b"012" + data


def test_a_megabyte(guest: DirectGuest, file: Path) -> None:
    data = os.urandom(1 << 20)
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    assert guest.write(fh, 0, data) == len(data)
    assert guest.read(fh, 0, 1 << 20) == data


def test_write_of_more_than_was_sent(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)
    for size in (5, 2**20 + 1, 2**31, 2**32 - 1):
        body = fuse.WRITE_IN.values(fh, 0, size, 0, 0, 0) + b"data"
        with expect_errno("EINVAL"):
            guest.call(Opcode.WRITE, 0, body)
    assert file.read_bytes() == b"0123456789"


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_offsets_beyond_the_largest(guest: DirectGuest, file: Path, offset: int) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    with expect_errno("EINVAL"):
        guest.read(fh, offset, 10)
    with expect_errno("EINVAL"):
        guest.write(fh, offset, b"x")


def test_write_at_the_end_of_the_world(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    with expect_errno("EFBIG", "EINVAL"):
        guest.write(fh, 2**63 - 1, b"xy")
    assert guest.read(fh, 2**63 - 2, 1) == b""


def test_beyond_4_gib(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    guest.write(fh, 5 * GIB, b"far")

    assert guest.read(fh, 5 * GIB, 10) == b"far"
    assert guest.getattr(guest.walk("file")).size == 5 * GIB + 3
    assert file.stat().st_blocks < 100


# --- opening --------------------------------------------------------------------------------------


def test_only_harmless_flags_reach_the_host(guest: DirectGuest, file: Path) -> None:
    wanted = os.O_RDWR | os.O_APPEND | os.O_DSYNC
    harmful = os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_DIRECT
    harmful |= os.O_PATH | os.O_TMPFILE | os.O_ASYNC | os.O_NONBLOCK | os.O_NOATIME

    fh = guest.open(guest.walk("file"), wanted | harmful)

    assert flags_of(guest, fh) & ~os.O_LARGEFILE & ~0o100000 == wanted
    assert guest.write(fh, 0, b"end") == 3
    assert file.read_bytes() == b"0123456789end"


def test_open_truncates(guest: DirectGuest, file: Path) -> None:
    guest.open(guest.walk("file"), os.O_WRONLY | os.O_TRUNC)

    assert file.stat().st_size == 0


def test_access_mode_is_kept(guest: DirectGuest, file: Path) -> None:
    reader = guest.open(guest.walk("file"), os.O_RDONLY)
    writer = guest.open(guest.walk("file"), os.O_WRONLY)

    with expect_errno("EBADF"):
        guest.write(reader, 0, b"x")
    with expect_errno("EBADF"):
        guest.read(writer, 0, 1)


def test_open_of_other_kinds(guest: DirectGuest, folder: Path) -> None:
    os.mkfifo(folder / "fifo")  # opening it would block
    with expect_errno("EISDIR"):
        guest.open(ROOT)
    with expect_errno("EBADF"):
        guest.open(guest.walk("fifo"))
    with expect_errno("EBADF"):
        guest.create(ROOT, b"fifo", os.O_RDONLY)


@as_root
def test_device_nodes_are_never_opened(guest: DirectGuest) -> None:
    entry = guest.mknod(ROOT, b"null", stat.S_IFCHR | 0o666, 0x103)
    with expect_errno("EBADF"):
        guest.open(entry.nodeid, os.O_RDWR)
    with expect_errno("EBADF"):
        guest.create(ROOT, b"null")


def test_file_that_was_moved_and_removed_stays_open(guest: DirectGuest, file: Path) -> None:
    nodeid = guest.walk("file")
    first = guest.open(nodeid)
    file.rename(file.with_name("other"))
    second = guest.open(nodeid)
    file.with_name("other").unlink()
    third = guest.open(nodeid)

    for fh in (first, second, third):
        assert guest.read(fh, 0, 3) == b"012"


def test_released_and_forged_handles(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)
    guest.release(fh)
    for bad in (fh, 1000, 0, 2**64 - 1):
        for attempt in (
            lambda bad=bad: guest.read(bad, 0, 1),
            lambda bad=bad: guest.write(bad, 0, b"x"),
            lambda bad=bad: guest.release(bad),
            lambda bad=bad: guest.call(Opcode.FLUSH, 0, fuse.FLUSH_IN.values(bad, 0)),
            lambda bad=bad: guest.call(Opcode.FSYNC, 0, fuse.FSYNC_IN.values(bad, 0)),
            lambda bad=bad: guest.readdir(bad),
            lambda bad=bad: guest.releasedir(bad),
        ):
            with expect_errno("EBADF"):
                attempt()


def test_handles_of_files_and_directories_are_different_things(
    guest: DirectGuest, folder: Path
) -> None:
    (folder / "file").touch()
    guest.opendir(ROOT)
    dir_fh = guest.opendir(ROOT)
    fh = guest.open(guest.walk("file"))
    assert (fh, dir_fh) == (1, 2)

    with expect_errno("EBADF"):
        guest.read(dir_fh, 0, 1)
    with expect_errno("EBADF"):
        guest.release(dir_fh)
    guest.releasedir(fh)  # the other open directory


# --- creating -------------------------------------------------------------------------------------


def test_create(guest: DirectGuest, folder: Path) -> None:
    entry, fh = guest.create(ROOT, b"new", os.O_RDWR, 0o6751)

    assert guest.write(fh, 0, b"hello") == 5
    assert (folder / "new").read_bytes() == b"hello"
    assert entry.attr.mode == stat.S_IFREG | 0o6751
    assert entry.nodeid == guest.walk("new")


def test_create_may_write_to_what_is_created_read_only(guest: DirectGuest) -> None:
    _, fh = guest.create(ROOT, b"new", os.O_RDWR, 0o400)

    assert guest.write(fh, 0, b"x") == 1


def test_create_of_what_exists(guest: DirectGuest, file: Path) -> None:
    entry, fh = guest.create(ROOT, b"file", os.O_RDWR, 0o600)
    assert guest.read(fh, 0, 10) == b"0123456789"
    assert entry.attr.size == 10
    with expect_errno("EEXIST"):
        guest.create(ROOT, b"file", os.O_RDWR | os.O_EXCL)

    entry, _ = guest.create(ROOT, b"file", os.O_RDWR | os.O_TRUNC)

    assert entry.attr.size == file.stat().st_size == 0


def test_create_appending(guest: DirectGuest, folder: Path) -> None:
    _, fh = guest.create(ROOT, b"log", os.O_WRONLY | os.O_APPEND)
    guest.write(fh, 0, b"one")
    (folder / "log").write_bytes(b"one and a half")
    guest.write(fh, 3, b" two")

    assert (folder / "log").read_bytes() == b"one and a half two"


def test_failed_create_owes_nothing(guest: DirectGuest, folder: Path) -> None:
    (folder / "dir").mkdir()
    before = len(os.listdir("/proc/self/fd"))

    with expect_errno("EISDIR"):
        guest.create(ROOT, b"dir")

    assert len(os.listdir("/proc/self/fd")) == before
    assert len(guest.session.inodes) == 1


def test_tmpfile(guest: DirectGuest, folder: Path) -> None:
    body = fuse.CREATE_IN.values(os.O_RDWR | os.O_TMPFILE, 0o640, 0, 0) + b"/\0"
    entry, opened = guest.call(Opcode.TMPFILE, ROOT, body).records
    guest.write(opened.fh, 0, b"now you see me")
    assert list(folder.iterdir()) == []
    assert (entry.attr.nlink, entry.attr.mode) == (0, stat.S_IFREG | 0o640)

    guest.link(entry.nodeid, ROOT, b"visible")

    assert (folder / "visible").read_bytes() == b"now you see me"


# --- what a handle can do -------------------------------------------------------------------------


def test_flush_and_syncfs(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    guest.call(Opcode.FLUSH, 0, fuse.FLUSH_IN.values(fh, 0))
    guest.call(Opcode.SYNCFS, ROOT, fuse.SYNCFS_IN.values(0))


def test_what_is_made_durable(
    guest: DirectGuest, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd, name=name: done.append(f"{name} {os.stat(fd)[1]}"))
    fh, folder_fh = guest.open(guest.walk("file"), os.O_RDWR), guest.opendir()

    for opcode, handle, inode in (
        (Opcode.FSYNC, fh, file.stat().st_ino),
        (Opcode.FSYNCDIR, folder_fh, file.parent.stat().st_ino),
    ):
        for flags in (0, 1):
            guest.call(opcode, ROOT, fuse.FSYNC_IN.values(handle, flags))
        assert done[-2:] == [f"fsync {inode}", f"fdatasync {inode}"]


def test_fallocate(guest: DirectGuest, file: Path) -> None:
    fh = guest.open(guest.walk("file"), os.O_RDWR)
    keep_size, punch_hole = 1, 2

    guest.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.values(fh, 0, 8192, 0))
    assert file.stat().st_size == 8192
    mode = keep_size | punch_hole
    guest.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.values(fh, 0, 5, mode))

    assert file.read_bytes()[:10] == b"\0\0\0\0\x0056789"
    for offset, length, bad_mode in ((0, 0, 0), (2**63, 1, 0), (0, 2**64 - 1, 0), (0, 1, 2**31)):
        body = fuse.FALLOCATE_IN.values(fh, offset, length, bad_mode)
        with expect_errno("EINVAL", "EOPNOTSUPP"):
            guest.call(Opcode.FALLOCATE, 0, body)


def test_lseek(guest: DirectGuest, file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(1 << 20)
    fh = guest.open(guest.walk("file"))

    def seek(offset: int, whence: int) -> int:
        body = fuse.LSEEK_IN.values(fh, offset, whence)
        found: int = guest.record(Opcode.LSEEK, 0, body).offset
        return found

    assert seek(0, os.SEEK_DATA) == 0
    assert 10 <= seek(0, os.SEEK_HOLE) < 1 << 20
    assert seek(0, os.SEEK_END) == 1 << 20
    with expect_errno("ENXIO"):
        seek(1 << 20, os.SEEK_DATA)
    for offset, whence in ((0, os.SEEK_CUR), (0, 5), (0, 2**32 - 1), (2**63, os.SEEK_DATA)):
        with expect_errno("EINVAL"):
            seek(offset, whence)
    assert guest.read(fh, 0, 3) == b"012"


@pytest.mark.parametrize("opcode", [Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64])
def test_copy_file_range(guest: DirectGuest, file: Path, opcode: Opcode) -> None:
    source = guest.open(guest.walk("file"))
    entry, target = guest.create(ROOT, b"copy")

    def copy(length: int, flags: int = 0, offset: int = 2) -> int:
        args = fuse.CopyFileRangeIn(source, offset, entry.nodeid, target, 1, length, flags)
        record = guest.record(opcode, 0, fuse.COPY_FILE_RANGE_IN.pack(args))
        size: int = record[0]
        return size

    assert copy(4) == 4
    assert file.with_name("copy").read_bytes() == b"\x002345"
    assert copy(2**64 - 1) == 8
    with expect_errno("EINVAL"):
        copy(1, flags=1)
    with expect_errno("EINVAL"):
        copy(1, offset=2**63)


# --- set-id bits ----------------------------------------------------------------------------------


@as_root
@pytest.mark.parametrize(("kill", "left"), [(0, 0o6755), (WriteFlag.KILL_SUIDGID, 0o755)])
def test_write_kills_set_id_bits_when_told(
    guest: DirectGuest, file: Path, kill: int, left: int
) -> None:
    file.chmod(0o6755)
    fh = guest.open(guest.walk("file"), os.O_RDWR)

    assert guest.write(fh, 0, b"xyz", kill) == 3

    assert file.read_bytes() == b"xyz3456789"
    assert stat.S_IMODE(file.stat().st_mode) == left


@as_root
@pytest.mark.parametrize(("uid", "left"), [(0, 0o6755), (1000, 0o755)])
@pytest.mark.parametrize("opcode", [Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE])
def test_changes_without_a_flag_kill_set_id_bits_unless_by_root(
    guest: DirectGuest, file: Path, opcode: Opcode, uid: int, left: int
) -> None:
    file.chmod(0o6755)
    nodeid = guest.walk("file")
    fh = guest.open(nodeid, os.O_RDWR)
    _, source = guest.create(ROOT, b"source")
    guest.write(source, 0, b"xyz")
    body = {
        Opcode.FALLOCATE: fuse.FALLOCATE_IN.values(fh, 0, 100, 0),
        Opcode.COPY_FILE_RANGE: fuse.COPY_FILE_RANGE_IN.values(source, 0, nodeid, fh, 0, 3, 0),
    }[opcode]
    guest.uid = uid

    guest.call(opcode, nodeid, body)

    assert stat.S_IMODE(file.stat().st_mode) == left


@as_root
@pytest.mark.parametrize(("kill", "left"), [(0, 0o6755), (OpenInFlag.KILL_SUIDGID, 0o755)])
def test_truncating_open_kills_set_id_bits_when_told(
    guest: DirectGuest, file: Path, kill: int, left: int
) -> None:
    file.chmod(0o6755)

    guest.open(guest.walk("file"), os.O_RDWR | os.O_TRUNC, kill)

    assert stat.S_IMODE(file.stat().st_mode) == left


# --- ways to share --------------------------------------------------------------------------------


def test_write_back_cache_reads_and_appends_by_itself(folder: Path, file: Path) -> None:
    options = ShareOptions(writeback=True)
    with Share(folder, options) as share, DirectGuest(share) as guest:
        assert guest.init().flags & InitFlag.WRITEBACK_CACHE
        fh = guest.open(guest.walk("file"), os.O_WRONLY | os.O_APPEND)

        assert guest.read(fh, 0, 3) == b"012"
        guest.write(fh, 1, b"x")
    assert file.read_bytes() == b"0x23456789"
