"""What the back-end asks of the DAX window: SHMEM_MAP and SHMEM_UNMAP on its request channel.

Here messages become plain numbers; what may be mapped is the window's to judge. There is one region
for a virtio-fs device, shmid 0.

Daemons from before the standard have FS_MAP and FS_UNMAP instead, and no region of their own: the
window is as large as we want, and they learn of it by INIT. Their FS_MAP replaces what it overlaps.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, Protocol

from vfsmount.errors import WireError
from vfsmount.wire.fs_map import (
    FS_MAP_NUMBERS,
    FS_UNMAP_NUMBERS,
    WHOLE_WINDOW,
    decode_fs_map,
)
from vfsmount.wire.vhost_user import (
    BackendRequest,
    Payload,
    ProtocolFeature,
    ShmemFlag,
    ShmemMap,
)
from vfsmount.wire.virtio_fs import DAX_SHMID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfsmount.channel.backend_requests import BackendHandler, OlderHandler

__all__ = ["Window", "older_handlers", "region_size", "window_handlers"]

_UNLIMITED: Final = 1 << 62
_WRITABLE: Final = int(ShmemFlag.WRITABLE)
_OLDER: Final = ProtocolFeature.BACKEND_REQ | ProtocolFeature.BACKEND_SEND_FD


class Window(Protocol):
    """Who takes what the back-end maps; numbers are bytes, results 0 or an errno."""

    def offered(self, size: int) -> None:
        """The back-end has a region of that many bytes, or none (0)."""

    def map(self, moffset: int, length: int, foffset: int, writable: bool, fd: int) -> int:
        """Map a part of a file; the descriptor stays the caller's.

        After success it is known to be one that can be closed at once.
        """

    def unmap(self, moffset: int, length: int) -> int:
        """Take one mapping away, named exactly."""

    def drop(self, moffset: int, length: int) -> None:
        """Take away every mapping that has a byte there."""

    def clear(self) -> None:
        """Take all away: the connection has ended."""


def region_size(features: int, offered: Mapping[int, int]) -> int:
    """Return the bytes of the region that a window may have.

    Args:
        features: Protocol features acked.
        offered: The regions that the back-end has.
    """
    if features & ProtocolFeature.SHMEM:
        return offered.get(DAX_SHMID, 0)
    return _UNLIMITED if features & _OLDER == _OLDER else 0


def window_handlers(window: Window) -> dict[BackendRequest, BackendHandler]:
    """Return the rows of the handler table for a window."""

    def map_(record: Payload, fds: list[int]) -> int:
        assert isinstance(record, ShmemMap)
        if record.shmid != DAX_SHMID or record.flags & ~_WRITABLE:
            return errno.EINVAL
        writable = bool(record.flags & _WRITABLE)
        error = window.map(record.shm_offset, record.length, record.fd_offset, writable, fds[0])
        if not error:
            os.close(fds.pop())  # it has been looked at: closing it waits for nobody
        return error

    def unmap(record: Payload, _fds: list[int]) -> int:
        assert isinstance(record, ShmemMap)
        if record.shmid != DAX_SHMID:
            return errno.EINVAL
        return window.unmap(record.shm_offset, record.length)

    return {BackendRequest.SHMEM_MAP: map_, BackendRequest.SHMEM_UNMAP: unmap}


def older_handlers(window: Window) -> dict[int, OlderHandler]:
    """Return the handlers of FS_MAP and FS_UNMAP for a window, by number."""

    def map_(payload: bytes, fds: list[int]) -> int:
        if len(fds) != 1:
            raise WireError(f"FS_MAP with {len(fds)} descriptors")
        done: list[tuple[int, int]] = []
        for one in decode_fs_map(payload):
            window.drop(one.cache_offset, one.length)
            error = window.map(one.cache_offset, one.length, one.fd_offset, one.writable, fds[0])
            if error:  # all of a message or nothing
                for moffset, length in done:
                    window.unmap(moffset, length)
                return error
            done.append((one.cache_offset, one.length))
        if done:
            os.close(fds.pop())
        return 0

    def unmap(payload: bytes, _fds: list[int]) -> int:
        for one in decode_fs_map(payload):
            whole = one.length == WHOLE_WINDOW
            window.drop(0 if whole else one.cache_offset, one.length)
        return 0

    return dict.fromkeys(FS_MAP_NUMBERS, map_) | dict.fromkeys(FS_UNMAP_NUMBERS, unmap)
