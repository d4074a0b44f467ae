"""What is shared and how: the directory, its options, and what a guest may cache.

One share serves many guests. It owns descriptors of the directory, and of ``/proc/self/fd``, where
a node held by an O_PATH descriptor has a name to be opened, linked and changed by.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.errors import UsageError
from vfsmount.hostd.fs.inodes import MAX_NODE_FDS
from vfsmount.hostd.fs.keeping import NodeKeeper
from vfsmount.hostd.fs.locks import LockBoard
from vfsmount.wire.fuse_flags import OpenOutFlag

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["POLICIES", "CacheMode", "CachePolicy", "Share", "ShareOptions"]


class CacheMode(Enum):
    """What a guest is told that it may cache; the words are virtiofsd's."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"
    METADATA = "metadata"


class CachePolicy(NamedTuple):
    """One row of the cache modes.

    Attributes:
        valid: Seconds for which names and attributes hold.
        file_flags: FOPEN bits in the replies to OPEN and CREATE.
        dir_flags: FOPEN bits in the reply to OPENDIR.
        readdirplus: Whether attributes come with names in listings: useless if they never hold.
    """

    valid: int
    file_flags: int
    dir_flags: int
    readdirplus: bool


_DIRECT = int(OpenOutFlag.DIRECT_IO)
_KEEP = int(OpenOutFlag.KEEP_CACHE)
_KEEP_DIR = int(OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE)
_DAY: Final = 86400

#: The same replies as virtiofsd's, mode by mode.
POLICIES: Final = {
    CacheMode.AUTO: CachePolicy(1, 0, 0, readdirplus=True),
    CacheMode.ALWAYS: CachePolicy(_DAY, _KEEP, _KEEP_DIR, readdirplus=True),
    CacheMode.NEVER: CachePolicy(0, _DIRECT, 0, readdirplus=False),
    CacheMode.METADATA: CachePolicy(_DAY, _DIRECT, _KEEP_DIR, readdirplus=True),
}


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """How a directory is shared.

    Attributes:
        cache: What guests may cache.
        readonly: Refuse every change with EROFS.
        writeback: Accept a guest's write-back cache.
        xattr: Serve extended attributes; else they are ENOSYS.
        posix_acl: Have guests heed access control lists; takes ``xattr``.
        security_label: Label files when they are made; takes ``xattr``.
        tag: Name of the share in the device's config space, 1 to 36 bytes.
        request_queues: Request queues of the device, besides the hiprio queue.
        dax: Bytes of the DAX window on offer, a multiple of the page size; 0 for none.
    """

    cache: CacheMode = CacheMode.AUTO
    readonly: bool = False
    writeback: bool = False
    xattr: bool = True
    posix_acl: bool = False
    security_label: bool = False
    tag: bytes = b"vfsmount"
    request_queues: int = 1
    dax: int = 1 << 30


class Share:
    """A directory that is open for guests.

    Attributes:
        options: How it is shared.
        root_fd: O_PATH descriptor of the directory.
        proc_fd: O_PATH descriptor of ``/proc/self/fd``.
        keeper: How to keep a node without a descriptor.
        node_limit: Descriptors that one guest's nodes may hold between requests.
        open_limit: Files and directories that one guest may have open, which is two descriptors
            each; and owners of locks that it may have, one each.
        locks: Who waits for locks.

    Raises:
        UsageError: The directory cannot be shared, or there is no /proc.
    """

    def __init__(self, directory: str | bytes | os.PathLike[str], options: ShareOptions) -> None:
        self.options = options
        self.locks = LockBoard()
        # One guest alone cannot use up what all have: it gets at most 7/8 of it.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.node_limit = min(MAX_NODE_FDS, descriptors // 8)
        self.open_limit = descriptors // 4
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            self.root_fd = os.open(directory, flags)
        except (OSError, ValueError) as error:
            name = os.fsdecode(directory)
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot share {name}: {reason}") from None
        try:
            self.proc_fd = os.open("/proc/self/fd", flags)
        except OSError as error:
            os.close(self.root_fd)
            raise UsageError(
                f"cannot open /proc/self/fd: {error.strerror}", "mount proc on /proc"
            ) from None
        try:
            readable = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._mount_fd = os.open(".", readable, dir_fd=self.root_fd)
        except OSError:  # not readable by us: then there are no handles either
            self._mount_fd = -1
        self.keeper = NodeKeeper.probe(self.root_fd, self.proc_fd, self._mount_fd)

    @property
    def policy(self) -> CachePolicy:
        """What the cache mode means."""
        return POLICIES[self.options.cache]

    def close(self) -> None:
        """Close the descriptors; no guest may be connected any more."""
        for fd in (self.root_fd, self.proc_fd, self._mount_fd):
            if fd >= 0:
                os.close(fd)
        self.root_fd = self.proc_fd = self._mount_fd = -1

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
