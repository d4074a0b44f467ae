"""Random operations in each mode, with and without write-back, by both engines.

More steps, and another seed: ``VFSMOUNT_FSX_STEPS=1000000 VFSMOUNT_FSX_SEED=7``.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.fsx import Exerciser
from tests.support.daemons import require_daemon
from tests.support.namespace import small_readahead
from tests.support.shares import open_shared

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

STEPS = int(os.environ.get("VFSMOUNT_FSX_STEPS", "2000"))
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


@pytest.mark.parametrize(
    ("kind", "engine", "mode", "writeback"),
    [
        pytest.param(
            *site,
            marks=[] if site[0] == "bundled" else [pytest.mark.needs_daemon],
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
