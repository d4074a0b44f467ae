"""The tables and the bars: what is compared with what, and what has to come out.

Both are data. A new comparison is a row here; a new way to mount is a row in ``subjects``, a new
thing to do a row in ``operations``.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.operations import OPERATIONS, RSS_CHURN
from benchmarks.subjects import SUBJECTS, TREES_ONLY
from benchmarks.trees import EXERCISES, TREE_ROWS

__all__ = ["BARS", "DEFAULT", "SERIES", "Bar", "Series"]

CALLED = tuple(name for name in SUBJECTS if name not in TREES_ONLY)
SHOWN = (
    "native", "bindfs", "passthrough_ll", "sshfs", "vfsmount-rust", "vfsmount-rust-pyfuse3",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """One table: subjects under the same conditions.

    Attributes:
        name: Its name on the command line, in bars and in the JSON file.
        cache: The cache mode of every subject that has one, in vfsmount's words.
        warm: Whether each operation's calls were made once before the clock started.
        peer: The subject that the others are divided by.
        subjects: Names, in order of columns.
        operations: Names, in order of rows.
        pinned: Whether everything runs on one processor.
        commands: Whether the rows are those of `trees`, whole commands, instead of operations.
    """

    name: str
    cache: str
    warm: bool
    peer: str
    subjects: tuple[str, ...]
    operations: tuple[str, ...]
    pinned: bool = True
    commands: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that has to come out.

    Attributes:
        series: Where it is measured.
        subject: Who has to clear it.
        quantity: What.
        limit: At most (at least, for a throughput) this many times the peer's value; without a
            peer, in the quantity's unit.
        peer: Whose value counts as 1; empty for an absolute limit.
    """

    series: str
    subject: str
    quantity: str
    limit: float
    peer: str = ""


SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        Series("uncached", "none", False, "passthroughfs", CALLED, tuple(OPERATIONS)),
        Series(
            "cached",
            "auto",
            True,
            "passthrough_ll",
            CALLED,
            ("stat", "lookup_miss", "open_read_close", "readdir_stat", "read_4k", "read_1m"),
        ),
        Series("trees", "auto", False, "passthrough_ll", SHOWN, TREE_ROWS, commands=True),
        Series("fsx", "auto", False, "passthrough_ll", SHOWN, EXERCISES, commands=True),
    )
}

#: What is run unless series are named: the others take minutes of their own.
DEFAULT = frozenset({"uncached", "cached"})

METADATA = tuple(operation.name for operation in OPERATIONS.values() if operation.metadata)

BARS: tuple[Bar, ...] = (
    Bar("uncached", "vfsmount-rust", "read_4k", 1.4, "passthroughfs"),
    *(Bar("uncached", "vfsmount-rust", name, 1.6, "passthroughfs") for name in METADATA),
    Bar("uncached", "vfsmount-rust", "read_1m", 0.8, "passthroughfs"),
    Bar("uncached", "vfsmount-rust", "write_1m", 0.8, "passthroughfs"),
    Bar("uncached", "vfsmount-rust", RSS_CHURN.name, 80),
    *(
        Bar("trees", "vfsmount-rust", row, 1.15 if row.endswith("_warm") else 2.5, "passthrough_ll")
        for row in TREE_ROWS
    ),
    *(Bar("trees", "vfsmount-rust", row, 1.0, "sshfs") for row in TREE_ROWS),
)
