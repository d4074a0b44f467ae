"""Chains and rings of a driver that obeys no rule, over a real socket: its connection ends.

Or it is served, where the rules are broken in a way that harms only the guest itself.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.hostd.driver import Buffer
from tests.hostd.frontend import GUEST_ADDR, MEMORY_SIZE, REPLY_AT, REQUEST_AT, TABLE_AT, Frontend
from tests.hostd.guest import ROOT
from tests.hostd.prey import make_tree, outcome, prey_in
from vfsmount.wire import fuse, vring
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vring import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.hostd.prey import Prey

pytestmark = pytest.mark.slow

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
REQUEST, REPLY, TABLE = GUEST_ADDR + REQUEST_AT, GUEST_ADDR + REPLY_AT, GUEST_ADDR + TABLE_AT
END = GUEST_ADDR + MEMORY_SIZE
LENGTH = 40 + 16
#: Descriptors of the ring, or of a table: address, length, flags, next.
Entry = tuple[int, int, int, int]


class Attack(NamedTuple):
    what: str
    act: Callable[[Frontend], object]
    answer: str = "closed"


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prey]:
    with prey_in(tmp_path_factory.mktemp("attacked")) as prey:
        yield prey


def put_request(guest: Frontend, opcode: int = Opcode.GETATTR, body: bytes = bytes(16)) -> None:
    message = fuse.encode_request(opcode, 2, ROOT, body)
    guest.memory[REQUEST_AT : REQUEST_AT + len(message)] = message


def chain(*entries: Entry, head: int = 0) -> Callable[[Frontend], object]:
    """Descriptors as they are, in the ring itself."""

    def act(guest: Frontend) -> None:
        put_request(guest)
        for index, entry in enumerate(entries):
            guest.rings[1].put(index, *entry)
        guest.publish(1, head)
        guest.wait_used(1)

    return act


def table(*entries: Entry, length: int | None = None, at: int = TABLE) -> Callable[..., object]:
    """Descriptors in an indirect table."""
    data = b"".join(DESC.values(*entry) for entry in entries)

    def act(guest: Frontend) -> None:
        put_request(guest)
        guest.memory[TABLE_AT : TABLE_AT + len(data)] = data
        size = len(data) if length is None else length
        guest.rings[1].put(0, at, size, INDIRECT)
        guest.publish(1, 0)
        guest.wait_used(1)

    return act


def head(number: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        guest.publish(1, number)
        guest.wait_used(1)

    return act


def index(ahead: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        guest.rings[1].set_avail_idx(guest.rings[1].avail_idx + ahead)
        guest.kick(1)
        guest.wait_used(1)

    return act


def _both(what: str, *entries: Entry, answer: str = "closed") -> list[Attack]:
    """The same in the ring and in a table."""
    return [
        Attack(f"{what}, direct", chain(*entries), answer),
        Attack(f"{what}, indirect", table(*entries), answer),
    ]


ASK, ROOM = (REQUEST, LENGTH, NEXT, 1), (REPLY, 4096, WRITE, 0)

CHAINS = [
    *_both("sound", ASK, ROOM, answer="served"),
    *_both("a loop of one", (REQUEST, LENGTH, NEXT, 0)),
    *_both("a loop of two", ASK, (REPLY, 4096, WRITE | NEXT, 0)),
    *_both("a loop of writable ones", (REPLY, 4096, WRITE | NEXT, 0)),
    *_both("a loop of empty ones", (0, 0, NEXT, 1), (0, 0, NEXT, 0)),
    *_both("next beyond the table", (REQUEST, LENGTH, NEXT, 16)),
    *_both("next 65535", (REQUEST, LENGTH, NEXT, 65535)),
    *_both("writable before readable", (REPLY, 4096, WRITE | NEXT, 1), (REQUEST, LENGTH, 0, 0)),
    *_both("readable after the reply", ASK, (REPLY, 4096, WRITE | NEXT, 2), (REQUEST, 1, 0, 0)),
    *_both("all of it empty", (REQUEST, 0, NEXT, 1), (REPLY, 0, WRITE, 0)),
    *_both("an empty request", (REQUEST, 0, NEXT, 1), ROOM),
    *_both("no request", ROOM),
    *_both("no room for the reply", (REQUEST, LENGTH, 0, 0)),
    *_both("room of 15 bytes", ASK, (REPLY, 15, WRITE, 0)),
    *_both("empty buffers between", (REQUEST, LENGTH, NEXT, 1), (2**63, 0, NEXT, 2),
           (REPLY, 4096, WRITE, 0), answer="served"),
    *_both("address 0", (0, LENGTH, NEXT, 1), ROOM),
    *_both("just before the memory", (GUEST_ADDR - 1, LENGTH, NEXT, 1), ROOM),
    *_both("across the end of the memory", (END - LENGTH + 1, LENGTH, NEXT, 1), ROOM),
    *_both("behind the memory", (END, LENGTH, NEXT, 1), ROOM),
    *_both("around the address space", (2**64 - 8, LENGTH, NEXT, 1), ROOM),
    *_both("4 GiB of request", (REQUEST, 2**32 - 1, NEXT, 1), ROOM),
    *_both("4 GiB of room", ASK, (REPLY, 2**32 - 1, WRITE, 0)),
    *_both("around with 4 GiB", ASK, (2**64 - 1, 2**32 - 1, WRITE, 0)),
    *_both("the reply over the request", ASK, (REQUEST, 4096, WRITE, 0), answer="served"),
    *_both("the reply twice over itself", ASK, (REPLY, 20, WRITE | NEXT, 2), (REPLY + 4, 4096,
           WRITE, 0), answer="served"),
    *_both("flags that are none", (REQUEST, LENGTH, NEXT | 0xFFF0, 1), ROOM, answer="served"),
    Attack("the request from the ring itself", chain((GUEST_ADDR + 0x10000, 4096, NEXT, 1), ROOM),
           "served closed EINVAL"),
    Attack("the reply over its own table", table(ASK, (TABLE, 4096, WRITE, 0)), "served"),
    Attack("the reply over the avail ring",
           chain(ASK, (GUEST_ADDR + 0x10000 + 256, 200, WRITE, 0)), "served closed"),
    Attack("a table in a table", table((TABLE, 32, INDIRECT, 0), ROOM)),
    Attack("a table in a table behind a request", table(ASK, (TABLE, 32, INDIRECT, 0))),
    Attack("a table that is its own entry", table((TABLE, 16, INDIRECT, 0))),
    Attack("a table with a next", chain((TABLE, 32, INDIRECT | NEXT, 1), ROOM)),
    Attack("a table behind a reply", chain(ASK, (REPLY, 4096, WRITE | NEXT, 2),
                                           (TABLE, 32, INDIRECT, 0))),
    *(Attack(f"a table of {n} bytes", table(ASK, ROOM, length=n))
      for n in (0, 1, 15, 17, 33, 16 * 1025, 2**32 - 16, 2**32 - 1)),
    Attack("a table cut after the request", table(ASK, ROOM, length=16)),
    Attack("a table outside", table(ASK, ROOM, at=END)),
    Attack("a table across the end", table(ASK, ROOM, at=END - 16)),
    Attack("a table that wraps around", table(ASK, ROOM, at=2**64 - 16)),
    Attack("a table at an odd address", table(at=TABLE + 1, length=32)),
    *(Attack(f"head {n}", head(n)) for n in (16, 17, 255, 32768, 65535)),
    *(Attack(f"index {n} ahead", index(n)) for n in (17, 1000, 32768, 65535)),
]  # fmt: skip


@pytest.mark.parametrize("attack", CHAINS, ids=lambda attack: attack.what)
def test_chain(prey: Prey, attack: Attack) -> None:
    with prey.guest() as guest:
        assert outcome(lambda: attack.act(guest)) in attack.answer.split()
    prey.check()


def overlapping(guest: Frontend, opcode: Opcode, body: bytes, pieces: int) -> int:
    """Ask with room many times as large as the memory: the same piece, again and again."""
    message = fuse.encode_request(opcode, 2, ROOT, body)
    guest.memory[REQUEST_AT : REQUEST_AT + len(message)] = message
    room = [Buffer(REPLY, MEMORY_SIZE - REPLY_AT, True)] * pieces
    guest.offer(1, [Buffer(REQUEST, len(message)), *room])
    [(_, length)] = guest.wait_used(1)
    return length


def test_room_without_end(prey: Prey) -> None:
    """4 GiB of room in 4 MiB: neither memory nor time is used for it."""
    make_tree(prey.share, prey.canary)
    with (prey.share / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with prey.guest() as guest:
        fh = guest.open(guest.walk("huge"))
        directory = guest.opendir()
        for size in (1 << 25, 2**31, 2**32 - 1):
            body = fuse.READ_IN.values(fh, 0, size, 0, 0, 0)
            assert overlapping(guest, Opcode.READ, body, 1000) == 16, "an error"
        body = fuse.READ_IN.values(directory, 0, 2**32 - 1, 0, 0, 0)
        assert 16 < overlapping(guest, Opcode.READDIRPLUS, body, 1000) < 1 << 20
        body = fuse.READ_IN.values(fh, 0, 1 << 24, 0, 0, 0)
        assert overlapping(guest, Opcode.READ, body, 1000) == 16 + (1 << 24), "pages of 64 KiB"
    prey.check()


def test_longest_chains_of_single_bytes(prey: Prey) -> None:
    """1023 pieces of request and room: served; one more descriptor than there may be: closed."""
    with prey.guest() as guest:
        put_request(guest)
        request = [Buffer(REQUEST + at, 1) for at in range(LENGTH)]
        room = [Buffer(REPLY + at, 1, True) for at in range(1024 - LENGTH)]
        guest.offer(1, request + room)
        assert guest.wait_used(1) == [(0, 120)]
        guest.offer(1, [*request, *room, Buffer(REPLY, 1, True)])
        assert outcome(lambda: guest.wait_used(1)) == "closed"
    prey.check()


def test_a_ring_that_runs_away(prey: Prey) -> None:
    """The avail index is moved on for ever: the socket is still looked at, and others served."""
    with prey.guest() as guest:
        put_request(guest, Opcode.STATFS, b"")
        ring = guest.rings[1]
        ring.put(0, REQUEST, 40, NEXT, 1)
        ring.put(1, REPLY, 4096, WRITE)
        for slot in range(ring.size):
            struct.pack_into("<H", ring.avail, vring.AVAIL_RING_OFFSET + 2 * slot, 0)
        for _ in range(200):
            ring.set_avail_idx(ring.used_idx + ring.size)
            guest.kick(1)
        prey.check()
    prey.check()
