"""The in-flight region: what a successor finds in it, whatever its predecessor died of."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostd.driver import Buffer, DriverRing
from tests.hostd.frontend import PROTOCOL, Frontend, R
from tests.hostd.guest import ROOT
from tests.support.daemons import start_daemon
from vfsmount.hostd.faults import RingFault
from vfsmount.hostd.inflight import TrackedRing, area_size, create_region, split_region
from vfsmount.wire import fuse, vhost_user
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import InflightDescription, ProtocolFeature

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 8
USED_IDX, LAST_BATCH_HEAD = 14, 12
TRACKED = PROTOCOL | int(ProtocolFeature.INFLIGHT_SHMFD)


class Pair:
    """A driver, an area, and one device after the other."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(8192))
        self.area = memoryview(bytearray(area_size(SIZE)))
        self.driver = DriverRing(self.memory, SIZE)
        self.held: set[int] = set()
        self.device = self.successor()

    def successor(self, held: set[int] | None = None, next_avail: int = 0) -> TrackedRing:
        """Another process, unless ``held`` says what this one holds."""
        self.held = set() if held is None else held
        self.device = TrackedRing(
            SIZE,
            self.driver.desc,
            self.driver.avail,
            self.driver.used,
            next_avail=next_avail,
            translate=lambda addr, length: self.memory[addr : addr + length],
            event_idx=True,
            indirect=True,
            area=self.area,
            held=self.held,
        )
        return self.device

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.driver.put_chain([Buffer(4096, 4)], first=head)
            self.driver.offer(head)

    def take(self, count: int) -> list[int]:
        return [chain.head for chain in (self.device.pop() for _ in range(count)) if chain]

    def marks(self) -> set[int]:
        return {head for head in range(SIZE) if self.area[16 * (head + 1)]}

    def word(self, offset: int) -> int:
        word: int = struct.unpack_from("=H", self.area, offset)[0]
        return word


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.mark.parametrize(("entries", "size"), [(1, 64), (3, 64), (4, 128), (128, 2112)])
def test_size_of_an_area(entries: int, size: int) -> None:
    assert area_size(entries) == size


def test_a_new_area_is_made_ready(pair: Pair) -> None:
    assert struct.unpack_from("=QHHHH", pair.area) == (0, 1, SIZE, 0, 0)


def test_marks_come_and_go(pair: Pair) -> None:
    pair.offer(3, 5)
    assert pair.take(2) == [3, 5]
    assert pair.marks() == pair.held == {3, 5}
    pair.device.push(5, 0)
    assert pair.marks() == pair.held == {3}
    assert (pair.word(LAST_BATCH_HEAD), pair.word(USED_IDX)) == (5, 1)
    pair.device.push(3, 0)
    assert pair.marks() == pair.held == set()
    assert not pair.successor(next_avail=7).pending()
    assert pair.device.next_avail == 2, "wherever the front-end thinks that it was"


def test_what_was_taken_is_taken_again_in_order(pair: Pair) -> None:
    pair.offer(6, 1, 4)
    pair.take(3)
    pair.device.push(1, 0)
    pair.offer(2)

    pair.successor()

    assert pair.device.pending()
    assert pair.take(9) == [6, 4, 2]
    for head in (6, 4, 2):
        pair.device.push(head, 0)
    assert sorted(pair.driver.collect()) == [(1, 0), (2, 0), (4, 0), (6, 0)]
    pair.offer(0)
    assert pair.successor().next_avail == 4
    assert pair.take(9) == [0]


def test_death_before_the_reply_is_published(pair: Pair) -> None:
    pair.offer(3)
    pair.take(1)
    struct.pack_into("=H", pair.area, LAST_BATCH_HEAD, 3)

    pair.successor()

    assert pair.take(9) == [3]


def test_death_behind_publishing_a_batch(pair: Pair) -> None:
    """As by a predecessor that returns several at once: the marks of all of them are left over."""
    pair.offer(3, 5, 6)
    pair.take(3)
    before = bytes(pair.area)
    pair.device.push(3, 0)
    pair.device.push(5, 0)
    pair.area[:] = before
    struct.pack_into("=H", pair.area, LAST_BATCH_HEAD, 5)
    struct.pack_into("=H", pair.area, 16 * 6 + 6, 3)

    pair.successor()

    assert pair.marks() == {6}
    assert pair.word(USED_IDX) == 2
    assert pair.take(9) == [6]


def test_a_ring_that_goes_on_in_the_same_process_owes_what_it_holds(pair: Pair) -> None:
    pair.offer(3, 5)
    pair.take(1)

    pair.successor(held=pair.held)

    assert pair.device.next_avail == 1
    assert pair.take(9) == [5]


@pytest.mark.parametrize(("version", "entries"), [(2, SIZE), (1, SIZE * 2), (1, 0)])
def test_areas_for_others(pair: Pair, version: int, entries: int) -> None:
    struct.pack_into("=HH", pair.area, 8, version, entries)
    with pytest.raises(RingFault, match="in-flight area"):
        pair.successor()


@given(content=st.binary(min_size=area_size(SIZE), max_size=area_size(SIZE)))
def test_whatever_the_area_says(content: bytes) -> None:
    pair = Pair()
    pair.area[:] = content
    struct.pack_into("=HH", pair.area, 8, 1, SIZE)
    for head in range(SIZE):
        pair.driver.put_chain([Buffer(4096, 4)], first=head)

    pair.successor()
    marked = pair.marks()

    try:
        again = pair.take(SIZE)
    except RingFault:  # the ring itself does not agree
        return
    assert sorted(again) == sorted(marked)


# --- a daemon after another ----------------------------------------------------------------------


@contextmanager
def connected(path: Path) -> Iterator[Frontend]:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(path))
    with Frontend(sock, protocol=TRACKED) as frontend:
        yield frontend


def get_region(frontend: Frontend) -> tuple[InflightDescription, int]:
    frontend.send(R.GET_INFLIGHT_FD, InflightDescription(0, 0, 2, 16))
    data, [fd], _, _ = socket.recv_fds(frontend.sock, 12 + 24, 4)
    reply: Any = vhost_user.decode_reply(R.GET_INFLIGHT_FD, data[12:])
    return reply, fd


@pytest.mark.slow
def test_a_successor_answers_what_was_in_flight(tmp_path: Path) -> None:
    """The first dies with a request taken; its guest would wait for ever."""
    with start_daemon("bundled", tmp_path) as daemon, connected(daemon.socket) as guest:
        guest.negotiate()
        region, fd = get_region(guest)
        guest.obey(R.SET_INFLIGHT_FD, region, [fd])
        guest.share_memory()
        for index in range(2):
            guest.start_ring(index)
        guest.init()
        assert guest.getattr(ROOT).ino
        daemon.kill()
        daemon.wait()
        # As if it had died one step later: taken, marked, not answered.
        message = fuse.encode_request(Opcode.STATFS, 99, ROOT)
        guest.submit(1, message, 4096)
        at = area_size(16) + 16
        os.pwrite(fd, b"\1", at)

        with start_daemon("bundled", tmp_path) as other:
            guest.sock.close()
            guest.sock = socket.socket(socket.AF_UNIX)
            guest.sock.settimeout(10)
            guest.sock.connect(os.fspath(other.socket))
            guest.negotiate()
            guest.obey(R.SET_INFLIGHT_FD, region, [fd])
            guest.share_memory()
            guest.start_ring(1)
            assert guest.wait_used(1) == [(0, 16)], "EIO: there was no INIT"
            guest.init()
            assert guest.getattr(ROOT).ino
        os.close(fd)


def test_regions_that_cannot_be(tmp_path: Path) -> None:
    with start_daemon("bundled", tmp_path) as daemon, connected(daemon.socket) as guest:
        guest.negotiate()
        region, fd = get_region(guest)
        assert region == InflightDescription(2 * area_size(16), 0, 2, 16)
        unsealed = os.memfd_create("region")
        os.ftruncate(unsealed, region.mmap_size)
        for record, wrong in (
            (region._replace(num_queues=3), fd),
            (region._replace(num_queues=0), fd),
            (region._replace(queue_size=17), fd),
            (region._replace(queue_size=32), fd),
            (region._replace(mmap_size=area_size(16)), fd),
            (region._replace(mmap_offset=64), fd),
            (region._replace(mmap_offset=2**63), fd),
            (region, unsealed),
        ):
            assert not guest.ack(R.SET_INFLIGHT_FD, record, [wrong])
        guest.obey(R.SET_INFLIGHT_FD, region, [fd])
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(unsealed)
        os.close(fd)


def test_a_region_has_an_area_for_each_queue() -> None:
    fd, size = create_region(3, 4)
    os.close(fd)
    assert size == 3 * 128
    assert len(list(split_region(memoryview(bytes(size)), 4))) == 3
