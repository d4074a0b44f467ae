"""Kernel backing files: a descriptor of a host file, registered with the mount's ``/dev/fuse``.

From then on the kernel can serve opens of a FUSE file from it (FUSE passthrough, Linux 6.9). What
this file knows of it, measured on 6.18:

* Registering needs CAP_SYS_ADMIN in the initial user namespace, a regular file, and a file system
  that is not stacked itself (overlayfs: ELOOP).
* **The rights of the descriptor do not count.** For each open the kernel opens the file anew, with
  the flags of that open and no look at permissions. So who answers an OPEN must have seen a
  descriptor that allows what the open wants (``passthrough``), and may register a read-only
  one for everybody. It does, because a file that is held open for writing cannot be executed at
  the host (ETXTBSY).
* **Reads and writes run with the credentials of the registering thread.** With CAP_FSETID among
  them nobody's write would take set-id bits off any more; with CAP_SYS_RESOURCE quotas and reserved
  blocks would not count. ``drop_capabilities`` is for that thread.
* The kernel keeps what it needs while a file is open; closing an id only forgets the number.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

__all__ = ["BackingFiles", "drop_capabilities", "problem"]

#: <linux/fuse.h>: _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t).
FUSE_DEV_IOC_BACKING_OPEN: Final = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE: Final = 0x4004E502
_BACKING_MAP: Final = struct.Struct("<iIQ")  # fuse_backing_map, 16 bytes: fd, flags, padding
_ID: Final = struct.Struct("<I")

#: <linux/capability.h>
_CAP_FSETID: Final = 4
_CAP_SYS_RESOURCE: Final = 24
_UNWANTED: Final = (1 << _CAP_FSETID) | (1 << _CAP_SYS_RESOURCE)
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAP_HEADER: Final = struct.Struct("<Ii")  # __user_cap_header_struct: version, pid
_CAP_DATA: Final = struct.Struct("<6I")  # 2 x __user_cap_data_struct: effective, permitted, ...

_WHY: Final = {
    errno.EPERM: "it takes CAP_SYS_ADMIN in the initial user namespace",
    errno.ENOTTY: "the kernel has no FUSE passthrough",
    errno.EOPNOTSUPP: "the kernel has no FUSE passthrough",
}


class BackingFiles:
    """The backing files of one mount.

    Args:
        device: The mount's ``/dev/fuse``.
    """

    __slots__ = ("_device",)

    def __init__(self, device: int) -> None:
        self._device = device

    def open(self, fd: int, *, writable: bool = False) -> int:
        """Register a file; return its id. The descriptor stays the caller's and may be closed.

        Args:
            fd: The file.
            writable: It may be written to; a read-only descriptor takes its place, if there is one.

        Raises:
            OSError: EPERM; ELOOP: its file system is stacked; EINVAL: no regular file; others.
        """
        if not writable:
            return self._register(fd)
        try:
            reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc, or a file that may only be written to
            return self._register(fd)
        try:
            return self._register(reading)
        finally:
            os.close(reading)

    def _register(self, fd: int) -> int:
        # A buffer that may be changed, because only then ioctl() returns the system call's result.
        argument = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        backing_id: int = fcntl.ioctl(self._device, FUSE_DEV_IOC_BACKING_OPEN, argument)
        return backing_id

    def close(self, backing_id: int) -> None:
        """Forget an id; opens that use it go on."""
        try:
            fcntl.ioctl(self._device, FUSE_DEV_IOC_BACKING_CLOSE, bytearray(_ID.pack(backing_id)))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


def problem(device: int) -> str:
    """Return why nothing can be registered with a mount; empty when something can. It tries."""
    files = BackingFiles(device)
    fd = os.memfd_create("vfsmount-try")
    try:
        files.close(files.open(fd))
    except OSError as error:
        return _WHY.get(error.errno or 0, f"no backing file: {os.strerror(error.errno or 0)}")
    finally:
        os.close(fd)
    return ""


def drop_capabilities() -> None:
    """Take from the calling thread what must not be in the credentials of backing files.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(_CAP_HEADER.pack(_CAPABILITY_VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    effective, *rest = _CAP_DATA.unpack(data.raw)
    changed = _CAP_DATA.pack(effective & ~_UNWANTED, *rest)
    if libc.capset(header, ctypes.create_string_buffer(changed, _CAP_DATA.size)):
        raise OSError(ctypes.get_errno(), "capset")
