"""What the relay's thread sleeps on, and what it does about that when it wakes.

the kernel          has requests; not while there is no slot for one (back-pressure)
the daemon          has replies (the call eventfd), or asks for something (``LentRequests``)
other threads       have given orders
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from vfsmount.errors import ProtocolViolation

if TYPE_CHECKING:
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.orders import Orders

__all__ = ["Sleeper"]


class Sleeper:
    """Two sets of descriptors.

    Args:
        dev_fuse: The kernel's end.
        loan: The daemon's.
        orders: Of other threads.

    Attributes:
        all: Everything.
        replies: All but the kernel.
    """

    __slots__ = ("_asked", "_loan", "_orders", "all", "replies")

    def __init__(self, dev_fuse: int, loan: Loan, orders: Orders) -> None:
        self._loan = loan
        self._orders = orders
        self._asked = loan.backend
        self.all, self.replies = (select.epoll(flags=select.EPOLL_CLOEXEC) for _ in range(2))
        for watch in (self.all, self.replies):
            # Edge triggered, because the eventfd is shared with the daemon and is never read.
            watch.register(loan.requests.call_fd, select.EPOLLIN | select.EPOLLET)
            watch.register(orders.wake_fd, select.EPOLLIN)
            if self._asked is not None:
                watch.register(self._asked, select.EPOLLIN)
        self.all.register(dev_fuse, select.EPOLLIN)

    def sleep(self, seconds: float | None, *, reads: bool) -> bool:
        """Wait until anything happens; the device's calls are suppressed from then on.

        Args:
            seconds: At most; None for ever.
            reads: A request of the kernel could be read.

        Returns:
            Whether anything has happened.
        """
        events = (self.all if reads else self.replies).poll(seconds)
        self._loan.requests.ring.disarm()
        for fd, _ in events:
            if fd == self._orders.wake_fd:
                self._orders.heed()
            elif fd == self._loan.requests.call_fd:
                self._loan.calls += 1
            elif self._asked is not None and fd == self._asked.fileno():
                self.serve_asked()
        return bool(events)

    def serve_asked(self) -> None:
        """Do what the daemon asks of us."""
        if self._asked is None:
            return
        try:
            self._asked.serve()
        except ProtocolViolation as violation:
            self._orders.violated(violation)
        if self._asked.ended or self._orders.error is not None:
            self.leave_unasked()

    def leave_unasked(self) -> None:
        """Do nothing more of that."""
        if self._asked is not None:
            for watch in (self.all, self.replies):
                watch.unregister(self._asked)
            self._asked = None

    def close(self) -> None:
        """Close both sets."""
        self.all.close()
        self.replies.close()
