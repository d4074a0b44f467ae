"""Whole commands on trees of small files: what they are, what they work on, how they are timed.

A command's first run is cold, on a mount made for it; the run right after that is warm. The trees
are the same in every run of the benchmark, are made once, and are shown by all subjects; what a
command writes goes to a folder of its own and is removed from outside. What each prints is counted:
a subject that lists or finds less is not faster.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.operations import Quantity
from benchmarks.peers import Unavailable
from benchmarks.processes import Failure, Hung

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "EXERCISES",
    "TREES_MEBIBYTES",
    "TREE_QUANTITIES",
    "TREE_ROWS",
    "WORKLOADS",
    "Workload",
    "lay_out_trees",
    "run_workload",
]

FOLDERS, FILES = 50, 100  # in each
TRACKED_FOLDERS = 30
NEEDLES = 50
BIG_MEBIBYTES = 256
#: The trees, and copies of the big file that are there at once.
TREES_MEBIBYTES = 4 * BIG_MEBIBYTES + 150
DEADLINE = 60.0
STEPS = int(os.environ.get("VFSMOUNT_FSX_STEPS", "1000000"))
# In the past, so that git trusts its index; the same everywhere, whatever copies or shows the tree.
WRITTEN_AT = 1_577_880_000

ENVIRONMENT = {
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    # `git status` would write the index otherwise, the first time.
    "GIT_OPTIONAL_LOCKS": "0",
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "bench"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "bench@localhost"),
    **dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), f"{WRITTEN_AT} +0000"),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One command.

    Attributes:
        name: Its name on the command line.
        title: Its name in the tables.
        words: The command: ``{root}`` is the tree as the subject shows it, ``{out}`` an empty
            folder below it, ``{away}`` an empty folder outside, ``{given}`` what `lay_out_trees`
            keeps outside.
        lines: What it prints.
        statuses: How it may end.
        again: Whether it is run a second time, warm.
        deadline: Seconds for one run.
        mebibytes: Fresh memory that it takes, about; see `_warm_memory`.
    """

    name: str
    title: str
    words: tuple[str, ...]
    lines: int = 0
    statuses: tuple[int, ...] = (0,)
    again: bool = True
    deadline: float = DEADLINE
    mebibytes: int = 0

    @property
    def rows(self) -> dict[str, Quantity]:
        """What it yields, cold first."""
        if not self.again:
            return {self.name: Quantity(self.name, self.title, "ms")}
        return {
            f"{self.name}_{state}": Quantity(f"{self.name}_{state}", f"{self.title}, {state}", "ms")
            for state in ("cold", "warm")
        }


_COMMANDS = (
    Workload("find", "find", ("find", "{root}/find"), 1 + FOLDERS * (1 + FILES)),
    Workload(
        "ls", "ls -lR", ("ls", "-lR", "{root}/ls"), 2 + FOLDERS * (1 + 3 + FILES)
    ),
    Workload("git", "git status", ("git", "-C", "{root}/git", "status", "--porcelain")),
    Workload("tar", "tar x of 5,000 files", ("tar", "-xf", "{given}/small.tar", "-C", "{out}")),
    Workload("grep", "grep -r", ("grep", "-r", "needle", "{root}/grep"), NEEDLES),
    Workload(
        "cp_from", "cp of 256 MiB from it", ("cp", "{root}/big/file", "{away}/copy"),
        mebibytes=3 * BIG_MEBIBYTES,
    ),
    Workload(
        "cp_to", "cp of 256 MiB to it", ("cp", "{given}/file", "{out}/copy"),
        mebibytes=3 * BIG_MEBIBYTES,
    ),
)  # fmt: skip

#: Timed once each, an hour at most, and only when asked for.
_EXERCISES = (
    Workload(
        "fsx", f"{STEPS:,} random steps",
        (sys.executable, "-m", "benchmarks.fsx", "{out}", "--steps", str(STEPS)),
        lines=1, again=False, deadline=3600.0,
    ),
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (*_COMMANDS, *_EXERCISES)}
TREE_ROWS = tuple(row for workload in _COMMANDS for row in workload.rows)
EXERCISES = tuple(row for workload in _EXERCISES for row in workload.rows)
TREE_QUANTITIES: dict[str, Quantity] = {
    name: quantity for workload in WORKLOADS.values() for name, quantity in workload.rows.items()
}


@cache
def lay_out_trees(work: Path) -> Path:
    """Make the trees below a folder, once.

    Returns:
        The folder to show; beside it are ``given`` and ``away``.

    Raises:
        Unavailable: there is no git.
    """
    root = work / "trees"
    given = work / "given"
    for folder in (root, root / "out", root / "stat", given, work / "away"):
        folder.mkdir()
    (root / "stat" / "f00000").write_bytes(bytes(4096))  # the first read of a mount
    for number, name in enumerate(("find", "ls", "grep", "git", "tar")):
        home = given / "small" if name == "tar" else root / name
        folders = TRACKED_FOLDERS if name == "git" else FOLDERS
        _plant(home, folders, random.Random(number))
    _commit(root / "git")
    with tarfile.open(given / "small.tar", "w") as archive:
        archive.add(given / "small", "small")
    (root / "big").mkdir()
    (given / "file").write_bytes(random.Random(5).randbytes(1 << 20) * BIG_MEBIBYTES)
    shutil.copyfile(given / "file", root / "big" / "file")
    return root


def _plant(home: Path, folders: int, dice: random.Random) -> None:
    """Small files of text, 100 bytes to 4 KiB, some with a word that no other has."""
    home.mkdir()
    words = [f"{dice.getrandbits(40):x}" for _ in range(500)]
    text = "".join(f"{' '.join(dice.choices(words, k=8))}\n" for _ in range(500))
    every = folders * FILES // NEEDLES
    for number in range(folders * FILES):
        folder = home / f"folder{number // FILES:03}"
        folder.mkdir(exist_ok=True)
        start = dice.randrange(len(text) - 4096)
        content = text[start : start + dice.randrange(100, 4096)]
        path = folder / f"file{number:05}.txt"
        path.write_text(f"{number}\n{content}\n" + "needle\n" * (number % every == 0))
        os.utime(path, (WRITTEN_AT, WRITTEN_AT))


def _commit(home: Path) -> None:
    # Inode numbers and change times are not the same through every filesystem (SFTP has neither),
    # and git would read all files of those again.
    settings = ["-c", "core.checkStat=minimal", "-c", "core.trustctime=false"]
    commands = (
        ["init", "-q", "."],
        ["config", "core.checkStat", "minimal"],
        ["config", "core.trustctime", "false"],
        [*settings, "add", "."],
        [*settings, "commit", "-q", "-m", "All of it"],
    )
    for words in commands:
        try:
            subprocess.run(
                ["git", *words], cwd=home, env=os.environ | ENVIRONMENT, check=True,
                capture_output=True, timeout=DEADLINE,
            )  # fmt: skip
        except FileNotFoundError:
            raise Unavailable("git is not installed") from None


def run_workload(workload: Workload, work: Path, root: Path, who: str) -> dict[str, float]:
    """Run a command on a mounted tree, cold and then warm.

    Args:
        workload: What to run.
        work: The folder that `lay_out_trees` was given.
        root: The tree, as the subject shows it.
        who: A name for the folder of what is written.

    Returns:
        Milliseconds by the names of `Workload.rows`.

    Raises:
        Hung: it took longer than its deadline.
        Failure: it failed, or printed something else than it should.
    """
    took = {}
    for row in workload.rows:
        name = f"{who}-{row}"
        out, away = work / "trees" / "out" / name, work / "away" / name
        for folder in (out, away):
            folder.mkdir()
        places = {"root": root, "out": root / "out" / name, "away": away, "given": work / "given"}
        words = [word.format(**places) for word in workload.words]
        try:
            took[row] = _run(workload, words, work / "output")
        finally:
            for folder in (out, away):
                shutil.rmtree(folder, ignore_errors=True)
    return took


def _warm_memory(mebibytes: int) -> None:
    """Have the machine below give us memory before the clock starts.

    A virtual machine gives free pages back to its host, and has to ask for each again: the first
    `cp` of a round took 0.25 s, and a later one up to 2.5, whoever's turn it was.
    """
    if not mebibytes:
        return
    with mmap.mmap(-1, mebibytes << 20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def _run(workload: Workload, words: Sequence[str], printed: Path) -> float:
    _warm_memory(workload.mebibytes)
    # To a file: some commands do less when they write to /dev/null, or when a pipe is full.
    with printed.open("wb") as output:
        begun = time.perf_counter()
        command = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE,
            env=os.environ | ENVIRONMENT, cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        try:
            _, complaint = command.communicate(timeout=workload.deadline)
        except subprocess.TimeoutExpired:
            raise Hung(f"{workload.name}: not done in {workload.deadline:g} s") from None
        finally:
            took = time.perf_counter() - begun
            command.kill()
    if command.returncode not in workload.statuses:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise Failure(f"{workload.name}: status {command.returncode}: {' '.join(last)}")
    lines = printed.read_bytes().count(b"\n")
    if lines != workload.lines:
        raise Failure(f"{workload.name}: printed {lines} lines, not {workload.lines}")
    return took * 1000
