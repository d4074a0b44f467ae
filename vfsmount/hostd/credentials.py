"""Acting as the guest's user: who creates a file owns it.

Only root can act as somebody else, so an unprivileged daemon creates everything as itself. As root,
a thread that serves a guest changes its *own* effective ids around a creating operation, and
nothing else: what a user may do has been checked by the guest (``default_permissions``); what
remains is the owner of what is made, the group in a setgid directory, and the host's own checks.

The kernel takes an effective user's capabilities away with uid 0 and gives them back with it. One
of them is needed on the way: without the caller's groups (CREATE_SUPP_GROUP) we cannot tell whether
a directory is writable through one of them, so DAC_OVERRIDE is kept then, as virtiofsd does.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vfsmount.hostd import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Credentials"]

#: "No such id" on the wire (idmapped mounts) and "leave it" to the kernel: never act on it.
_NO_ID = 0xFFFFFFFF


class Credentials:
    """What a guest's thread may switch to.

    Attributes:
        switching: Whether this process can act as other users.
        own_umask: Whether the thread has a umask of its own.
    """

    __slots__ = ("_home_gid", "own_umask", "switching")

    def __init__(self) -> None:
        self.switching = os.geteuid() == 0
        self._home_gid = os.getegid()
        self.own_umask = False

    def settle(self) -> None:
        """Prepare the calling thread to serve a guest: no umask, no groups of our own.

        A host that forbids ``unshare`` leaves the umask shared by the whole process; it is cleared
        all the same, because the guest has applied its callers' masks already.
        """
        with suppress(OSError):
            syscalls.thread_unshare_fs()
            self.own_umask = True
        os.umask(0)
        if self.switching:
            # Refused in a user namespace with setgroups denied, where there are none to drop.
            with suppress(OSError):
                syscalls.thread_set_groups(())

    def would_switch(self, uid: int, gid: int) -> bool:
        """Whether acting as this user is anything but what the thread does anyway."""
        return self.switching and (uid != 0 or gid != self._home_gid)

    @contextmanager
    def acting_as(
        self, uid: int, gid: int, groups: tuple[int, ...] | None, umask: int = 0
    ) -> Iterator[None]:
        """Be the caller of a creating request for the length of a ``with`` block.

        Args:
            uid: User, from the request's header.
            gid: Group, from the request's header.
            groups: Supplementary groups that the guest sent, or None when it cannot send any.
            umask: What to take off the mode, unless the directory has a default ACL. Only where
                the thread has a umask of its own.

        Raises:
            OSError: The ids are not valid here; nothing has changed.
        """
        switch = self.would_switch(uid, gid)
        if switch and (uid == _NO_ID or gid == _NO_ID):
            raise OSError(errno.EINVAL, "caller without an identity")
        try:
            if umask:
                os.umask(umask)
            if switch:
                self._become(uid, gid, groups)
            yield
        finally:
            if umask:
                os.umask(0)
            if switch:
                self._return()

    def _become(self, uid: int, gid: int, groups: tuple[int, ...] | None) -> None:
        """The user comes last, because the right to change the others goes with it."""
        if groups:
            syscalls.thread_set_groups(groups)
        syscalls.thread_setegid(gid)
        if uid:
            syscalls.thread_seteuid(uid)
            if groups is None:
                _raise_capability(syscalls.CAP_DAC_OVERRIDE)

    def _return(self) -> None:
        """Undo ``_become`` wherever it stopped; each step is right on its own.

        An error here would leave the thread as the guest's user, which is safe but of no use.
        """
        syscalls.thread_seteuid(0)
        syscalls.thread_setegid(self._home_gid)
        with suppress(OSError):
            syscalls.thread_set_groups(())

    @contextmanager
    def without_fsetid(self, wanted: bool) -> Iterator[None]:
        """Let the kernel clear set-id bits on a write or truncation, as it does for mere users.

        Args:
            wanted: The guest asked for it (KILL_SUIDGID); otherwise nothing happens.
        """
        if not wanted or not self.switching:
            yield
            return
        words = syscalls.thread_capabilities()
        effective = words[0]
        words[0] = effective & ~(1 << syscalls.CAP_FSETID)
        syscalls.thread_set_capabilities(words)
        try:
            yield
        finally:
            words[0] = effective
            syscalls.thread_set_capabilities(words)


def _raise_capability(number: int) -> None:
    """Make a permitted capability effective; without it the host's checks just stay strict."""
    words = syscalls.thread_capabilities()
    words[0] |= words[1] & 1 << number
    with suppress(OSError):
        syscalls.thread_set_capabilities(words)
