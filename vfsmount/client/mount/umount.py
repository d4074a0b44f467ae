"""``vfsmount umount``: take a mount off and wait until everything written is with the host.

The serving process flushes after the kernel has let go of the mount, so an unmount is over only
when that process has ended; it is watched through a pidfd, which cannot mean another process.
Works without touching the mount, so also when it is dead or hangs.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from contextlib import suppress

from vfsmount.client.mount.control import ask, check_owner, serving_pid, tidy_up
from vfsmount.client.mount.mountinfo import MountEntry, locate
from vfsmount.client.mount.mountpoint import (
    abort_connection,
    describe_holders,
    detach,
    is_mounted,
    unmount,
)
from vfsmount.errors import MountError

__all__ = ["run_umount"]

WAIT_SECONDS = 60.0
"""For the flush after an unmount; a slow host with much to write needs some of it."""
FORCE_SECONDS = 5.0
"""For the end after an abort, when nothing is left to be saved."""


def run_umount(path: str, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount and wait for the end of the process behind it.

    Args:
        path: The mount point.
        lazy: Take it out of sight at once, whoever uses it, and do not wait.
        force: Abort the connection: pending requests fail, unwritten data is lost.

    Raises:
        MountError: Nothing of ours is mounted there, it is busy, or its process does not end.
    """
    resolved, entry = locate(path)
    entry = _checked(path, entry)
    pid = serving_pid(entry)
    process = _pidfd(pid)
    try:
        if force:
            _break_off(resolved, entry, process)
        elif lazy:
            _take_off(resolved, lazy=True)
        else:
            _take_off(resolved, lazy=pid is None)
        if not lazy and not force and not _ended(process, WAIT_SECONDS):
            cure = f"look at its log; to end it now: kill -9 {pid}"
            raise MountError(f"{path} is unmounted, but process {pid} is still flushing", cure)
    finally:
        if process is not None:
            os.close(process)
        tidy_up()


def _checked(path: str, entry: MountEntry | None) -> MountEntry:
    if entry is None:
        raise MountError(f"nothing is mounted on {path}")
    ours = entry.fstype == "fuse.vfsmount" or (entry.is_fuse and serving_pid(entry) is not None)
    if not ours:
        cure = f"unmount it with: umount {path}"
        raise MountError(f"{path} is a mount of type {entry.fstype}, not one of vfsmount", cure)
    check_owner(entry)
    return entry


def _pidfd(pid: int | None) -> int | None:
    try:
        return None if pid is None else os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _take_off(path: str, *, lazy: bool) -> None:
    try:
        (detach if lazy else unmount)(path)
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: str, error: OSError) -> MountError:
    if error.errno == errno.EBUSY:
        users = describe_holders(path)
        cure = f"close them, or detach it: vfsmount umount --lazy {path}"
        if not users:
            cure = f"detach it with --lazy, or if it hangs: vfsmount umount --force {path}"
        return MountError(f"{path} is busy{', ' + users if users else ''}", cure)
    return MountError(f"cannot unmount {path}: {error.strerror}")


def _break_off(path: str, entry: MountEntry, process: int | None) -> None:
    """Abort the connection, and end the process by itself if it can, else by SIGKILL."""
    with suppress(MountError):  # it may be gone or stopped
        ask(entry, "abort")
    if is_mounted(path, entry.device):
        abort_connection(entry)
    if process is not None and not _ended(process, FORCE_SECONDS):
        signal.pidfd_send_signal(process, signal.SIGKILL)
        _ended(process, FORCE_SECONDS)
    try:
        if is_mounted(path, entry.device):
            detach(path)
    except OSError as error:
        if is_mounted(path, entry.device):
            raise _refusal(path, error) from error


def _ended(process: int | None, limit: float) -> bool:
    if process is None:
        return True
    watch = select.poll()
    watch.register(process, select.POLLIN)
    return bool(watch.poll(limit * 1000))
