"""The local directory that a mount covers: what can be wrong with it, and how to take a mount off.

Root uses umount2(2); everybody else asks fusermount3, which only takes off the caller's own mounts.
Nothing here looks inside a mount that exists: see ``mountinfo``.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import stat
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vfsmount.client.mount.control import serving_pid
from vfsmount.client.mount.mountinfo import MountEntry, locate
from vfsmount.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Holder",
    "abort_connection",
    "check_fuse_available",
    "check_mountpoint",
    "describe_holders",
    "detach",
    "holders",
    "is_mounted",
    "unmount",
]

MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8
"""Flags of umount2(2), <sys/mount.h>."""
FUSE_DEVICE = "/dev/fuse"
CONNECTIONS = "/sys/fs/fuse/connections"
FUSERMOUNT_SECONDS = 30.0
"""fusermount3 answers in milliseconds; beyond this something on its way hangs."""

ANOTHER = "name a directory that you may enter"
"""Cure where the mount point will not do."""

logger = logging.getLogger(__name__)
libc = ctypes.CDLL(None, use_errno=True)


def is_root() -> bool:
    """Whether mount(2) and umount2(2) are ours to call."""
    return os.geteuid() == 0


# --- before mounting ---


def check_mountpoint(path: str) -> str:
    """Make sure that a directory is there and free to be covered.

    Returns:
        The path with its symbolic links resolved, as the mount table will show it.

    Raises:
        MountError: Missing, not a directory, not ours to see, mounted already, or a dead mount.
    """
    resolved, entry = locate(path)
    if resolved == "/":
        raise MountError("mount point / would hide the whole system", ANOTHER)
    taken = entry is not None and entry.fstype == "fuse.vfsmount"
    cure = f"unmount it first: vfsmount umount {path}"
    # Asked before anybody looks inside: a mount that lives but hangs would hang us too.
    if taken and entry is not None and serving_pid(entry) is not None:
        raise MountError(f"{path} is a vfsmount mount already", cure)
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        if taken:
            raise MountError(f"{path} is a vfsmount mount already", cure)
        if not is_directory:
            raise MountError(f"mount point {path} is not a directory", ANOTHER)
        with os.scandir(path) as names:
            if next(names, None) is not None:
                logger.warning("%s is not empty; its files are hidden while mounted", path)
    except OSError as error:
        raise _mountpoint_error(path, error) from error
    return os.path.realpath(resolved)


def _mountpoint_error(path: str, error: OSError) -> MountError:
    if error.errno == errno.ENOENT:
        return MountError(f"mount point {path} does not exist", f"create it: mkdir -p {path}")
    if error.errno == errno.ENOTDIR:
        return MountError(f"mount point {path} is not a directory", ANOTHER)
    if error.errno == errno.ENOTCONN:
        cure = f"clean it up: vfsmount umount {path} (or umount -l {path})"
        return MountError(f"mount point {path} is a dead mount, its process is gone", cure)
    return MountError(f"mount point {path}: {os.strerror(error.errno or 0)}", ANOTHER)


def check_fuse_available() -> None:
    """Make sure that the kernel's device and, for those who need it, the helper are there.

    Raises:
        MountError: One of them is missing; the cure says where it comes from.
    """
    if not os.path.exists(FUSE_DEVICE):
        cure = "load it with 'modprobe fuse'; a container must be given it: --device /dev/fuse"
        raise MountError(f"{FUSE_DEVICE} does not exist", cure)
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        cure = f"root can allow it: chmod 666 {FUSE_DEVICE}"
        raise MountError(f"{FUSE_DEVICE} may not be opened by this user", cure)
    if not is_root() and fusermount() is None:
        cure = "install the package fuse3, or run as root"
        raise MountError("fusermount3 is not installed, and only root can mount without it", cure)


def fusermount() -> str | None:
    """Return the path of fusermount3, or None."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/bin:/bin:/usr/local/bin"
    return shutil.which("fusermount3", path=search)


# --- taking it off ---


def is_mounted(path: str, device: str) -> bool:
    """Whether what one sees at ``path`` is still the mount of ``device`` (``major:minor``)."""
    entry = locate(path)[1]
    return entry is not None and entry.device == device


def unmount(path: str) -> None:
    """Take the topmost mount off ``path``.

    Raises:
        OSError: As umount2(2); EBUSY while somebody uses it.
    """
    _take_off(path, UMOUNT_NOFOLLOW, [])


def detach(path: str) -> None:
    """Take the topmost mount out of sight at once; it ends when its last user lets go.

    Raises:
        OSError: As umount2(2).
    """
    _take_off(path, MNT_DETACH | UMOUNT_NOFOLLOW, ["-z"])


def _take_off(path: str, flags: int, extra: list[str]) -> None:
    if libc.umount2(os.fsencode(path), flags) == 0:
        return
    number = ctypes.get_errno()
    helper = fusermount()
    if number != errno.EPERM or helper is None:
        raise OSError(number, os.strerror(number), path)
    try:
        result = subprocess.run(
            [helper, "-u", *extra, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FUSERMOUNT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, "fusermount3 does not return", path) from None
    if result.returncode != 0:
        text = os.fsdecode(result.stderr).strip()
        number = errno.EBUSY if "busy" in text else errno.EPERM
        raise OSError(number, text or os.strerror(number), path)


def abort_connection(entry: MountEntry) -> bool:
    """Make the kernel fail every pending and later request of a FUSE mount.

    Uses the control file of the connection, or MNT_FORCE where that file system is not mounted,
    which only root may do.

    Returns:
        Whether it worked.
    """
    try:
        with open(f"{CONNECTIONS}/{entry.minor}/abort", "w", encoding="ascii") as file:
            file.write("1")
        return True
    except OSError as error:
        logger.debug("no control file for connection %d: %s", entry.minor, error)
    if not is_root():
        return False
    # Aborts first, unmounts then; EBUSY therefore means that the abort is done.
    done = libc.umount2(os.fsencode(entry.mountpoint), MNT_FORCE | UMOUNT_NOFOLLOW) == 0
    return done or ctypes.get_errno() == errno.EBUSY


# --- who keeps it busy ---


class Holder(NamedTuple):
    """A process that uses the mount."""

    pid: int
    name: str


def holders(path: str) -> Iterator[Holder]:
    """Yield the processes that have something below ``path`` open or work there.

    Reads links in /proc only, so it is safe on a mount that hangs. Processes of others are seen by
    root only; files that are only mapped into memory are not looked for.
    """
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if any(_is_below(target, path) for target in _used_paths(f"/proc/{name}")):
            yield Holder(int(name), _process_name(name))


def describe_holders(path: str, limit: int = 3) -> str:
    """Return ``used by 12 (bash), 34 (vim)``, or an empty string when nobody can be named."""
    found = list(holders(path))
    if not found:
        return ""
    named = ", ".join(f"{holder.pid} ({holder.name})" for holder in found[:limit])
    return f"used by {named}" + (f" and {len(found) - limit} more" if len(found) > limit else "")


def _used_paths(process: str) -> Iterator[str]:
    links = [f"{process}/cwd", f"{process}/root"]
    with suppress(OSError):  # somebody else's process, or one that has just ended
        links += [f"{process}/fd/{number}" for number in os.listdir(f"{process}/fd")]
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _is_below(target: str, path: str) -> bool:
    return target == path or target.startswith(path.rstrip("/") + "/")


def _process_name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
