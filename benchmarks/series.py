"""The tables and the bars: what is compared with what, and what has to come out.

Both are data. A new comparison is a row here; a new way to mount is a row in ``subjects``, a new
thing to do a row in ``operations``.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.operations import FIRST_READ, OPERATIONS, RSS_CHURN, RSS_CROWD, RSS_IDLE, WIDE
from benchmarks.subjects import DAX_ONLY, SUBJECTS, TREES_ONLY
from benchmarks.trees import EXERCISES, TREE_ROWS

__all__ = ["BARS", "DEFAULT", "SERIES", "Bar", "Series"]

CALLED = tuple(name for name in SUBJECTS if name not in TREES_ONLY | DAX_ONLY)
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
        churn: Whether thousands of files come and go at the end.
    """

    name: str
    cache: str
    warm: bool
    peer: str
    subjects: tuple[str, ...]
    operations: tuple[str, ...]
    pinned: bool = True
    commands: bool = False
    churn: bool = True


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
        other: Which value of the peer's, if it is another quantity.
    """

    series: str
    subject: str
    quantity: str
    limit: float
    peer: str = ""
    other: str = ""


PYFUSE3_BUNDLED = "vfsmount-bundled-pyfuse3"
RELAY_BUNDLED = "vfsmount-bundled-relay"

#: Operations of the pinned tables: several processes mean something on several processors only, and
#: pyfuse3 cannot map what the kernel must not keep.
ALONE = tuple(name for name in OPERATIONS if name not in ("read_4k_many", "map_8b", WIDE))

SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        Series("uncached", "none", False, "passthroughfs", CALLED, ALONE),
        Series(
            "cached",
            "auto",
            True,
            "passthrough_ll",
            CALLED,
            ("stat", "lookup_miss", "open_read_close", "readdir_stat", "read_4k", "read_1m"),
        ),
        Series(
            "unpinned",
            "none",
            False,
            "passthrough_ll",
            ("passthrough_ll", "vfsmount-rust", "vfsmount-rust-pyfuse3"),
            (
                "stat",
                "open_read_close",
                "read_4k",
                "read_4k_many",
                "write_4k",
                "read_1m",
                "write_1m",
            ),
            pinned=False,
            churn=False,
        ),
        # No page is kept here, so the calls of the warm-up map the file and no more.
        Series(
            "dax",
            "none",
            True,
            f"{PYFUSE3_BUNDLED}-off",
            ("native", *(f"{PYFUSE3_BUNDLED}-{mark}" for mark in ("off", "dax", "narrow"))),
            ("read_4k", WIDE, "write_4k", "read_1m", "write_1m"),
            churn=False,
        ),
        # The kernel reads, writes and maps by itself. Files have been opened before.
        Series(
            "passthrough",
            "auto",
            True,
            "native",
            ("native", *(f"{RELAY_BUNDLED}-{mark}" for mark in ("off", "default", "dax"))),
            (
                "open_read_close",
                "read_4k",
                "write_4k",
                "read_1m",
                "write_1m",
                "map_8b",
            ),
            churn=False,
        ),
        # Small files that nobody has opened before.
        Series(
            "once",
            "auto",
            False,
            f"{RELAY_BUNDLED}-off",
            ("native", *(f"{RELAY_BUNDLED}-{mark}" for mark in ("off", "default", "dax"))),
            ("open_read_close", "create"),
            churn=False,
        ),
        Series(
            "trees",
            "auto",
            False,
            "passthrough_ll",
            (*SHOWN, "vfsmount-rust-plain"),
            TREE_ROWS,
            commands=True,
        ),
        Series("fsx", "auto", False, "passthrough_ll", SHOWN, EXERCISES, commands=True),
    )
}

#: What is run unless series are named: the others take minutes of their own.
DEFAULT = frozenset({"uncached", "cached"})

METADATA = tuple(operation.name for operation in OPERATIONS.values() if operation.metadata)

RELAY = "vfsmount-rust"
PYFUSE3 = "vfsmount-rust-pyfuse3"
BUNDLED = "vfsmount-bundled"
C_PEER = "passthrough_ll"


def _beside_passthroughfs(subject: str) -> tuple[Bar, ...]:
    """What each engine has to reach beside the Python peer."""
    return (
        Bar("uncached", subject, "read_4k", 1.4, "passthroughfs"),
        *(Bar("uncached", subject, name, 1.6, "passthroughfs") for name in METADATA),
        Bar("uncached", subject, "read_1m", 0.8, "passthroughfs"),
        Bar("uncached", subject, "write_1m", 0.8, "passthroughfs"),
        Bar("uncached", subject, RSS_CHURN.name, 80),
    )


BARS: tuple[Bar, ...] = (
    *_beside_passthroughfs(PYFUSE3),
    *_beside_passthroughfs(RELAY),
    # The relay beside the C peer.
    Bar("uncached", RELAY, "read_4k", 2.2, C_PEER),
    Bar("uncached", RELAY, "read_4k", 0.4, PYFUSE3),
    *(
        Bar("uncached", RELAY, name, 2.5, C_PEER)
        for name in METADATA
        if name not in ("mkdir", "rmdir")
    ),
    Bar("uncached", RELAY, "read_1m", 0.9, C_PEER),
    Bar("uncached", RELAY, "write_1m", 0.9, C_PEER),
    *(Bar("uncached", BUNDLED, name, 2.5, RELAY) for name in (*METADATA, "read_4k", "write_4k")),
    Bar("uncached", BUNDLED, "read_1m", 0.8, RELAY),
    Bar("uncached", BUNDLED, "write_1m", 0.8, RELAY),
    Bar("cached", RELAY, "stat", 1.1, C_PEER),
    Bar("cached", RELAY, "read_4k", 1.1, C_PEER),
    Bar("unpinned", RELAY, "read_4k", 2.2, C_PEER),
    # 1.5 times the throughput of one process.
    Bar("unpinned", RELAY, "read_4k_many", 1 / 1.5, RELAY, "read_4k"),
    Bar("uncached", RELAY, FIRST_READ.name, 300),
    Bar("uncached", RELAY, RSS_IDLE.name, 40),
    Bar("uncached", RELAY, RSS_CROWD.name, 45),
    Bar("dax", f"{PYFUSE3_BUNDLED}-dax", "read_4k", 0.85, f"{PYFUSE3_BUNDLED}-off"),
    # A window of a quarter of the file: 0.9 times the speed.
    Bar("dax", f"{PYFUSE3_BUNDLED}-narrow", WIDE, 1 / 0.9, f"{PYFUSE3_BUNDLED}-off"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "read_4k", 1.15, "native"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "write_4k", 1.15, "native"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "read_1m", 0.9, "native"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "write_1m", 0.9, "native"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "map_8b", 1.1, "native"),
    Bar("passthrough", f"{RELAY_BUNDLED}-dax", "open_read_close", 1.3, f"{RELAY_BUNDLED}-off"),
    Bar("once", f"{RELAY_BUNDLED}-default", "open_read_close", 1.1, f"{RELAY_BUNDLED}-off"),
    Bar("once", f"{RELAY_BUNDLED}-default", "create", 1.1, f"{RELAY_BUNDLED}-off"),
    *(
        Bar("trees", RELAY, row, 1.15 if row.endswith("_warm") else 2.5, C_PEER)
        for row in TREE_ROWS
    ),
    *(Bar("trees", RELAY, row, 1.0, "sshfs") for row in TREE_ROWS),
)
