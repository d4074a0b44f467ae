"""What may be asked of a descriptor that the other side has sent, before it is known what it is.

fstat(2), open(2), read(2) and even close(2) ask the file's file system. One in userspace (FUSE), or
at the other end of a network, answers when it likes, or never, and the thread that asked can only
wait. So it is first found out whose file it is, from what the kernel knows by itself:

* statx(2) with AT_STATX_DONT_SYNC: type, device, inode and mount, as they are cached (Linux 4.11).
* ``/proc/self/mountinfo``: the type of the file system, by mount; or by device, because a daemon
  may have a mount namespace of its own. What is found by neither has to have a block device.

File systems of other types than ``PROMPT`` are refused: their files go by message, and the daemon
alone waits. A refused descriptor is for others to close (``closer``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from functools import cache
from typing import Final, NamedTuple

__all__ = ["PROMPT", "FileFacts", "MountTypes", "look"]

#: Types of file systems that wait for nobody but the kernel and its disks. An overlay in our mount
#: table is as good as those who made it; only types in the table count.
PROMPT: Final = frozenset(
    (
        "bcachefs", "btrfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs",
        "hugetlbfs", "iso9660", "jfs", "nilfs2", "ntfs3", "overlay", "ramfs", "rootfs", "squashfs",
        "tmpfs", "udf", "vfat", "xfs", "zfs",
    )
)  # fmt: skip

#: <fcntl.h>, <linux/stat.h>
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_TYPE_MODE_INO: Final = 0x103
_MNT_ID: Final = 0x1000  # Linux 5.8: as in mountinfo
_MNT_ID_UNIQUE: Final = 0x4000  # Linux 6.8: never used again
#: struct statx, 256 bytes: mask at 0, mode at 28, ino at 32, device at 136, mount at 144.
_STATX: Final = struct.Struct("=I24xHxxQ96xIIQ104x")


class FileFacts(NamedTuple):
    """What the kernel knows of a file by itself.

    Attributes:
        mode: Type and permissions; the latter may be old.
        dev: Device number of the file system.
        ino: Inode number.
        mount: Number of the mount; 0 where the kernel does not tell.
    """

    mode: int
    dev: int
    ino: int
    mount: int


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def look(fd: int, *, unique: bool = False) -> FileFacts:
    """Look at a descriptor without asking its file system.

    Args:
        fd: Any descriptor.
        unique: ``mount`` is to be a number that is never used again, instead of mountinfo's.

    Raises:
        OSError: EBADF.
    """
    found = ctypes.create_string_buffer(_STATX.size)
    mount_bit = _MNT_ID_UNIQUE if unique else _MNT_ID
    flags, mask = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _TYPE_MODE_INO | mount_bit
    if _libc().statx(fd, b"", flags, mask, found):
        raise OSError(ctypes.get_errno(), "statx")
    filled, mode, ino, major, minor, mount = _STATX.unpack(found.raw)
    return FileFacts(mode, os.makedev(major, minor), ino, mount if filled & mount_bit else 0)


class MountTypes:
    """Which mounts are of prompt file systems."""

    def __init__(self) -> None:
        #: Unique numbers of mounts that were looked up; a mount never changes its file system.
        self._prompt: set[int] = set()

    def check(self, fd: int) -> FileFacts:
        """Look at a regular file of a prompt file system.

        Raises:
            OSError: ENODEV: something else; EOPNOTSUPP: of another file system.
        """
        facts = look(fd, unique=True)
        if not stat.S_ISREG(facts.mode):
            raise OSError(errno.ENODEV, "not a regular file")
        if facts.mount not in self._prompt:
            _refuse_others(look(fd))
            if facts.mount:
                self._prompt.add(facts.mount)
        return facts


def _refuse_others(facts: FileFacts) -> None:
    """Raise EOPNOTSUPP unless the file system is one that answers."""
    kind = _type_of(facts)
    if kind not in PROMPT and (kind or not os.major(facts.dev)):
        kind = kind or "that is not mounted here"
        raise OSError(errno.EOPNOTSUPP, f"a file system that may keep us waiting: {kind}")


def _type_of(facts: FileFacts) -> str:
    """Return the type of the file system that is mounted there, or has that device; else ""."""
    mount, device = str(facts.mount), f"{os.major(facts.dev)}:{os.minor(facts.dev)}"
    by_device = ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            number, _, of_device, _ = line.split(" ", 3)
            kind = line.partition(" - ")[2].partition(" ")[0]
            if number == mount:
                return kind
            if of_device == device:
                by_device = kind
    return by_device
