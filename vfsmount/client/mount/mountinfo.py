"""The kernel's mount table, read without touching any of the mounts in it.

A mount whose daemon hangs blocks whoever looks at it, even with stat(2). Everything that ``status``
and ``umount`` must know about a mount is therefore taken from ``/proc/self/mountinfo`` (proc(5),
"/proc/pid/mountinfo"), and a mount point's path is resolved up to its parent only.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from vfsmount.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["MountEntry", "find_mount", "locate", "parse_mountinfo", "read_mountinfo", "unescape"]

MAX_SYMLINKS = 40
"""As the kernel's own limit (path_resolution(7))."""


class MountEntry(NamedTuple):
    """One line of the mount table.

    Attributes:
        device: ``major:minor`` of the file system, unique on the machine while it is mounted.
        root: Which directory of the file system is seen here; ``/`` unless bind-mounted.
        mountpoint: Absolute path, relative to our own root directory.
        options: Options of this mount point.
        fstype: Such as ``fuse.vfsmount``.
        source: What libfuse calls fsname.
        super_options: Options of the file system, such as ``user_id=0``.
    """

    device: str
    root: str
    mountpoint: str
    options: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]

    @property
    def minor(self) -> int:
        """Number of the FUSE connection below /sys/fs/fuse/connections."""
        return int(self.device.partition(":")[2])

    @property
    def owner_uid(self) -> int | None:
        """Who made the mount, by FUSE's option user_id; None for other file systems."""
        for option in self.super_options:
            if option.startswith("user_id="):
                return int(option.removeprefix("user_id="))
        return None

    @property
    def is_fuse(self) -> bool:
        """Whether this is any FUSE mount."""
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")


def unescape(field: str) -> str:
    """Undo the kernel's octal escapes (blank, tab, newline, backslash, number sign)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def parse_mountinfo(text: str) -> Iterator[MountEntry]:
    """Yield the entries of a mountinfo file in its order; lines of another shape are passed over.

    Args:
        text: The file, decoded with ``os.fsdecode`` so that any path survives.
    """
    for line in text.split("\n"):
        fields = line.split(" ")
        if len(fields) < 10 or "-" not in fields[6:]:
            continue
        # Optional fields, none or several, end with a single dash.
        dash = fields.index("-", 6)
        fstype, source, super_options = (*fields[dash + 1 :], "", "", "")[:3]
        yield MountEntry(
            device=fields[2],
            root=unescape(fields[3]),
            mountpoint=unescape(fields[4]),
            options=tuple(fields[5].split(",")),
            fstype=fstype,
            source=unescape(source),
            super_options=tuple(super_options.split(",")),
        )


def find_mount(entries: Iterable[MountEntry], mountpoint: str) -> MountEntry | None:
    """Return what is mounted at exactly this path; of several the last, which covers the others."""
    found = None
    for entry in entries:
        if entry.mountpoint == mountpoint:
            found = entry
    return found


def read_mountinfo() -> list[MountEntry]:
    """Return the mount table of this process.

    Raises:
        MountError: There is none to read.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            return list(parse_mountinfo(os.fsdecode(file.read())))
    except OSError as error:
        text = f"cannot read the mount table, {error.filename}: {error.strerror}"
        raise MountError(text, "mount proc on /proc") from error


def locate(path: str) -> tuple[str, MountEntry | None]:
    """Find the mount at a path that the user wrote.

    Only the parent is resolved, never the last component: if that is a mount whose daemon hangs,
    looking at it would hang us as well. It is read as a symbolic link only once the mount table
    says that nothing is mounted there.

    Returns:
        The resolved path, and its entry or None.
    """
    entries = read_mountinfo()
    for _ in range(MAX_SYMLINKS):
        parent, name = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(parent), name)
        entry = find_mount(entries, path)
        if entry is not None:
            return path, entry
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            break
    return path, None
