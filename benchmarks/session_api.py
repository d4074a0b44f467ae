"""Reads of the session API, by message and of mapped ranges, in turn; and who sends messages.

    python -m benchmarks.session_api [--cpu N]

Everything runs on one processor, on a file of 16 MiB on a tmpfs. Each figure is the median of the
rounds; in each round one kind follows the other, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import trio

import vfsmount
from benchmarks.processes import pin
from tests.support.daemons import start_daemon

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfsmount import Session

MIB = 1 << 20
FILE_SIZE = 16 * MIB
SIZES = {"4 KiB": 4096, "128 KiB": 128 << 10, "1 MiB": MIB}
ROUNDS = 9
CALLS = 64
ACCESSES = 100_000


async def _timed(guest: Session, nodeid: int, fh: int, size: int, *, view: bool) -> float:
    """Return the microseconds that a read takes on average."""
    read: Callable[[int, int, int, int], Awaitable[object]]
    read = guest.read_mapped if view else guest.read
    begun = perf_counter()
    for call in range(CALLS):
        await read(nodeid, fh, call * size % FILE_SIZE, size)
    return (perf_counter() - begun) / CALLS * 1e6


async def _compare(guest: Session, nodeid: int, fh: int) -> None:
    dax = guest.dax
    assert dax is not None
    print(f"{'':24}{'message':>12}{'mapped':>12}{'ratio':>10}")
    for view in (False, True):
        for title, size in SIZES.items():
            rounds = []
            for _ in range(ROUNDS):
                guest.dax = None
                message = await _timed(guest, nodeid, fh, size, view=view)
                guest.dax = dax
                assert await dax.map(nodeid, 0, FILE_SIZE, write=True)
                rounds.append((message, await _timed(guest, nodeid, fh, size, view=view)))
            name = f"{'read_mapped' if view else 'read'} {title}"
            columns = [median(column) for column in zip(*rounds, strict=True)]
            ratio = median(message / mapped for message, mapped in rounds)
            print(f"{name:24}{columns[0]:9.1f} us{columns[1]:9.1f} us{ratio:10.1f}")


async def _count(guest: Session, nodeid: int, fh: int) -> None:
    before = {name: row.count for name, row in guest.channel.statistics().requests.items()}
    numbers = random.Random(1)
    for call in range(ACCESSES):
        offset = numbers.randrange(FILE_SIZE - 4096)
        if call % 2:
            await guest.read(nodeid, fh, offset, 4096)
        else:
            await guest.write(nodeid, fh, offset, b"x" * 100)
    rows = guest.channel.statistics().requests
    sent = {name: row.count - before.get(name, 0) for name, row in rows.items()}
    counts = ", ".join(f"{sent.get(name, 0)} {name}" for name in ("READ", "WRITE", "GETXATTR"))
    print(f"{ACCESSES:,} accesses in mapped ranges: {counts}")


async def _run(socket: Path) -> None:
    async with vfsmount.connect(socket, dax=64 * MIB) as guest:
        entry = await guest.lookup(1, b"file")
        opened = await guest.open(entry.nodeid, os.O_RDWR)
        await _compare(guest, entry.nodeid, opened.fh)
        await _count(guest, entry.nodeid, opened.fh)
        await guest.release(entry.nodeid, opened.fh, os.O_RDWR)
        guest.forget(entry.nodeid)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session_api")
    parser.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)))
    pin(parser.parse_args().cpu)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder, "file")
        path.write_bytes(os.urandom(FILE_SIZE))
        with start_daemon("bundled", folder) as daemon:
            trio.run(_run, daemon.socket)


if __name__ == "__main__":
    main()
