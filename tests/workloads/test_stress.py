"""Many processes at once, and how much memory that takes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import daemon_problem
from tests.workloads.conftest import ENGINES, open_share

if TYPE_CHECKING:
    from tests.workloads.conftest import Share

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

PROCESSES = 64
ROUNDS = 25
PATIENCE = 240
MIB = 1 << 20

#: Each process works on names of its own and on three that all fight for.
WORKER = """
import os, sys
folder, me, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.chdir(folder)
for turn in range(rounds):
    mine, moved = f"own-{me}-{turn}", f"moved-{me}-{turn}"
    with open(mine, "x") as file:
        file.write(f"{me} {turn}")
    os.rename(mine, moved)
    assert open(moved).read() == f"{me} {turn}"
    shared, other = f"shared-{turn % 3}", f"shared-{(turn + 1) % 3}"
    try:
        with open(shared, "x") as file:
            file.write("x")
    except FileExistsError:
        pass
    for change in (lambda: os.rename(shared, other), lambda: os.unlink(shared)):
        try:
            change()
        except FileNotFoundError:
            pass
    os.mkdir(f"d-{me}-{turn}")
    os.rename(moved, f"d-{me}-{turn}/file")
    if turn % 5:
        os.unlink(f"d-{me}-{turn}/file")
        os.rmdir(f"d-{me}-{turn}")
"""


def test_64_processes(share: Share) -> None:
    """Create, rename and unlink from 64 processes; what is left is what each of them left."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", WORKER, share.path, str(me), str(ROUNDS)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(PROCESSES)
    ]
    failures = []
    for process in processes:
        _, errors = process.communicate(timeout=PATIENCE)
        if process.returncode:
            failures.append(errors)
    assert not failures, failures[0]

    expected = {f"d-{me}-{turn}" for me in range(PROCESSES) for turn in range(0, ROUNDS, 5)}
    left = {name for name in os.listdir(share.path) if not name.startswith("shared-")}
    assert left == expected
    assert sorted(os.listdir(share.host)) == sorted(os.listdir(share.path))
    for name in expected:
        assert (share.path / name / "file").read_text() == name[2:].replace("-", " ")


@pytest.mark.parametrize("engine", ENGINES)
def test_memory(engine: str) -> None:
    """Idle under 60 MiB; after 10,000 files made, listed and removed under 80 MiB.

    It is the mount's memory, which does not depend on the daemon: the quickest one serves.
    """
    kind = next(kind for kind in ("c", "rust", "bundled") if not daemon_problem(kind))
    with open_share(kind, engine) as share:
        idle = share.mount.rss
        folder = share.path / "many"
        folder.mkdir()
        for number in range(10_000):
            os.mknod(folder / f"{number:05}", stat.S_IFREG | 0o600)
        with os.scandir(folder) as entries:
            assert sum(entry.stat().st_size == 0 for entry in entries) == 10_000
        most = share.mount.rss
        for number in range(10_000):
            os.unlink(folder / f"{number:05}")
        after = share.mount.rss
        folder.rmdir()
    print(
        f"{kind}, {engine}: idle {idle / MIB:.1f}, with files {most / MIB:.1f}, "
        f"after {after / MIB:.1f} MiB"
    )
    assert idle < 60 * MIB
    assert max(most, after) < 80 * MIB
