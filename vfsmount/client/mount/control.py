"""The control socket of a mount: where it is, what is spoken there, and the asking side.

Each serving process listens on one AF_UNIX socket named by the mount's ``major:minor``, in a folder
of its owner that nobody else may enter. So a mount is found and asked without touching the mount
itself, however badly it hangs.

The protocol is one JSON object per line in both directions: ``{"command": "status"}`` is answered
by ``{"ok": true, "result": {...}}`` or ``{"ok": false, "error": "..."}``. All waits are bounded.
The answering side is ``control_server``; this module imports neither trio nor pyfuse3, so that
``vfsmount status`` starts fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from vfsmount.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vfsmount.client.mount.mountinfo import MountEntry

__all__ = [
    "ANSWER_SECONDS",
    "MAX_LINE",
    "ask",
    "check_owner",
    "folders",
    "peer_credentials",
    "prepare_folder",
    "remove_stale_sockets",
    "serving_pid",
    "socket_name",
    "tidy_up",
]

ANSWER_SECONDS = 5.0
"""A healthy process answers in milliseconds; one that is stopped never does."""
MAX_LINE = 4 << 20
"""Bytes of one message; a status with every queue full of requests is far below."""
UCRED = struct.Struct("=iII")
"""struct ucred (12 bytes, <sys/socket.h>): pid, uid, gid."""


def socket_name(device: str) -> str:
    """Return the socket's file name for a mount's ``major:minor``."""
    return f"{device}.sock"


def folders(uid: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return where the sockets of this user's mounts may be, best first.

    The environment counts only for ourselves: root looking for a user's mount must guess.
    """
    fallback = f"/tmp/vfsmount-{uid}"
    if uid == 0:
        return ["/run/vfsmount", fallback]
    own = environ.get("XDG_RUNTIME_DIR", "") if uid == os.geteuid() else ""
    runtime = [own] if own.startswith("/") else []
    return [os.path.join(base, "vfsmount") for base in [*runtime, f"/run/user/{uid}"]] + [fallback]


def prepare_folder() -> str:
    """Return our own folder for control sockets, made with mode 0700 if need be.

    Raises:
        OSError: None of the places will do.
    """
    problem = OSError("no place for a control socket")
    for folder in folders(os.geteuid()):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            _check_folder(folder, os.geteuid())
            return folder
        except OSError as error:
            problem = error
    raise problem


def _check_folder(folder: str, uid: int) -> None:
    # /tmp belongs to everybody: a folder that somebody else made there first is a trap.
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder that only uid {uid} may enter")


def remove_stale_sockets(folder: str) -> None:
    """Remove the sockets in our folder where no process listens any more."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".sock") and _is_stale(path):
            with suppress(FileNotFoundError):  # another vfsmount may be tidying up as well
                os.unlink(path)


def tidy_up() -> None:
    """Remove what killed processes of ours left behind, wherever that may be."""
    for folder in folders(os.geteuid()):
        with suppress(OSError):
            _check_folder(folder, os.geteuid())
            remove_stale_sockets(folder)


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # a full backlog (EAGAIN), or gone already
        return False


# --- asking ---


def connect(entry: MountEntry) -> socket.socket | None:
    """Connect to the process that serves a mount; None when it cannot be found."""
    uid = entry.owner_uid
    for path in _candidates(entry, os.geteuid() if uid is None else uid):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(ANSWER_SECONDS)
            link.connect(path)
            # Root asks sockets in a user's folder: what answers must be that user's.
            if peer_credentials(link)[1] in (uid, 0):
                return link
        except OSError:
            pass
        link.close()
    return None


def _candidates(entry: MountEntry, uid: int) -> Iterator[str]:
    for folder in folders(uid):
        try:
            _check_folder(folder, uid)
        except OSError:
            continue
        yield os.path.join(folder, socket_name(entry.device))


class HasSocketOptions(Protocol):
    """A stdlib socket, or trio's stream around one."""

    def getsockopt(self, level: int, option: int, buffersize: int, /) -> bytes:
        """As ``socket.getsockopt``."""


def peer_credentials(link: HasSocketOptions) -> tuple[int, int]:
    """Return pid and uid of the process at the other end (for a listener: who called listen)."""
    pid, uid, _ = UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid


def check_owner(entry: MountEntry) -> None:
    """Make sure that a mount is ours to ask and to take off.

    Raises:
        MountError: It was made by somebody else, and we are not root.
    """
    if os.geteuid() not in (0, entry.owner_uid):
        text = f"{entry.mountpoint} is a mount of uid {entry.owner_uid}, not yours"
        raise MountError(text, "run this as that user, or as root (sudo)")


def serving_pid(entry: MountEntry) -> int | None:
    """Return the process that serves a mount, even one that is stopped; None if it is gone."""
    link = connect(entry)
    if link is None:
        return None
    with link:
        return peer_credentials(link)[0]


def ask(entry: MountEntry, command: str) -> dict[str, Any]:
    """Send one command to the process behind a mount and return its result.

    Raises:
        MountError: No process serves the mount, it does not answer, or it refuses the command.
    """
    link = connect(entry)
    if link is None:
        check_owner(entry)
        cure = f"clean it up: vfsmount umount {entry.mountpoint}"
        raise MountError(f"no vfsmount process serves {entry.mountpoint} any more", cure)
    with link:
        pid = peer_credentials(link)[0]
        try:
            link.sendall(json.dumps({"command": command}).encode() + b"\n")
            with link.makefile("rb") as stream:
                answer = json.loads(stream.readline(MAX_LINE))
        except (OSError, ValueError) as error:
            cure = f"is it stopped? to end it: vfsmount umount --force {entry.mountpoint}"
            raise MountError(
                f"process {pid} does not answer on its control socket", cure
            ) from error
    if not isinstance(answer, dict) or answer.get("ok") is not True:
        reason = answer.get("error") if isinstance(answer, dict) else "bad answer"
        raise MountError(f"process {pid} refuses {command!r}: {reason}")
    result: dict[str, Any] = answer["result"]
    return result
