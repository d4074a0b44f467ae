"""Naming a file without holding it open: the kernel's file handles.

A guest may know a million nodes; each as a descriptor would exhaust the process. A node that has
not been used for a while is kept as a file handle instead (some 20 bytes), from which it can be
opened again wherever it was moved. A file that was removed meanwhile is ESTALE, even if its inode
number has been given to another.

This takes CAP_DAC_READ_SEARCH and a filesystem that has handles. A handle opens on one mount, so
only files on the share's own are named; those of other mounts below it stay open.
"""

from __future__ import annotations

import os

from vfsmount.hostd import syscalls

__all__ = ["FileHandles"]

_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class FileHandles:
    """File handles of one mount.

    Args:
        mount_fd: A directory on it, open for reading; stays the caller's.
        mount_id: From ``syscalls.name_to_handle_at``.
    """

    __slots__ = ("_mount_fd", "_mount_id")

    def __init__(self, mount_fd: int, mount_id: int) -> None:
        self._mount_fd = mount_fd
        self._mount_id = mount_id

    @classmethod
    def probe(cls, mount_fd: int) -> FileHandles | None:
        """Return the handles of a directory's mount; None where they cannot be made or opened."""
        try:
            handle, mount_id = syscalls.name_to_handle_at(mount_fd)
            os.close(syscalls.open_by_handle_at(mount_fd, handle, _FLAGS))
        except OSError:
            return None
        return cls(mount_fd, mount_id)

    def make(self, fd: int) -> bytes | None:
        """Return the handle of an O_PATH descriptor; None if it must stay open."""
        try:
            handle, mount_id = syscalls.name_to_handle_at(fd)
        except OSError:
            return None
        return handle if mount_id == self._mount_id else None

    def open(self, handle: bytes) -> int:
        """Return an O_PATH descriptor.

        Raises:
            OSError: ESTALE: the file has been removed.
        """
        return syscalls.open_by_handle_at(self._mount_fd, handle, _FLAGS)
