"""What is measured: the operations, the quantities that come out, and the tree they work on.

This file owns the names. An operation is a row of the table below and a function of the same name
in ``load.c``; a new one needs both, and its files in `lay_out_tree` if it works on any.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CHURN",
    "CHURN_FILES",
    "CROWD",
    "CROWD_FILES",
    "FIRST_READ",
    "OPERATIONS",
    "QUANTITIES",
    "RSS_CHURN",
    "RSS_CROWD",
    "RSS_IDLE",
    "TREE_MEBIBYTES",
    "WIDE",
    "WIDE_MEBIBYTES",
    "Operation",
    "Quantity",
    "lay_out_tree",
    "make_crowd",
]

PAGE = 4096
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Quantity:
    """One number that a run yields.

    Attributes:
        name: Its name in bars and in the JSON file.
        title: Its name in the tables.
        unit: ``us`` (per call), ``MiB/s``, ``ms`` or ``MiB``.
    """

    name: str
    title: str
    unit: str

    @property
    def more_is_better(self) -> bool:
        return self.unit == "MiB/s"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the main tables.

    Attributes:
        quantity: What it yields; the name is also the operation's name in ``load.c``.
        count: Timed calls per round. Chosen so that the slowest subject needs a fifth of a second.
        metadata: Whether it is about names and attributes only.
    """

    quantity: Quantity
    count: int
    metadata: bool = False

    @property
    def name(self) -> str:
        return self.quantity.name


def _operation(name: str, title: str, count: int, *, metadata: bool = False) -> Operation:
    return Operation(Quantity(name, title, "us"), count, metadata)


def _throughput(name: str, title: str, mebibytes: int) -> Operation:
    return Operation(Quantity(name, title, "MiB/s"), mebibytes)


#: The operation that needs a file of `WIDE_MEBIBYTES`.
WIDE = "read_4k_wide"

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _operation("stat", "stat", 1000, metadata=True),
        _operation("lookup_miss", "lookup of an absent name", 1000, metadata=True),
        # Opens, reads 4 KiB and closes 4 KiB files.
        _operation("open_read_close", "open+read+close", 400, metadata=True),
        # Per entry, in a folder of LISTED entries.
        _operation("readdir_stat", "readdir+stat, per entry", 20, metadata=True),
        _operation("create", "create+close", 400, metadata=True),
        _operation("rename", "rename", 400, metadata=True),
        _operation("unlink", "unlink", 400, metadata=True),
        _operation("mkdir", "mkdir", 200, metadata=True),
        _operation("rmdir", "rmdir", 200, metadata=True),
        _operation("read_4k", "read 4 KiB, random", 4000),
        # Of a file four times as large as the window that it meets.
        _operation(WIDE, "read 4 KiB, random, of 256 MiB", 4000),
        # 8 processes at once; the time between two calls of anybody.
        _operation("read_4k_many", "read 4 KiB, random, by 8", 8000),
        _operation("write_4k", "write 4 KiB, random", 4000),
        _throughput("read_1m", "read 1 MiB, sequential", 64),
        _throughput("write_1m", "write 1 MiB, sequential", 64),
        _operation("map_8b", "1,000 loads and stores of 8 bytes, mapped", 1000),
    )
}

# Run in this order, the subject's memory is looked at after each.
CHURN = ("churn_create", "churn_list", "churn_remove")
CHURN_FILES = 10_000
#: A folder with a great many files, made behind the subject's back; its names are listed, once.
CROWD = "crowd_list"
CROWD_FILES = 100_000

FIRST_READ = Quantity("first_read", "start to first byte read", "ms")
RSS_IDLE = Quantity("rss_idle", "RSS idle", "MiB")
RSS_CHURN = Quantity(
    "rss_churn", f"RSS, highest of {CHURN_FILES:,} files created, listed, removed", "MiB"
)
RSS_CROWD = Quantity("rss_crowd", f"RSS after {CROWD_FILES:,} files listed", "MiB")

QUANTITIES: dict[str, Quantity] = {
    **{operation.name: operation.quantity for operation in OPERATIONS.values()},
    **{quantity.name: quantity for quantity in (FIRST_READ, RSS_IDLE, RSS_CHURN, RSS_CROWD)},
}

# Few enough for passthroughfs, which reads and stats the whole folder again for each reply of 25
# (older kernels) to 200 entries: in a large folder nothing else of it would be seen.
LISTED = 100
STATTED = 100
SPARE = 20  # UNTIMED in load.c: warm-up calls that use up a file each
DATA_MEBIBYTES = 64
WIDE_MEBIBYTES = 256
TREE_MEBIBYTES = 2 * DATA_MEBIBYTES + 4  # what a tree takes, without the wide file


def lay_out_tree(root: Path, *, wide: bool = False) -> None:
    """Make the files that every operation expects, directly, not through a subject's mount.

    Args:
        root: Where.
        wide: Whether ``WIDE`` will be run.
    """
    _make_files(root / "stat", STATTED, PAGE)
    _make_files(root / "listing", LISTED, 0)
    _make_files(root / "small", OPERATIONS["open_read_close"].count + SPARE, PAGE)
    for name in ("rename", "unlink"):
        _make_files(root / name, OPERATIONS[name].count + SPARE, 0)
    for name in ("create", "mkdir", "churn"):
        (root / name).mkdir()
    for number in range(OPERATIONS["rmdir"].count + SPARE):
        (root / "rmdir" / f"f{number:05}").mkdir(parents=True)
    (root / "data").mkdir()
    for name in ("read", "write"):
        _make_data(root / "data" / name, DATA_MEBIBYTES)
    if wide:
        _make_data(root / "data" / "wide", WIDE_MEBIBYTES)


def make_crowd(root: Path) -> None:
    """Make the folder of ``CROWD``, directly as well."""
    _make_files(root / "crowd", CROWD_FILES, 0)


def _make_files(folder: Path, count: int, size: int) -> None:
    folder.mkdir()
    content = os.urandom(size)
    for number in range(count):
        (folder / f"f{number:05}").write_bytes(content)


def _make_data(path: Path, mebibytes: int) -> None:
    mebibyte = os.urandom(MEBIBYTE)
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(mebibyte)
