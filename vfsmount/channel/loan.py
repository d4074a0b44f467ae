"""The queues in other hands: what a thread gets that drives them itself, without the event loop.

``Channel.lend`` hands a ``Loan`` out and ``Channel.end_loan`` takes it back. In between:

* The borrower's thread is the only one that touches queues, arena and gatherer. The channel's tasks
  leave them alone, and its ``request`` raises ChannelClosed.
* Figures stay where they are: the borrower counts in the channel's own counters, and whatever it
  submits stands in the queues' tables, so ``Channel.statistics`` shows it.
* The channel watches the daemon's socket as before and tells of its end with ``on_failed``; the
  borrower tells of a violation with ``Channel.fail``, in the event loop's thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.channel.arena import Arena
    from vfsmount.channel.backend_requests import LentRequests
    from vfsmount.channel.forgets import ForgetGatherer
    from vfsmount.channel.memory import SharedMemory
    from vfsmount.channel.rings import DriverQueue, PollBudget
    from vfsmount.channel.statistics import OpcodeCounter
    from vfsmount.channel.watchdog import Watchdog
    from vfsmount.errors import VfsmountError

__all__ = ["Loan"]


@dataclass(slots=True)
class Loan:
    """What is lent, and what the borrower reports back.

    Attributes:
        memory: The shared memory.
        arena: Its blocks; those that the borrower holds at the end are lost to the channel.
        hiprio: The queue for FORGETs.
        requests: The queue for everything else; nothing is outstanding when the loan begins.
        forgets: Gathers FORGETs and sends them on ``hiprio``.
        budget: How long to look for replies; counts what came of it.
        watchdog: Judges requests that take long.
        request_timeout: Seconds until a request fails; 0 for never.
        counters: By opcode; the borrower adds rows.
        backend: What the daemon asks of us, to be served by the borrower; None where it cannot.
        on_failed: Called in the event loop's thread when the channel has failed.
        calls: Times that the device woke the borrower.
        abandoned: Requests that were answered before the device did.
    """

    memory: SharedMemory
    arena: Arena
    hiprio: DriverQueue
    requests: DriverQueue
    forgets: ForgetGatherer
    budget: PollBudget
    watchdog: Watchdog
    request_timeout: float
    counters: dict[int, OpcodeCounter]
    on_failed: Callable[[VfsmountError], None]
    backend: LentRequests | None = None
    calls: int = 0
    abandoned: int = 0
