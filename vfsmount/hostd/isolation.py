"""How the daemon is kept in: what was asked for, as plain values."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["Isolation", "Sandbox", "UserMap", "parse_user_map"]

_FIELDS = 3


class Sandbox(Enum):
    """How far the filesystem reaches; the words are virtiofsd's, save for the last.

    ``AUTO`` is for the daemon behind ``vfsmount MNT --source DIR``, whose guest is a program on the
    same machine: namespaces where the host allows them to root, else none, and the log says so.
    """

    NAMESPACE = "namespace"
    CHROOT = "chroot"
    NONE = "none"
    AUTO = "auto"


class UserMap(NamedTuple):
    """One line of a user namespace's ``uid_map`` or ``gid_map``."""

    inside: int
    outside: int
    length: int


class Isolation(NamedTuple):
    """What the command line asks for.

    Attributes:
        sandbox: What the daemon can see of the filesystem.
        seccomp: What a forbidden system call does: ``kill``, ``log``, ``trap``; or ``none``.
        added: Capabilities to keep besides the usual ones, by number.
        dropped: Capabilities not to keep.
        uid_map: Users of a user namespace; empty for none, or for the default of mere users.
        gid_map: Groups of it.
    """

    sandbox: Sandbox = Sandbox.NAMESPACE
    seccomp: str = "kill"
    added: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()
    uid_map: tuple[UserMap, ...] = ()
    gid_map: tuple[UserMap, ...] = ()

    @property
    def mapped(self) -> bool:
        """Whether a user namespace is asked for."""
        return bool(self.uid_map or self.gid_map)


def parse_user_map(text: str) -> UserMap:
    """Read ``:INSIDE:OUTSIDE:COUNT:``; any character may stand for the colon.

    Raises:
        ValueError: It is something else.
    """
    separator = text[:1]
    fields = text[1:-1].split(separator) if separator and text[-1:] == separator else []
    if len(fields) != _FIELDS or not all(field.isascii() and field.isdigit() for field in fields):
        raise ValueError(f"{text!r} is not :INSIDE:OUTSIDE:COUNT:")
    entry = UserMap(*map(int, fields))
    if not entry.length or max(entry.inside, entry.outside) + entry.length > 1 << 32:
        raise ValueError(f"{text!r} leaves the numbers of 32 bits")
    return entry
