"""What one guest holds between INIT and its end: nodes, handles, and what was negotiated.

A session belongs to one connection and is used by its thread alone, so nothing here is locked.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.hostd.credentials import Credentials
from vfsmount.hostd.fs import attributes, labels
from vfsmount.hostd.fs.handles import FileHandle, HandleTable
from vfsmount.hostd.fs.inodes import NODE_FLAGS, InodeTable
from vfsmount.hostd.fs.locks import GuestLocks
from vfsmount.hostd.window import ALIGNMENT_SHIFT, DaxWindow
from vfsmount.wire.fuse import (
    HEEDS_INTERRUPT,
    KERNEL_MINOR_VERSION,
    KERNEL_VERSION,
    InitFlag,
    InitIn,
    InitOut,
    flag_names,
    join_flags,
    split_flags,
)

if TYPE_CHECKING:
    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.listing import DirHandle
    from vfsmount.hostd.fs.share import Share
    from vfsmount.wire.fuse import Request

__all__ = ["MAX_PAGES", "MAX_WRITE", "Session"]

logger = logging.getLogger(__name__)

#: Oldest minor version that is served: 7.27, which virtiofsd takes too. Every struct since then has
#: the size that ``wire`` knows, save those that an INIT flag switches.
MIN_MINOR: Final = 27

_PAGE: Final = 4096
#: Largest READ and WRITE in pages and bytes.
MAX_PAGES: Final = 256
MAX_WRITE: Final = MAX_PAGES * _PAGE
#: Without MAX_PAGES the protocol's own limit holds.
_MAX_WRITE_DEFAULT: Final = 32 * _PAGE
_MAX_BACKGROUND: Final = 0xFFFF

#: Offered to every guest that asks.
_ALWAYS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.POSIX_LOCKS
    | InitFlag.FLOCK_LOCKS
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.SUBMOUNTS
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.CREATE_SUPP_GROUP
    | HEEDS_INTERRUPT
)
_DAX: Final = InitFlag.MAP_ALIGNMENT | InitFlag.HAS_INODE_DAX
#: All or none: a guest that applies umasks itself would cut off what a default ACL grants, and one
#: that cannot ask for it would leave set-group-id to somebody that an ACL lets change a file.
_ACL: Final = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.SETXATTR_EXT
_READDIRPLUS: Final = InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO

#: Kinds of nodes that are opened for guests.
_OPENED: Final = frozenset((stat.S_IFREG, stat.S_IFDIR))

_AS_WE_ARE: Final[AbstractContextManager[None]] = nullcontext()

#: One getdents64 takes this much of a directory: some 800 names, 30 us of kernel time.
_DIRENT_BUFFER: Final = 32768


class Agreed(NamedTuple):
    """What INIT settled, as far as operations depend on it: INIT flags, by name.

    Plain booleans, because an operator of IntFlag takes as long as a system call.
    """

    create_supp_group: bool
    security_ctx: bool
    dont_mask: bool
    setxattr_ext: bool
    inode_dax: bool
    submounts: bool
    writeback_cache: bool


class Session:
    """One guest's view of a share.

    Attributes:
        share: What it sees.
        policy: What it may cache.
        inodes: Nodes that it knows.
        files: Regular files that it has open.
        dirs: Directories that it has open.
        locks: Locks that it has or waits for.
        credentials: How to act as its users.
        window: Its DAX window; None where the share has none.
        agreed: What INIT settled; None before INIT and after DESTROY.
        dirent_buffer: Where getdents64 writes; its contents are copied out at once.
    """

    __slots__ = (
        "agreed",
        "credentials",
        "dirent_buffer",
        "dirs",
        "files",
        "inodes",
        "locks",
        "policy",
        "share",
        "window",
    )

    def __init__(self, share: Share) -> None:
        self.share = share
        size = share.options.dax
        self.window = DaxWindow(size) if size else None
        self.policy = share.policy
        self.inodes = InodeTable(share.root_fd, share.keeper, share.node_limit)
        self.files: HandleTable[FileHandle] = HandleTable(self.inodes)
        self.dirs: HandleTable[DirHandle] = HandleTable(self.inodes)
        try:
            self.locks = GuestLocks(share, self.files)
        except OSError:  # there is no descriptor left
            self.inodes.close()
            raise
        self.credentials = Credentials()
        self.agreed: Agreed | None = None
        self.dirent_buffer = ctypes.create_string_buffer(_DIRENT_BUFFER)

    # --- beginning and end -----------------------------------------------------------------------

    def supported(self) -> InitFlag:
        """INIT flags that this share serves."""
        options = self.share.options
        flags = _ALWAYS
        if not options.submounts:
            flags &= ~InitFlag.SUBMOUNTS
        if not options.killpriv:
            flags &= ~InitFlag.HANDLE_KILLPRIV_V2
        if self.policy.readdirplus and options.readdirplus:
            flags |= _READDIRPLUS
        if not self.policy.valid or options.allow_mmap:
            flags |= InitFlag.DIRECT_IO_ALLOW_MMAP
        if options.posix_acl and options.xattr and self.credentials.own_umask:
            flags |= _ACL
        if options.security_label and options.xattr:
            flags |= InitFlag.SECURITY_CTX
        if options.writeback and not options.readonly:
            flags |= InitFlag.WRITEBACK_CACHE
        if self.window is not None and self.window.channel is not None:
            flags |= _DAX
        return flags

    def start(self, offer: InitIn) -> InitOut:
        """Begin (INIT). A second INIT starts over: everything held is let go.

        Raises:
            OSError: EPROTO: the guest speaks an older protocol than we do.
        """
        self.reset()
        if offer.major < KERNEL_VERSION or (
            offer.major == KERNEL_VERSION and offer.minor < MIN_MINOR
        ):
            raise OSError(errno.EPROTO, f"FUSE {offer.major}.{offer.minor} is too old")
        if offer.major > KERNEL_VERSION:
            # The guest reads the version, and sends INIT again with it.
            return InitOut(KERNEL_VERSION, KERNEL_MINOR_VERSION, *[0] * 11)
        flags = join_flags(offer.flags, offer.flags2) & self.supported()
        if flags & _ACL != _ACL:
            flags &= ~(InitFlag.POSIX_ACL | InitFlag.DONT_MASK)
        self.agreed = Agreed(
            create_supp_group=InitFlag.CREATE_SUPP_GROUP in flags,
            security_ctx=InitFlag.SECURITY_CTX in flags,
            dont_mask=InitFlag.DONT_MASK in flags,
            inode_dax=InitFlag.HAS_INODE_DAX in flags,
            setxattr_ext=InitFlag.SETXATTR_EXT in flags,
            submounts=InitFlag.SUBMOUNTS in flags,
            writeback_cache=InitFlag.WRITEBACK_CACHE in flags,
        )
        logger.debug("INIT %d.%d: %s", *offer[:2], " ".join(flag_names(flags)))
        return self._init_out(offer, flags)

    def _init_out(self, offer: InitIn, flags: InitFlag) -> InitOut:
        first, second = split_flags(flags)
        big = bool(flags & InitFlag.MAX_PAGES)
        return InitOut(
            major=KERNEL_VERSION,
            minor=KERNEL_MINOR_VERSION,
            max_readahead=offer.max_readahead,
            flags=first,
            max_background=_MAX_BACKGROUND,
            congestion_threshold=_MAX_BACKGROUND * 3 // 4,
            max_write=MAX_WRITE if big else _MAX_WRITE_DEFAULT,
            time_gran=1,
            max_pages=MAX_PAGES if big else 0,
            map_alignment=ALIGNMENT_SHIFT if flags & InitFlag.MAP_ALIGNMENT else 0,
            flags2=second,
            max_stack_depth=0,
            request_timeout=0,
        )

    def reset(self) -> None:
        """Let go of everything (DESTROY, device reset); only INIT is served until the next one."""
        self.agreed = None
        if self.window is not None:
            self.window.clear()
        self.files.clear()
        self.dirs.clear()
        self.locks.clear()
        self.inodes.clear()

    def reset_device(self) -> None:
        """The same for a device that was reset, which takes its mappings away without a word."""
        if self.window is not None:
            self.window.forget()
        self.reset()

    def close(self) -> None:
        """The guest has gone: close every descriptor."""
        if self.window is not None:
            self.window.forget()
        self.files.clear()
        self.dirs.clear()
        self.locks.close()
        self.inodes.close()

    # --- what operations share -------------------------------------------------------------------

    def look_up(self, parent: Inode, name: bytes) -> bytes:
        """Return the ``fuse_entry_out`` of a checked name; counts one lookup.

        Raises:
            OSError: From the host: ENOENT, ENOTDIR, EACCES, EMFILE, ...
        """
        nodeid, found, place = self.inodes.look_up(parent.fd, name)
        return self.entry(parent, nodeid, found, place)

    def entry(self, parent: Inode, nodeid: int, found: os.stat_result, place: int) -> bytes:
        """Return the ``fuse_entry_out`` of a node whose lookup has been counted."""
        flags = self.attr_flags(found, place, parent)
        return attributes.entry_out(nodeid, found, self.policy.valid, flags)

    def attr_flags(self, found: os.stat_result, place: int = 0, parent: Inode | None = None) -> int:
        """FUSE_ATTR_* of a node, of those that the guest knows.

        SUBMOUNT for the root of another filesystem, where it is found in its parent; DAX for all
        regular files, in case that the guest leaves it to us which of them to map.
        """
        agreed = self.agreed
        if agreed is None:
            return 0
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFREG:
            return attributes.ATTR_DAX if agreed.inode_dax else 0
        if parent is None or place == parent.place or kind != stat.S_IFDIR:
            return 0
        return attributes.ATTR_SUBMOUNT if agreed.submounts else 0

    def reopen(self, inode: Inode, flags: int) -> int:
        """Open the node that an O_PATH descriptor names; the caller owns the new descriptor.

        The name in /proc/self/fd leads to the node itself, wherever it was moved meanwhile. Only
        regular files and directories: a device must not be touched, a FIFO would block.

        Raises:
            OSError: EBADF for other kinds; ENFILE; the host's errors.
        """
        self.check_room()
        if inode.kind not in _OPENED:
            raise OSError(errno.EBADF, "only files and directories are opened")
        return os.open(inode.proc_name, flags | os.O_CLOEXEC, dir_fd=self.share.proc_fd)

    def check_room(self) -> None:
        """Before a file or directory is opened for the guest.

        Raises:
            OSError: ENFILE: it has as many as a guest may have; the others need some, too.
        """
        if len(self.files) + len(self.dirs) >= self.share.open_limit:
            raise OSError(errno.ENFILE, "too many open files of one guest")

    def made(self, request: Request, parent: Inode, name: bytes) -> bytes:
        """Return the ``fuse_entry_out`` of what a request has just made; counts one lookup.

        Raises:
            OSError: As ``look_up``; or it cannot have its labels, and is removed again.
        """
        # New, so without asking first whether it is known, as ``look_up`` does.
        inode, found = self.inodes.adopt(os.open(name, NODE_FLAGS, dir_fd=parent.fd))
        if self.wants_labels(request):
            found = self.label(request, inode, parent, name)
        return self.entry(parent, inode.nodeid, found, inode.place)

    def wants_labels(self, request: Request) -> bool:
        """Whether a creating request brings security labels that were agreed on."""
        agreed = self.agreed
        return agreed is not None and agreed.security_ctx and bool(request.extensions.security)

    def label(self, request: Request, inode: Inode, parent: Inode, name: bytes) -> os.stat_result:
        """Label what a request has just made; returns its attributes.

        Raises:
            OSError: It cannot have its labels. It has been removed, and the lookup taken back.
        """
        try:
            rules = self.share.options.xattrmap
            labels.label(request.extensions.security or (), inode, parent, name, rules)
            return os.fstat(inode.fd)
        except OSError:
            self.inodes.forget(inode.nodeid, 1)
            raise

    def acting_as_caller(self, request: Request) -> AbstractContextManager[None]:
        """Be the caller of a creating request for the length of a ``with`` block."""
        header, umask = request.header, 0
        known = False
        if self.agreed is not None:
            known = self.agreed.create_supp_group
            if self.agreed.dont_mask:  # then it is the host's business, unless a default ACL rules
                umask = getattr(request.args, "umask", 0) & 0o777  # a symlink has none
        if not umask and not self.credentials.would_switch(header.uid, header.gid):
            return _AS_WE_ARE
        groups = request.extensions.groups or () if known else None
        return self.credentials.acting_as(header.uid, header.gid, groups, umask)
