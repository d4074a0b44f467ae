"""Locks: GETLK, SETLK, SETLKW and INTERRUPT, on the host's own locks.

Every lock that a guest takes is one of the host's, so guests, and the host's processes, exclude one
another without a table of ours:

* A POSIX lock is an open-file-description lock. Such locks belong to a file description, so each
  pair of file and lock owner has one: opened at the owner's first lock, closed when the owner gives
  up (FLUSH), unlocks the whole file, or the handle that it used is closed.
* A flock lock is taken on the handle's own descriptor, and goes with it.

Nobody waits in a system call. A wait is the request put aside (``Deferred``) and tried again: when
anybody on this share gives a lock up, and besides now and then, because a process of the host does
not tell; in order of arrival (``lockboard``). An interrupt ends a wait with EINTR.

A guest's locks are used by its own thread, except where a deadlock is searched for: that looks at
the descriptors of other guests, which are therefore closed under the share's mutex.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.hostd.fs.call import Deferred
from vfsmount.hostd.fs.lockboard import TURN, Wait
from vfsmount.hostd.syscalls import close_quietly
from vfsmount.wire.fuse import LK_OUT, LockFlag, LockType

if TYPE_CHECKING:
    from vfsmount.hostd.fs.handles import FileHandle, HandleTable
    from vfsmount.hostd.fs.lockboard import File
    from vfsmount.hostd.fs.session import Session
    from vfsmount.hostd.fs.share import Share
    from vfsmount.wire.fuse import Request
    from vfsmount.wire.fuse_structs import LkIn

__all__ = ["GuestLocks", "getlk", "interrupt", "setlk", "setlkw"]

#: Largest offset of a file, which stands for "to the end" where a lock ends.
_OFFSET_MAX: Final = (1 << 63) - 1
_FLOCK = int(LockFlag.FLOCK)
_READ, _WRITE, _UNLOCK = int(LockType.READ), int(LockType.WRITE), int(LockType.UNLOCK)
_FLOCK_KINDS: Final = {_READ: fcntl.LOCK_SH, _WRITE: fcntl.LOCK_EX, _UNLOCK: fcntl.LOCK_UN}
_POSIX_KINDS: Final = {_READ: fcntl.F_RDLCK, _WRITE: fcntl.F_WRLCK, _UNLOCK: fcntl.F_UNLCK}

#: ``struct flock``: type, whence, start, length (0: to the end), pid.
_STRUCT_FLOCK: Final = struct.Struct("hhqqi0q")

#: Seconds between two tries of a guest's waits, at first and at most. What a process of the host
#: gives up is taken that much later; what a guest gives up, at once.
_FIRST_PAUSE: Final = 0.001
_LAST_PAUSE: Final = 0.05
#: Waits looked at in the search for a deadlock; the kernel's own search takes 10 steps.
_MAX_STEPS: Final = 10
#: Interrupts that came before what they interrupt: the two travel on different queues.
_MAX_EARLY: Final = 64

#: Waits of one guest. Each takes a place in a ring until it is over, but a guest that breaks the
#: rules can offer one place again and again. No queue that we know of has more.
_MAX_WAITS: Final = 1024


class _Owner(NamedTuple):
    """A lock owner's hold on one file.

    Attributes:
        fd: Our descriptor for its locks.
        fh: The handle that it used last. Linux says no more than that this one is closed when the
            owner is a handle itself (an open file description). Another owner, a process, has
            closed it before, and has said so (FLUSH).
        pid: The guest's process that used it.
    """

    fd: int
    fh: int
    pid: int


class _Found(NamedTuple):
    """A lock as F_OFD_GETLK shows it; ``end`` belongs to it."""

    kind: int
    start: int
    end: int


class GuestLocks:
    """The locks of one guest.

    Args:
        share: What they are on.
        files: The guest's open files.

    Attributes:
        board: The waits of all guests.
        wake_fd: An eventfd, written to when ``retry`` has something to do.
        waits: Requests put aside, by their ``unique``.
    """

    __slots__ = (
        "_early",
        "_files",
        "_held",
        "_owners",
        "_pause",
        "_retry_at",
        "_settled",
        "_share",
        "board",
        "waits",
        "wake_fd",
    )

    def __init__(self, share: Share, files: HandleTable[FileHandle]) -> None:
        self._share = share
        self._files = files
        self._owners: dict[File, dict[int, _Owner]] = {}
        self._held = 0
        self._early: dict[int, None] = {}
        self._settled: list[tuple[int, int]] = []
        self._pause = _FIRST_PAUSE
        self._retry_at = 0.0
        self.board = share.locks
        self.waits: dict[int, Wait] = {}
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __bool__(self) -> bool:
        """Whether there may be a POSIX lock."""
        return bool(self._owners)

    # --- taking ----------------------------------------------------------------------------------

    def take(self, args: LkIn) -> None:
        """Take or give up a lock, without waiting.

        Raises:
            OSError: EAGAIN: somebody else has it; EBADF, EINVAL, ENOLCK.
        """
        handle = self._files.get(args.fh)
        if args.lk_flags & _FLOCK:
            kind = _FLOCK_KINDS.get(args.type)
            if kind is None:
                raise OSError(errno.EINVAL, "no such lock")
            fcntl.flock(handle.fd, kind | fcntl.LOCK_NB)
        else:
            self._take_posix(handle, args)

    def _take_posix(self, handle: FileHandle, args: LkIn) -> None:
        wanted = _to_host(args)
        file = _file_of(handle)
        if args.type == _UNLOCK and (self.owner_of(file, args.owner) is None or _is_whole(args)):
            self._give_up(file, args.owner)
            return
        fcntl.fcntl(self._description(handle, file, args), fcntl.F_OFD_SETLK, wanted)

    def _description(self, handle: FileHandle, file: File, args: LkIn) -> int:
        """Return the descriptor for an owner's locks on a file."""
        owner = self.owner_of(file, args.owner)
        if owner is None:
            fd = self._open(handle)
            self._held += 1
        else:
            fd = owner.fd
        self._owners.setdefault(file, {})[args.owner] = _Owner(fd, args.fh, args.pid)
        return fd

    def _open(self, handle: FileHandle) -> int:
        """Open a description for a lock owner: for both kinds of locks, if we may."""
        if self._held >= self._share.open_limit:
            raise OSError(errno.ENOLCK, "too many owners of locks")
        name, proc_fd = b"%d" % handle.fd, self._share.proc_fd
        if not self._share.options.readonly:
            with suppress(OSError):
                return os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=proc_fd)
        mode = os.O_WRONLY if handle.writable else os.O_RDONLY
        try:
            return os.open(name, mode | os.O_CLOEXEC, dir_fd=proc_fd)
        except OSError as error:
            raise OSError(errno.ENOLCK, f"no descriptor for a lock: {error.strerror}") from None

    def find(self, args: LkIn) -> tuple[_Found, int] | None:
        """Return a lock that is in the way and the guest's process that has it, or 0; or None."""
        handle = self._files.get(args.fh)
        owners = self._owners.get(_file_of(handle), {})
        asking = owners.get(args.owner)
        # The handle's own description has no such locks, so everybody's are in its way.
        found = _in_the_way(handle.fd if asking is None else asking.fd, args)
        if found is None:
            return None
        pids = (owner.pid for owner in owners.values() if _has_alone(owner.fd, found))
        return found, next(pids, 0)

    # --- giving up -------------------------------------------------------------------------------

    def give_up(self, handle: FileHandle, number: int) -> None:
        """An owner is through with a file: its POSIX locks on it go."""
        self._give_up(_file_of(handle), number)

    def _give_up(self, file: File, number: int) -> None:
        owners = self._owners.get(file, {})
        owner = owners.pop(number, None)
        if not owners:
            self._owners.pop(file, None)
        if owner is not None:
            self._close([owner])

    def closing(self, handle: FileHandle, fh: int) -> None:
        """A handle is about to be closed: so are the owners that are that handle."""
        file = _file_of(handle)
        owners = self._owners.get(file, {})
        for number in [number for number, owner in owners.items() if owner.fh == fh]:
            self._give_up(file, number)

    def _close(self, owners: list[_Owner]) -> None:
        with self.board.mutex:
            for owner in owners:
                close_quietly(owner.fd)
        self._held -= len(owners)
        self.notify()

    def notify(self) -> None:
        """A lock has been given up, perhaps: have those who wait try again."""
        if self.board:
            self.board.notify(time.monotonic())

    def clear(self) -> None:
        """Give up all locks; whoever waits is answered with EINTR."""
        for unique in list(self.waits):
            self._settle(unique, errno.EINTR)
        self._early.clear()
        held, self._owners = self._owners, {}
        self._close([owner for owners in held.values() for owner in owners.values()])

    def close(self) -> None:
        """The guest has gone."""
        self.clear()
        os.close(self.wake_fd)

    # --- waiting ---------------------------------------------------------------------------------

    def must_queue(self, args: LkIn) -> bool:
        """Whether a request that may wait is not to be tried before others have been."""
        if not self.board or args.type == _UNLOCK:
            return False
        file = _file_of(self._files.get(args.fh))
        return self.board.is_awaited(file, time.monotonic())

    def wait(self, unique: int, args: LkIn, *, tried: bool) -> None:
        """Put a request aside until it can have its lock.

        Args:
            unique: Its number.
            args: What it is for.
            tried: It cannot have it now.

        Raises:
            OSError: EDEADLK: it would wait for somebody who waits for it; EINTR: interrupted
                already; EINVAL: another request has the same ``unique``.
        """
        if unique in self._early:
            del self._early[unique]
            raise OSError(errno.EINTR, "interrupted")
        if unique in self.waits:
            raise OSError(errno.EINVAL, "two requests with one number")
        if len(self.waits) >= _MAX_WAITS:
            raise OSError(errno.ENOLCK, "too many waits for locks")
        handle = self._files.get(args.fh)
        wait = Wait(self, args, _file_of(handle))
        posix = not args.lk_flags & _FLOCK
        if posix:  # a deadlock is searched for with its descriptor
            self._description(handle, wait.file, args)
        with self.board.mutex:
            if posix and self._would_deadlock(wait):
                raise OSError(errno.EDEADLK, "a circle of locks")
            self.waits[unique] = wait
            self.board.join(wait, tried=tried)
        self._pause = _FIRST_PAUSE
        self._retry_at = time.monotonic() + self._pause

    def interrupt(self, unique: int) -> None:
        """End a wait with EINTR; one that has not begun will not."""
        if unique in self.waits:
            self._settle(unique, errno.EINTR)
            return
        self._early[unique] = None
        if len(self._early) > _MAX_EARLY:
            del self._early[next(iter(self._early))]

    def _settle(self, unique: int, number: int) -> None:
        self.board.leave(self.waits.pop(unique))
        self._settled.append((unique, number))
        os.eventfd_write(self.wake_fd, 1)

    def patience(self) -> float | None:
        """Seconds until ``retry`` has something to do; None for as long as nobody wakes us."""
        return max(self._retry_at - time.monotonic(), 0) if self.waits else None

    def wake(self) -> None:
        """``wake_fd`` can be read: do not be patient."""
        os.eventfd_read(self.wake_fd)
        self._retry_at = 0.0

    def retry(self) -> list[tuple[int, int]]:
        """Try again, if it is time to; return the waits that are over, as (unique, errno or 0)."""
        now = time.monotonic()
        if self.waits and now >= self._retry_at:
            self._retry(now)
        settled, self._settled = self._settled, []
        return settled

    def _retry(self, now: float) -> None:
        """Try those whose turn it is."""
        patience = math.inf
        if self._retry_at:  # nobody has woken us: a process of the host may have given something up
            patience = self._pause
            self._pause = min(2 * self._pause, _LAST_PAUSE)
        next_try = self._pause
        for unique, wait in list(self.waits.items()):
            number = self.board.turn(wait, now, patience)
            if number:
                self._try(unique, wait, number)
            elif number == 0:
                next_try = min(next_try, TURN)
        self._retry_at = now + next_try

    def _try(self, unique: int, wait: Wait, number: int) -> None:
        try:
            self.take(wait.args)
        except BlockingIOError:
            self.board.tried(wait, number)
        except OSError as error:
            self._settle(unique, error.errno or errno.EIO)
        else:
            self._settle(unique, 0)

    # --- deadlocks -------------------------------------------------------------------------------

    def _would_deadlock(self, wait: Wait) -> bool:
        """Whether a wait for a POSIX lock would close a circle of such waits on this share.

        Of a lock that several owners share it cannot be told whose it is, so a circle through one
        is not found; neither is one through processes of the host.
        """
        others = [one for one in self.board.waits() if not one.args.lk_flags & _FLOCK]
        blocked = [wait]
        for _ in range(_MAX_STEPS):
            if not blocked:
                break
            one = blocked.pop()
            if one is not wait and _waits_for(one, wait):
                return True
            blocking = [other for other in others if _waits_for(one, other)]
            others = [other for other in others if other not in blocking]
            blocked += blocking
        return False

    def owner_of(self, file: File, number: int) -> _Owner | None:
        """Return an owner's hold on a file."""
        return self._owners.get(file, {}).get(number)


def _waits_for(wait: Wait, other: Wait) -> bool:
    """Whether it is the lock of another wait's owner, and nobody else's, that a wait is for."""
    waiting = wait.locks.owner_of(wait.file, wait.args.owner)
    owner = other.locks.owner_of(wait.file, other.args.owner)
    if waiting is None or owner is None or owner.fd == waiting.fd:
        return False
    found = _in_the_way(waiting.fd, wait.args)
    return found is not None and _has_alone(owner.fd, found)


def _file_of(handle: FileHandle) -> File:
    """Guests agree on this, and so do all mounts that a file can be seen on."""
    found = os.fstat(handle.fd)
    return found.st_dev, found.st_ino


def _is_whole(args: LkIn) -> bool:
    return args.start == 0 and args.end == _OFFSET_MAX


def _to_host(args: LkIn) -> bytes:
    """Return ``struct flock`` of a request.

    Raises:
        OSError: EINVAL: there is no such lock or range.
    """
    kind = _POSIX_KINDS.get(args.type)
    if kind is None or not args.start <= args.end <= _OFFSET_MAX:
        raise OSError(errno.EINVAL, "no such lock")
    length = 0 if args.end == _OFFSET_MAX else args.end - args.start + 1
    return _STRUCT_FLOCK.pack(kind, os.SEEK_SET, args.start, length, 0)


def _in_the_way(fd: int, args: LkIn) -> _Found | None:
    """Return a lock of somebody else than the descriptor that prevents one, or None."""
    raw = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _to_host(args))
    kind, _, start, length, _ = _STRUCT_FLOCK.unpack(raw)
    if kind == fcntl.F_UNLCK:
        return None
    end = start + length - 1 if length else _OFFSET_MAX
    return _Found(_READ if kind == fcntl.F_RDLCK else _WRITE, start, end)


def _has_alone(fd: int, found: _Found) -> bool:
    """Whether a lock that exists is a descriptor's: then nobody else's is in its way."""
    length = 0 if found.end == _OFFSET_MAX else found.end - found.start + 1
    wanted = _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, found.start, length, 0)
    raw = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
    return bool(_STRUCT_FLOCK.unpack(raw)[0] == fcntl.F_UNLCK)


# --- operations ----------------------------------------------------------------------------------


def getlk(session: Session, request: Request) -> bytes:
    """GETLK: tell of a lock that is in the way of one; of flock locks nobody can ask."""
    args: LkIn = request.args
    if args.lk_flags & _FLOCK or args.type == _UNLOCK:
        raise OSError(errno.EINVAL, "no lock to ask about")
    answer = session.locks.find(args)
    if answer is None:
        return LK_OUT.values(args.start, args.end, _UNLOCK, 0)
    found, pid = answer
    return LK_OUT.values(found.start, found.end, found.kind, pid)


def setlk(session: Session, request: Request) -> bytes:
    """SETLK: take or give up a lock, or EAGAIN."""
    args: LkIn = request.args
    locks = session.locks
    try:
        locks.take(args)
    except BlockingIOError:
        if args.lk_flags & _FLOCK:  # one that was to be converted has been given up
            locks.notify()
        raise
    if args.type != _WRITE:  # given up, or shared where it was exclusive, perhaps
        locks.notify()
    return b""


def setlkw(session: Session, request: Request) -> bytes:
    """SETLKW: the same, but wait."""
    locks, unique = session.locks, request.header.unique
    tried = not locks.must_queue(request.args)
    if tried:
        with suppress(BlockingIOError):
            return setlk(session, request)
    locks.wait(unique, request.args, tried=tried)
    raise Deferred(unique)


def interrupt(session: Session, request: Request) -> None:
    """INTERRUPT: end a wait for a lock; nothing else waits here. Never answered."""
    session.locks.interrupt(request.args.unique)
