"""The cache mode as numbers: how long what may be believed, and who keeps file contents.

One immutable object is made when the mount starts; whoever answers the kernel reads it.

    mode     names, attributes, absent names   contents                        listings
    none     never                             never: direct I/O               never
    auto     ``timeout`` seconds               while unchanged: each open      while unchanged,
                                               compares size, mtime and ctime  likewise; the relay
    always   for ever                          kept across opens               kept
    host     as the daemon says                as the daemon says              as the daemon says

Each of the four times can be set apart from the mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

__all__ = ["FOREVER", "IO_SIZE", "MODES", "CachePolicy"]

#: Seconds that stand for "never expires": 31 years, which the kernel's jiffies can still count.
FOREVER: Final = 1e9

#: What files say they are best read and written by (st_blksize), bytes; as with NFS and SMB, it is
#: about what goes in one message, and not what the host's disk has. ``cp`` of 256 MiB to the mount
#: sends WRITEs of 128 KiB by itself and takes 1.38 times as long as passthrough_ll, with this 1.05,
#: with 1 MiB 0.95; but who reads here and there through a buffer of this size has to fill it.
IO_SIZE: Final = 512 << 10

#: Names of the modes, default first.
MODES: Final = ("auto", "none", "always", "host")


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What one mount caches.

    Attributes:
        name: The mode.
        entry_timeout: Validity of a name that exists, seconds.
        attr_timeout: Validity of attributes, seconds.
        negative_timeout: Validity of "no such name", seconds; 0 is not to remember it.
        dir_timeout: Validity of a listing after its directory was opened, seconds; 0 is not to
            keep it.
        direct_io: Reads and writes bypass the kernel's page cache.
        keep_cache: An open keeps the pages that are there, unseen.
        revalidate: An open asks for attributes, tells the kernel when its own are old, and keeps
            pages only where size, mtime and ctime are what they were.
        from_host: The daemon's own validities and open flags pass as they are.
        writeback: Written pages may be kept for a while.
    """

    name: str
    entry_timeout: float
    attr_timeout: float
    negative_timeout: float
    dir_timeout: float = 0.0
    direct_io: bool = False
    keep_cache: bool = False
    revalidate: bool = False
    from_host: bool = False
    writeback: bool = False

    @classmethod
    def for_mode(
        cls,
        mode: str,
        timeout: float = 1.0,
        writeback: bool = False,
        *,
        entry_timeout: float | None = None,
        attr_timeout: float | None = None,
        negative_timeout: float | None = None,
        dir_timeout: float | None = None,
    ) -> CachePolicy:
        """Return the policy of a mode.

        Args:
            mode: One of MODES.
            timeout: Seconds of validity in mode ``auto``.
            writeback: Has no effect in mode ``none``, whose writes are at the host on return.
            entry_timeout: In place of the mode's own, as the three that follow; without meaning
                in mode ``host``.
            attr_timeout: Seconds.
            negative_timeout: Seconds.
            dir_timeout: Seconds.

        Raises:
            ValueError: There is no such mode.
        """
        base = _base(mode, timeout)
        if base.from_host:
            return replace(base, writeback=writeback)
        return replace(
            base,
            entry_timeout=_chosen(entry_timeout, base.entry_timeout),
            attr_timeout=_chosen(attr_timeout, base.attr_timeout),
            negative_timeout=_chosen(negative_timeout, base.negative_timeout),
            dir_timeout=_chosen(dir_timeout, base.dir_timeout),
            writeback=writeback and not base.direct_io,
        )

    def keeps_listing(self, age: float | None) -> bool:
        """Whether a listing of that age in seconds may be used again; None is no listing."""
        return age is not None and age < self.dir_timeout


def _base(mode: str, timeout: float) -> CachePolicy:
    """The modes, each as it is when nothing else is said."""
    if mode == "none":
        return CachePolicy(mode, 0.0, 0.0, 0.0, direct_io=True)
    if mode == "auto":
        timeout = min(timeout, FOREVER)
        return CachePolicy(mode, timeout, timeout, timeout, revalidate=True)
    if mode == "always":
        return CachePolicy(mode, FOREVER, FOREVER, FOREVER, FOREVER, keep_cache=True)
    if mode == "host":
        return CachePolicy(mode, 0.0, 0.0, 0.0, from_host=True)
    raise ValueError(f"no cache mode {mode!r}; there are {', '.join(MODES)}")


def _chosen(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else min(given, FOREVER)
