"""A folder, host daemons on it, and mounts of them: what the tests of whole mounts start from.

Several mounts of one folder stand for several guests of one host. The bundled daemon serves them
all; the real ones serve one connection each, so each mount gets a daemon of its own.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from tests.support.daemons import Daemon, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount
from vfsmount.client.mount.status import read_status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Shared", "messages", "open_shared"]

_numbers = count()


@dataclass
class Shared:
    """A folder of the host and where it is mounted.

    Attributes:
        kind: What daemon serves it.
        engine: What serves the mounts.
        cache: Their cache mode.
        host: The folder itself.
        mounts: Each shows the folder.
        daemons: One for all, or one for each mount.
    """

    kind: str
    engine: str
    cache: str
    host: Path
    mounts: list[Mount]
    daemons: list[Daemon]

    def folder(self) -> list[Path]:
        """Make a folder of a name never used before; return it at the host and in each mount."""
        name = f"test-{next(_numbers)}"
        (self.host / name).mkdir()
        return [self.host / name, *(mount.path / name for mount in self.mounts)]

    def check_alive(self) -> None:
        """Fail, and say why, when something that should run does not."""
        for mount in self.mounts:
            assert mount.is_running(), f"the mount has ended:\n{mount.log}"
        for daemon in self.daemons:
            assert daemon.is_running(), f"the daemon has ended:\n{daemon.stderr}"


@contextmanager
def open_shared(
    kind: str,
    engine: str,
    cache: str,
    *,
    mounts: int = 1,
    options: Sequence[str] = (),
    writeback: bool = False,
    xattr: bool = True,
    daemon_cache: str = "auto",
    daemon_options: Sequence[str] = (),
    expected_complaint: str = "",
) -> Iterator[Shared]:
    """Share a fresh folder, in memory where that is possible, and mount it.

    Args:
        kind: One of `tests.support.daemons.DAEMON_KINDS`.
        engine: ``relay`` or ``pyfuse3``.
        cache: Cache mode of the mounts.
        mounts: How many.
        options: More arguments of each mount.
        writeback: Keep written data here for a while, and have the daemon accept that.
        xattr: Whether the daemon serves extended attributes.
        daemon_cache: What the daemon would have cached: ``none``, ``auto`` or ``always``.
        daemon_options: More arguments of the daemon, as its kind spells them.
        expected_complaint: Of the mounts, see `start_mount`.
    """
    words = [*options, *(["--writeback"] if writeback else [])]
    names = [f"mnt{number}" for number in range(mounts)]
    with quick_folders("share", "host", *names) as (host, *paths), ExitStack() as stack:
        shared = Shared(kind, engine, cache, host, [], [])
        for path in paths:
            if kind != "bundled" or not shared.daemons:
                shared.daemons.append(
                    stack.enter_context(
                        start_daemon(
                            kind,
                            shared.host,
                            cache=daemon_cache,
                            xattr=xattr,
                            writeback=writeback,
                            extra=daemon_options,
                        )
                    )
                )
            socket = shared.daemons[-1].socket
            shared.mounts.append(
                stack.enter_context(
                    start_mount(
                        path,
                        socket,
                        cache=cache,
                        engine=engine,
                        options=words,
                        expected_complaint=expected_complaint,
                    )
                )
            )
        yield shared


def messages(mount: Mount) -> Counter[str]:
    """Return how many messages a mount has sent so far, by opcode; forgets are not counted.

    They are sent when the kernel is short of memory and at other moments of its choosing.
    """
    rows = read_status(str(mount.path))["requests"]
    return Counter(
        {
            name: row["count"]
            for name, row in rows.items()
            if name not in ("FORGET", "BATCH_FORGET", "INTERRUPT")
        }
    )
