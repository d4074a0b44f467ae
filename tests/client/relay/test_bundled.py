"""What the bundled daemon has and virtiofsd 1.13 has not, through the relay and on the mount."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import subprocess
import termios
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.hostd.server import Server, listen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_daemon]

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NODUMP_FL = 0x80086601, 0x40086602, 0x40

#: rwx for the owner, r-x for user 7, r-x for the group, rwx as the mask, nothing for others.
NOBODY = 0xFFFFFFFF
ENTRIES = [(1, 7, NOBODY), (2, 5, 7), (4, 5, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ENTRIES)


class Here(NamedTuple):
    """A mount of the bundled daemon by the relay, and the folder that it shows."""

    host: Path
    path: Path
    mount: Mount


@contextmanager
def mounted() -> Iterator[Here]:
    with (
        quick_folders("relay", "host", "mnt") as (host, path),
        start_daemon("bundled", host) as daemon,
        start_mount(path, daemon.socket, cache="auto", engine="relay") as mount,
    ):
        yield Here(host, path, mount)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with mounted() as one:
        yield one


def test_a_file_without_a_name_gets_one(here: Here) -> None:
    file = os.open(here.path, os.O_TMPFILE | os.O_RDWR, 0o640)
    fds = os.open("/proc/self/fd", os.O_PATH)
    try:
        os.write(file, b"content")
        assert not list(here.host.iterdir())
        # With a directory it is linkat(2) that Python calls, which follows; link(2) does not.
        os.link(str(file), here.path / "named", src_dir_fd=fds, follow_symlinks=True)
    finally:
        os.close(fds)
        os.close(file)
    assert (here.host / "named").read_bytes() == b"content"
    assert (here.host / "named").stat().st_mode & 0o777 == 0o640


def test_birth_time_is_the_hosts(here: Here) -> None:
    (here.host / "born").write_bytes(b"")

    def birth(path: Path) -> str:
        show = ["stat", "--format=%w", str(path)]
        return subprocess.check_output(show, text=True).strip()

    assert birth(here.path / "born") == birth(here.host / "born")
    assert birth(here.path / "born") != "-"


def test_a_hole_is_punched_at_the_host(here: Here) -> None:
    path = here.path / "holes"
    path.write_bytes(b"x" * (1 << 20))
    subprocess.run(
        ["fallocate", "--punch-hole", "--offset", "65536", "--length", "131072", path], check=True
    )
    content = (here.host / "holes").read_bytes()
    assert content == b"x" * 65536 + bytes(131072) + b"x" * ((1 << 20) - 65536 - 131072)
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
        assert os.lseek(file.fileno(), 65536, os.SEEK_DATA) == 65536 + 131072


def flags_of(path: Path) -> int:
    file = os.open(path, os.O_RDONLY)
    try:
        return int.from_bytes(fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(4)), "little")
    finally:
        os.close(file)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_inode_flags_are_the_hosts(here: Here, kind: str) -> None:
    made = here.host / f"flagged-{kind}"
    made.touch() if kind == "file" else made.mkdir()
    try:
        before = flags_of(made)
    except OSError as error:
        pytest.skip(f"no inode flags at the host: {error}")
    path = here.path / made.name
    assert flags_of(path) == before

    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(file, FS_IOC_SETFLAGS, (before | FS_NODUMP_FL).to_bytes(8, "little"))
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            fcntl.ioctl(file, termios.TIOCGWINSZ, bytes(8))
    finally:
        os.close(file)

    assert flags_of(made) == flags_of(path) == before | FS_NODUMP_FL


@contextmanager
def mounted_with_lists() -> Iterator[tuple[Path, Path]]:
    """A mount of a share that heeds access control lists, and the folder that it shows."""
    with (
        quick_folders("relay", "host", "mnt") as (host, path),
        Share(host, ShareOptions(posix_acl=True)) as share,
        Server(share, listen(socket := f"{host}.socket"), path=socket) as server,
    ):
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with start_mount(path, socket, cache="auto", engine="relay"):
                yield host, path
        finally:
            server.stop()
            thread.join(10)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as somebody else")
def test_access_control_lists() -> None:
    with mounted_with_lists() as (host, path):
        name = "system.posix_acl_default"
        try:
            os.setxattr(host, name, ACL)
        except OSError as error:
            pytest.skip(f"no access control lists at the host: {error}")
        assert os.getxattr(path, name) == ACL
        before = os.umask(0o77)
        for folder in (host, path):
            (folder / f"dir-{folder.name}").mkdir()
            (folder / f"file-{folder.name}").touch()
        os.umask(before)

        modes = {made.name: made.stat().st_mode for made in host.iterdir()}
        assert modes["dir-mnt"] == modes["dir-host"]
        assert modes["file-mnt"] == modes["file-host"] == stat.S_IFREG | 0o660
        # User 7 may, by the list alone, and it is the kernel that looks.
        (host / "file-host").write_bytes(b"content")
        os.setxattr(path / "file-host", "system.posix_acl_access", ACL)
        host.chmod(0o777)
        for uid, read in ((7, b"content"), (8, b"")):
            command = ["cat", str(path / "file-host")]
            done = subprocess.run(command, user=uid, group=uid, capture_output=True, check=False)
            assert done.stdout == read
