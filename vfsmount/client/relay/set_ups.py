"""Descriptors from the daemon: set-ups in the DAX window, which it answers with the file's own.

The relay has no use for the window, so a range is free again as soon as its descriptor is there.
What is mapped in it gives way to the next file, which saves a message, or is removed:

    opened for writing   first, and soon (``let_go``): until then nobody can execute it at the host
    anything else        when there is nothing else to do (``tidy``)
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.channel.inflight import Pending
from vfsmount.client.relay.passed_nodes import WRITE
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetupmappingFlag

if TYPE_CHECKING:
    from vfsmount.channel.rings import DriverQueue
    from vfsmount.dax_shm.window import Window

__all__ = ["SetUp", "SetUps"]

#: Descriptors that are asked for at a time, and files that stay mapped until there is time.
_RANGES: Final = 32
#: Nanoseconds that the daemon may have a file open for writing for us when we are done with it.
_LINGER_NS: Final = 1_000_000
_NO_FH: Final = (1 << 64) - 1


class SetUp(NamedTuple):
    """What is asked of the daemon.

    Attributes:
        moffset: The range that it is to use.
        nodeid: The file; 0 when whatever is in the range is to go.
        wants: What the descriptor is to allow.
    """

    moffset: int
    nodeid: int = 0
    wants: int = 0


class SetUps:
    """The ranges, and what is on its way.

    Args:
        queue: Where requests go.
        window: Where the daemon maps; gives some of its ranges away for this.

    Attributes:
        asked: What is on its way. As long, the daemon may have something to ask as well, on the
            back-end request channel.
        lingering: Free ranges in which a file is still mapped for writing, and until when it may
            be, ``perf_counter_ns``.
        untidy: Free ranges in which any file is still mapped.
        ranges: How many ranges the window had to spare.
    """

    def __init__(self, queue: DriverQueue, window: Window) -> None:
        self.asked: dict[Pending, SetUp] = {}
        self.lingering: dict[int, int] = {}
        self.untidy: set[int] = set()
        self._queue = queue
        self._window = window
        reserved = (window.reserve() for _ in range(_RANGES))
        #: Free ranges; the next one to be used is first.
        self._free = [moffset for moffset in reserved if moffset is not None]
        self.ranges = len(self._free)
        #: Files, and what is wanted of them, for which there was no range or no room.
        self._queued: list[tuple[int, int]] = []

    def ask(self, nodeid: int, wants: int) -> None:
        """Have a file set up, now or when there is room; the daemon learns of it with a kick."""
        if not self._free or not self._send(nodeid, wants):
            self._queued.append((nodeid, wants))

    def ask_queued(self) -> None:
        """Ask for what had found no room, and kick."""
        if self._queued:
            while self._queued and self._free and self._send(*self._queued[0]):
                del self._queued[0]
            self._queue.kick()

    def _send(self, nodeid: int, wants: int) -> bool:
        moffset = self._free[0]
        flags = SetupmappingFlag.READ | (SetupmappingFlag.WRITE if wants & WRITE else 0)
        size = self._window.range_size
        body = fuse.SETUPMAPPING_IN.values(_NO_FH, 0, size, int(flags), moffset)
        pending = Pending(Opcode.SETUPMAPPING, nodeid, body, None, 0, 0, 0, 0, 0, None)
        if not self._queue.submit(pending, kick=False):
            return False
        del self._free[0]
        self.lingering.pop(moffset, None)
        self.asked[pending] = SetUp(moffset, nodeid, wants)
        return True

    def finished(self, pending: Pending) -> SetUp | None:
        """A request of the relay's own is through; return the set-up that it was, or None."""
        found = self.asked.pop(pending, None)
        if found is None or found.nodeid:
            return found
        self._free.append(found.moffset)
        return None

    def descriptor(self, set_up: SetUp) -> int | None:
        """Return a descriptor of what was set up; the caller owns it. None: none that allows it.

        Raises:
            OSError: EMFILE: no descriptor left.
        """
        return self._window.descriptor(set_up.moffset, write=bool(set_up.wants & WRITE))

    def release(self, moffset: int, *, writable: bool) -> None:
        """The range is free, whatever is mapped there now."""
        self.untidy.add(moffset)
        if writable:
            self._free.insert(0, moffset)
            self.lingering[moffset] = perf_counter_ns() + _LINGER_NS
        else:
            self._free.append(moffset)

    def let_go(self, now: int) -> None:
        """Have the daemon let go of files that it has open for writing, if it is time."""
        for moffset in [one for one, until in self.lingering.items() if until <= now]:
            if not self._clear(moffset):
                return

    def tidy(self) -> None:
        """Have the daemon let go of all files; when there is nothing else to do."""
        for moffset in self.untidy.intersection(self._free):
            if not self._clear(moffset):
                return

    def _clear(self, moffset: int) -> bool:
        """Have the daemon let go of a file; the range is free again when it has."""
        one = fuse.REMOVEMAPPING_ONE.values(moffset, self._window.range_size)
        body = fuse.REMOVEMAPPING_IN.values(1) + one
        pending = Pending(Opcode.REMOVEMAPPING, fuse.ROOT_ID, body, None, 0, 0, 0, 0, 0, None)
        if not self._queue.submit(pending):
            return False
        self.asked[pending] = SetUp(moffset)
        self._free.remove(moffset)
        self.untidy.discard(moffset)
        self.lingering.pop(moffset, None)
        return True

    def check_invariants(self) -> None:
        """Raise AssertionError unless what lingers is free and untidy."""
        assert self.lingering.keys() <= self.untidy & set(self._free)
        assert len(set(self._free)) == len(self._free)
