"""A daemon to attack: a process with a canary outside its share, and a bystander on it.

After each attack the daemon must be alive, the canary untouched, the bystander served, and a new
guest admitted. What the attack got for an answer is the attack's own business.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.hostd.frontend import Disconnected, Frontend
from tests.hostd.guest import ROOT
from tests.support.daemons import OUR_FAULT, start_daemon
from tests.support.errors import error_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.daemons import Daemon

__all__ = ["CANARY", "Prey", "outcome", "prey_in"]

CANARY = b"untouched"


class Prey:
    """The daemon, the share and what lies outside of it.

    Attributes:
        share: The shared folder.
        canary: A file next to it.
    """

    def __init__(self, home: Path, daemon: Daemon) -> None:
        self.daemon = daemon
        self.share = home / "share"
        self.canary = home / "canary"
        self._home = home
        self._canary_as_it_was = self._look()
        self._bystander = self._connect()
        self._bystander.handshake()
        self._bystander.init()
        self._file = self._bystander.open(self._bystander.walk("safe"))

    def _connect(self) -> Frontend:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.daemon.socket))
        return Frontend(sock)

    @contextmanager
    def guest(self, *, init: bool = True) -> Iterator[Frontend]:
        """A guest that may do as it likes."""
        with self._connect() as frontend:
            frontend.handshake()
            if init:
                frontend.init()
            yield frontend

    def _look(self) -> object:
        found = self.canary.stat()
        around = sorted(path.name for path in self._home.iterdir())
        return (
            self.canary.read_bytes(), found.st_mode, found.st_uid, found.st_nlink,
            found.st_mtime_ns, os.listxattr(self.canary), around,
        )  # fmt: skip

    def check(self) -> None:
        """Nobody but the attacker has noticed anything."""
        assert self._look() == self._canary_as_it_was
        assert self.daemon.is_running()
        assert self._bystander.read(self._file, 0, 100) == b"safe and sound"
        with self.guest() as next_one:
            assert next_one.lookup(ROOT, b"safe").attr.size == len(b"safe and sound")
        log = self.daemon.stderr
        assert not any(words in log for words in OUR_FAULT), log

    def close(self) -> None:
        self._bystander.close()


def make_tree(share: Path, canary: Path) -> None:
    """What attacks need, made anew: also if the last one has changed it."""
    for path in share.iterdir():
        if path.name != "safe":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (share / "dir").mkdir()
    (share / "file").write_bytes(b"text")
    (share / "dir" / "inner").write_bytes(b"inner")
    (share / "up").symlink_to("..")
    (share / "out").symlink_to(canary)
    (share / "loop").symlink_to("loop")
    os.mkfifo(share / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        place = os.open(share, os.O_PATH)
        sock.bind(f"/proc/self/fd/{place}/socket")
        os.close(place)
    if os.geteuid() == 0:
        os.mknod(share / "device", 0o20666, os.makedev(1, 8))  # random bytes, if it were read


@contextmanager
def prey_in(home: Path) -> Iterator[Prey]:
    """A daemon on ``home/share``, ended with the block."""
    (home / "share").mkdir()
    (home / "canary").write_bytes(CANARY)
    (home / "share" / "safe").write_bytes(b"safe and sound")
    with start_daemon("bundled", home / "share") as daemon:
        prey = Prey(home, daemon)
        yield prey
        prey.close()


def outcome(attack: Callable[[], object]) -> str:
    """How an attack ends: an errno's name, ``closed``, or ``served``."""
    try:
        attack()
    except Disconnected:
        return "closed"
    except OSError as error:
        return error_name(error).replace("ENOTSUP", "EOPNOTSUPP")  # one number
    return "served"
