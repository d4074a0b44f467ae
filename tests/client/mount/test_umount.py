"""``vfsmount umount`` and ``status`` where there is nothing to talk to."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.client.mount.conftest import HungMount, Outcome
from tests.client.mount.test_command import run_as_nobody
from vfsmount.client.mount.mountinfo import locate

if TYPE_CHECKING:
    from pathlib import Path

Maker = Callable[..., HungMount]
Command = Callable[..., Outcome]


@pytest.mark.parametrize("name", ["umount", "status"])
def test_nothing_mounted(command: Command, tmp_path: Path, name: str) -> None:
    done = command(name, tmp_path)
    assert (done.returncode, done.error) == (32, f"nothing is mounted on {tmp_path}")


def test_mount_of_another_type(command: Command) -> None:
    done = command("umount", "/proc")
    assert done.returncode == 32
    assert done.error == (
        "/proc is a mount of type proc, not one of vfsmount; unmount it with: umount /proc"
    )
    assert command("status", "/proc").error == (
        "/proc is a mount of type proc, not one of vfsmount"
    )


@pytest.mark.needs_fuse
class TestDeadMount:
    def test_status_says_how_to_clean_up(self, command: Command, hung_mount: Maker) -> None:
        mount = hung_mount()
        done = command("status", mount.path)
        assert done.returncode == 32
        assert done.error == (
            f"no vfsmount process serves {mount.path} any more; "
            f"clean it up: vfsmount umount {mount.path}"
        )

    @pytest.mark.parametrize("option", [[], ["--lazy"], ["--force"], ["-l"], ["-f"]])
    def test_umount(self, command: Command, hung_mount: Maker, option: list[str]) -> None:
        mount = hung_mount()
        mount.die()
        done = command("umount", mount.path, *option)
        assert (done.returncode, done.stderr) == (0, "")
        assert locate(str(mount.path))[1] is None

    def test_umount_of_one_in_use(self, command: Command, hung_mount: Maker) -> None:
        # Nobody serves it, so nothing can be lost: it is detached.
        mount = hung_mount()
        held = os.open(mount.path, os.O_PATH)
        mount.die()
        done = command("umount", mount.path)
        os.close(held)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("name", ["umount", "status"])
    def test_mount_of_somebody_else(self, open_folder: Path, hung_mount: Maker, name: str) -> None:
        mount = hung_mount(str(open_folder / "mnt"))
        done = run_as_nobody([name, str(mount.path)])
        assert done.returncode == 32
        assert done.error == (
            f"{mount.path} is a mount of uid 0, not yours; run this as that user, or as root (sudo)"
        )

    def test_umount_leaves_other_fuse_mounts_alone(
        self, command: Command, hung_mount: Maker
    ) -> None:
        mount = hung_mount(subtype="sshfs")
        done = command("umount", mount.path)
        assert done.returncode == 32
        assert "is a mount of type fuse.sshfs, not one of vfsmount" in done.error
        assert locate(str(mount.path))[1] is not None

    def test_umount_through_a_link(
        self, command: Command, hung_mount: Maker, tmp_path: Path
    ) -> None:
        mount = hung_mount()
        (tmp_path / "link").symlink_to("hung")
        assert command("umount", tmp_path / "link").returncode == 0
        assert locate(str(mount.path))[1] is None

    def test_mount_over_a_dead_mount(self, command: Command, hung_mount: Maker) -> None:
        mount = hung_mount()
        mount.die()
        done = command(mount.path, "--socket", "/no/socket")
        assert done.returncode == 32
        assert "is a dead mount, its process is gone; clean it up: vfsmount umount" in done.error
