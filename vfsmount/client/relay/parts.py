"""The parts of a relay, joined: who works with whom. Made once, before the loop begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfsmount.client.relay.answers import Answers
from vfsmount.client.relay.backing import BackingFiles
from vfsmount.client.relay.device import DevicePort
from vfsmount.client.relay.kernel import KernelPort
from vfsmount.client.relay.late import LateReplies
from vfsmount.client.relay.memory import Memory
from vfsmount.client.relay.opens import OpenChecks
from vfsmount.client.relay.passthrough import Passthrough
from vfsmount.client.relay.reuse import HandleReuse
from vfsmount.client.relay.rooms import largest_request
from vfsmount.client.relay.set_id import SetIdBits
from vfsmount.client.relay.sleeper import Sleeper
from vfsmount.client.relay.slots import SlotPool

if TYPE_CHECKING:
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.init import Terms
    from vfsmount.client.relay.orders import Orders
    from vfsmount.dax_shm.window import Window

__all__ = ["Parts"]


class Parts:
    """What the functions of a relay work with; each takes what it needs.

    Args:
        dev_fuse: The connected, initialised ``/dev/fuse``.
        loan: The queues.
        policy: What the kernel may believe.
        terms: What INIT has settled.
        orders: What other threads say.
        window: The DAX window, where the kernel has agreed to FUSE passthrough.
        pass_from: Bytes that a file has to have at least to be passed through; 0 for any.

    Attributes:
        pool: Where messages lie.
        sleeper: What the thread sleeps on.
        passthrough: Files that the kernel reads and writes by itself; None without a window.
        kernel: The one end.
        device: The other.
        memory: What is remembered of files.
        opens: What OPENs wait for.
        reuse: Answers OPENs with handles that are closed; None where opens do not ask.
        set_id: Takes set-id bits off.
        late: Requests answered before their time.
        answers: Replies.
    """

    def __init__(
        self,
        dev_fuse: int,
        loan: Loan,
        policy: CachePolicy,
        terms: Terms,
        orders: Orders,
        window: Window | None,
        pass_from: int,
    ) -> None:
        self.loan = loan
        self.policy = policy
        self.terms = terms
        self.orders = orders
        # One more than the ring takes: an INTERRUPT or FORGET can be read when all are in use.
        slots = loan.requests.capacity + 1
        self.pool = SlotPool(loan, largest_request(terms.max_message), slots)
        self.sleeper = Sleeper(dev_fuse, loan, orders)
        self.passthrough: Passthrough | None = None
        if window is not None:
            self.passthrough = Passthrough(loan, window, BackingFiles(dev_fuse), pass_from)
        self.memory = Memory(policy)
        self.kernel = KernelPort(dev_fuse)
        self.opens = OpenChecks(
            loan,
            policy,
            self.memory.names,
            self.memory.walkers,
            self.memory.kept,
            self.passthrough,
        )
        self.device = DevicePort(loan, orders, self.opens)
        self.reuse = HandleReuse(self) if policy.revalidate else None
        self.set_id = SetIdBits(loan, self.device, self.kernel, self.opens, self.memory.modes)
        self.late = LateReplies(loan, self.kernel, self.device, self.forget, self.memory.released)
        self.answers = Answers(loan, policy, self.kernel, self.opens, self.late, self.memory.xattrs)

    def forget(self, nodeid: int, nlookup: int) -> None:
        """References to a node are given back; so is what is known of it."""
        if self.reuse is not None:
            self.reuse.forget(nodeid)
        self.memory.forget(nodeid)
        self.opens.forget(nodeid)
        if self.passthrough is not None:
            self.passthrough.nodes.forget(nodeid)
        self.device.forget(nodeid, nlookup)
