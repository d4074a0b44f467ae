"""The relay as the rest of the program sees it: a thread, what others tell it, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vfsmount.channel.inflight import ABANDONED
from vfsmount.client.relay.ending import drain, fail_all, serve_lost
from vfsmount.client.relay.loop import Loop
from vfsmount.client.relay.orders import Orders
from vfsmount.client.relay.parts import Parts
from vfsmount.client.relay.passthrough import PASS_FROM

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.init import Terms
    from vfsmount.dax_shm.window import Window
    from vfsmount.errors import ProtocolViolation

__all__ = ["Relay"]


class Relay:
    """A relay; ``run`` is its thread.

    ``stop``, ``abort`` and ``fail`` are for other threads.

    Args:
        dev_fuse: The connected, initialised ``/dev/fuse``; becomes non-blocking, stays the
            caller's.
        loan: The queues.
        policy: What the kernel may believe.
        terms: What INIT has settled.
        on_violation: Called in this thread when the daemon breaks the rules.
        window: The DAX window, where the kernel has agreed to FUSE passthrough.
        pass_from: Bytes that a file has to have at least to be passed through; 0 for any.

    Attributes:
        ended: ``run`` touches nothing any more.
    """

    def __init__(
        self,
        dev_fuse: int,
        loan: Loan,
        policy: CachePolicy,
        terms: Terms,
        on_violation: Callable[[ProtocolViolation], None],
        *,
        window: Window | None = None,
        pass_from: int = PASS_FROM,
    ) -> None:
        self.ended = False
        self._orders = Orders(on_violation)
        self.stop, self.abort, self.fail = self._orders.stop, self._orders.abort, self._orders.fail
        self._parts = Parts(dev_fuse, loan, policy, terms, self._orders, window, pass_from)
        self._loop = Loop(self._parts)

    @property
    def refused(self) -> int:
        """Replies that the kernel would not take."""
        return self._parts.answers.refused

    def passthrough_facts(self) -> dict[str, Any]:
        """What the kernel does by itself, for ``status``."""
        passthrough = self._parts.passthrough
        return {} if passthrough is None else passthrough.facts()

    def run(self) -> None:
        """Serve until the connection ends or somebody says so.

        Raises:
            OSError: The device failed in a way that is not its end.
        """
        try:
            if self._parts.passthrough is not None:
                self._parts.passthrough.prepare_thread()
            self._loop.serve()
            if self._orders.error is not None:
                self._serve_lost()
            elif not self._orders.aborting:
                self._finish()
        finally:
            self._leave()

    def _finish(self) -> None:
        parts = self._parts
        parts.device.kick()
        ring = parts.loan.requests.ring
        drain(ring, self._loop.progress, self._orders, parts.sleeper.replies)

    def _serve_lost(self) -> None:
        parts = self._parts
        parts.sleeper.leave_unasked()
        slots = (*parts.device.in_flight(), *parts.device.stalled)
        fail_all(slots, parts.kernel, self._orders)
        slot = self._loop.any_slot()
        serve_lost(parts.loan.memory.map, slot, parts.kernel, self._orders, parts.sleeper.all)

    def _leave(self) -> None:
        """Let go of everything; what the device still has gets blocks that the channel can free."""
        parts = self._parts
        for slot in parts.device.in_flight():
            slot.state = ABANDONED
            slot.block = parts.loan.arena.allocate(1)
        for one in (parts.sleeper, parts.kernel, parts.pool):
            one.close()
        self.ended = True

    def close(self) -> None:
        """Close what ``stop`` and ``fail`` use; when ``run`` has returned."""
        self._orders.close()
