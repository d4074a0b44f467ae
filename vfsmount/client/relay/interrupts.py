"""INTERRUPT: who may be answered before the daemon is, so that nobody hangs and nothing is lost.

The kernel sends INTERRUPT once for a request whose caller got *any* signal, and goes on waiting
for the reply. The bundled daemon ends a wait for a lock when it is told, and it is; other daemons
cannot be asked to give a request up (virtiofsd in Rust ignores INTERRUPT, the C one crashes on it),
so for them, and for all other requests, it is decided here:

* A wait for a lock (SETLKW) ends at once with EINTR, as fcntl(2) says. At the daemon it goes on:
  it is an *orphan*. The same wait asked for again adopts the orphan instead of standing in line
  twice; otherwise a grant that comes too late is undone by unlocking. An owner that has locked
  something else of the file meanwhile keeps the late grant: unlocking could take away what it has.
* Anything else is answered with EINTR only when its caller is being killed, and is then undone
  when the daemon is through with it. A live caller waits, as it would for a disk: a write that has
  happened must not be reported as interrupted.
* The kernel says nothing when a caller that was interrupted is killed later, so such callers are
  looked at from time to time.
"""

from __future__ import annotations

import errno
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.client.relay.slots import Slot

__all__ = ["LOOK_SECONDS", "Interrupts", "is_being_killed"]

#: Seconds between two looks at callers that were interrupted.
LOOK_SECONDS: Final = 0.1
#: A caller is asked about only when its request has taken that long: nearly all are through by
#: then, and reading /proc takes 30 us.
_PATIENCE_NS: Final = 20_000_000

_SETLKW: Final = int(Opcode.SETLKW)
_SIGKILL_BIT: Final = 1 << 8


def is_being_killed(pid: int) -> bool:
    """Whether SIGKILL, or a signal that ends the process, is pending for a thread.

    The kernel turns every fatal signal but those that dump core into SIGKILL for all threads.
    A process that we cannot see (another pid namespace) counts as alive.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            status = file.read()
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & _SIGKILL_BIT:
            return True
    return False


class Interrupts:
    """Requests whose callers were interrupted, and waits for locks that go on without theirs.

    Args:
        give_up: Answers a request with an errno and leaves it to the daemon.
        lock_of: Returns the 48 bytes of ``fuse_lk_in`` of a request.
        pid_of: Returns the caller's thread id.
    """

    def __init__(
        self,
        give_up: Callable[[Slot, int], None],
        lock_of: Callable[[Slot], bytes],
        pid_of: Callable[[Slot], int],
    ) -> None:
        self._give_up = give_up
        self._lock_of = lock_of
        self._pid_of = pid_of
        self._waiting: list[tuple[Slot, int]] = []
        self._orphans: dict[tuple[int, bytes], Slot] = {}
        self._kept: set[int] = set()

    def __bool__(self) -> bool:
        """Whether there is anybody to look at from time to time."""
        return bool(self._waiting)

    def interrupt(self, slot: Slot) -> None:
        """The caller of a request that is in flight got a signal."""
        if slot.opcode == _SETLKW:
            self._orphan(slot)
        else:
            self._waiting.append((slot, slot.answers))

    def look(self) -> None:
        """Let go of callers that are being killed."""
        now = perf_counter_ns()
        still = []
        for slot, unique in self._waiting:
            if slot.answers != unique:
                continue  # answered; the slot may have another request by now
            if now - slot.started_ns > _PATIENCE_NS and is_being_killed(self._pid_of(slot)):
                self._give_up(slot, errno.EINTR)
            else:
                still.append((slot, unique))
        self._waiting = still

    # --- locks ---

    def _orphan(self, slot: Slot) -> None:
        self._orphans[slot.nodeid, self._lock_of(slot)] = slot
        self._give_up(slot, errno.EINTR)

    def adopt(self, nodeid: int, lock: bytes) -> Slot | None:
        """Return the orphan that waits for exactly this lock; it is one no more."""
        return self._orphans.pop((nodeid, lock), None) if self._orphans else None

    def note_lock(self, nodeid: int, lock: bytes) -> None:
        """An owner asks for a lock (not for one of its orphans)."""
        if not self._orphans:
            return
        asked = fuse.LK_IN.unpack(lock)
        if asked.type == LockType.UNLOCK:
            return
        for (node, waited), slot in self._orphans.items():
            if node == nodeid and fuse.LK_IN.unpack(waited).owner == asked.owner:
                self._kept.add(slot.unique)

    def settle(self, slot: Slot) -> bool:
        """The daemon has answered an abandoned request; return whether success is to be undone."""
        if slot.opcode == _SETLKW:
            self._orphans.pop((slot.nodeid, self._lock_of(slot)), None)
            if slot.unique in self._kept:
                self._kept.discard(slot.unique)
                return False
        return True
