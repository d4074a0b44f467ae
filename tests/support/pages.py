"""What relies on pages that the kernel keeps of files, directories and links: it may drop any page.

Not only when memory is short: on a machine that gives cold memory back by itself (DAMON, as in
virtual machines whose host wants it) pages go in bursts, now and then some that were read a
millisecond ago. A program that then reads them again costs messages that nothing here can save.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["while_pages_stay"]

T = TypeVar("T")

_REFRESH = Path("/proc/sys/vm/stat_refresh")
_COUNTERS = Path("/proc/vmstat")
_TRIES = 20


def while_pages_stay(case: Callable[[], T]) -> T:
    """Do something from its beginning; anew if the kernel has dropped pages by itself meanwhile.

    Whatever has come of it: only the kernel's own counters decide. They have what it took back for
    want of memory, because it looked cold, or because somebody asked for that (``drop_caches``);
    they do not have what a file system throws away because we told it to.
    """
    for _ in range(_TRIES - 1):
        before = _dropped()
        result = case()
        if _dropped() == before:
            return result
    return case()


def _dropped() -> int:
    """Pages that were read again, or went with their inodes, on the whole machine since it began.

    Each processor counts for itself, for up to a second; only root can have them all add up at
    once. Others do without: what they see would be from before.
    """
    try:
        _REFRESH.read_bytes()
        lines = _COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    rows = dict(line.split() for line in lines)
    return sum(int(rows.get(name, 0)) for name in ("workingset_refault_file", "pginodesteal"))
