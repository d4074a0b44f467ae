"""What the back-end asks of the DAX window: SHMEM_MAP and SHMEM_UNMAP on its request channel.

Here messages become plain numbers; what may be mapped is the window's to judge. There is one region
for a virtio-fs device, shmid 0.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from vfsmount.wire.vhost_user import BackendRequest, Payload, ShmemFlag, ShmemMap
from vfsmount.wire.virtio_fs import DAX_SHMID

if TYPE_CHECKING:
    from vfsmount.channel.backend_requests import BackendHandler

__all__ = ["Window", "window_handlers"]


class Window(Protocol):
    """Who takes what the back-end maps; numbers are bytes, results 0 or an errno."""

    def offered(self, size: int) -> None:
        """The back-end has a region of that many bytes, or none (0)."""

    def map(self, moffset: int, length: int, foffset: int, writable: bool, fd: int) -> int:
        """Map a part of a file; the descriptor stays the caller's."""

    def unmap(self, moffset: int, length: int) -> int:
        """Take one mapping away, named exactly."""

    def clear(self) -> None:
        """Take all away: the connection has ended."""


def window_handlers(window: Window) -> dict[BackendRequest, BackendHandler]:
    """Return the rows of the handler table for a window."""

    def map_(record: Payload, fds: list[int]) -> int:
        assert isinstance(record, ShmemMap)
        if record.shmid != DAX_SHMID or record.flags & ~int(ShmemFlag.WRITABLE):
            return errno.EINVAL
        writable = bool(record.flags & ShmemFlag.WRITABLE)
        return window.map(record.shm_offset, record.length, record.fd_offset, writable, fds[0])

    def unmap(record: Payload, _fds: list[int]) -> int:
        assert isinstance(record, ShmemMap)
        if record.shmid != DAX_SHMID:
            return errno.EINVAL
        return window.unmap(record.shm_offset, record.length)

    return {BackendRequest.SHMEM_MAP: map_, BackendRequest.SHMEM_UNMAP: unmap}
