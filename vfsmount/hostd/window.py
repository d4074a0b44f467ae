"""The DAX window as its device: which part of which file the front-end has mapped where.

FUSE and vhost-user disagree: SETUPMAPPING over what is mapped replaces it, in part if need be, but
SHMEM_MAP must not overlap anything, and SHMEM_UNMAP must name one earlier mapping in full. So this
table knows each mapping as the front-end does, takes away whole ones, and maps their remainders
again. For those it keeps each file open, once per node and kind of access.

Offsets: ``foffset`` is in the file, ``moffset`` in the window; all are multiples of ALIGNMENT.

Invariants (``check_invariants``): mappings do not overlap and lie inside the window; a file is open
exactly while a mapping of it exists.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.hostd.syscalls import close_quietly
from vfsmount.wire.vhost_user import BackendRequest, ShmemFlag, ShmemMap
from vfsmount.wire.virtio_fs import DAX_SHMID

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.hostd.requests import RequestChannel

__all__ = ["ALIGNMENT", "ALIGNMENT_SHIFT", "DaxWindow"]

#: FUSE's map_alignment, log2 of bytes: one page. Guests choose larger ranges, Linux 2 MiB.
ALIGNMENT_SHIFT: Final = 12
ALIGNMENT: Final = 1 << ALIGNMENT_SHIFT
#: Mappings of one guest. Each takes one of the front-end's, of which Linux allows 65530.
MAX_MAPPINGS: Final = 4096
_MAX_OFFSET: Final = (1 << 63) - 1
_WRITABLE: Final = int(ShmemFlag.WRITABLE)


class _File:
    """A file that is open for its mappings, which it counts."""

    __slots__ = ("fd", "key", "mappings")

    def __init__(self, key: tuple[int, bool], fd: int) -> None:
        self.key = key
        self.fd = fd
        self.mappings = 0


class _Mapping(NamedTuple):
    """One mapping as the front-end has it; bytes."""

    moffset: int
    length: int
    foffset: int
    file: _File

    @property
    def end(self) -> int:
        return self.moffset + self.length


class DaxWindow:
    """The window of one guest.

    Args:
        size: Bytes, a multiple of ALIGNMENT.

    Attributes:
        size: The same.
        channel: Where the front-end can be asked; None while it cannot.
    """

    __slots__ = ("_files", "_mappings", "channel", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.channel: RequestChannel | None = None
        self._mappings: list[_Mapping] = []
        self._files: dict[tuple[int, bool], _File] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    @property
    def open_files(self) -> int:
        """Descriptors that the mappings take."""
        return len(self._files)

    def set_up(
        self,
        key: tuple[int, bool],
        foffset: int,
        length: int,
        moffset: int,
        open_file: Callable[[], int],
    ) -> None:
        """Map a part of a file in place of whatever is there.

        Args:
            key: Node, and whether the guest may write.
            foffset: Where in the file; its end may lie before the end of the mapping.
            length: Bytes.
            moffset: Where in the window.
            open_file: Opens the file for ``key`` if it is not open yet; the descriptor is ours.

        Raises:
            OSError: EINVAL: not aligned, empty or not inside the window; ENOSPC: too many; EIO and
                others: the front-end refuses. In the last case nothing is mapped there.
        """
        self._check(moffset, length)
        if foffset % ALIGNMENT or foffset > _MAX_OFFSET - length:
            raise OSError(errno.EINVAL, f"mapping of a file at {foffset:#x}")
        self._check_room(moffset, length, coming=1)
        file = self._files.get(key)
        if file is None:
            file = self._files[key] = _File(key, open_file())
        file.mappings += 1  # so that it survives the removal of its last mapping just here
        try:
            self._remove(moffset, length, wait=False)  # what is asked next comes later
            self._map(_Mapping(moffset, length, foffset, file))
        finally:
            self._let_go(file)

    def remove(self, moffset: int, length: int) -> None:
        """Unmap a part of the window; what is not mapped there does not matter.

        Raises:
            OSError: EINVAL: not aligned, empty or not inside the window; ENOSPC: it would make two
                of one, and that is too many; EIO and others: the front-end would not map again what
                remains of a mapping.
        """
        self._check(moffset, length)
        self._check_room(moffset, length, coming=0)
        self._remove(moffset, length, wait=True)

    def _touched(self, moffset: int, length: int) -> slice:
        """Where in the table the mappings of a part of the window are."""
        first = bisect_right(self._mappings, moffset, key=lambda one: one.end)
        behind = bisect_left(self._mappings, moffset + length, key=lambda one: one.moffset)
        return slice(first, behind)

    def _check_room(self, moffset: int, length: int, coming: int) -> None:
        """Whether ``coming`` mappings may take the place of what is mapped somewhere."""
        touched = self._mappings[self._touched(moffset, length)]
        left_over = sum((one.moffset < moffset) + (one.end > moffset + length) for one in touched)
        if len(self._mappings) - len(touched) + left_over + coming > MAX_MAPPINGS:
            raise OSError(errno.ENOSPC, f"more than {MAX_MAPPINGS} mappings")

    def _remove(self, moffset: int, length: int, *, wait: bool) -> None:
        end = moffset + length
        place = self._touched(moffset, length)
        touched = self._mappings[place]
        del self._mappings[place]
        for one in touched:
            self._unmap(one, wait=wait)
        try:
            for one in touched:  # only the first and the last can stick out
                if one.moffset < moffset:
                    self._map(one._replace(length=moffset - one.moffset))
                if one.end > end:
                    foffset = one.foffset + end - one.moffset
                    self._map(_Mapping(end, one.end - end, foffset, one.file))
        finally:
            for one in touched:
                self._let_go(one.file)

    def clear(self) -> None:
        """Unmap everything (INIT, DESTROY)."""
        if self._mappings:
            self.remove(0, self.size)

    def forget(self) -> None:
        """Everything is unmapped already: the device was reset, or the front-end has gone."""
        for one in self._mappings:
            self._let_go(one.file)
        self._mappings = []

    def _check(self, moffset: int, length: int) -> None:
        inside = 0 < length <= self.size and moffset <= self.size - length
        if not inside or moffset % ALIGNMENT or length % ALIGNMENT:
            raise OSError(errno.EINVAL, f"{length:#x} bytes at {moffset:#x} of the window")

    def _map(self, one: _Mapping) -> None:
        writable = one.file.key[1]
        flags = _WRITABLE if writable else 0
        record = ShmemMap(DAX_SHMID, one.foffset, one.moffset, one.length, flags)
        if self.channel is None:
            raise OSError(errno.EIO, "there is no back-end request channel")
        self.channel.ask(BackendRequest.SHMEM_MAP, record, [one.file.fd])
        one.file.mappings += 1
        self._mappings.insert(
            bisect_left(self._mappings, one.moffset, key=lambda other: other.moffset), one
        )

    def _unmap(self, one: _Mapping, *, wait: bool) -> None:
        # A front-end that says no has dropped it by itself, as it does in a reset.
        if self.channel is not None:
            with suppress(OSError):
                record = ShmemMap(DAX_SHMID, 0, one.moffset, one.length, 0)
                self.channel.ask(BackendRequest.SHMEM_UNMAP, record, wait=wait)

    def _let_go(self, file: _File) -> None:
        file.mappings -= 1
        if not file.mappings:
            del self._files[file.key]
            close_quietly(file.fd)

    def check_invariants(self) -> None:
        """Assert what the module promises; for tests."""
        at = 0
        counts: dict[tuple[int, bool], int] = {}
        for one in self._mappings:
            assert at <= one.moffset < one.end <= self.size
            assert not (one.moffset | one.length | one.foffset) % ALIGNMENT
            at = one.end
            assert self._files[one.file.key] is one.file
            counts[one.file.key] = counts.get(one.file.key, 0) + 1
        assert counts == {key: file.mappings for key, file in self._files.items()}
