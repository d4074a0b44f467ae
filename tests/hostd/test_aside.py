"""Requests that wait for locks on real rings: the rest goes on, and the ring may stop meanwhile."""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.hostd.driver import Buffer
from tests.hostd.frontend import (
    DEADLINE,
    GUEST_ADDR,
    TABLE_AT,
    Disconnected,
    Frontend,
)
from tests.hostd.guest import ROOT
from tests.support.wait import wait_until
from vfsmount.hostd.connection import Connection
from vfsmount.wire import fuse
from vfsmount.wire.fuse import LockType, Opcode
from vfsmount.wire.vhost_user import FrontendRequest, MemoryTable, VringState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfsmount.hostd.fs.share import Share

R = FrontendRequest
END = (1 << 63) - 1
OWNER, UNIQUE = 5, 1000
#: Where the waiting request lies, apart from all others, and the descriptor that leads to it.
ASIDE = 1 << 19
SLOT = 1


class Machine:
    """A guest with ``file`` open.

    Args:
        share: What it sees.
    """

    def __init__(self, share: Share) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(theirs, share, name="guest", poll_ns=0)
        self.thread = threading.Thread(target=self.connection.run)
        self.thread.start()
        self.frontend = Frontend(ours)
        self.frontend.handshake()
        self.frontend.init()
        self.nodeid = self.frontend.walk("file")
        self.fh = self.frontend.open(self.nodeid, os.O_RDWR)

    def leave(self) -> None:
        self.connection.stop()
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        self.frontend.close()

    def body(self, kind: int = LockType.WRITE) -> bytes:
        return fuse.LK_IN.values(self.fh, OWNER, 0, END, kind, 1, 0)

    def lock(self, kind: int = LockType.WRITE) -> None:
        self.frontend.call(Opcode.SETLK, self.nodeid, self.body(kind))

    def wait(self) -> None:
        """Ask for what somebody else has, and see that the rest goes on."""
        message = fuse.encode_request(Opcode.SETLKW, UNIQUE, self.nodeid, self.body())
        self.put(message, [Buffer(GUEST_ADDR + ASIDE + 4096, 16, True)])
        self.frontend.getattr(ROOT)

    def put(self, message: bytes, room: list[Buffer]) -> None:
        frontend = self.frontend
        frontend.memory[ASIDE : ASIDE + len(message)] = message
        buffers = [Buffer(GUEST_ADDR + ASIDE, len(message)), *room]
        table = GUEST_ADDR + TABLE_AT + 4096
        frontend.publish(1, frontend.rings[1].put_indirect(SLOT, table, buffers))

    def answer(self) -> int:
        """Return the errno that the wait ends with."""
        ring = self.frontend.rings[1]
        ring.set_used_event(ring.used_seen)
        [(head, length)] = self.frontend.wait_used(1)
        assert (head, length) == (SLOT, 16)
        at = ASIDE + 4096
        reply = fuse.OUT_HEADER.unpack(bytes(self.frontend.memory[at : at + 16]))
        assert (reply.len, reply.unique) == (16, UNIQUE)
        return -reply.error

    def interrupt(self) -> None:
        body = fuse.INTERRUPT_IN.values(UNIQUE)
        message = fuse.encode_request(Opcode.INTERRUPT, UNIQUE + 1, 0, body)
        self.frontend.memory[ASIDE + 8192 : ASIDE + 8192 + len(message)] = message
        buffers = [Buffer(GUEST_ADDR + ASIDE + 8192, len(message))]
        frontend = self.frontend
        frontend.publish(0, frontend.rings[0].put_indirect(0, GUEST_ADDR + TABLE_AT, buffers))

    def stop_ring(self) -> int:
        return int(self.frontend.ask(R.GET_VRING_BASE, VringState(1, 0)).num)

    def start_ring(self, base: int) -> None:
        """Start it as a machine that was paused does, or as one that begins anew."""
        frontend = self.frontend
        ring = frontend.rings[1]
        ring.avail_idx, old = base, ring.avail_idx
        frontend.start_ring(1)
        ring.avail_idx = old


@contextmanager
def on(share: Share) -> Iterator[Machine]:
    machine = Machine(share)
    try:
        yield machine
    finally:
        machine.leave()


@pytest.fixture
def holder(share: Share, folder: Path) -> Iterator[Machine]:
    (folder / "file").touch()
    with on(share) as machine:
        machine.lock()
        yield machine


@pytest.fixture
def waiter(share: Share, holder: Machine) -> Iterator[Machine]:
    with on(share) as machine:
        machine.wait()
        yield machine


def test_granted(holder: Machine, waiter: Machine) -> None:
    holder.lock(LockType.UNLOCK)
    assert waiter.answer() == 0


def test_granted_when_the_holder_is_cut_off(holder: Machine, waiter: Machine) -> None:
    holder.connection.stop()
    assert waiter.answer() == 0


def test_granted_by_a_process_of_the_host(share: Share, folder: Path) -> None:
    (folder / "file").touch()
    with (folder / "file").open("r+b") as mine, on(share) as machine:
        os.lockf(mine.fileno(), os.F_LOCK, 0)
        machine.wait()
        os.lockf(mine.fileno(), os.F_ULOCK, 0)
        assert machine.answer() == 0


def test_interrupted(holder: Machine, waiter: Machine) -> None:
    waiter.interrupt()
    assert waiter.answer() == 4  # EINTR
    holder.lock(LockType.UNLOCK)
    holder.lock()


def test_a_guest_that_waits_and_goes_leaves_nothing(
    share: Share, holder: Machine, folder: Path
) -> None:
    before = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _fds())
    with on(share) as machine:
        machine.wait()
    assert sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _fds()) == before
    assert not share.locks
    holder.lock(LockType.UNLOCK)
    with (folder / "file").open("r+b") as mine:
        os.lockf(mine.fileno(), os.F_TLOCK, 0)


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_memory_is_exchanged_meanwhile(holder: Machine, waiter: Machine) -> None:
    frontend = waiter.frontend
    frontend.obey(R.SET_MEM_TABLE, MemoryTable((frontend.region,)), [frontend.memfd])
    holder.lock(LockType.UNLOCK)
    assert waiter.answer() == 0


def test_a_ring_that_goes_on_where_it_was_is_answered(
    share: Share, holder: Machine, waiter: Machine
) -> None:
    base = waiter.stop_ring()
    holder.lock(LockType.UNLOCK)
    wait_until(lambda: not holder.connection._session.share.locks, DEADLINE, "the lock to be taken")
    assert waiter.frontend.rings[1].collect() == []
    waiter.start_ring(base)
    assert waiter.answer() == 0


def test_a_driver_that_begins_anew_gets_no_reply_of_the_old_one(
    share: Share, holder: Machine, waiter: Machine
) -> None:
    ring = waiter.frontend.rings[1]
    base = waiter.stop_ring()
    ring.set_avail_idx(base + 7)
    waiter.start_ring(base + 7)
    holder.lock(LockType.UNLOCK)
    wait_until(lambda: not holder.connection._session.share.locks, DEADLINE, "the lock to be taken")
    waiter.frontend.getattr(ROOT)
    assert ring.collect() == []


def test_init_ends_waits(holder: Machine, waiter: Machine) -> None:
    message = fuse.encode_request(Opcode.INIT, 1, 0, fuse.INIT_IN.values(7, 45, 0, 0, 0))
    waiter.frontend.submit(1, message, 100)
    used: list[tuple[int, int]] = []
    while len(used) < 2:
        ring = waiter.frontend.rings[1]
        ring.set_used_event(ring.used_seen)
        used += waiter.frontend.wait_used(1)
    assert sorted(used) == [(0, 80), (SLOT, 16)]


def test_a_chain_that_was_spoiled_meanwhile(
    holder: Machine, waiter: Machine, expect_log: Callable[[str], None]
) -> None:
    expect_log("the room for a reply has gone")
    frontend = waiter.frontend
    frontend.rings[1].put_indirect(
        SLOT, GUEST_ADDR + TABLE_AT + 4096, [Buffer(GUEST_ADDR + ASIDE, 60)]
    )
    holder.lock(LockType.UNLOCK)
    with pytest.raises(Disconnected):
        frontend.wait_used(1)
    holder.frontend.getattr(ROOT)


def test_waiting_sleeps(holder: Machine, waiter: Machine) -> None:
    """A wait costs a try now and then, not a busy thread."""
    assert holder.thread.is_alive()
    busy = _cpu_seconds(waiter)
    select.poll().poll(500)
    assert _cpu_seconds(waiter) - busy < 0.1


def _cpu_seconds(machine: Machine) -> float:
    with open(f"/proc/self/task/{machine.thread.native_id}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
