"""What this machine can do, and what happens to a test when it cannot."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "fuse_problem",
    "in_ci",
    "quick_folders",
    "supports_user_xattr",
    "tmpfs_problem",
    "unavailable",
]

TMPFS = Path("/dev/shm")


def in_ci() -> bool:
    """Whether this is a CI run (``CI=true``), where nothing may be left out."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def unavailable(reason: str) -> NoReturn:
    """End the test because the machine lacks something: a skip, in CI a failure."""
    if in_ci():
        pytest.fail(f"cannot run in CI: {reason}", pytrace=False)
    pytest.skip(reason)


def fuse_problem() -> str:
    """Why no FUSE filesystem can be mounted here; empty when it can."""
    device = Path("/dev/fuse")
    if not device.exists():
        return "/dev/fuse does not exist"
    if not os.access(device, os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is not installed and this is not root"
    return ""


def tmpfs_problem() -> str:
    """Why there is no tmpfs folder to use; empty when there is one."""
    if not os.access(TMPFS, os.W_OK | os.X_OK):
        return f"{TMPFS} is not writable"
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if (str(TMPFS), "tmpfs") not in {(fields[1], fields[2]) for fields in mounts}:
        return f"{TMPFS} is no tmpfs"
    return ""


def supports_user_xattr(folder: Path) -> bool:
    """Whether files in ``folder`` can have ``user.*`` attributes (tmpfs: since Linux 6.6)."""
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.setxattr(probe.name, "user.probe", b"1")
        except OSError:
            return False
    return True


@contextmanager
def quick_folders(prefix: str, *names: str) -> Iterator[list[Path]]:
    """Make folders of these names in a fresh one, in memory where that has extended attributes.

    Everybody may enter the fresh one. All is removed at the end.
    """
    in_memory = not tmpfs_problem() and supports_user_xattr(TMPFS)
    with tempfile.TemporaryDirectory(
        prefix=f"vfsmount-{prefix}-", dir=TMPFS if in_memory else None
    ) as home:
        os.chmod(home, 0o755)
        folders = [Path(home, name) for name in names]
        for folder in folders:
            folder.mkdir()
        yield folders
