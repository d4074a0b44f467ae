"""Write-behind of the pyfuse3 engine: writes are kept here and reach the host a little later.

It needs nothing from the daemon and leaves size and times of files with the host. ``cache.dirty``
knows what is dirty; this file writes it, one writer per node at a time, when

    a handle that wrote is closed or synced    a message is to read, open or truncate the file,
    more than the limit is dirty               or to see or set its attributes
    the oldest byte is 30 s old                the mount ends

A failure is told to each handle that wrote, once, by its next close or fsync. The data stay dirty
and are tried again; only when the last handle that wrote is released are they lost, and the log
says so. More than the limit is not kept of what the host does not take: then write(2) fails.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Protocol

import trio

from vfsmount.cache.dirty import DirtyFiles
from vfsmount.errors import RemoteErrno, VfsmountError
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.cache.dirty import DirtyFile, Piece
    from vfsmount.client.session import Session

__all__ = ["Handle", "WriteBehind"]

log = logging.getLogger(__name__)

#: Seconds that the end of a mount waits for what is still dirty.
END_SECONDS = 10.0


class Handle(Protocol):
    """An open file that may write.

    Attributes:
        number: Its own.
        fh: The daemon's.
        flags: Of open(2).
    """

    number: int
    fh: int
    flags: int


class _Target:
    """One node: what is dirty, and by which handles it can be written."""

    __slots__ = ("dirty", "error", "handles", "lock", "write_flags", "written")

    def __init__(self, dirty: DirtyFile) -> None:
        self.dirty = dirty
        self.handles: dict[int, Handle] = {}
        self.lock = trio.Lock()
        self.write_flags = 0
        self.error = 0
        self.written = 0


class WriteBehind:
    """The dirty files of a mount.

    Args:
        session: Where they are written.
        wrote: Is told of each piece that has been written, or perhaps: node, start, bytes.
        limit: Bytes that may be dirty in all.

    Attributes:
        written: How often something was written out; attributes that were asked for before are old.
    """

    def __init__(
        self,
        session: Session,
        wrote: Callable[[int, int, int], None] = lambda *_: None,
        limit: int = 16 << 20,
    ) -> None:
        self._session = session
        self._wrote = wrote
        self._files = DirtyFiles(limit)
        self._targets: dict[int, _Target] = {}
        self._woken = trio.Event()
        self.written = 0
        #: What that was when a file was last written to no more.
        self._closed = 0

    def end_of(self, nodeid: int) -> int:
        """Return the least size of a file by what is dirty of it; 0 when nothing is."""
        target = self._targets.get(nodeid)
        return target.dirty.end if target is not None else 0

    async def write(
        self, nodeid: int, handle: Handle, start: int, data: bytes, write_flags: int
    ) -> int:
        """Keep a write; wait only when too much is kept already.

        Raises:
            RemoteErrno: Too much is, and the host does not take it; nothing of this write is kept.
        """
        target = self._targets.get(nodeid)
        if target is None:
            target = self._targets[nodeid] = _Target(self._files.of(nodeid))
        elif target.error and self._files.is_too_much():
            await self.flush(nodeid)  # there may be room by now
            if target.error:
                raise RemoteErrno(Opcode.WRITE, nodeid, target.error)
        target.handles[handle.number] = handle
        target.write_flags |= write_flags
        if target.dirty.since is None:
            self._woken.set()
        target.dirty.write(handle.number, start, data, trio.current_time())
        if self._files.is_too_much():
            await self.flush(nodeid)
        return len(data)

    def settles(self, nodeid: int) -> bool:
        """Whether ``flush`` has anything to do or to wait for."""
        target = self._targets.get(nodeid)
        return target is not None and (bool(target.dirty) or target.lock.locked())

    def has_overtaken(self, nodeid: int, written: int) -> bool:
        """Whether the host may have got something of a file since ``written`` was that."""
        if self._closed > written:
            return True  # it may have been that one
        target = self._targets.get(nodeid)
        return target is not None and (target.lock.locked() or target.written > written)

    async def flush(self, nodeid: int) -> None:
        """Have everything written that was dirty when this was called. Failures are noted."""
        target = self._targets.get(nodeid)
        if target is None or not (target.dirty or target.lock.locked()):
            return
        async with target.lock:
            if target.dirty and target.handles:
                await self._write_out(nodeid, target)

    async def _write_out(self, nodeid: int, target: _Target) -> None:
        pieces = target.dirty.take(self._session.facts.max_write)
        handle = next(reversed(target.handles.values()))
        write_flags, target.write_flags = target.write_flags, 0
        written, number = 0, errno.EIO  # also when this task is cancelled
        try:
            for piece in pieces:
                await self._write_piece(nodeid, handle, piece, write_flags)
                written += 1
        except RemoteErrno as error:
            number = error.errno
        except VfsmountError:
            pass  # the channel has told of it
        finally:
            self.written += 1
            target.written = self.written
            target.error = number if written < len(pieces) else 0
            if target.error:
                target.write_flags |= write_flags
                target.dirty.failed(pieces[written:], number, trio.current_time())

    async def _write_piece(
        self, nodeid: int, handle: Handle, piece: Piece, write_flags: int
    ) -> None:
        start, left = piece.start, memoryview(piece.data)
        try:
            while left:
                count = await self._session.write(
                    nodeid, handle.fh, start, left, write_flags, handle.flags
                )
                if not count:
                    raise RemoteErrno(Opcode.WRITE, nodeid, errno.EIO)  # no progress
                start, left = start + count, left[count:]
        finally:
            self._wrote(nodeid, piece.start, len(piece.data))

    def truncate(self, nodeid: int, size: int) -> None:
        """The file has ``size`` bytes now: what could not be written beyond that is void."""
        target = self._targets.get(nodeid)
        if target is not None:
            target.dirty.truncate(size)

    async def settle(self, nodeid: int, handle: Handle) -> int:
        """Write a handle's file out; return the errno that the handle has to be told, or 0."""
        await self.flush(nodeid)
        target = self._targets.get(nodeid)
        return 0 if target is None else target.dirty.owed(handle.number)

    async def release(self, nodeid: int, handle: Handle) -> None:
        """Write what is left before a handle goes away; give it up with the last that wrote."""
        target = self._targets.get(nodeid)
        if target is None or handle.number not in target.handles:
            return
        await self.flush(nodeid)
        target.handles.pop(handle.number, None)
        if target.dirty.close(handle.number):
            return
        lost = target.dirty.abandon()
        if lost:
            log.error("%d bytes written to node %d did not reach the host", lost, nodeid)
        self._targets.pop(nodeid, None)
        self._closed = self.written
        self._files.drop(nodeid)

    async def run(self) -> None:
        """Write out what gets too old, until cancelled."""
        while True:
            due = self._files.next_due()
            if due is None:
                self._woken = trio.Event()
                await self._woken.wait()
                continue
            await trio.sleep_until(due)
            for nodeid in self._files.due(trio.current_time()):
                await self.flush(nodeid)

    async def finish(self) -> None:
        """The mount ends: write everything, within bounds, cancelled or not."""
        with trio.move_on_after(END_SECONDS, shield=True):
            for nodeid in self._files.nodes():
                await self.flush(nodeid)
        lost = self._files.size
        if lost:
            log.error("%d bytes written here did not reach the host", lost)
