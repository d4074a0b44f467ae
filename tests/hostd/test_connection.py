"""A guest on a real socket: requests over rings, bad messages, and what a vanished one leaves."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from tests.hostd.driver import Buffer
from tests.hostd.frontend import (
    DEADLINE,
    FEATURES,
    GUEST_ADDR,
    MEMORY_SIZE,
    REQUEST_AT,
    TABLE_AT,
    Disconnected,
    Frontend,
    bit_30,
    connected,
)
from tests.hostd.guest import ROOT, expect_errno
from tests.support.wait import wait_until
from vfsmount.hostd.polling import ONE_LOOK, PollWindow
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import (
    HEADER,
    FdWord,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    VirtioFeature,
    VringState,
)
from vfsmount.wire.vring import DESC_F_INDIRECT, DESC_F_NEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfsmount.hostd.fs.share import Share

R = FrontendRequest
EVENT_IDX = VirtioFeature.RING_EVENT_IDX
INDIRECT = VirtioFeature.RING_INDIRECT_DESC


@pytest.fixture
def frontend(share: Share) -> Iterator[Frontend]:
    with connected(share) as frontend:
        yield frontend


@pytest.fixture
def ready(frontend: Frontend) -> Frontend:
    """After handshake and INIT."""
    frontend.handshake()
    frontend.init()
    return frontend


# --- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [0, INDIRECT])
@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
@pytest.mark.parametrize("poll_us", [0, 50])
def test_files_over_a_ring(
    share: Share, folder: Path, indirect: int, event_idx: int, poll_us: int
) -> None:
    features = FEATURES & ~(INDIRECT | EVENT_IDX) | indirect | event_idx
    data = os.urandom(100_000)
    with connected(share, features=features, poll_us=poll_us) as frontend:
        frontend.handshake()
        assert frontend.init().major == 7
        entry, fh = frontend.create(ROOT, b"file")
        assert frontend.write(fh, 0, data) == len(data)
        assert frontend.read(fh, 1000, 200_000) == data[1000:]
        frontend.release(fh)
        frontend.forget(entry.nodeid)
        with expect_errno("EBADF"):
            frontend.getattr(entry.nodeid)
        with expect_errno("ENOENT"):
            frontend.lookup(ROOT, b"nothing")
    assert (folder / "file").read_bytes() == data


@pytest.mark.parametrize(("second", "length"), [(10**15, 50_000), (0, ONE_LOOK)])
def test_the_rings_are_looked_at_once_on_a_processor_that_is_not_ours_alone(
    share: Share, monkeypatch: pytest.MonkeyPatch, second: int, length: int
) -> None:
    monkeypatch.setattr(time, "thread_time_ns", itertools.count(0, second).__next__)
    windows: list[PollWindow] = []
    monkeypatch.setattr(PollWindow, "waited", lambda window, _: windows.append(window))
    with connected(share) as frontend:
        frontend.handshake()
        frontend.init()
        wait_until(lambda: [frontend.getattr(ROOT)] and windows, DEADLINE, "a wait for a kick")
        frontend.getattr(ROOT)
    assert windows[0].length == length


@pytest.mark.parametrize("queue_size", [1, 2, 128, 2048])
def test_queue_sizes(share: Share, queue_size: int) -> None:
    with connected(share, queue_size=queue_size) as frontend:
        frontend.handshake()
        frontend.init()
        for _ in range(5):
            frontend.getattr(ROOT)


def test_indices_wrap(share: Share) -> None:
    with connected(share) as frontend:
        for ring in frontend.rings:
            ring.set_avail_idx(65530)
            ring.used_seen = 65530
            ring.used[2:4] = struct.pack("<H", 65530)
        frontend.handshake()
        frontend.init()
        for _ in range(20):
            frontend.getattr(ROOT)
        assert frontend.rings[1].avail_idx == 15


def test_without_protocol_features(share: Share) -> None:
    """A front-end that does not know bit 30: rings are enabled from the start."""
    with connected(share, features=FEATURES & ~bit_30, protocol=0) as frontend:
        frontend.send(R.SET_OWNER)
        frontend.send(R.SET_FEATURES, frontend.features)
        frontend.share_memory()
        for index in range(2):
            frontend.start_ring(index)
        frontend.init()
        assert frontend.getattr(ROOT).ino


def test_front_end_without_acknowledgements(share: Share) -> None:
    with connected(share, protocol=int(ProtocolFeature.MQ)) as frontend:
        frontend.handshake()
        frontend.init()
        assert frontend.getattr(ROOT).ino


def test_many_at_once_are_answered_in_one_go(ready: Frontend) -> None:
    ring = ready.rings[1]
    message = fuse.encode_request(Opcode.GETATTR, 2, ROOT, bytes(16))
    ready.memory[REQUEST_AT : REQUEST_AT + len(message)] = message
    for slot in range(8):
        reply = Buffer(GUEST_ADDR + (2 << 20) + 4096 * slot, 120, True)
        head = ring.put_chain([Buffer(GUEST_ADDR + REQUEST_AT, len(message)), reply], 2 * slot)
        ring.offer(head)
    ring.set_used_event(ring.used_seen + 7)
    ready.kick(1)
    used: list[tuple[int, int]] = []
    while len(used) < 8:
        used += ready.wait_used(1)

    assert used == [(2 * slot, 120) for slot in range(8)]


def test_a_ring_without_kicks_is_looked_at(share: Share) -> None:
    with connected(share) as frontend:
        frontend.handshake()
        frontend.init()
        frontend.obey(R.SET_VRING_KICK, FdWord(1, no_fd=True))
        frontend.kicks[1], kick = os.eventfd(0), frontend.kicks[1]  # goes nowhere
        os.close(kick)
        assert frontend.getattr(ROOT).ino


def test_busy_guests_kick_rarely(ready: Frontend) -> None:
    """While the device looks at the ring by itself, it does not ask for kicks."""
    ready.kicked = 0
    for _ in range(200):
        ready.getattr(ROOT)

    assert ready.kicked <= 200


def test_stop_and_go_on(ready: Frontend) -> None:
    ready.getattr(ROOT)
    done = ready.rings[1].avail_idx
    assert ready.ask(R.GET_VRING_BASE, VringState(1, 0)) == VringState(1, done)

    ready.start_ring(1)

    assert ready.getattr(ROOT).ino


def test_reset_forgets_the_session(ready: Frontend, folder: Path) -> None:
    (folder / "a").touch()
    ready.walk("a")
    ready.obey(R.RESET_DEVICE)
    for ring in ready.rings:
        ring.memory[ring.layout.desc : ring.layout.end] = bytes(ring.layout.end - ring.layout.desc)
        ring.avail_idx = ring.used_seen = 0
    for index in range(2):
        ready.start_ring(index)

    with expect_errno("EIO"):
        ready.getattr(ROOT)
    ready.init()
    assert ready.walk("a")


def test_several_guests_at_once(
    share: Share, folder: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("guest: .*; closing its connection")
    (folder / "a").touch()
    with connected(share) as one, connected(share) as two, connected(share) as three:
        for frontend in (one, two, three):
            frontend.handshake()
            frontend.init()
        nodeid = one.walk("a")
        with expect_errno("EBADF"):
            two.getattr(nodeid)
        three.send_raw(b"\xff" * 12)  # ends that one only
        assert two.walk("a") == nodeid
        assert one.getattr(nodeid).ino == two.getattr(nodeid).ino


# --- vanishing -----------------------------------------------------------------------------------


def test_a_guest_that_vanishes_leaves_nothing(share: Share, folder: Path) -> None:
    for number in range(20):
        (folder / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))
    with connected(share) as frontend:
        frontend.handshake()
        frontend.init()
        for number in range(20):
            frontend.open(frontend.walk(str(number)))
        frontend.opendir()
        # And in the middle of a request, of which the reply finds nobody.
        frontend.submit(1, fuse.encode_request(Opcode.STATFS, 2, ROOT), 4096)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_guest_that_vanishes_during_the_handshake(share: Share) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with connected(share) as frontend:
        frontend.negotiate()
        frontend.share_memory()
    assert len(os.listdir("/proc/self/fd")) == before


# --- messages that break the rules ---------------------------------------------------------------


def raw(request: int, flags: int, size: int, payload: bytes = b"") -> bytes:
    return HEADER.values(request, flags, size) + payload


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw(1, 0, 0), "version 0"),
        (raw(1, 2, 0), "version 2"),
        (raw(1, 0x11, 0), "unknown vhost-user header flags"),
        (raw(0, 1, 0), "unknown vhost-user request 0"),
        (raw(46, 1, 0), "unknown vhost-user request 46"),
        (raw(2**32 - 1, 1, 0), "unknown vhost-user request"),
        (raw(1, 1, 4097), "payload of 4097"),
        (raw(1, 1, 2**32 - 1), "payload of"),
        (raw(1, 1, 8, bytes(8)), "empty payload of 8"),
        (raw(2, 1, 4, bytes(4)), "u64 payload of 4"),
        (raw(8, 1, 0), "VringState"),
        (raw(5, 1, 8, bytes(8)), "memory table of 0"),
        (raw(12, 1, 8, struct.pack("=Q", 1 << 9)), "unknown bits"),
        (raw(12, 1, 8, bytes(8)), "with 0 descriptors, expected 1"),
        (raw(24, 1, 16, bytes(16)), "config"),
        (raw(17, 1, 0), "GET_QUEUE_NUM without MQ"),
        (raw(8, 1, 8, struct.pack("=II", 7, 8)), "SET_VRING_NUM: ring 7"),
    ],
)
def test_bad_messages_end_the_connection(
    frontend: Frontend, expect_log: Callable[[str], None], data: bytes, reason: str
) -> None:
    expect_log(f"guest: .*{reason}.*closing its connection")
    frontend.send_raw(data)

    assert frontend.is_disconnected()


@pytest.mark.parametrize("size", [1, 11, 12, 15])
def test_message_that_ends_early(
    frontend: Frontend, expect_log: Callable[[str], None], size: int
) -> None:
    expect_log("ended inside a message")
    frontend.send_raw(raw(2, 1, 8, bytes(8))[:size])
    frontend.sock.shutdown(socket.SHUT_WR)

    assert frontend.is_disconnected()


def test_message_in_pieces(frontend: Frontend) -> None:
    for byte in raw(1, 1, 0):
        frontend.send_raw(bytes([byte]))
    header, payload = frontend.receive()

    assert (header.request, header.flags, len(payload)) == (1, 0x5, 8)


def test_several_messages_in_one_piece(frontend: Frontend) -> None:
    frontend.send_raw(raw(3, 1, 0) + raw(1, 1, 0) + raw(15, 1, 0))

    assert [frontend.receive()[0].request for _ in range(2)] == [1, 15]


@pytest.mark.parametrize("count", [1, 8, 32])
def test_descriptors_that_nobody_asked_for(
    frontend: Frontend, expect_log: Callable[[str], None], count: int
) -> None:
    expect_log(f"with {count} descriptors, expected 0")
    before = len(os.listdir("/proc/self/fd"))
    frontend.send_raw(raw(1, 1, 0), [frontend.memfd] * count)

    assert frontend.is_disconnected()
    # The thread closes them on its way out.
    wait_until(
        lambda: len(os.listdir("/proc/self/fd")) < before, DEADLINE, "descriptors to be closed"
    )


def test_more_descriptors_than_a_message_may_have(
    frontend: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("more than 32 descriptors")
    frontend.send_raw(raw(1, 1, 0), [frontend.memfd] * 33)

    assert frontend.is_disconnected()


def test_refusals_are_acknowledged_and_survived(
    frontend: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("refused SET_MEM_TABLE: memory region ends beyond its file")
    frontend.negotiate()
    table = MemoryTable((MemoryRegion(GUEST_ADDR, MEMORY_SIZE * 2, 0, 0),))

    assert not frontend.ack(R.SET_MEM_TABLE, table, [frontend.memfd])
    frontend.share_memory()


def test_acknowledgements_have_to_be_negotiated(
    share: Share, expect_log: Callable[[str], None]
) -> None:
    expect_log("SET_VRING_NUM: ring of 3 entries")
    with connected(share, protocol=0) as frontend:
        frontend.send(R.SET_OWNER, need_reply=True)
        frontend.send(R.SET_VRING_NUM, VringState(0, 3), need_reply=True)
        assert frontend.is_disconnected()


# --- rings that break the rules ------------------------------------------------------------------


def test_broken_rings_signal_and_end_the_connection(
    ready: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("guest: .* in no region; closing its connection")
    ready.offer(1, [Buffer(0xDEAD_0000, 40), Buffer(GUEST_ADDR, 100, True)])

    with pytest.raises(Disconnected):
        ready.wait_used(1)
    assert os.eventfd_read(ready.errs[1]) == 1


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (lambda ring: ring.put(0, GUEST_ADDR, 40, DESC_F_NEXT, 0), "loop"),
        (lambda ring: ring.put(0, GUEST_ADDR, 40, DESC_F_NEXT, 99), "descriptor 99"),
        (lambda ring: ring.put(0, GUEST_ADDR, 17, DESC_F_INDIRECT), "indirect table of 17"),
        (lambda ring: ring.put(0, GUEST_ADDR, 39), "request of 39 bytes"),
        (lambda ring: ring.put(0, GUEST_ADDR, 0), "request of 0 bytes"),
        (
            lambda ring: ring.put_indirect(
                0, GUEST_ADDR + TABLE_AT, [Buffer(GUEST_ADDR, 9, True), Buffer(GUEST_ADDR, 9)]
            ),
            "behind a writable",
        ),
    ],
)
def test_broken_chains(
    ready: Frontend,
    expect_log: Callable[[str], None],
    index: int,
    put: Callable[[object], None],
    reason: str,
) -> None:
    expect_log(f"guest: .*{reason}.*; closing its connection")
    put(ready.rings[index])
    ready.publish(index, 0)

    with pytest.raises(Disconnected):
        ready.wait_used(index)


def test_head_and_index_out_of_range(share: Share, expect_log: Callable[[str], None]) -> None:
    expect_log("chain head 16 in a queue of 16")
    expect_log("avail index 1000 is more than a queue ahead")
    with connected(share) as frontend:
        frontend.handshake()
        frontend.publish(1, 16)
        assert frontend.is_disconnected()
    with connected(share) as frontend:
        frontend.handshake()
        frontend.rings[1].set_avail_idx(1000)
        frontend.kick(1)
        assert frontend.is_disconnected()


def test_forgets_may_bring_room_or_not_and_come_on_any_queue(ready: Frontend) -> None:
    message = fuse.encode_request(Opcode.FORGET, 2, 99, fuse.FORGET_IN.values(1))
    for index in (0, 1):
        for room in (0, 16, 4096):
            ready.submit(index, message, room)
            assert ready.wait_used(index) == [(0, 0)]


def test_memory_that_is_taken_away_under_a_ring(
    ready: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("no region; closing")
    elsewhere = MemoryTable((MemoryRegion(GUEST_ADDR, MEMORY_SIZE, 0, 0),))
    ready.send(R.SET_MEM_TABLE, elsewhere, [ready.memfd])

    assert ready.is_disconnected()


def test_who_is_refused_again_and_again_does_not_fill_the_log(
    frontend: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("guest: refused SET_VRING_NUM: ring of 3 entries")
    expect_log("guest: SET_VRING_NUM: ring of 3 entries; closing its connection")
    frontend.negotiate()
    for _ in range(100):
        assert not frontend.ack(R.SET_VRING_NUM, VringState(0, 3))
    frontend.send(R.SET_VRING_NUM, VringState(0, 3), need_reply=True)
    assert frontend.is_disconnected()
