"""The polling window follows the guest's pace."""

from __future__ import annotations

from vfsmount.hostd.polling import ONE_LOOK, PollWindow

US = 1000


def test_it_shrinks_to_nothing_when_waits_are_long() -> None:
    window = PollWindow(50 * US)
    lengths = []
    for _ in range(5):
        window.waited(10_000 * US)
        lengths.append(window.length)

    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0


def test_it_grows_again_when_they_are_short() -> None:
    window = PollWindow(50 * US)
    for _ in range(5):
        window.waited(10_000 * US)
    for _ in range(4):
        window.waited(40 * US)

    assert window.length == 50 * US


def test_a_wait_inside_the_window_changes_nothing() -> None:
    window = PollWindow(50 * US)
    window.waited(50 * US)
    window.waited(1)

    assert window.length == 50 * US


def test_one_look_where_the_processor_is_shared() -> None:
    window = PollWindow(50 * US)
    window.worked(1000 * US, 900 * US)
    assert window.length == 50 * US
    window.worked(1000 * US, 800 * US)
    assert window.length == ONE_LOOK
    for _ in range(255):
        window.waited(40 * US)
        assert window.length == ONE_LOOK
    window.waited(40 * US)
    assert window.length == 50 * US


def test_it_can_be_turned_off() -> None:
    window = PollWindow(0)
    for duration in (1, 10 * US, 10_000 * US):
        window.waited(duration)
        window.worked(duration, 0)
        assert window.length == 0
