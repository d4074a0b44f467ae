"""``vfsmount status``: ask the process behind a mount what it is doing.

Works on a mount that hangs: the mount is found in the mount table and its process asked on its
control socket. The document itself is made by ``report``, in the serving process.
"""

from __future__ import annotations

from typing import Any

from vfsmount.client.mount.control import ask
from vfsmount.client.mount.mountinfo import locate
from vfsmount.client.mount.tables import format_status
from vfsmount.errors import MountError

__all__ = ["format_status", "read_status"]


def read_status(path: str) -> dict[str, Any]:
    """Return the status document of the mount at ``path``.

    Raises:
        MountError: Nothing is mounted there, it is not ours, or its process does not answer.
    """
    _, entry = locate(path)
    if entry is None:
        raise MountError(f"nothing is mounted on {path}")
    if not entry.is_fuse:
        raise MountError(f"{path} is a mount of type {entry.fstype}, not one of vfsmount")
    return ask(entry, "status")
