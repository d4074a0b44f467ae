"""What is shared and how: the directory, its options, and what a guest may cache.

One share serves many guests. It owns descriptors of the directory, and of ``/proc/self/fd``, where
a node held by an O_PATH descriptor has a name to be opened, linked and changed by.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.errors import UsageError
from vfsmount.hostd import procfd
from vfsmount.hostd.fs.inodes import MAX_NODE_FDS
from vfsmount.hostd.fs.keeping import NodeKeeper
from vfsmount.hostd.fs.lockboard import LockBoard
from vfsmount.wire.fuse_flags import OpenOutFlag

if TYPE_CHECKING:
    from vfsmount.hostd.fs.idmap import Translation
    from vfsmount.hostd.fs.xattrmap import XattrMap

__all__ = [
    "POLICIES",
    "CacheMode",
    "CachePolicy",
    "HandleUse",
    "Share",
    "ShareOptions",
    "open_directory",
]


class CacheMode(Enum):
    """What a guest is told that it may cache; the words are virtiofsd's."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"
    METADATA = "metadata"


class HandleUse(Enum):
    """Whether nodes are kept as file handles; the words are virtiofsd's."""

    NEVER = "never"
    PREFER = "prefer"
    MANDATORY = "mandatory"


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


class ShareOptions(NamedTuple):
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
        xattrmap: Other names for extended attributes on the host, or None.
        translation: Other numbers for users and groups on the host, or None.
        submounts: Tell guests where another filesystem begins.
        readdirplus: List with attributes, where the cache mode has a use for them.
        direct_io: Open with O_DIRECT where a guest's application does.
        keep_noatime: The same for O_NOATIME, which the host refuses for others' files.
        allow_mmap: Let guests map files of the modes that do not cache their data.
        killpriv: Clear set-id bits as the guest asks (HANDLE_KILLPRIV_V2).
        handles: Whether to keep nodes as file handles instead of descriptors.
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
    xattrmap: XattrMap | None = None
    translation: Translation | None = None
    submounts: bool = True
    readdirplus: bool = True
    direct_io: bool = False
    keep_noatime: bool = False
    allow_mmap: bool = False
    killpriv: bool = True
    handles: HandleUse = HandleUse.PREFER


#: Everything else is about paths, creation or the guest's own descriptor. O_DIRECT demands an
#: alignment that guest memory may not have, and O_NOATIME is refused for others' files, so each is
#: for a share to allow.
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_SYNC | os.O_DSYNC


_PLACE: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def open_directory(directory: str | bytes | os.PathLike[str]) -> int:
    """Return an O_PATH descriptor of a directory to share.

    Raises:
        UsageError: There is none, or this process may not enter it.
    """
    try:
        # Its own "." is found by who may enter it, which O_PATH alone does not ask for.
        return os.open(os.path.join(os.fsencode(directory), b"."), _PLACE)
    except (OSError, ValueError) as error:
        name = os.fsdecode(directory)
        reason = getattr(error, "strerror", None) or error
        cure = "name a directory that you may enter"
        raise UsageError(f"cannot share {name}: {reason}", cure) from None


class Share:
    """A directory that is open for guests.

    Args:
        directory: Where it is.
        options: How it is shared.

    Attributes:
        options: How it is shared.
        root_fd: O_PATH descriptor of the directory.
        proc_fd: O_PATH descriptor of ``/proc/self/fd``.
        keeper: How to keep a node without a descriptor.
        node_limit: Descriptors that one guest's nodes may hold between requests.
        open_limit: Files and directories that one guest may have open, which is two descriptors
            each; owners of locks, and files in its DAX window, that it may have, one each.
        locks: Who waits for locks.
        open_flags: open(2) flags that a guest may choose.

    Raises:
        UsageError: The directory cannot be shared, or not in this way, or there is no /proc.
    """

    def __init__(self, directory: str | bytes | os.PathLike[str], options: ShareOptions) -> None:
        self.options = options
        self.locks = LockBoard()
        # One guest alone cannot use up what all have: it gets at most 15/16 of it.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.node_limit = min(MAX_NODE_FDS, descriptors // 8)
        self.open_limit = descriptors // 5
        self.open_flags = (
            _OPEN_FLAGS
            | (os.O_DIRECT if options.direct_io else 0)
            | (os.O_NOATIME if options.keep_noatime else 0)
        )
        self.root_fd = open_directory(directory)
        try:
            self.proc_fd = procfd.open_folder()
        except OSError as error:
            os.close(self.root_fd)
            raise UsageError(
                f"cannot open /proc/self/fd: {error.strerror}", "mount proc on /proc"
            ) from None
        self._mount_fd = -1
        if options.handles is not HandleUse.NEVER:
            readable = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            with suppress(OSError):  # not readable by us: then there are no handles either
                self._mount_fd = os.open(".", readable, dir_fd=self.root_fd)
        self.keeper = NodeKeeper.probe(self.root_fd, self.proc_fd, self._mount_fd)
        if options.handles is HandleUse.MANDATORY and not self.keeper.by_handle:
            self.close()
            raise UsageError(
                "no file handles: they take CAP_DAC_READ_SEARCH and a filesystem that has them",
                "take --inode-file-handles prefer",
            )

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

    def __exit__(self, *_: object) -> None:
        self.close()
