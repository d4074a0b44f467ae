"""Naming a file without holding it open: by the kernel's file handle, or by its path.

A guest may know a million nodes; each as a descriptor would exhaust the process. A node that has
not been used for a while is kept as a few bytes instead, and opened again from them.

File handles (some 20 bytes) find a file wherever it was moved. They take CAP_DAC_READ_SEARCH and a
filesystem that has them, and one opens on its own mount only, so they serve the share's own mount.

Everything else, and all nodes of a daemon without that right, are kept as the path below the share
that leads to them now, with a mark that tells the file from any other: its handle, which everybody
may ask for, or its birth time. A path is opened below the share and through no link, and what is
found there is believed only if the mark is the same.

Either way a file that cannot be found again is ESTALE. Handles: it was removed. Paths: it, or a
directory above it, was moved or removed; the guest looks its name up again and finds the same node.
"""

from __future__ import annotations

import errno
import os
import struct

from vfsmount.hostd import syscalls

__all__ = ["NodeKeeper"]

_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

#: First byte of what is kept: ``struct file_handle`` follows, or a mark with its length and a path.
_BY_HANDLE, _BY_PATH = b"H", b"P"
#: Device, inode number and birth time of a file that has no handle; device alone of one that has.
_DEVICE = struct.Struct("<Q")
_BIRTH = struct.Struct("<QQQ")

#: What the kernel says when a path does not lead where it did.
_LOST = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EXDEV))


class NodeKeeper:
    """How the nodes of one share are kept without descriptors.

    Args:
        root_fd: The shared directory; stays the caller's, like the others.
        proc_fd: ``/proc/self/fd``.
        mount_fd: The shared directory, open for reading: where handles are opened. -1 for paths.
        mount_id: Of its mount, from ``syscalls.name_to_handle_at``.
    """

    __slots__ = ("_mount_fd", "_mount_id", "_proc_fd", "_root_fd")

    def __init__(self, root_fd: int, proc_fd: int, mount_fd: int = -1, mount_id: int = -1) -> None:
        self._root_fd = root_fd
        self._proc_fd = proc_fd
        self._mount_fd = mount_fd
        self._mount_id = mount_id

    @classmethod
    def probe(cls, root_fd: int, proc_fd: int, mount_fd: int) -> NodeKeeper:
        """Return what works here: handles if they can be made and opened, else paths."""
        try:
            handle, mount_id = syscalls.name_to_handle_at(mount_fd)
            os.close(syscalls.open_by_handle_at(mount_fd, handle, _FLAGS))
        except OSError:
            return cls(root_fd, proc_fd)
        return cls(root_fd, proc_fd, mount_fd, mount_id)

    @property
    def by_handle(self) -> bool:
        """Whether nodes on the share's own mount are kept as handles."""
        return self._mount_fd >= 0

    def make(self, fd: int) -> bytes:
        """Return what to keep instead of an O_PATH descriptor."""
        handle, mount_id = _handle_of(fd)
        if self.by_handle and mount_id == self._mount_id:
            return _BY_HANDLE + handle
        mark = _mark(fd, handle)
        return _BY_PATH + bytes((len(mark),)) + mark + self._path(fd)

    def open(self, kept: bytes) -> int:
        """Return an O_PATH descriptor of what was kept.

        Raises:
            OSError: ESTALE: it is not to be found; EMFILE.
        """
        if not kept.startswith(_BY_PATH):
            return syscalls.open_by_handle_at(self._mount_fd, kept[1:], _FLAGS)
        end = 2 + kept[1]
        try:
            fd = syscalls.open_beneath(self._root_fd, kept[end:], _FLAGS)
        except OSError as error:
            if error.errno in _LOST:
                raise OSError(errno.ESTALE, "not where it was") from None
            raise
        if not self.is_same(kept, fd):
            os.close(fd)
            raise OSError(errno.ESTALE, "another file by now")
        return fd

    def is_same(self, kept: bytes, fd: int) -> bool:
        """Whether an O_PATH descriptor names what was kept."""
        handle, mount_id = _handle_of(fd)
        if not kept.startswith(_BY_PATH):
            return kept[1:] == handle and mount_id == self._mount_id
        return kept[2 : 2 + kept[1]] == _mark(fd, handle)

    def is_named(self, kept: bytes, dir_fd: int, name: bytes) -> bool:
        """Whether a name surely leads to what was kept, without opening it.

        Never of what is kept by path: that should learn the new one.
        """
        if kept.startswith(_BY_PATH):
            return False
        try:
            return syscalls.name_to_handle_at(dir_fd, name) == (kept[1:], self._mount_id)
        except OSError:
            return False

    def _path(self, fd: int) -> bytes:
        """The path below the share; empty, which leads nowhere, if it has none or a too long one.

        That of a removed file ends in " (deleted)"; if something has that very name, its mark
        differs.
        """
        try:
            root = os.readlink(b"%d" % self._root_fd, dir_fd=self._proc_fd).rstrip(b"/") + b"/"
            path = os.readlink(b"%d" % fd, dir_fd=self._proc_fd)
        except OSError:
            return b""
        return path[len(root) :] if path.startswith(root) else b""


def _handle_of(fd: int) -> tuple[bytes, int]:
    """The file handle, empty where there are none, and the id of the mount that it opens on."""
    try:
        return syscalls.name_to_handle_at(fd)
    except OSError:
        return b"", -1


def _mark(fd: int, handle: bytes) -> bytes:
    """What no other file has, in the same place or elsewhere."""
    found = os.fstat(fd)
    if handle:
        return _DEVICE.pack(found.st_dev) + handle
    return _BIRTH.pack(found.st_dev, found.st_ino, syscalls.birth_time(fd))
