"""Waiting in tests: look until it is true, with a deadline; never sleep and hope."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["wait_until", "wait_until_async"]

T = TypeVar("T")

# The first looks come quickly, because most waits end within a few milliseconds; the later ones
# slowly, because the process waited for needs the CPU more than we do.
FIRST_PAUSE = 0.001
LONGEST_PAUSE = 0.05


def wait_until(predicate: Callable[[], T], deadline: float, what: str) -> T:
    """Call ``predicate`` until it returns something true.

    Args:
        predicate: Looks at the world; an exception that it raises goes to the caller.
        deadline: Seconds from now.
        what: What is waited for, for the failure message: "the socket to appear".

    Returns:
        The first true value.

    Raises:
        AssertionError: it was not true within ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    pause = FIRST_PAUSE
    while True:
        last = time.monotonic() >= end  # asked before the look: time may pass behind it
        if value := predicate():
            return value
        if last:
            raise AssertionError(f"waited {deadline:g} s for {what}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def wait_until_async(predicate: Callable[[], T], deadline: float, what: str) -> T:
    """Like `wait_until`, for tests whose event loop must go on; cancelled, it just ends."""
    end = trio.current_time() + deadline
    pause = FIRST_PAUSE
    while True:
        last = trio.current_time() >= end
        if value := predicate():
            return value
        if last:
            raise AssertionError(f"waited {deadline:g} s for {what}")
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
