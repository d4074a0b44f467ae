"""vfsmount is killed while somebody writes: what fsync has returned for is at the host.

A writer fills slots of a file with numbered pages and syncs now and then. Each slot must hold,
whole, a number that is at least the one it had at the last fsync, and at most the last one written.
When the process dies is decided by a seed: so many writes, and so many microseconds into the next.
More seeds: ``VFSMOUNT_KILLS=100``.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import Mount, start_mount

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

KILLS = int(os.environ.get("VFSMOUNT_KILLS", "2"))

SLOTS = 64
SLOT = 4096
FILES = 3
#: Most writes before the kill.
LONGEST = 600
#: Microseconds; some writes' worth.
LATEST = 3000


class Writer:
    """Writes numbered pages until it cannot any more.

    Attributes:
        synced: By file and slot, the number that was there when fsync last returned.
        written: By file and slot, the last number that was given to write(2).
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._files = [
            os.open(folder / f"file-{number}", os.O_RDWR | os.O_CREAT) for number in range(FILES)
        ]
        self.synced = [[0] * SLOTS for _ in self._files]
        self.written = [[0] * SLOTS for _ in self._files]

    def step(self, number: int) -> None:
        """Write one page, and now and then sync its file."""
        file = self._random.randrange(FILES)
        slot = self._random.randrange(SLOTS)
        self.written[file][slot] = number
        os.pwrite(self._files[file], page(number), slot * SLOT)
        if self._random.random() < 0.1:
            state = list(self.written[file])
            os.fsync(self._files[file])
            self.synced[file] = state

    def close(self) -> None:
        for fd in self._files:
            with suppress(OSError):  # the process behind it is dead
                os.close(fd)


def page(number: int) -> bytes:
    return struct.pack("<I", number) * (SLOT // 4)


def check(folder: Path, writer: Writer) -> int:
    """Compare with what is at the host; return how many slots are known to be synced."""
    for number, (synced, written) in enumerate(zip(writer.synced, writer.written, strict=True)):
        content = (folder / f"file-{number}").read_bytes()
        for slot, (least, most) in enumerate(zip(synced, written, strict=True)):
            found = content[slot * SLOT : (slot + 1) * SLOT]
            if not found and not least:
                continue  # the file ends before it
            value = struct.unpack_from("<I", found)[0]
            where = f"file {number}, slot {slot}: {value}, synced {least}, written {most}"
            assert found == page(value), f"{where}: torn"
            assert least <= value <= most, where
    return sum(number > 0 for synced in writer.synced for number in synced)


def write_until_killed(mount: Mount, seed: int) -> Writer:
    """Write, and kill the mount's process meanwhile."""
    moment = random.Random(seed)
    last, delay = moment.randint(20, LONGEST), moment.randint(0, LATEST) / 1e6
    writer = Writer(mount.path, seed)
    killer = threading.Timer(delay, mount.process.kill)
    number = 0
    try:
        while mount.process.returncode is None:
            number += 1
            if number == last:
                killer.start()
            writer.step(number)
            if number > last and not killer.is_alive():
                mount.process.wait(10)
    except OSError:
        pass  # ENOTCONN and the like: it is dead
    finally:
        writer.close()
    killer.join()
    mount.process.wait(10)
    assert number >= last, f"vfsmount ended by itself:\n{mount.log}"
    subprocess.run(["umount", mount.path], check=True, timeout=10)
    return writer


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("writeback", [False, True], ids=["through", "writeback"])
@pytest.mark.parametrize("engine", ["relay", "pyfuse3"])
@pytest.mark.parametrize("kind", ["bundled", pytest.param("rust", marks=pytest.mark.needs_daemon)])
def test_synced_is_at_the_host(kind: str, engine: str, writeback: bool, seed: int) -> None:
    options = ["--writeback"] * writeback
    with quick_folders("killed", "host", "mnt") as (host, path):
        with (
            start_daemon(kind, host, writeback=writeback) as daemon,
            start_mount(
                path, daemon.socket, engine=engine, options=options, expected_status=-9
            ) as mount,
        ):
            writer = write_until_killed(mount, seed)
        # The daemon is gone, too: nothing is written any more.
        synced = check(host, writer)
    print(f"{synced} slots synced")
