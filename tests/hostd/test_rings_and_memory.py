"""Several queues, several regions, and what changes while rings run: over a socket."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import (
    DEADLINE,
    GUEST_ADDR,
    MEMORY_SIZE,
    REPLY_AT,
    REQUEST_AT,
    USER_ADDR,
    Disconnected,
    Frontend,
    R,
    connected,
)
from tests.hostd.guest import ROOT
from tests.support.silent_fuse import silent_file
from tests.support.wait import wait_until
from vfsmount import closer
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.hostd.memory import MAX_MEM_SLOTS
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import ConfigRange, FdWord, MemoryRegion, MemoryTable, VringState
from vfsmount.wire.virtio_fs import decode_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUEUES = 3
GETATTR = fuse.encode_request(Opcode.GETATTR, 2, ROOT, bytes(16))
OK = 16 + 104


@pytest.fixture
def ready(share: Share) -> Iterator[Frontend]:
    with connected(share) as frontend:
        frontend.handshake()
        frontend.init()
        yield frontend


# --- several queues ------------------------------------------------------------------------------


def test_every_request_queue_serves_one_session(folder: Path) -> None:
    with (
        Share(folder, ShareOptions(request_queues=QUEUES)) as share,
        connected(share, rings=1 + QUEUES) as guest,
    ):
        guest.negotiate()
        assert guest.ask(R.GET_QUEUE_NUM) == 1 + QUEUES
        config = guest.ask(R.GET_CONFIG, ConfigRange(0, 0, bytes(40)))
        assert decode_config(config.data).num_request_queues == QUEUES
        guest.share_memory()
        for index in range(1 + QUEUES):
            guest.start_ring(index)
        guest.init()
        for index in (3, 1, 2, 2, 3):
            guest.submit(index, GETATTR, 4096)
            assert guest.wait_used(index) == [(0, OK)]


def test_a_queue_that_stops_leaves_the_others_alone(folder: Path) -> None:
    with (
        Share(folder, ShareOptions(request_queues=2)) as share,
        connected(share, rings=3) as guest,
    ):
        guest.handshake()
        guest.init()
        guest.ask(R.GET_VRING_BASE, VringState(2, 0))
        guest.submit(2, GETATTR, 4096)
        guest.submit(1, GETATTR, 4096)
        assert guest.wait_used(1) == [(0, OK)]
        assert guest.rings[2].collect() == []


# --- stopping ------------------------------------------------------------------------------------


def test_a_stopped_ring_is_not_touched_and_goes_on_where_it_was(ready: Frontend) -> None:
    ready.getattr(ROOT)
    stopped = ready.ask(R.GET_VRING_BASE, VringState(1, 0))
    assert stopped.num == ready.rings[1].used_idx, "nothing was left half done"
    ready.submit(1, GETATTR, 4096)
    os.eventfd_write(ready.kicks[1], 1)
    ready.ask(R.GET_FEATURES)  # a barrier
    ready.ask(R.GET_FEATURES)
    assert ready.rings[1].collect() == []

    ready.obey(R.SET_VRING_BASE, stopped)
    ready.obey(R.SET_VRING_KICK, FdWord(1), [ready.kicks[1]])

    assert ready.wait_used(1) == [(0, OK)]


def test_a_disabled_ring_waits(ready: Frontend) -> None:
    ready.obey(R.SET_VRING_ENABLE, VringState(1, 0))
    ready.submit(1, GETATTR, 4096)
    ready.ask(R.GET_FEATURES)
    assert ready.rings[1].collect() == []
    ready.obey(R.SET_VRING_ENABLE, VringState(1, 1))
    assert ready.wait_used(1) == [(0, OK)]


def test_driver_sets_its_status_step_by_step(share: Share) -> None:
    with connected(share) as guest:
        guest.negotiate()
        for status in (0, 1, 3, 11, 15):
            guest.obey(R.SET_STATUS, status)
            assert guest.ask(R.GET_STATUS) == status


# --- memory --------------------------------------------------------------------------------------

#: The front-end's one file in three pieces: rings and tables, requests, replies.
BORDERS = (0, REQUEST_AT, REPLY_AT, MEMORY_SIZE)
PIECES = [
    MemoryRegion(GUEST_ADDR + start, end - start, USER_ADDR + start, start)
    for start, end in itertools.pairwise(BORDERS)
]


@pytest.fixture
def in_pieces(share: Share) -> Iterator[Frontend]:
    """Its memory comes region by region, most of it while rings run."""
    with connected(share) as guest:
        guest.negotiate()
        assert guest.ask(R.GET_MAX_MEM_SLOTS) == MAX_MEM_SLOTS
        guest.obey(R.ADD_MEM_REG, PIECES[0], [guest.memfd])
        for index in range(2):
            guest.start_ring(index)
        for piece in PIECES[1:]:
            guest.obey(R.ADD_MEM_REG, piece, [guest.memfd])
        guest.init()
        yield guest


def test_a_chain_over_several_regions(in_pieces: Frontend) -> None:
    assert in_pieces.getattr(ROOT).ino


def test_regions_in_one_table(share: Share) -> None:
    with connected(share) as guest:
        guest.negotiate()
        guest.obey(R.SET_MEM_TABLE, MemoryTable(tuple(PIECES)), [guest.memfd] * 3)
        for index in range(2):
            guest.start_ring(index)
        guest.init()
        assert guest.getattr(ROOT).ino


def test_a_region_is_exchanged_while_rings_run(in_pieces: Frontend) -> None:
    """The replies' addresses lead to other bytes of the file from then on."""
    elsewhere = PIECES[2]._replace(size=1 << 20, mmap_offset=REPLY_AT + (2 << 20))
    in_pieces.obey(R.REM_MEM_REG, PIECES[2])
    in_pieces.obey(R.ADD_MEM_REG, elsewhere, [in_pieces.memfd])
    in_pieces.submit(1, GETATTR, 4096)

    assert in_pieces.wait_used(1) == [(0, OK)]

    assert bytes(in_pieces.memory[REPLY_AT : REPLY_AT + OK]) == b"\xee" * OK
    at = REPLY_AT + (2 << 20)
    assert fuse.decode_reply(Opcode.GETATTR, bytes(in_pieces.memory[at : at + OK])).header.len == OK


@pytest.mark.parametrize("gone", [1, 2], ids=["request", "reply"])
def test_buffers_in_a_region_that_is_gone(
    in_pieces: Frontend, gone: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("no region; closing")
    in_pieces.obey(R.REM_MEM_REG, PIECES[gone])
    in_pieces.submit(1, GETATTR, 4096)

    with pytest.raises(Disconnected):
        in_pieces.wait_used(1)


def test_an_exchange_that_is_refused_changes_nothing(
    in_pieces: Frontend, expect_log: Callable[[str], None]
) -> None:
    expect_log("refused ADD_MEM_REG: .*overlaps")
    expect_log("refused REM_MEM_REG: no memory region")
    assert not in_pieces.ack(R.ADD_MEM_REG, PIECES[1], [in_pieces.memfd])
    assert not in_pieces.ack(R.REM_MEM_REG, PIECES[1]._replace(size=4096))
    assert in_pieces.getattr(ROOT).ino


def test_descriptors_of_a_file_system_that_does_not_answer(
    share: Share, tmp_path_factory: pytest.TempPathFactory, expect_log: Callable[[str], None]
) -> None:
    """They are refused without a question, and closed aside, by few threads."""
    with (
        silent_file(tmp_path_factory.mktemp("silent") / "mnt") as fd,
        connected(share) as frontend,
    ):
        expect_log("refused SET_MEM_TABLE")
        expect_log("refused SET_VRING_ERR")
        frontend.handshake()
        frontend.init()
        memory = MemoryTable((frontend.region,))
        for _ in range(2 * closer.THREADS):
            assert not frontend.ack(R.SET_MEM_TABLE, memory, [fd])
            assert not frontend.ack(R.SET_VRING_ERR, FdWord(1), [fd])
        assert sum(one.name == "closer" for one in threading.enumerate()) == closer.THREADS
        assert frontend.getattr(ROOT).ino
    wait_until(
        lambda: all(one.name != "closer" for one in threading.enumerate()), DEADLINE, "the closers"
    )
