"""The device's virtqueues as the front-end has set them up, with their eventfds.

A queue outlives its ring: size, addresses and descriptors are kept while it does not run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vfsmount.hostd import procfd
from vfsmount.hostd.faults import GuestFault, Refused

if TYPE_CHECKING:
    from vfsmount.hostd.vring import DeviceRing
    from vfsmount.wire.vhost_user import VringAddr

__all__ = ["NO_FD", "Queue", "take_eventfd"]

NO_FD: Final = -1


class Queue:
    """One virtqueue and its three eventfds, which it owns.

    Attributes:
        index: Number on the wire; 0 is the hiprio queue.
        size: Entries; 0 until told.
        addresses: Where its parts lie, as user addresses; None until told.
        base: Next available index while it does not run.
        enabled: SET_VRING_ENABLE's state, which outlives a stop.
        kick: Its descriptor, or -1.
        kickless: The front-end will not kick; the ring has to be looked at now and then.
        ring: The running ring, else None.
        area: Where the front-end keeps what is in flight; None if it does not.
        held: Heads taken from the queue and not returned, where there is an area.
    """

    __slots__ = (
        "_call",
        "_err",
        "addresses",
        "area",
        "base",
        "enabled",
        "held",
        "index",
        "kick",
        "kickless",
        "ring",
        "size",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.addresses: VringAddr | None = None
        self.base = 0
        self.enabled = False
        self.kick = NO_FD
        self.kickless = False
        self.ring: DeviceRing | None = None
        self.area: memoryview | None = None
        self.held: set[int] = set()
        self._call = NO_FD
        self._err = NO_FD

    @property
    def may_run(self) -> bool:
        """Whether all that it takes is there."""
        reachable = self.kickless or self.kick >= 0
        return self.enabled and reachable and self.size > 0 and self.addresses is not None

    def stop(self) -> None:
        """Stop running; where the ring was is kept in ``base``."""
        if self.ring is not None:
            self.base = self.ring.next_avail
            self.ring = None

    def set_kick(self, fd: int, kickless: bool) -> None:
        """Take over a kick descriptor, or -1 and whether there will be none."""
        _close(self.kick)
        self.kick = fd
        self.kickless = kickless

    def set_call(self, fd: int) -> None:
        """Take over a call descriptor, or -1: the front-end looks by itself."""
        _close(self._call)
        self._call = fd

    def set_err(self, fd: int) -> None:
        """Take over an error descriptor, or -1."""
        _close(self._err)
        self._err = fd

    def call(self) -> None:
        """Tell the driver that chains were used."""
        _signal(self._call)

    def fail(self) -> None:
        """Tell the front-end that the ring is broken."""
        _signal(self._err)

    def reset(self) -> None:
        """Forget everything, and close the descriptors."""
        self.ring = None
        self.set_kick(NO_FD, kickless=False)
        self.set_call(NO_FD)
        self.set_err(NO_FD)
        self.size = self.base = 0
        self.addresses = None
        self.enabled = False
        self.area = None
        self.held = set()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _signal(fd: int) -> None:
    """Write to an eventfd that its owner may have filled to the brim, which counts as told."""
    if fd < 0:
        return
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        pass
    except OSError as error:
        raise GuestFault(f"call descriptor: {error.strerror}") from None


def take_eventfd(fds: list[int]) -> int:
    """Take an eventfd out of what came with a message; -1 when nothing came.

    Reading and writing whatever else a guest may send could block us, or act on its behalf.
    """
    if not fds:
        return NO_FD
    if os.readlink(procfd.path(b"%d" % fds[0])) != b"anon_inode:[eventfd]":
        raise Refused("kick, call or error descriptor that is no eventfd")
    os.set_blocking(fds[0], False)
    return fds.pop(0)
