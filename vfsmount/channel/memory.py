"""The memory that we share with the device: one descriptor, one mapping, rings first, arena behind.

The mapping is large and empty: pages come into being when they are touched and go when ``punch``
takes them, so what the process holds follows what is in flight. A memfd is sealed against change of
size: a device that truncated it would kill us with SIGBUS. A file (``--shm-file``) cannot be
sealed; whoever may write to it is trusted not to shorten it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

from vfsmount.errors import UsageError
from vfsmount.wire.vhost_user import MemoryRegion

__all__ = ["GUEST_BASE", "SharedMemory"]

#: Guest address of the first byte. Not 0, so that a forgotten address is no valid one; low, so that
#: addresses stay small integers. It serves as user address too: to the device that is only a key.
GUEST_BASE = 0x10000

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_BLOCK = 512  # unit of st_blocks
#: Bytes that a file must have room for: rings, and a few large requests.
_ROOM = 16 << 20


class SharedMemory:
    """Shared memory and its mapping.

    Args:
        size: Bytes, a multiple of the page size.
        path: File to create for it, removed again by ``close``; None for an anonymous memfd.

    Attributes:
        fd: The descriptor to send to the device.
        map: The mapping; reading a slice of it makes ``bytes``.
        view: The same as a memoryview.
        size: Bytes.

    Raises:
        UsageError: The file exists already or cannot be made.
    """

    def __init__(self, size: int, path: str | None = None) -> None:
        self.size = size
        self._path = path
        self._can_punch = True
        self.fd = self._open(path)
        try:
            os.truncate(self.fd, size)
            if path is None:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            else:
                self._check_room(path)
            self.map = mmap.mmap(self.fd, size, mmap.MAP_SHARED)
        except BaseException:
            os.close(self.fd)
            self._unlink()
            raise
        # A 2 MiB page for a GETATTR is not what we want; a kernel without them says EINVAL.
        with contextlib.suppress(OSError):
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self.map)

    @staticmethod
    def _open(path: str | None) -> int:
        if path is None:
            return os.memfd_create("vfsmount", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # O_EXCL: sizing somebody's file would destroy it.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            cure = "remove it if it is a leftover, or name another"
            raise UsageError(f"shared memory file {path} exists already", cure) from None
        except OSError as error:
            text = f"cannot create shared memory file {path}: {error.strerror}"
            raise UsageError(text, "name another") from error

    def _check_room(self, path: str) -> None:
        """Make sure that a file system has room to begin with: a page without is SIGBUS."""
        try:
            os.posix_fallocate(self.fd, 0, min(self.size, _ROOM))
        except OSError as error:
            text = f"no room for shared memory in {path}: {error.strerror}"
            raise UsageError(text, "name a file where there is some, in /dev/shm say") from error

    @property
    def region(self) -> MemoryRegion:
        """The region to announce to the device."""
        return MemoryRegion(GUEST_BASE, self.size, GUEST_BASE, 0)

    def resident(self) -> int:
        """Bytes that exist."""
        return os.fstat(self.fd).st_blocks * _BLOCK

    def punch(self, offset: int, size: int) -> None:
        """Give pages back; they read as zero afterwards. Does nothing where the file cannot."""
        if not self._can_punch:
            return
        try:
            self.map.madvise(mmap.MADV_REMOVE, offset, size)
        except OSError:
            self._can_punch = False  # a filesystem without holes

    def close(self) -> None:
        """Unmap and close; again is harmless.

        A view that somebody still holds keeps the mapping until it goes.
        """
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        os.close(fd)
        self._unlink()
        self.view.release()
        with contextlib.suppress(BufferError):  # then it is unmapped when the last view goes
            self.map.close()

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self.fd < 0

    def _unlink(self) -> None:
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
