"""The cache mode as numbers: how long what may be believed, and who keeps file contents.

One immutable object is made when the mount starts; whoever answers the kernel reads it.

    mode     names, attributes, absent names   contents
    none     never                             never: direct I/O
    auto     ``timeout`` seconds               while open; dropped when an open finds them changed
    always   for ever                          kept across opens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FOREVER", "MODES", "CachePolicy"]

#: Seconds that stand for "never expires": 31 years, which the kernel's jiffies can still count.
FOREVER: Final = 1e9

#: Names of the modes, default first.
MODES: Final = ("auto", "none", "always")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What one mount caches.

    Attributes:
        name: The mode.
        entry_timeout: Validity of a name that exists, seconds.
        attr_timeout: Validity of attributes, seconds.
        negative_timeout: Validity of "no such name", seconds; 0 is not to remember it.
        direct_io: Reads and writes bypass the kernel's page cache.
        keep_cache: An open keeps the pages that are there.
        writeback: The kernel may keep written pages for a while.
    """

    name: str
    entry_timeout: float
    attr_timeout: float
    negative_timeout: float
    direct_io: bool
    keep_cache: bool
    writeback: bool

    @classmethod
    def for_mode(cls, mode: str, timeout: float = 1.0, writeback: bool = False) -> CachePolicy:
        """Return the policy of a mode.

        Args:
            mode: One of MODES.
            timeout: Seconds of validity in mode ``auto``.
            writeback: Has no effect in mode ``none``, whose writes are at the host on return.
        """
        if mode == "none":
            return cls(mode, 0.0, 0.0, 0.0, direct_io=True, keep_cache=False, writeback=False)
        if mode == "always":
            return cls(
                mode,
                FOREVER,
                FOREVER,
                FOREVER,
                direct_io=False,
                keep_cache=True,
                writeback=writeback,
            )
        if mode == "auto":
            return cls(
                mode,
                timeout,
                timeout,
                timeout,
                direct_io=False,
                keep_cache=False,
                writeback=writeback,
            )
        raise ValueError(f"no cache mode {mode!r}; there are {', '.join(MODES)}")
