"""The driver's ring against an independent device's ring, on one piece of memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfsmount.channel.barrier import full_barrier
from vfsmount.channel.virtqueue import Part, Virtqueue
from vfsmount.errors import ProtocolViolation
from vfsmount.testing import Chain, DeviceRing
from vfsmount.wire.vring import VringLayout, vring_layout

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pair:
    """Both ends of one ring; indirect tables lie behind it."""

    def __init__(self, size: int, *, start: int = 0, event_idx: bool = True) -> None:
        self.layout: VringLayout = vring_layout(size)
        self.tables = -(-self.layout.end // 16) * 16
        self.memory = bytearray(self.tables + 64 * size)
        self.driver = Virtqueue(
            memoryview(self.memory),
            self.layout,
            event_idx=event_idx,
            fence=full_barrier,
            strong=False,  # also takes the fences that this machine may not need
            start=start,
        )
        self.device = DeviceRing(
            self.memory,
            size,
            self.layout.desc,
            self.layout.avail,
            self.layout.used,
            event_idx=event_idx,
            start=start,
        )
        # A real used ring starts where SET_VRING_BASE says.
        struct.pack_into("<H", self.memory, self.layout.used + 2, start)

    def add_indirect(self, slot: int, parts: list[Part]) -> int:
        """Write a table into a slot of 64 bytes and add it."""
        at = self.tables + 64 * slot
        for i, (addr, length, writable) in enumerate(parts):
            flags = 2 * writable + (1 if i + 1 < len(parts) else 0)
            struct.pack_into("<QIHH", self.memory, at + 16 * i, addr, length, flags, i + 1)
        return self.driver.add_indirect(at, 16 * len(parts))

    def round_trip(self) -> tuple[int, int]:
        """One chain there and back."""
        assert not self.driver.has_used()
        self.driver.add_chain([(0, 40, False), (64, 16, True)])
        self.driver.publish()
        chain = self.device.take()
        assert chain is not None
        self.device.use(chain.head, 16)
        assert self.driver.has_used()
        used = self.driver.take_used()
        assert used is not None
        assert not self.driver.has_used()
        return used


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(8)
    yield pair
    pair.driver.release()


def test_chain_there_and_back(pair: Pair) -> None:
    head = pair.driver.add_chain([(1000, 40, False), (2000, 16, True), (3000, 8, True)])
    assert pair.device.take() is None, "seen before it was published"

    assert pair.driver.publish()
    assert pair.device.take() == Chain(head, [(1000, 40)], [(2000, 16), (3000, 8)])
    assert not pair.driver.has_used()

    pair.device.use(head, 20)
    assert pair.driver.has_used()
    assert pair.driver.take_used() == (head, 20)
    assert pair.driver.take_used() is None
    assert pair.driver.num_free == 8
    pair.driver.check_invariants()


def test_indirect_chain_takes_one_descriptor(pair: Pair) -> None:
    head = pair.add_indirect(0, [(1000, 40, False), (2000, 16, True)])

    pair.driver.publish()

    assert pair.driver.num_free == 7
    assert pair.device.take() == Chain(head, [(1000, 40)], [(2000, 16)])


def test_no_kick_while_the_device_looks_by_itself(pair: Pair) -> None:
    pair.device.want_kick()
    pair.driver.add_chain([(0, 1, False)])
    assert pair.driver.publish(), "it asked for a kick at the first one"
    pair.driver.add_chain([(0, 1, False)])
    assert not pair.driver.publish(), "it has not asked since"
    assert pair.device.take()
    assert pair.device.take()
    assert not pair.device.want_kick()
    pair.driver.add_chain([(0, 1, False)])
    assert pair.driver.publish()


def test_device_that_asks_while_we_decide_gets_its_kick() -> None:
    pair = Pair(8)
    fences = []

    def device_asks() -> None:
        """At the moment of the fence, the device stops looking."""
        fences.append(1)
        pair.device.take()
        pair.device.last_avail = 1
        pair.device.want_kick()
        pair.device.last_avail = 0

    driver = Virtqueue(
        memoryview(pair.memory), pair.layout, event_idx=True, fence=device_asks, strong=True
    )
    pair.device.want_kick()
    driver.add_chain([(0, 1, False)])
    assert driver.publish()
    assert not fences, "a kick needs no fence"
    driver.add_chain([(0, 1, False)])
    assert driver.publish(), "the second look was not taken"
    assert len(fences) == 1


def test_calls_are_off_until_armed_and_off_again_after_one(pair: Pair) -> None:
    calls = []
    for arm in (False, True, False):
        pair.driver.add_chain([(0, 1, False)])
        pair.driver.publish()
        chain = pair.device.take()
        assert chain
        if arm:
            assert not pair.driver.arm()
        calls.append(pair.device.use(chain.head, 0))
        pair.driver.take_used()
    assert calls == [False, True, False]


def test_disarmed_before_it_was_due(pair: Pair) -> None:
    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    chain = pair.device.take()
    assert chain
    pair.driver.arm()
    pair.driver.disarm()
    assert not pair.device.use(chain.head, 0)


def test_arming_sees_what_came_before(pair: Pair) -> None:
    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    chain = pair.device.take()
    assert chain
    pair.device.use(chain.head, 0)

    assert pair.driver.arm()
    pair.driver.take_used()
    assert not pair.driver.arm()


def test_without_event_idx_the_flags_speak() -> None:
    pair = Pair(8, event_idx=False)
    pair.driver.add_chain([(0, 1, False)])
    assert pair.driver.publish()
    assert not pair.driver.publish(), "nothing new"
    chain = pair.device.take()
    assert chain
    assert not pair.device.use(chain.head, 0)
    pair.driver.take_used()

    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    chain = pair.device.take()
    assert chain
    assert not pair.driver.arm()
    assert pair.device.use(chain.head, 0)


@pytest.mark.slow
def test_70000_round_trips_pass_65535() -> None:
    pair = Pair(4, start=60000)
    for _ in range(70000):
        pair.round_trip()
    pair.driver.check_invariants()


# --- a device that lies ---------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [2, 9, 1000, 65535])
def test_used_idx_that_jumps(pair: Pair, jump: int) -> None:
    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    pair.device.publish(jump)

    with pytest.raises(ProtocolViolation, match=f"used {jump} buffers, only 1"):
        pair.driver.take_used()


@pytest.mark.parametrize("head", [8, 9, 2**32 - 1])
def test_used_id_out_of_range(pair: Pair, head: int) -> None:
    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    pair.device.use(head, 0)

    with pytest.raises(ProtocolViolation, match=f"descriptor {head}"):
        pair.driver.take_used()
    pair.driver.check_invariants()


def test_used_id_that_is_not_outstanding(pair: Pair) -> None:
    head = pair.driver.add_chain([(0, 1, False), (0, 1, True)])
    pair.driver.publish()
    for wrong in set(range(8)) - {head}:  # the second descriptor of the chain is no head either
        pair.device.use(wrong, 0)
        with pytest.raises(ProtocolViolation, match="not available"):
            pair.driver.take_used()
        pair.device.used_idx -= 1
    pair.driver.check_invariants()


def test_used_twice(pair: Pair) -> None:
    first = pair.driver.add_chain([(0, 1, False)])
    pair.driver.add_chain([(0, 1, False)])
    pair.driver.publish()
    pair.device.use(first, 0)
    pair.device.use(first, 0)

    pair.driver.take_used()
    with pytest.raises(ProtocolViolation, match="not available"):
        pair.driver.take_used()


# --- anything, in any order -----------------------------------------------------------------------


class RingMachine(RuleBasedStateMachine):
    """Two rings and a model: what is available, what the device holds, what it has used."""

    @initialize(
        size=st.sampled_from([2, 4, 16]),
        start=st.sampled_from([0, 1, 65530, 65535]),
        event_idx=st.booleans(),
    )
    def begin(self, size: int, start: int, event_idx: bool) -> None:
        self.size = size
        self.pair = Pair(size, start=start, event_idx=event_idx)
        self.added: list[tuple[int, list[Part]]] = []
        self.available: list[tuple[int, list[Part]]] = []
        self.held: list[int] = []
        self.used: list[tuple[int, int]] = []
        self.descriptors: dict[int, int] = {}
        self.event_idx = event_idx
        self.asleep = False
        self.called = False
        self.armed = False

    @rule(data=st.data(), indirect=st.booleans())
    def add(self, data: st.DataObject, indirect: bool) -> None:
        free = self.size - sum(self.descriptors.values())
        assert self.pair.driver.num_free == free
        if not free:
            return
        most = min(self.size if indirect else free, 4)
        readable = data.draw(st.integers(0, most))
        writable = data.draw(st.integers(0 if readable else 1, most - readable or 1))
        parts: list[Part] = [(100 * i, i + 1, i >= readable) for i in range(readable + writable)]
        parts = parts[:most]
        if indirect:
            slot = next(i for i in range(self.size) if i not in self._slots())
            head = self.pair.add_indirect(slot, parts)
            self.descriptors[head] = 1
            self.slots[head] = slot
        else:
            head = self.pair.driver.add_chain(parts)
            self.descriptors[head] = len(parts)
        self.added.append((head, parts))

    def _slots(self) -> list[int]:
        if not hasattr(self, "slots"):
            self.slots: dict[int, int] = {}
        return [slot for head, slot in self.slots.items() if head in self.descriptors]

    @rule()
    def publish(self) -> None:
        kicked = self.pair.driver.publish()
        if self.added and (self.asleep or not self.event_idx):
            assert kicked, "the kick that was asked for did not come"
        if kicked:
            self.asleep = False
        self.available += self.added
        self.added = []

    @precondition(lambda self: self.available)
    @rule()
    def device_takes(self) -> None:
        chain = self.pair.device.take()
        head, parts = self.available.pop(0)
        assert chain is not None
        assert chain.head == head
        assert chain.readable == [(a, n) for a, n, writable in parts if not writable]
        assert chain.writable == [(a, n) for a, n, writable in parts if writable]
        self.held.append(head)

    @rule()
    def device_sleeps(self) -> None:
        more = self.pair.device.want_kick()
        assert more == bool(self.available)
        self.asleep = not more

    @precondition(lambda self: self.held)
    @rule(data=st.data(), length=st.integers(0, 2**32 - 1))
    def device_uses(self, data: st.DataObject, length: int) -> None:
        head = data.draw(st.sampled_from(self.held))
        self.held.remove(head)
        if self.pair.device.use(head, length):
            self.called = True
        elif self.armed:
            assert self.called, "the call that was asked for did not come"
        self.used.append((head, length))

    @rule()
    def driver_takes(self) -> None:
        for expected in self.used:
            assert self.pair.driver.take_used() == expected
            del self.descriptors[expected[0]]
        assert self.pair.driver.take_used() is None
        if self.used:
            self.armed = False
        self.used = []

    @rule()
    def driver_sleeps(self) -> None:
        assert self.pair.driver.arm() == bool(self.used)
        self.called = bool(self.used)  # what came before is seen, not called
        self.armed = True

    @rule()
    def driver_looks(self) -> None:
        self.pair.driver.disarm()
        self.armed = False

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "pair"):
            self.pair.driver.check_invariants()
            outstanding = len(self.added) + len(self.available) + len(self.held) + len(self.used)
            assert self.pair.driver.outstanding == outstanding


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRing = pytest.mark.slow(RingMachine.TestCase)
