"""The back-end's state machine: golden handshakes, refusals, and when a ring runs."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.hostd.driver import Buffer, DriverRing
from vfsmount.hostd.backend import FEATURES, PROTOCOL_FEATURES, Backend
from vfsmount.hostd.faults import GuestFault, Refused, RingFault
from vfsmount.hostd.memory import MAX_MEM_SLOTS
from vfsmount.wire.vhost_user import (
    FRONTEND_MESSAGES,
    ConfigRange,
    FdWord,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    VringAddr,
    VringState,
)
from vfsmount.wire.virtio_fs import Config, decode_config

if TYPE_CHECKING:
    from collections.abc import Iterator

R = FrontendRequest
GUEST, USER, SIZE = 0x1000_0000, 0x7000_0000, 1 << 20
BIT_30 = 1 << 30


class Front:
    """Calls a back-end's handlers with what messages would carry."""

    def __init__(self) -> None:
        self.resets = 0
        self.backend = Backend(Config(b"tag", 1), self._reset)
        self.memfd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, SIZE)
        self.sent: list[int] = []

    def _reset(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.backend.close()
        os.close(self.memfd)

    def say(self, request: FrontendRequest, record: Any = None, *fds: int) -> Any:
        """Hand a message over; descriptors that are left are closed, as by the connection."""
        kind = FRONTEND_MESSAGES[int(request)]
        given = list(fds)
        try:
            return self.backend.handle(kind, record, given)
        finally:
            for fd in given:
                os.close(fd)

    def negotiate(self, features: int = FEATURES, protocol: int = PROTOCOL_FEATURES) -> None:
        self.say(R.SET_OWNER)
        self.say(R.SET_PROTOCOL_FEATURES, protocol)
        self.say(R.SET_FEATURES, features)

    def share_memory(self, guest: int = GUEST, user: int = USER) -> None:
        table = MemoryTable((MemoryRegion(guest, SIZE, user, 0),))
        self.say(R.SET_MEM_TABLE, table, os.dup(self.memfd))

    def place(self, index: int = 1, size: int = 8, base: int = 0, user: int = USER) -> None:
        """Everything that a ring needs, except kick and enable."""
        at = user + 0x1000 * index
        self.say(R.SET_VRING_NUM, VringState(index, size))
        self.say(R.SET_VRING_BASE, VringState(index, base))
        self.say(R.SET_VRING_ADDR, VringAddr(index, 0, at, at + 0x800, at + 0x400, 0))

    def give_kick(self, index: int = 1) -> None:
        self.say(R.SET_VRING_KICK, FdWord(index), os.eventfd(0))

    def running(self) -> list[int]:
        return [queue.index for queue in self.backend.running]


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    yield front
    front.close()


def test_what_is_offered(front: Front) -> None:
    assert front.say(R.GET_FEATURES) == 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32
    bits = (0, 3, 5, 9, 10, 12, 13, 15, 16)
    assert front.say(R.GET_PROTOCOL_FEATURES) == sum(1 << bit for bit in bits)


def test_queries(front: Front) -> None:
    front.negotiate()

    assert front.say(R.GET_QUEUE_NUM) == 2
    assert front.say(R.GET_MAX_MEM_SLOTS) == MAX_MEM_SLOTS
    assert front.say(R.GET_STATUS) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 40), (0, 256), (36, 4), (40, 8), (255, 1)])
def test_config_space(front: Front, offset: int, size: int) -> None:
    front.negotiate()
    whole = front.say(R.GET_CONFIG, ConfigRange(0, 0, bytes(256))).data
    assert decode_config(whole[:40]) == Config(b"tag", 1)
    assert whole[40:] == bytes(216)

    reply = front.say(R.GET_CONFIG, ConfigRange(offset, 0, bytes(size)))

    assert reply == ConfigRange(offset, 0, whole[offset : offset + size])


def test_config_space_is_read_only(front: Front) -> None:
    front.negotiate()
    with pytest.raises(Refused, match="read-only"):
        front.say(R.SET_CONFIG, ConfigRange(0, 0, b"x"))


@pytest.mark.parametrize("bit", [0, 24, 26, 33, 34, 63])
def test_features_that_were_not_offered(front: Front, bit: int) -> None:
    with pytest.raises(Refused, match="not offered"):
        front.say(R.SET_FEATURES, FEATURES | 1 << bit)
    assert front.backend.features == 0


@pytest.mark.parametrize("bit", [1, 14, 19, 22, 63])
def test_protocol_features_that_were_not_offered(front: Front, bit: int) -> None:
    with pytest.raises(Refused, match="not offered"):
        front.say(R.SET_PROTOCOL_FEATURES, 1 << bit)


@pytest.mark.parametrize(
    ("request_", "record", "feature"),
    [
        (R.GET_QUEUE_NUM, None, "MQ"),
        (R.GET_CONFIG, ConfigRange(0, 0, bytes(4)), "CONFIG"),
        (R.GET_MAX_MEM_SLOTS, None, "CONFIGURE_MEM_SLOTS"),
        (R.GET_STATUS, None, "STATUS"),
        (R.RESET_DEVICE, None, "RESET_DEVICE"),
        (R.GET_SHMEM_CONFIG, None, "SHMEM"),
        (R.SET_VRING_ENABLE, VringState(0, 1), "PROTOCOL_FEATURES"),
    ],
)
def test_messages_whose_feature_was_not_negotiated(
    front: Front, request_: FrontendRequest, record: Any, feature: str
) -> None:
    with pytest.raises(GuestFault, match=f"{request_.name} without {feature}"):
        front.say(request_, record)


def test_messages_for_other_devices(front: Front) -> None:
    with pytest.raises(GuestFault, match="not for this device"):
        front.say(R.SET_LOG_FD, None, os.eventfd(0))


# --- when a ring runs ----------------------------------------------------------------------------


def test_a_ring_runs_when_nothing_is_missing(front: Front) -> None:
    front.negotiate()
    front.share_memory()
    front.place()
    assert front.running() == []
    front.give_kick()
    assert front.running() == []
    front.say(R.SET_VRING_ENABLE, VringState(1, 1))

    assert front.running() == [1]


def test_without_bit_30_all_rings_are_enabled(front: Front) -> None:
    front.say(R.SET_FEATURES, FEATURES & ~BIT_30)
    front.share_memory()
    front.place(0)
    front.place(1)
    front.give_kick(0)
    front.give_kick(1)

    assert front.running() == [0, 1]


def test_disabling_stops_and_enabling_goes_on(front: Front) -> None:
    start(front)
    ring = front.backend.queues[1].ring
    assert ring is not None
    offer(front)
    assert ring.pop() is not None

    front.say(R.SET_VRING_ENABLE, VringState(1, 0))
    assert front.running() == []
    front.say(R.SET_VRING_ENABLE, VringState(1, 1))

    assert front.running() == [1]
    again = front.backend.queues[1].ring
    assert again is not None
    assert again.next_avail == 1
    assert not again.pending()


def test_what_came_before_enabling_is_not_lost(front: Front) -> None:
    front.negotiate()
    front.share_memory()
    front.place()
    front.give_kick()
    offer(front)
    front.say(R.SET_VRING_ENABLE, VringState(1, 1))

    ring = front.backend.queues[1].ring
    assert ring is not None
    assert ring.pending()


def test_get_vring_base_stops_and_tells_where(front: Front) -> None:
    start(front)
    offer(front)
    ring = front.backend.queues[1].ring
    assert ring is not None
    ring.pop()

    assert front.say(R.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 1)
    assert front.running() == []
    front.give_kick()
    assert front.running() == [1], "enabled outlives the stop"


def test_a_kickless_ring_runs(front: Front) -> None:
    front.negotiate()
    front.share_memory()
    front.place()
    front.say(R.SET_VRING_ENABLE, VringState(1, 1))
    front.say(R.SET_VRING_KICK, FdWord(1, no_fd=True))

    assert front.running() == [1]


@pytest.mark.parametrize(
    ("request_", "record"),
    [
        (R.SET_VRING_NUM, VringState(1, 16)),
        (R.SET_VRING_BASE, VringState(1, 3)),
        (R.SET_FEATURES, FEATURES & ~(1 << 29)),
    ],
)
def test_what_may_not_change_while_a_ring_runs(
    front: Front, request_: FrontendRequest, record: Any
) -> None:
    start(front)
    with pytest.raises(Refused, match="run"):
        front.say(request_, record)
    assert front.running() == [1]
    front.say(R.SET_FEATURES, FEATURES)


def test_addresses_may_change_while_it_runs(front: Front) -> None:
    start(front)
    at = USER + 0x8000
    front.say(R.SET_VRING_ADDR, VringAddr(1, 0, at, at + 0x800, at + 0x400, 0))

    assert front.running() == [1]


@pytest.mark.parametrize(
    ("request_", "record"),
    [
        (R.SET_VRING_NUM, VringState(2, 8)),
        (R.SET_VRING_NUM, VringState(2**32 - 1, 8)),
        (R.SET_VRING_NUM, VringState(1, 0)),
        (R.SET_VRING_NUM, VringState(1, 3)),
        (R.SET_VRING_NUM, VringState(1, 65536)),
        (R.SET_VRING_BASE, VringState(1, 65536)),
        (R.SET_VRING_BASE, VringState(9, 0)),
        (R.GET_VRING_BASE, VringState(2, 0)),
        (R.SET_VRING_ENABLE, VringState(1, 2)),
        (R.SET_VRING_ENABLE, VringState(2, 1)),
        (R.SET_VRING_KICK, FdWord(255, no_fd=True)),
        (R.SET_VRING_ADDR, VringAddr(0, 0, USER, USER, USER, 0)),
    ],
)
def test_numbers_that_cannot_be(front: Front, request_: FrontendRequest, record: Any) -> None:
    front.negotiate()
    front.share_memory()
    with pytest.raises(Refused):
        front.say(request_, record)


@pytest.mark.parametrize(
    ("desc", "used", "avail"),
    [
        (8, 0x800, 0x400),
        (0, 0x802, 0x400),
        (0, 0x800, 0x401),
        (SIZE, 0x800, 0x400),
        (0, SIZE - 4, 0x400),
        (0, 0x800, -0x1000),
        (2**63, 0x800, 0x400),
    ],
)
def test_rings_that_are_not_where_they_may_be(
    front: Front, desc: int, used: int, avail: int
) -> None:
    front.negotiate()
    front.share_memory()
    front.say(R.SET_VRING_NUM, VringState(1, 8))
    with pytest.raises(Refused):
        front.say(R.SET_VRING_ADDR, VringAddr(1, 0, USER + desc, USER + used, USER + avail, 0))


def test_address_before_memory(front: Front) -> None:
    front.negotiate()
    with pytest.raises(Refused, match="no region"):
        front.place()


@pytest.mark.parametrize("request_", [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR])
def test_only_eventfds_are_written_to_and_read_from(
    front: Front, request_: FrontendRequest
) -> None:
    front.negotiate()
    read_end, write_end = os.pipe()
    with pytest.raises(Refused, match="no eventfd"):
        front.say(request_, FdWord(1), read_end)
    with pytest.raises(Refused, match="no eventfd"):
        front.say(request_, FdWord(1), write_end)


# --- memory while rings run ----------------------------------------------------------------------


def test_memory_may_be_replaced_under_a_ring(front: Front) -> None:
    start(front)
    front.share_memory(guest=GUEST * 2)
    offer(front, GUEST * 2)

    ring = front.backend.queues[1].ring
    assert ring is not None
    chain = ring.pop()
    assert chain is not None
    assert chain.readable[0].nbytes == 4


def test_memory_may_not_be_taken_from_under_a_ring(front: Front) -> None:
    start(front)
    with pytest.raises(RingFault, match="no region"):
        front.share_memory(user=USER * 2)


def test_regions_come_and_go(front: Front) -> None:
    start(front)
    other = MemoryRegion(GUEST + SIZE, SIZE, USER + SIZE, 0)
    front.say(R.ADD_MEM_REG, other, os.dup(front.memfd))
    assert len(front.backend.memory.regions) == 2
    front.say(R.REM_MEM_REG, other)

    assert len(front.backend.memory.regions) == 1
    assert front.running() == [1]


# --- reset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["device", "status", "owner"])
def test_reset(front: Front, how: str) -> None:
    start(front)
    front.say(R.SET_STATUS, 15)
    assert front.say(R.GET_STATUS) == 15
    before = len(os.listdir("/proc/self/fd"))

    if how == "status":
        front.say(R.SET_STATUS, 0)
    else:
        front.say(R.RESET_DEVICE if how == "device" else R.RESET_OWNER)

    assert front.resets == (how != "status"), "a paused machine must find its session again"
    assert front.running() == []
    assert front.say(R.GET_STATUS) == 0
    assert len(os.listdir("/proc/self/fd")) == before - 1, "the kick descriptor"
    assert len(front.backend.memory.regions) == 1
    assert front.backend.protocol_features & ProtocolFeature.REPLY_ACK
    start(front)
    assert front.running() == [1]


def test_every_descriptor_is_given_back(front: Front) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        start(front)
        front.say(R.SET_VRING_CALL, FdWord(1), os.eventfd(0))
        front.say(R.SET_VRING_ERR, FdWord(1), os.eventfd(0))
        ours, theirs = socket.socketpair()
        front.say(R.SET_BACKEND_REQ_FD, None, theirs.detach())
        ours.close()
        front.say(R.GET_VRING_BASE, VringState(1, 0))
    front.backend.close()

    assert len(os.listdir("/proc/self/fd")) == before


def start(front: Front) -> None:
    front.negotiate()
    front.share_memory()
    front.place()
    front.give_kick()
    front.say(R.SET_VRING_ENABLE, VringState(1, 1))


def offer(front: Front, guest: int = GUEST) -> None:
    """Make one chain of one buffer available in ring 1, as ``place`` has laid it out."""
    page = front.backend.memory.at_user(USER + 0x1000, 0x1000)
    ring = DriverRing(page, 8)
    ring.put_chain([Buffer(guest + 0x4000, 4)])
    page[0x400 + 4 : 0x400 + 6] = bytes(2)
    page[0x400 + 2 : 0x400 + 4] = (1).to_bytes(2, "little")
