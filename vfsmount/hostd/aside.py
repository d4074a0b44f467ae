"""Requests put aside: taken from a ring, and answered later.

Only waits for locks are. A request put aside is remembered by its queue and head, and its chain is
walked again when it is answered, so that nothing here keeps guest memory alive, and memory may be
exchanged meanwhile.

A ring that stops and goes on where it was (a machine that pauses) still has its requests. One that
goes on elsewhere has a driver that begins anew, which must not see replies to another's requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfsmount.hostd.faults import RingFault

if TYPE_CHECKING:
    from vfsmount.hostd.fs.dispatch import FuseServer
    from vfsmount.hostd.queues import Queue
    from vfsmount.hostd.vring import DeviceRing

__all__ = ["Aside"]


class Aside:
    """The requests that the rings of one guest wait for.

    Args:
        fuse: Writes the replies.

    Attributes:
        places: Queue and head of each, by its ``unique``.
    """

    __slots__ = ("_fuse", "_left", "_over", "places")

    def __init__(self, fuse: FuseServer) -> None:
        self._fuse = fuse
        self.places: dict[int, tuple[Queue, int]] = {}
        #: Answers, as (unique, errno or 0), that no running ring takes for now.
        self._over: list[tuple[int, int]] = []
        #: Rings that have stopped, and their next available index then.
        self._left: dict[Queue, int] = {}

    def put(self, unique: int, queue: Queue, head: int) -> None:
        """Put a request aside."""
        self.places[unique] = queue, head

    def follow(self, before: list[tuple[Queue, DeviceRing]]) -> None:
        """A message may have changed the rings that ran before; keep those that go on."""
        if not self.places:
            return
        for queue, ring in before:
            if queue.ring is not ring:
                self._left[queue] = ring.next_avail
        for queue in [queue for queue in self._left if queue.ring is not None]:
            assert queue.ring is not None
            if queue.ring.next_avail != self._left.pop(queue):
                kept = {u: place for u, place in self.places.items() if place[0] is not queue}
                self.places = kept

    def answer(self, settled: list[tuple[int, int]]) -> None:
        """Answer requests that are over.

        Args:
            settled: Their ``unique``, and an errno or 0.

        Raises:
            GuestFault: A chain is not what it was.
        """
        todo, self._over = self._over + settled, []
        for unique, number in todo:
            queue, head = self.places.get(unique, (None, 0))
            if queue is None:
                continue  # its driver is gone
            if queue.ring is None:
                self._over.append((unique, number))
                continue
            del self.places[unique]
            self._push(queue, queue.ring, head, unique, number)

    def _push(self, queue: Queue, ring: DeviceRing, head: int, unique: int, number: int) -> None:
        try:
            written = self._fuse.answer_late(ring.chain(head).writable, unique, number)
        except RingFault:
            queue.fail()
            raise
        ring.push(head, written)
        if ring.must_call():
            queue.call()
