"""Who waits for a lock on one share, and in which order they try again.

All waits for locks of one file, of all guests, stand in one queue. When a lock has been given up
(or now and then, because the host's processes do not tell) a *round* begins: each wait is tried
once, in order of arrival, by its own guest's thread, which then wakes the next one's. Linux does
the same (``fs/locks.c``): who waits behind another is woken when that one has had its try.

* Who cannot have its lock yet keeps nobody behind it from theirs: it may be waiting for them.
* Who asks anew, and would wait, comes behind those whose try is still to come. Linux lets it
  overtake, and so would a guest that is awake always get ahead of those that have to be woken.
* A guest whose thread is busy with something slow keeps the others back for ``TURN`` at most.

Threads of all guests meet here. Methods of ``LockBoard`` take its mutex themselves, except for
those that say otherwise.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.hostd.fs.locks import GuestLocks
    from vfsmount.wire.fuse_structs import LkIn

__all__ = ["TURN", "File", "LockBoard", "Wait"]

#: Seconds from the begin of a round after which nobody waits for a turn.
TURN: Final = 0.01

#: What tells files apart: ``st_dev`` and ``st_ino``.
File = tuple[int, int]


class Wait:
    """A wait for a lock.

    Attributes:
        locks: The guest that waits.
        args: What for.
        file: The file that it is about.
        tried: The last round in which it was tried; 0 for none.
    """

    __slots__ = ("args", "file", "locks", "tried")

    def __init__(self, locks: GuestLocks, args: LkIn, file: File) -> None:
        self.locks = locks
        self.args = args
        self.file = file
        self.tried = 0


class _Queue:
    """The waits for locks of one file, in order of arrival.

    Attributes:
        waits: Themselves.
        round: Number of the round, from 1.
        began: When it began, in seconds of the monotonic clock.
    """

    __slots__ = ("began", "round", "waits")

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.round = 1
        self.began = 0.0

    def next(self) -> Wait | None:
        """The first that has still to be tried in this round."""
        number = self.round
        return next((wait for wait in self.waits if wait.tried < number), None)


class LockBoard:
    """The waits on one share.

    Attributes:
        mutex: Held to begin or end a wait, and to close a descriptor that may have locks.
    """

    __slots__ = ("_queues", "mutex")

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self._queues: dict[File, _Queue] = {}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queues)

    def waits(self) -> Iterator[Wait]:
        """All waits; the caller holds the mutex."""
        for queue in self._queues.values():
            yield from queue.waits

    def join(self, wait: Wait, *, tried: bool) -> None:
        """Queue a wait, which has just been tried or not; the caller holds the mutex."""
        queue = self._queues.setdefault(wait.file, _Queue())
        queue.waits.append(wait)
        wait.tried = queue.round if tried else 0

    def leave(self, wait: Wait) -> None:
        """A wait is over."""
        with self.mutex:
            queue = self._queues[wait.file]
            queue.waits.remove(wait)
            if queue.waits:
                _wake_next(queue)
            else:
                del self._queues[wait.file]

    def notify(self, now: float) -> None:
        """A lock has been given up, perhaps: begin a round everywhere."""
        if self._queues:
            with self.mutex:
                for queue in self._queues.values():
                    _begin(queue, now)

    def is_awaited(self, file: File, now: float) -> bool:
        """Whether somebody who waits for a lock of a file has yet to be tried in this round."""
        with self.mutex:
            queue = self._queues.get(file)
            return queue is not None and now - queue.began <= TURN and queue.next() is not None

    def turn(self, wait: Wait, now: float, pause: float) -> int | None:
        """Ask whether it is the turn of a wait.

        Args:
            wait: The wait.
            now: By the monotonic clock.
            pause: If it has been tried in a round that began so many seconds ago, begin another.

        Returns:
            The number of the round if it is; 0 if others come first; None if it has been tried.
        """
        with self.mutex:
            queue = self._queues[wait.file]
            if wait.tried == queue.round:
                if now - queue.began < pause:
                    return None
                _begin(queue, now)
            late = now - queue.began > TURN
            return queue.round if late or queue.next() is wait else 0

    def tried(self, wait: Wait, number: int) -> None:
        """A wait goes on, having been tried in a round: now it is the next one's turn."""
        with self.mutex:
            wait.tried = number
            _wake_next(self._queues[wait.file])


def _begin(queue: _Queue, now: float) -> None:
    """Begin a round. All are woken, so that each knows by when it has waited long enough."""
    queue.round += 1
    queue.began = now
    for locks in {wait.locks for wait in queue.waits}:
        os.eventfd_write(locks.wake_fd, 1)


def _wake_next(queue: _Queue) -> None:
    wait = queue.next()
    if wait is not None:
        os.eventfd_write(wait.locks.wake_fd, 1)
