"""What a guest can do wrong, by consequence.

    VfsmountError
    ├── Refused          a message understood and declined: it is nacked, the connection goes on
    └── GuestFault       the guest broke the rules: its connection ends, with one line in the log
        └── RingFault    ... in a virtqueue: the queue's ERR eventfd is signalled as well

A FUSE request that makes no sense is none of these: it is answered with an errno. Whatever the
fault, no other guest and not the process is affected.
"""

from __future__ import annotations

from vfsmount.errors import VfsmountError

__all__ = ["GuestFault", "Refused", "RingFault"]


class Refused(VfsmountError):
    """The front-end asked for what we will not or cannot do; nothing has changed."""


class GuestFault(VfsmountError):
    """The guest broke the rules of vhost-user, so its connection ends."""


class RingFault(GuestFault):
    """A virtqueue holds what no driver may put there: an index, address, chain or length."""
