"""Where a daemon is known to answer otherwise than its host directory, and why.

This is the only place for such knowledge. A row must be true: a daemon that stops deviating makes
its test fail, and so does a row that no test uses.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEVIATIONS", "Deviation", "known_deviation"]


class Deviation(NamedTuple):
    """One known difference.

    Attributes:
        case: Name of the case, as the test gives it.
        kinds: Daemons that it concerns.
        ways: How the tree is reached: ``session``, or engine and cache mode: ``relay-none``.
        error: What comes instead: an error's name, or "" for success.
        reason: Why, for the reader.
    """

    case: str
    kinds: tuple[str, ...]
    ways: tuple[str, ...]
    error: str
    reason: str


_SESSION = ("session",)
_MOUNTED = ("pyfuse3-none", "pyfuse3-auto", "relay-none", "relay-auto")

DEVIATIONS = (
    Deviation(
        "unlink a missing name",
        ("c",),
        _SESSION,
        "EIO",
        "virtiofsd (C) looks the name up first and reports that failure as EIO; mounted, the "
        "kernel's own lookup says ENOENT before",
    ),
    Deviation(
        "rmdir a missing name",
        ("c",),
        _SESSION,
        "EIO",
        "as unlink",
    ),
    Deviation(
        "rename a missing name",
        ("c",),
        _SESSION,
        "EIO",
        "as unlink",
    ),
    Deviation(
        "unlink below a file",
        ("c",),
        _SESSION,
        "EIO",
        "as unlink",
    ),
    Deviation(
        "unlink a name too long",
        ("c",),
        _SESSION,
        "EIO",
        "as unlink",
    ),
    Deviation(
        "rmdir a name too long",
        ("c",),
        _SESSION,
        "EIO",
        "as unlink",
    ),
    Deviation(
        "readlink a file",
        ("c", "rust"),
        _SESSION,
        "ENOENT",
        "readlinkat(2) of an O_PATH descriptor that is no symlink says so; mounted, the kernel "
        "never sends READLINK for a file",
    ),
    Deviation(
        "create by a supplementary group",
        ("c",),
        (*_SESSION, *_MOUNTED),
        "EACCES",
        "virtiofsd (C) knows no CREATE_SUPP_GROUP: it makes files with the caller's uid and gid, "
        "and no other group",
    ),
    Deviation(
        "remove what was replaced at the host",
        ("c",),
        ("pyfuse3-auto", "relay-auto"),
        "EIO",
        "virtiofsd (C) removes and renames only what the guest has looked up; within the timeout "
        "the guest knows the file that had the name before",
    ),
    Deviation(
        "access",
        ("c",),
        _SESSION,
        "ENOSYS",
        "virtiofsd (C) has no ACCESS: the guest checks permissions",
    ),
    Deviation(
        "locks",
        ("c", "rust"),
        _SESSION,
        "ENOSYS",
        "virtiofsd (C) has locks when it is told to, the one in Rust has none; mounted, the kernel "
        "keeps them then",
    ),
    Deviation(
        "flock locks",
        ("rust",),
        _SESSION,
        "ENOSYS",
        "as locks; virtiofsd (C) says yes to these and has none",
    ),
    Deviation(
        "a file without a name",
        ("c", "rust"),
        _SESSION,
        "ENOSYS",
        "virtiofsd has no TMPFILE",
    ),
    Deviation(
        "a file without a name",
        ("c", "rust"),
        _MOUNTED,
        "ENOTSUP",
        "the same, as the kernel tells it",
    ),
    Deviation(
        "a file without a name",
        ("bundled",),
        ("pyfuse3-none", "pyfuse3-auto"),
        "ENOTSUP",
        "pyfuse3 has no handler for TMPFILE",
    ),
)


def known_deviation(case: str, kind: str, way: str) -> Deviation | None:
    """Return the row for a case on a daemon, if there is one."""
    return next(
        (row for row in DEVIATIONS if row.case == case and kind in row.kinds and way in row.ways),
        None,
    )
