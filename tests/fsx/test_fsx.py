"""Random operations in each mode, with and without write-back, by both engines.

More steps, and another seed: ``VFSMOUNT_FSX_STEPS=1000000 VFSMOUNT_FSX_SEED=7``.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from benchmarks.fsx import Exerciser
from tests.support.daemons import daemon_marks, require_daemon
from tests.support.namespace import small_readahead
from tests.support.shares import open_shared
from vfsmount.client.mount.status import read_status

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

STEPS = int(os.environ.get("VFSMOUNT_FSX_STEPS", "2000"))
#: How often the two files of a window take turns.
TURNS = 20
SEED = int(os.environ.get("VFSMOUNT_FSX_SEED", "1"))

ENGINES = ("relay", "pyfuse3")
# The real daemons add nothing to what happens to bytes here, so one mode is enough for each.
SITES = [
    *(
        ("bundled", engine, mode, writeback)
        for engine in ENGINES
        for mode in ("none", "auto", "always")
        for writeback in (False, True)
        if mode != "none" or not writeback
    ),
    ("rust", "relay", "auto", False),
    ("rust", "pyfuse3", "auto", True),
    ("c", "relay", "auto", True),
]
#: The same with a window: for every file, and with room for one of two.
WINDOWS = [
    ("relay", "auto", "1G"),
    ("relay", "none", "1G"),
    ("pyfuse3", "none", "2M"),
]


@pytest.mark.parametrize(
    ("kind", "engine", "mode", "writeback"),
    [
        pytest.param(
            *site,
            marks=daemon_marks(site[0]),
            id="-".join(site[:3]) + "-writeback" * site[3],
        )
        for site in SITES
    ],
)
def test_random_operations(kind: str, engine: str, mode: str, writeback: bool) -> None:
    require_daemon(kind)
    with open_shared(kind, engine, mode, writeback=writeback) as shared:
        host, folder = shared.folder()
        exerciser = Exerciser(folder, host, SEED, through=not writeback)
        try:
            exerciser.run(STEPS)
        finally:
            exerciser.close()
    print(exerciser.counts, exerciser.refused)


@pytest.mark.parametrize("writeback", [False, True])
def test_random_operations_with_pages_kept_here(writeback: bool) -> None:
    with small_readahead():
        test_random_operations("bundled", "pyfuse3", "auto", writeback)


@pytest.mark.parametrize(("engine", "mode", "window"), WINDOWS)
def test_with_a_window(engine: str, mode: str, window: str) -> None:
    with ExitStack() as stack:
        options = ["--dax", window]
        shared = stack.enter_context(open_shared("bundled", engine, mode, options=options))
        exercisers = []
        for seed in (SEED, SEED + 1):
            host, folder = shared.folder()
            exercisers.append(Exerciser(folder, host, seed, through=True))
            stack.callback(exercisers[-1].close)
        for _ in range(TURNS):
            for one in exercisers:
                one.run(STEPS // TURNS // 2)
        dax = read_status(str(shared.mounts[0].path))["dax"]
    if engine == "pyfuse3":
        assert dax["reclaims"] + dax["bypassed"] > 0
