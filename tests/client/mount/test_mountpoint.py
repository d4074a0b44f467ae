"""What can be wrong with a mount point, and taking mounts off that cannot be looked at."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.client.mount.conftest import HungMount
from vfsmount.client.mount import mountpoint
from vfsmount.client.mount.mountinfo import locate
from vfsmount.client.mount.mountpoint import (
    abort_connection,
    check_fuse_available,
    check_mountpoint,
    describe_holders,
    detach,
    is_mounted,
    unmount,
)
from vfsmount.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

Maker = Callable[..., HungMount]


class TestCheck:
    def test_empty_directory(self, tmp_path: Path) -> None:
        assert check_mountpoint(str(tmp_path)) == os.path.realpath(tmp_path)

    def test_link_is_resolved(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        assert check_mountpoint(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")

    @pytest.mark.parametrize("path", ["/", "//", "/tmp/.."])
    def test_everything(self, path: str) -> None:
        with pytest.raises(MountError, match="would hide the whole system"):
            check_mountpoint(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MountError, match=r"mount point .*/m does not exist") as caught:
            check_mountpoint(str(tmp_path / "m"))
        assert caught.value.cure == f"create it: mkdir -p {tmp_path}/m"

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_not_a_directory(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(MountError, match="is not a directory"):
            check_mountpoint(str(tmp_path / name))

    def test_not_empty_is_a_warning(
        self, tmp_path: Path, expect_log: Callable[[str], None]
    ) -> None:
        (tmp_path / "file").touch()
        expect_log("is not empty; its files are hidden while mounted")
        check_mountpoint(str(tmp_path))

    def test_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("a")
        with pytest.raises(MountError, match="Too many levels of symbolic links"):
            check_mountpoint(str(tmp_path / "a"))

    @pytest.mark.needs_fuse
    def test_dead_mount(self, hung_mount: Maker) -> None:
        mount = hung_mount()
        mount.die()
        with pytest.raises(MountError, match="is a dead mount, its process is gone") as caught:
            check_mountpoint(str(mount.path))
        cure = f"clean it up: vfsmount umount {mount.path} (or umount -l {mount.path})"
        assert caught.value.cure == cure

    @pytest.mark.needs_fuse
    def test_live_mount_of_ours_is_not_looked_at(
        self, hung_mount: Maker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mountpoint, "serving_pid", lambda entry: 1)
        mount = hung_mount()
        with pytest.raises(MountError, match="is a vfsmount mount already"):
            check_mountpoint(str(mount.path))


class TestAvailable:
    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mountpoint, "FUSE_DEVICE", "/no/fuse")
        with pytest.raises(MountError, match="/no/fuse does not exist") as caught:
            check_fuse_available()
        assert "modprobe fuse" in caught.value.cure

    def test_closed_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        monkeypatch.setattr(mountpoint, "FUSE_DEVICE", "/dev/null")
        with pytest.raises(MountError, match="/dev/null may not be opened by this user"):
            check_fuse_available()

    def test_no_helper_for_a_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mountpoint, "FUSE_DEVICE", "/dev/null")
        monkeypatch.setattr(mountpoint, "fusermount", lambda: None)
        monkeypatch.setattr(mountpoint, "is_root", lambda: False)
        with pytest.raises(MountError, match="fusermount3 is not installed") as caught:
            check_fuse_available()
        assert caught.value.cure == "install the package fuse3, or run as root"
        monkeypatch.setattr(mountpoint, "is_root", lambda: True)
        check_fuse_available()


@pytest.mark.needs_fuse
class TestTakingOff:
    """None of these may look into the mount: the test would hang."""

    def test_unmount(self, hung_mount: Maker) -> None:
        mount = hung_mount()
        entry = locate(str(mount.path))[1]
        assert entry is not None
        assert is_mounted(str(mount.path), entry.device)
        unmount(str(mount.path))
        assert not is_mounted(str(mount.path), entry.device)

    def test_busy_and_who(self, hung_mount: Maker) -> None:
        mount = hung_mount()
        held = os.open(mount.path, os.O_PATH)
        try:
            with pytest.raises(OSError, match="busy") as caught:
                unmount(str(mount.path))
            assert caught.value.errno == errno.EBUSY
            assert f"used by {os.getpid()} (" in describe_holders(str(mount.path))
            detach(str(mount.path))
        finally:
            os.close(held)
        assert locate(str(mount.path))[1] is None

    def test_nothing_mounted(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Invalid argument"):
            unmount(str(tmp_path))

    def test_dead(self, hung_mount: Maker) -> None:
        mount = hung_mount()
        mount.die()
        unmount(str(mount.path))
        assert locate(str(mount.path))[1] is None

    def test_abort_frees_a_process_that_hangs(self, hung_mount: Maker) -> None:
        mount = hung_mount()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            held = os.open(mount.path, os.O_PATH)  # from now on the abort cannot unmount as well
            os.write(writer, b"x")
            try:
                os.listdir(f"/proc/self/fd/{held}")
            except OSError:
                os._exit(7)
            os._exit(0)
        os.read(reader, 1)
        entry = locate(str(mount.path))[1]
        assert entry is not None
        assert abort_connection(entry)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.close(reader)
        os.close(writer)


def test_no_holders(tmp_path: Path) -> None:
    assert describe_holders(str(tmp_path / "nothing")) == ""
