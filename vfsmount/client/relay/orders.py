"""What the relay's thread is told by other threads, and how it is woken for that.

Others set a flag, then write the wake eventfd; the thread looks at ``given`` in each round and
sleeps on the eventfd among others. Nothing is ever taken back, so no flag needs a lock.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from vfsmount.channel.eventfd import close_fd, new_eventfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.errors import ProtocolViolation, VfsmountError

__all__ = ["Orders"]


class Orders:
    """The flags and the eventfd.

    Args:
        on_violation: Called in the relay's thread when the daemon breaks the rules.

    Attributes:
        given: Serving is to end, for whatever reason.
        stopping: Nothing more is to be read.
        aborting: And nothing that is with the device is to be waited for.
        error: The channel has ended by this; None while it has not.
        wake_fd: Readable when there is something new.
    """

    __slots__ = ("_on_violation", "aborting", "error", "given", "stopping", "wake_fd")

    def __init__(self, on_violation: Callable[[ProtocolViolation], None]) -> None:
        self.given = self.stopping = self.aborting = False
        self.error: VfsmountError | None = None
        self.wake_fd = new_eventfd()
        self._on_violation = on_violation

    # --- from other threads ---

    def stop(self) -> None:
        """End soon: what is with the device may be answered, nothing more is read."""
        self.stopping = self.given = True
        self._rouse()

    def abort(self) -> None:
        """End at once. Again, and after the end, is harmless."""
        self.aborting = True
        self.stop()

    def fail(self, error: VfsmountError) -> None:
        """The channel has ended: everything from now on is answered with an error."""
        self.error = error
        self.given = True
        self._rouse()

    def _rouse(self) -> None:
        if self.wake_fd >= 0:
            os.eventfd_write(self.wake_fd, 1)

    # --- from the relay's thread ---

    def violated(self, violation: ProtocolViolation) -> None:
        """The daemon has broken the rules: nothing that it says is believed any more."""
        if self.error is None:
            self.error = violation
            self.given = True
            self._on_violation(violation)

    def heed(self) -> None:
        """Make the eventfd quiet again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)

    def close(self) -> None:
        """Close the eventfd; orders that come later wake nobody."""
        wake, self.wake_fd = self.wake_fd, -1
        close_fd(wake)
