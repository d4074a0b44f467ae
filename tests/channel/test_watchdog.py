from __future__ import annotations

from typing import TYPE_CHECKING

from vfsmount.channel.inflight import ABANDONED, NEW, SENT, Pending
from vfsmount.channel.watchdog import Watchdog
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

SECOND = 10**9


def sent(started: float, opcode: int = Opcode.READ, state: int = SENT) -> Pending:
    """A request of node 100 * ``started``, submitted at that second."""
    one = Pending(opcode, int(100 * started), b"", None, 0, 0, 0, 0, 0, None)
    one.started_ns = int(started * SECOND)
    one.state = state
    return one


def test_those_that_become_mute_together_share_a_line_and_none_is_told_twice(
    expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("mute")
    watchdog = Watchdog(10, 0)
    requests = [sent(2), sent(1), sent(3), sent(9)]

    assert watchdog.examine(requests, 13 * SECOND) == []
    watchdog.examine(requests, 14 * SECOND)
    watchdog.examine(requests, 20 * SECOND)

    assert [record.getMessage() for record in caplog.records] == [
        "no reply to READ of node 100 and 2 more requests for 12.0 s: the daemon is mute",
        "no reply to READ of node 900 for 11.0 s: the daemon is mute",
    ]


def test_time_limit() -> None:
    watchdog = Watchdog(1000, 5)
    late, queued, gone, soon = sent(1), sent(1, state=NEW), sent(1, state=ABANDONED), sent(4)

    assert watchdog.examine([late, queued, gone, soon], 6 * SECOND) == [late, queued]


def test_what_was_not_sent_is_not_mute() -> None:
    watchdog = Watchdog(1, 0)

    assert not watchdog.is_mute(sent(0, state=NEW), 5 * SECOND)
    assert watchdog.is_mute(sent(0), 5 * SECOND)
    assert watchdog.is_mute(sent(0, state=ABANDONED), 5 * SECOND)


def test_waiting_for_a_lock_is_neither_mute_nor_late() -> None:
    watchdog = Watchdog(1, 1)
    lock = sent(0, Opcode.SETLKW)

    assert not watchdog.is_mute(lock, 100 * SECOND)
    assert watchdog.examine([lock], 100 * SECOND) == []


def test_it_looks_often_enough_and_not_too_often() -> None:
    assert Watchdog(10, 0).interval == 1
    assert Watchdog(10, 0.4).interval == 0.1
    assert Watchdog(0.2, 5).interval == 0.05


def test_no_limit_is_too_long_or_too_short() -> None:
    assert Watchdog(10, 1e300).examine([sent(1)], 5 * SECOND) == []
    brief = Watchdog(10, 1e-300)
    assert brief.interval >= 0.001  # else nobody else gets the CPU
    assert len(brief.examine([sent(1)], 5 * SECOND)) == 1
