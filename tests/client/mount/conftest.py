"""What several tests of the command need: a mount that nobody answers, and the command itself."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import REPOSITORY
from tests.support.environment import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MNT_DETACH = 2


class HungMount:
    """A FUSE mount of our own making whose requests nobody reads: looking inside blocks for ever.

    Attributes:
        path: The mount point.
        device: The open /dev/fuse; -1 once the mount is dead.
    """

    def __init__(self, path: Path, subtype: str) -> None:
        self.path = path
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.device},rootmode=40000,user_id={os.geteuid()},group_id=0"
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mount(
            b"test", os.fsencode(path), f"fuse.{subtype}".encode(), 0, options.encode()
        )
        if result:
            os.close(self.device)
            raise OSError(ctypes.get_errno(), "mount")

    def die(self) -> None:
        """Let the kernel see the end of the serving side: whoever looks gets ENOTCONN."""
        if self.device >= 0:
            os.close(self.device)
            self.device = -1

    def remove(self) -> None:
        """Take it off if it is still there."""
        self.die()
        ctypes.CDLL(None).umount2(os.fsencode(self.path), MNT_DETACH)


@pytest.fixture
def hung_mount(tmp_path: Path) -> Iterator[Callable[..., HungMount]]:
    """Make mounts that hang, at ``tmp_path / name``; needs root."""
    if os.geteuid() != 0:
        unavailable("only root can call mount(2)")
    made: list[HungMount] = []

    def make(name: str = "hung", subtype: str = "vfsmount") -> HungMount:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        made.append(HungMount(path, subtype))
        return made[-1]

    yield make
    for mount in reversed(made):
        mount.remove()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; ``tmp_path`` is closed to others."""
    with tempfile.TemporaryDirectory(prefix="vfsmount-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class Outcome(subprocess.CompletedProcess[str]):
    """A finished command."""

    @property
    def error(self) -> str:
        """The only line on stderr, without the prefix that every error has."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("vfsmount: error: "), self.stderr
        return lines[0].removeprefix("vfsmount: error: ")


@pytest.fixture
def command() -> Callable[..., Outcome]:
    """Run ``vfsmount`` with these words until it ends, by a program that starts it where given."""

    def run(*words: str | os.PathLike[str], by: Sequence[str] = (), **options: object) -> Outcome:
        done = subprocess.run(
            [*by, sys.executable, "-m", "vfsmount", *(os.fspath(word) for word in words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=60,
            check=False,
            **options,  # type: ignore[call-overload]
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Outcome(done.args, done.returncode, done.stdout, done.stderr)

    return run
