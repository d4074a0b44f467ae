"""What the bundled daemon has and virtiofsd 1.13 has not, through the relay and on the mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import TMPFS, tmpfs_problem
from tests.support.mounts import Mount, start_mount

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_daemon]


class Here(NamedTuple):
    """A mount of the bundled daemon by the relay, and the folder that it shows."""

    host: Path
    path: Path
    mount: Mount


@contextmanager
def mounted() -> Iterator[Here]:
    home = Path(tempfile.mkdtemp(prefix="vfsmount-relay-", dir=None if tmpfs_problem() else TMPFS))
    host, path = home / "host", home / "mnt"
    try:
        host.mkdir()
        path.mkdir()
        with (
            start_daemon("bundled", host) as daemon,
            start_mount(path, daemon.socket, cache="auto", engine="relay") as mount,
        ):
            yield Here(host, path, mount)
    finally:
        shutil.rmtree(home)


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
