"""A queue driven by a plain thread, without any event loop."""

from __future__ import annotations

import os
import select
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from vfsmount.channel.arena import MAX_BLOCK, Arena
from vfsmount.channel.eventfd import CallWatch
from vfsmount.channel.inflight import DONE, NEW, SENT, Pending
from vfsmount.channel.memory import GUEST_BASE, SharedMemory
from vfsmount.channel.rings import DriverQueue, PollBudget
from vfsmount.testing import DeviceRing
from vfsmount.wire.fuse import IN_HEADER, OUT_HEADER, Opcode
from vfsmount.wire.vring import vring_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BASE = 1 << 16


class Rig:
    """A queue and, on the same memory, the device's side of it."""

    def __init__(self, size: int, *, indirect: bool) -> None:
        layout = vring_layout(size)
        self.memory = SharedMemory(BASE + MAX_BLOCK)
        self.arena = Arena(MAX_BLOCK, BASE)
        self.queue = DriverQueue(
            1, self.memory, self.arena, layout, event_idx=True, indirect=indirect
        )
        self.device = DeviceRing(
            self.memory.map,
            size,
            layout.desc,
            layout.avail,
            layout.used,
            event_idx=True,
            offset_of=lambda guest_addr: guest_addr - GUEST_BASE,
        )

    def close(self) -> None:
        self.queue.close()
        self.memory.close()

    def answer(self, body: bytes = b"") -> None:
        """Take the next request and reply to it."""
        chain = self.device.take()
        assert chain is not None
        data = b"".join(self.read(addr, length) for addr, length in chain.readable)
        unique = IN_HEADER.unpack(data).unique
        reply = OUT_HEADER.values(16 + len(body), 0, unique) + body
        ((addr, length),) = chain.writable
        assert length >= len(reply)
        self.memory.map[addr - GUEST_BASE : addr - GUEST_BASE + len(reply)] = reply
        if self.device.use(chain.head, len(reply)):
            os.eventfd_write(self.queue.call_fd, 1)

    def read(self, guest_addr: int, length: int) -> bytes:
        return self.memory.map[guest_addr - GUEST_BASE : guest_addr - GUEST_BASE + length]


@contextmanager
def rig(size: int = 8, *, indirect: bool = True) -> Iterator[Rig]:
    made = Rig(size, indirect=indirect)
    try:
        yield made
    finally:
        made.close()


def pending(reply_size: int = 16, body: bytes = b"body") -> Pending:
    return Pending(Opcode.GETATTR, 5, body, None, reply_size, 1, 2, 3, 0, None)


both_shapes = pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])


@both_shapes
def test_submit_reap_free(indirect: bool) -> None:
    with rig(indirect=indirect) as it:
        one = pending()
        assert one.state == NEW
        assert it.queue.submit(one)
        assert one.state == SENT
        assert list(it.queue.outstanding()) == [one]
        assert select.select([it.queue.kick_fd], [], [], 0)[0], "no kick"

        it.answer(b"reply")
        done: list[Pending] = []
        it.queue.reap(done)

        assert done == [one]
        assert one.state == DONE
        assert list(it.queue.outstanding()) == []
        assert it.memory.map[one.data_at : one.data_at + one.length] == b"reply"
        it.arena.free(one.block)
        assert it.arena.used_bytes == 0
        it.queue.ring.check_invariants()


@both_shapes
def test_no_room_changes_nothing(indirect: bool) -> None:
    with rig(2, indirect=indirect) as it:
        sent = [pending() for _ in range(2 if indirect else 1)]
        assert all(it.queue.submit(one) for one in sent)
        used = it.arena.used_bytes
        late = pending()
        assert not it.queue.submit(late)
        assert late.state == NEW
        assert it.arena.used_bytes == used
        assert not it.queue.submit_raw(late, [b"x", b"y"], [])
        it.queue.ring.check_invariants()


def test_full_arena_is_no_room() -> None:
    with rig() as it:
        assert it.queue.submit(pending(MAX_BLOCK // 2 + 1))
        assert not it.queue.submit(pending())
        assert it.queue.ring.outstanding == 1


def test_poll_finds_what_is_there() -> None:
    with rig() as it:
        first, second = pending(), pending()
        it.queue.submit(first)
        it.queue.submit(second)
        it.answer()
        done: list[Pending] = []
        assert it.queue.poll(first, 10**6, done)
        assert done == [first]
        assert not it.queue.poll(second, 1000, done)
        it.answer()
        assert it.queue.poll(second, 0, done), "there is one look at least"


def test_sleeping_until_a_call() -> None:
    with rig() as it:
        watch = CallWatch(it.queue.call_fd)
        it.queue.submit(pending())
        it.answer()
        assert not select.select([watch], [], [], 0)[0], "called though not armed"

        it.queue.reap([])
        it.queue.submit(pending())
        assert not it.queue.ring.arm()
        it.answer()
        assert select.select([watch], [], [], 1)[0]
        watch.clear()
        assert not select.select([watch], [], [], 0)[0]
        watch.close()
        assert watch.fileno() == -1


def test_watch_cannot_be_blocked_by_its_peer() -> None:
    """The device holds the same eventfd: it may make it blocking, and empty it before we look."""
    with rig() as it:
        watch = CallWatch(it.queue.call_fd)
        os.eventfd_write(it.queue.call_fd, 1)
        os.eventfd_read(it.queue.call_fd)
        os.set_blocking(it.queue.call_fd, True)
        watch.clear()
        watch.close()


def test_kicks_are_counted_and_saved() -> None:
    with rig() as it:
        it.device.want_kick()
        for _ in range(3):
            it.queue.submit(pending())
        assert (it.queue.kicks, it.queue.kicks_saved) == (1, 2)


def test_closing_twice() -> None:
    with rig() as it:
        it.queue.close()


# --- the budget of polling ------------------------------------------------------------------------


def test_budget_shrinks_when_replies_do_not_come_and_grows_when_they_do() -> None:
    budget = PollBudget(50)
    assert budget.nanoseconds == 50_000
    for _ in range(20):
        budget.miss()
    assert budget.nanoseconds == 0
    for _ in range(8):
        budget.hit()
    assert budget.nanoseconds == 50_000
    assert (budget.hits, budget.misses) == (8, 20)


def test_budget_is_tried_in_full_now_and_then() -> None:
    budget = PollBudget(50)
    tried = []
    for _ in range(200):
        budget.miss()
        tried.append(budget.nanoseconds)
    assert tried.count(50_000) == 3


@pytest.mark.parametrize("change", [PollBudget.hit, PollBudget.miss])
def test_budget_of_nothing_stays_nothing(change: Callable[[PollBudget], None]) -> None:
    budget = PollBudget(0)
    for _ in range(130):
        change(budget)
    assert budget.nanoseconds == 0
