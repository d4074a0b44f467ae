"""Reads and writes of a session that need no message, because their part of the file is mapped.

    read, write     at once, or None: then it is to go by message
    misses          are counted, and set mappings up in the background when that pays
    forget          takes the mappings of a node away before its number can mean another file

What is read or written goes through the descriptor that the daemon sent for the mapping, in one
system call (see ``dax_shm.window`` for why): it ends where the file ends now, whoever truncates it,
and a change is at the host when the call returns. By message go all writes that would extend the
file or clear a set-id bit, and those of handles that append or sync: size and mode are looked at
in the file itself, before each write.

The rights of a handle are kept: mappings belong to nodes, and who opened a file for reading must
not write through what was mapped for somebody else.

A file of the host that is slow to read holds up the event loop, which a message would not.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from vfsmount.dax_shm.benefit import Benefit, Verdict
from vfsmount.errors import RemoteErrno, VfsmountError
from vfsmount.wire.fuse import AttrFlag, SetupmappingFlag

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from typing_extensions import Buffer

    from vfsmount.dax_shm.mappings import OpenFile
    from vfsmount.dax_shm.ranges import Range
    from vfsmount.dax_shm.window import Window

__all__ = ["Dax", "DaxStatistics"]

log = logging.getLogger(__name__)

_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
#: Writes of such handles are the daemon's: it knows the end of the file, and what is durable.
_BY_MESSAGE: Final = os.O_APPEND | os.O_DSYNC | os.O_DIRECT
_WANTED: Final = int(AttrFlag.DAX)
#: Accesses without a checkpoint before one is taken, as in the channel.
_FAIRNESS: Final = 64
#: Accesses, times the number of ranges, after which the coldest range is of no use. At random over
#: several times the window, the coldest has waited some ten times the window's part of them.
_IDLE: Final = 64


class DaxStatistics(NamedTuple):
    """A snapshot.

    Attributes:
        ranges: Ranges that the window has.
        mapped_ranges: Those that are mapped.
        hits: Reads and writes that needed no message.
        misses: Those that went by message because their part was not mapped.
        set_ups: Mappings made.
        reclaims: How often one part took the range of another.
        bypassed: Misses at which there was no room that would have paid.
        failures: Set-ups that the daemon or the window refused.
    """

    ranges: int
    mapped_ranges: int
    hits: int
    misses: int
    set_ups: int
    reclaims: int
    bypassed: int
    failures: int


class Channel(Protocol):
    """What is needed of a session's channel."""

    @property
    def orphans(self) -> int: ...


class Requests(Protocol):
    """What is needed of a session."""

    @property
    def channel(self) -> Channel: ...

    def setupmapping(
        self, nodeid: int, foffset: int, length: int, flags: int, moffset: int
    ) -> Awaitable[None]: ...

    def removemapping(self, nodeid: int, ranges: Sequence[tuple[int, int]]) -> Awaitable[None]: ...


class _SetUp:
    """A set-up on its way."""

    __slots__ = ("done", "forgotten")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.forgotten = False


class Dax:
    """The window of a session in use. Event loop only.

    Args:
        session: Where mappings are asked for.
        window: Where they come to be.
        spawn: Starts a background task: ``nursery.start_soon``.
        per_inode: Whether the daemon says of each file if it is to be mapped (HAS_INODE_DAX).
    """

    def __init__(
        self,
        session: Requests,
        window: Window,
        spawn: Callable[..., object],
        *,
        per_inode: bool = False,
    ) -> None:
        self._session = session
        self._window = window
        self._ranges = window.ranges
        self._spawn = spawn
        self._benefit = Benefit()
        self._per_inode = per_inode
        self._excluded: set[int] = set()
        self._handles: dict[int, tuple[int, int]] = {}
        self._on_the_way: dict[tuple[int, int], _SetUp] = {}
        self._sees_all = os.geteuid() == 0
        self._turns = 0
        self._hits = self._misses = self._set_ups = 0
        self._reclaims = self._bypassed = self._failures = 0

    def statistics(self) -> DaxStatistics:
        """Return the counts so far."""
        return DaxStatistics(
            len(self._ranges),
            sum(one.ready for one in self._ranges),
            self._hits,
            self._misses,
            self._set_ups,
            self._reclaims,
            self._bypassed,
            self._failures,
        )

    def found(self, nodeid: int, attr_flags: int) -> None:
        """A node was looked up: keep in mind whether the daemon wants it mapped."""
        if self._per_inode:
            if attr_flags & _WANTED:
                self._excluded.discard(nodeid)
            else:
                self._excluded.add(nodeid)

    # --- handles ---------------------------------------------------------------------------------

    def opened(self, nodeid: int, fh: int, flags: int) -> None:
        """A handle was given out; ``flags`` as in open(2)."""
        self._handles[fh] = nodeid, flags

    def released(self, fh: int) -> None:
        """A handle is given back."""
        self._handles.pop(fh, None)

    # --- accesses --------------------------------------------------------------------------------

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> bytes | None:
        """Return up to ``size`` bytes, fewer only at the end of the file; None: by message."""
        if not self._may_read(nodeid, fh):
            return None
        file = self._file(nodeid, offset, size, False)
        if file is None:
            return None
        try:
            data = os.pread(file.fd, size, offset)
        except OSError:  # the daemon's answer will tell why
            return None
        self._hit(nodeid)
        return data

    def view(self, nodeid: int, fh: int, offset: int, size: int) -> memoryview | None:
        """As ``read``, without a copy, for what lies in one range; see ``Window.view``."""
        start = offset % self._ranges.range_size
        if not self._may_read(nodeid, fh) or start + size > self._ranges.range_size:
            return None
        file = self._file(nodeid, offset, size, False)
        one = self._ranges.find(nodeid, offset // self._ranges.range_size)
        if file is None or one is None:
            return None
        left = os.fstat(file.fd).st_size - offset
        found = self._window.view(one, start, min(size, max(left, 0)))
        if found is not None:
            self._hit(nodeid)
        return found

    def _may_read(self, nodeid: int, fh: int) -> bool:
        handle = self._handles.get(fh)
        return (
            handle is not None and handle[0] == nodeid and handle[1] & os.O_ACCMODE != os.O_WRONLY
        )

    def write(self, nodeid: int, fh: int, offset: int, data: Buffer) -> int | None:
        """Write inside the file, and return how many bytes were; None: by message."""
        handle = self._handles.get(fh)
        if handle is None or handle[0] != nodeid or handle[1] & _BY_MESSAGE:
            return None
        if handle[1] & os.O_ACCMODE == os.O_RDONLY:
            return None
        size = memoryview(data).nbytes
        file = self._file(nodeid, offset, size, True)
        if file is None:
            return None
        now = os.fstat(file.fd)
        if offset + size > now.st_size or now.st_mode & _SET_ID:
            return None
        try:
            done = os.pwrite(file.fd, data, offset)
        except OSError:
            return None
        self._hit(nodeid)
        return done

    async def give_way(self) -> None:
        """Let other tasks live: once in a while, and while something is being set up.

        To be called after each access: neither this nor a request that finds its reply at once
        would otherwise let a set-up begin.
        """
        self._turns += 1
        if self._turns >= _FAIRNESS or self._on_the_way:
            self._turns = 0
            await trio.lowlevel.checkpoint()

    def lacks_xattr(self, nodeid: int, name: bytes) -> bool:
        """Whether a node that has mappings certainly lacks an extended attribute: no need to ask.

        A daemon may keep it at the host under another name, with something put before it. Only
        root sees all names that it may have.
        """
        if not self._sees_all:
            return False
        for one in self._ranges.parts(nodeid):
            if self._is_usable(one, False) and one.file is not None:
                try:
                    found = os.listxattr(one.file.fd)
                except OSError:
                    return False
                return not any(os.fsencode(known).endswith(name) for known in found)
        return False

    def _file(self, nodeid: int, offset: int, size: int, write: bool) -> OpenFile | None:
        """Return the file for an access that lies in mapped ranges in full."""
        if size <= 0:
            return None
        range_size = self._ranges.range_size
        first, last = offset // range_size, (offset + size - 1) // range_size
        file = None
        for index in range(first, last + 1):
            one = self._ranges.find(nodeid, index)
            usable = one is not None and self._is_usable(one, write)
            if one is None or not usable or (index > first and one.file is not file):
                self._missed(nodeid, index, size, write)
                return None
            file = one.file
            one.used = self._hits + self._misses
        return file

    def _hit(self, nodeid: int) -> None:
        self._hits += 1
        self._benefit.hit(nodeid)

    def _is_usable(self, one: Range, write: bool) -> bool:
        if not one.ready or (write and not one.writable):
            return False
        return one.generation == self._window.generation or self._look_again(one)

    def _look_again(self, one: Range) -> bool:
        """Whether the back-end still has mapped what a range is for."""
        generation = self._window.generation
        found = self._window.mapping(one.moffset, self._ranges.range_size)
        if found is not None:
            foffset = found.foffset + one.moffset - found.moffset
            if foffset == one.index * self._ranges.range_size:
                one.file, one.writable, one.generation = found.file, found.writable, generation
                return True
        one.file = None
        if not one.pins:
            self._ranges.drop(one)
        return False

    # --- setting up ------------------------------------------------------------------------------

    def _missed(self, nodeid: int, index: int, size: int, write: bool) -> None:
        self._misses += 1
        if (nodeid, index) in self._on_the_way or nodeid in self._excluded:
            return
        known = self._ranges.find(nodeid, index) is not None
        full = not known and self._ranges.full and not self._has_idle_range()
        verdict = self._benefit.missed(nodeid, index, size, full)
        if verdict is Verdict.SET_UP:
            self._begin(nodeid, index, write)
        elif verdict is Verdict.BYPASS:
            self._bypassed += 1

    def _has_idle_range(self) -> bool:
        """Whether the range that would have to go is of no use to anybody."""
        one = self._ranges.coldest()
        idle = self._hits + self._misses - one.used if one is not None else 0
        return idle > _IDLE * len(self._ranges)

    def _begin(self, nodeid: int, index: int, write: bool) -> _SetUp | None:
        """Start setting a part up, or making it writable; None when there is no range for it.

        Nothing is begun while the daemon has not answered a set-up that has timed out. So no more
        ranges can be lost than were being set up in that moment.
        """
        if self._ranges.lost:
            if self._session.channel.orphans:
                return None
            self._ranges.recover()
        one = self._ranges.find(nodeid, index)
        if one is not None:
            one.pins += 1
        else:
            self._reclaims += self._ranges.full
            one = self._ranges.claim(nodeid, index)
            if one is None:
                return None
            one.used = self._hits + self._misses
        under_way = self._on_the_way[nodeid, index] = _SetUp()
        self._spawn(self._set_up, one, write, under_way)
        return under_way

    async def _set_up(self, one: Range, write: bool, under_way: _SetUp) -> None:
        size = self._ranges.range_size
        flags = SetupmappingFlag.READ | (SetupmappingFlag.WRITE if write else 0)
        try:
            await self._session.setupmapping(
                one.nodeid, one.index * size, size, int(flags), one.moffset
            )
        except RemoteErrno as error:
            log.debug("%s could not be set up: %s", one, error)
            self._failed(one)
        except VfsmountError:  # perhaps it is mapped, perhaps it will be, until the daemon answers
            self._ranges.lose(one)
        else:
            self._answered(one, write)
        finally:
            del self._on_the_way[one.nodeid, one.index]
            under_way.done.set()
        if under_way.forgotten:
            self.forget(one.nodeid)

    def _answered(self, one: Range, write: bool) -> None:
        one.pins -= 1
        one.ready = True
        if self._look_again(one) and one.writable >= write:
            self._set_ups += 1
        else:  # the daemon says yes and has not done it
            self._failures += 1
            self._benefit.failed(one.nodeid, one.index)

    def _failed(self, one: Range) -> None:
        self._failures += 1
        self._benefit.failed(one.nodeid, one.index)
        one.pins -= 1
        # What may still be mapped at a new range is somebody else's.
        if not one.ready or not self._look_again(one):
            self._ranges.drop(one)

    async def map(self, nodeid: int, offset: int, size: int, *, write: bool = False) -> bool:
        """Map a part of a file now, whether that pays or not; return whether all of it is mapped.

        The handles that are to use it have rights of their own. The mapping goes like any other:
        when somebody else needs the room, or the node is forgotten.
        """
        range_size = self._ranges.range_size
        parts = range(offset // range_size, -(-(offset + size) // range_size))
        return all([await self._map(nodeid, index, write) for index in parts])

    async def _map(self, nodeid: int, index: int, write: bool) -> bool:
        for _ in range(2):  # what is on its way may be for reading only
            one = self._ranges.find(nodeid, index)
            if one is not None and self._is_usable(one, write):
                return True
            under_way = self._on_the_way.get((nodeid, index)) or self._begin(nodeid, index, write)
            if under_way is None:
                return False
            await under_way.done.wait()
            if under_way.forgotten:
                return False
        one = self._ranges.find(nodeid, index)
        return one is not None and self._is_usable(one, write)

    # --- taking away -----------------------------------------------------------------------------

    def forget(self, nodeid: int) -> None:
        """A node is about to be forgotten: its number may soon mean another file."""
        self._benefit.forget(nodeid)
        self._excluded.discard(nodeid)
        for key, under_way in self._on_the_way.items():
            if key[0] == nodeid:
                under_way.forgotten = True
        if self._ranges.has_node(nodeid):
            gone = self._ranges.leave(nodeid)
            if gone:
                self._spawn(self._remove, nodeid, gone)

    async def _remove(self, nodeid: int, places: list[int]) -> None:
        size = self._ranges.range_size
        # Not removed is no harm: whoever gets the range replaces what is mapped there.
        with suppress(VfsmountError):
            await self._session.removemapping(nodeid, [(moffset, size) for moffset in places])
        for moffset in places:
            self._ranges.left(moffset)
