"""What all handlers of the pyfuse3 engine share: the state of a mount, and how errors get out.

A handler raises FUSEError and nothing else: ``handler`` is the one place where our errors become
errno values. What several kinds of handlers need is here: who counts lookups, what the kernel is
told of a node, and what is old after a change.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError

from vfsmount.cache.freshness import Freshness, signature_of
from vfsmount.cache.policy import IO_SIZE
from vfsmount.cache.shortages import Shortages
from vfsmount.cache.xattrs import AbsentXattrs
from vfsmount.client.pyfuse.listings import KeptListings
from vfsmount.client.pyfuse.nodes import NodeTable
from vfsmount.client.pyfuse.write_behind import WriteBehind
from vfsmount.client.session import setattr_in
from vfsmount.errors import (
    ChannelBroken,
    ChannelClosed,
    ProtocolViolation,
    RemoteErrno,
    RequestTimeout,
    VfsmountError,
)
from vfsmount.wire.fuse import InitFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pyfuse3 import RequestContext

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.pyfuse.nodes import Node
    from vfsmount.client.pyfuse.reading import Reader, Reading
    from vfsmount.client.session import Session
    from vfsmount.wire import fuse

__all__ = ["Handlers", "OpenFile", "decode_dev", "encode_dev", "handler"]

log = logging.getLogger(__name__)

H = TypeVar("H", bound="Handlers")
P = ParamSpec("P")
T = TypeVar("T")

#: What each error of ours means to an application, first match wins. Never ENOSYS: the kernel would
#: switch the operation off for the life of the mount.
_ERRNO_OF: tuple[tuple[type[VfsmountError], int], ...] = (
    (RequestTimeout, errno.ETIMEDOUT),  # as a network file system that is mounted soft
    (ProtocolViolation, errno.EIO),  # the daemon is there but cannot be believed
    (ChannelBroken, errno.ENOTCONN),  # as any FUSE mount whose server died
    (ChannelClosed, errno.ENOTCONN),  # we are about to unmount
    (VfsmountError, errno.EIO),
)

#: Handlers after which what was asked for before is old, by what their arguments begin with: a
#: node, a handle, or a directory and a name in it.
_NODE_CHANGES = frozenset(("setattr", "setxattr", "removexattr", "link"))
_FILE_CHANGES = frozenset(("write", "flush", "fsync"))
_NAME_CHANGES = frozenset(("create", "mkdir", "mknod", "rename", "rmdir", "symlink", "unlink"))
_CHANGES = _NODE_CHANGES | _FILE_CHANGES | _NAME_CHANGES


def handler(
    method: Callable[Concatenate[H, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[H, P], Coroutine[Any, Any, T]]:
    """Make a method raise FUSEError and nothing else, and count it if it changes attributes."""
    changes = method.__name__ in _CHANGES

    @functools.wraps(method)
    async def safe(self: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except RemoteErrno as error:
            raise FUSEError(error.errno) from None
        except FUSEError:
            raise
        except VfsmountError as error:
            raise FUSEError(_errno_of(method.__name__, error)) from None
        except Exception:
            # Top of a request: a bug in one handler must not take the whole mount down.
            log.exception("internal error in %s, answered with EIO", method.__name__)
            raise FUSEError(errno.EIO) from None
        finally:
            # When it is through, not before: one on its way may or may not be in an answer that is
            # parked meanwhile, so that answer must not be used later.
            if changes:
                self._changes += 1
                if self._listings is not None:
                    self._changed(self._listings, method.__name__, args)

    return safe


def _errno_of(method: str, error: VfsmountError) -> int:
    # The channel has told of its end already, once for all.
    if not isinstance(error, ChannelBroken | ChannelClosed):
        log.error("%s failed: %s", method, error)
    return next(number for kind, number in _ERRNO_OF if isinstance(error, kind))


class OpenFile:
    """An open file: where it is at the daemon, and what its opener may not keep.

    Attributes:
        writes: How often it was written to.
        flushed: Of these, how many a FLUSH is known to have come after.
    """

    __slots__ = ("fh", "flags", "flushed", "kills_set_id", "node", "number", "reader", "writes")

    def __init__(self, node: Node, fh: int, flags: int, kills_set_id: bool) -> None:
        self.number = 0
        self.node = node
        self.fh = fh
        self.flags = flags
        self.kills_set_id = kills_set_id
        self.writes = self.flushed = 0
        self.reader: Reader | None = None


class Handlers(pyfuse3.Operations):
    """The state of a mount, below the handlers of names, files and directories.

    Args:
        session: Where requests go.
        policy: What the kernel may keep, and for how long.
    """

    supports_dot_lookup = False

    def __init__(self, session: Session, policy: CachePolicy) -> None:
        super().__init__()
        flags = session.facts.flags
        # The kernel's own write-back would take size and times of every file from the host.
        self.enable_writeback_cache = False
        self.behind = WriteBehind(session, self._wrote) if policy.writeback else None
        #: Reads ahead where the kernel does not; set, if at all, before anything is opened.
        self.reading: Reading | None = None
        self.enable_acl = InitFlag.POSIX_ACL in flags
        self.initialised = trio.Event()
        self.nodes = NodeTable()
        self._session = session
        self._policy = policy
        self._fresh = Freshness()
        self._absent_xattrs = AbsentXattrs(policy.attr_timeout)
        self._shortages = Shortages()
        self._listings = (
            KeptListings(policy, self.nodes, self._release_node) if policy.dir_timeout else None
        )
        #: Counts what may have changed attributes; what was parked before a change is not used.
        self._changes = 0
        self._files: dict[int, OpenFile] = {}
        self._last_fh = 0
        self._killpriv_v2 = InitFlag.HANDLE_KILLPRIV_V2 in flags
        self._killpriv = bool(flags & (InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2))
        self._supp_group = InitFlag.CREATE_SUPP_GROUP in flags

    def init(self) -> None:
        """Libfuse answers the kernel's INIT right after this."""
        self.initialised.set()

    # --- what the kernel knows -------------------------------------------------------------------

    async def _look_up(
        self, parent: Node, name: bytes, ctx: RequestContext | None = None
    ) -> fuse.EntryOut:
        """Ask where a name leads; the reference is the caller's. Raises as the session does."""
        written = self._written()
        entry = await self._session.lookup(parent.nodeid, name, ctx)
        return await self._as_written(entry, written)

    def _written(self) -> int:
        return self.behind.written if self.behind is not None else 0

    async def _as_written(self, entry: fuse.EntryOut, written: int) -> fuse.EntryOut:
        """Ask again for attributes that may be from before what is written out by now.

        The kernel knows these writes as done, and would believe a size from before them.

        Args:
            entry: What the daemon said.
            written: ``_written`` before it was asked.
        """
        behind = self.behind
        if behind is not None and entry.nodeid and behind.has_overtaken(entry.nodeid, written):
            with suppress(VfsmountError):  # then it is as good as it can be
                await behind.flush(entry.nodeid)
                attr = (await self._session.getattr(entry.nodeid)).attr
                return entry._replace(attr=attr)
        return entry

    def _enter(self, entry: fuse.EntryOut) -> EntryAttributes:
        out = self._attributes(self.nodes.enter(entry.nodeid, entry.attr), entry.attr, entry)
        if self._policy.from_host and self._version() >= 0:
            out.entry_timeout = entry.entry_valid + entry.entry_valid_nsec / 1e9
        return out

    def _attributes(
        self, node: Node, attr: fuse.Attr, reply: fuse.EntryOut | fuse.AttrOut | None = None
    ) -> EntryAttributes:
        """What the kernel is told; ``reply`` has the daemon's own validity, for mode ``host``."""
        node.saw(attr)
        policy = self._policy
        if self.behind is not None and self.behind.end_of(node.nodeid) > attr.size:
            attr = attr._replace(size=self.behind.end_of(node.nodeid))
        if policy.revalidate or self.reading is not None:
            self._note_signature(node.nodeid, signature_of(attr))
        out = EntryAttributes()
        out.st_ino = pyfuse3.InodeT(node.inode)
        out.generation = 0
        out.entry_timeout = policy.entry_timeout
        out.attr_timeout = policy.attr_timeout
        if policy.from_host and reply is not None:
            out.attr_timeout = reply.attr_valid + reply.attr_valid_nsec / 1e9
        if self._version() < 0:
            out.attr_timeout = out.entry_timeout = 0.0
        out.st_mode = attr.mode
        out.st_nlink = attr.nlink
        out.st_uid = attr.uid
        out.st_gid = attr.gid
        if attr.rdev:
            out.st_rdev = decode_dev(attr.rdev)
        out.st_size = attr.size
        own = stat.S_ISREG(attr.mode) and not policy.from_host
        out.st_blksize = IO_SIZE if own else attr.blksize
        out.st_blocks = attr.blocks
        out.st_atime_ns = attr.atime * 1_000_000_000 + attr.atimensec
        out.st_mtime_ns = attr.mtime * 1_000_000_000 + attr.mtimensec
        out.st_ctime_ns = attr.ctime * 1_000_000_000 + attr.ctimensec
        return out

    def _note_signature(self, nodeid: int, signature: bytes) -> None:
        pages = None if self.reading is None else self.reading.pages
        if pages is not None and nodeid in pages and not self._fresh.is_given(nodeid, signature):
            pages.drop(nodeid)
        self._fresh.gave(nodeid, signature)

    def _give_back(self, owed: list[tuple[int, int]]) -> None:
        for nodeid, nlookup in owed:
            self._fresh.forget(nodeid)
            self._absent_xattrs.forget(nodeid)
            self._shortages.truncate(nodeid, 0)
            self._drop_pages(nodeid)
            if self._listings is not None:
                self._listings.gone(nodeid)
            self._session.forget(nodeid, nlookup)

    def _release_node(self, nodeid: int) -> None:
        self._give_back(self.nodes.release(nodeid))

    # --- what is old -----------------------------------------------------------------------------

    def _changed(self, listings: KeptListings, method: str, args: tuple[Any, ...]) -> None:
        """A handler that changes something is through, well or not."""
        node = self.nodes
        if method in _FILE_CHANGES:
            listings.changed(self._files[args[0]].node.nodeid)
        elif method in _NODE_CHANGES:
            listings.changed(node[args[0]].nodeid)
        else:
            listings.changed_name(node[args[0]].nodeid, args[1])
        if method == "link":
            listings.changed_name(node[args[1]].nodeid, args[2])
        elif method == "rename":
            listings.changed_name(node[args[2]].nodeid, args[3])

    def _version(self) -> int:
        """What was asked at another version, or at -1, may be old.

        A change that has timed out may be carried out at any time, until the daemon answers it.
        """
        if self._session.channel.orphans:
            return -1
        return self._changes + self._written()

    def _wrote(self, nodeid: int, start: int, size: int) -> None:
        if self.reading is not None:
            self.reading.pages.wrote(nodeid, start, size)

    def _drop_pages(self, nodeid: int) -> None:
        if self.reading is not None:
            self.reading.pages.drop(nodeid)

    def _was_cut(self, nodeid: int, size: int) -> None:
        """A file has ``size`` bytes now: nothing is missing, or to be written, behind that."""
        self._shortages.truncate(nodeid, size)
        self._drop_pages(nodeid)
        if self.behind is not None:
            self.behind.truncate(nodeid, size)

    def _settles(self, node: Node) -> bool:
        """Whether something of a file is dirty, or on its way to the host."""
        return self.behind is not None and self.behind.settles(node.nodeid)

    async def _write_out(self, node: Node) -> None:
        if self.behind is not None and self._settles(node):
            await self.behind.flush(node.nodeid)

    # --- who asks --------------------------------------------------------------------------------

    def _group(self, parent: Node, ctx: RequestContext) -> int | None:
        """The parent's group, if the caller is in it but not primarily: as the kernel chooses.

        Reading /proc takes 30 us, so only when it can matter.
        """
        if not self._supp_group or ctx.uid == 0 or parent.gid == ctx.gid:
            return None
        try:
            groups = pyfuse3.get_sup_groups(ctx.pid)
        except (OSError, RuntimeError):
            return None  # the caller has died, or is in another pid namespace
        return parent.gid if parent.gid in groups else None

    async def _drop_set_id(self, node: Node, ctx: RequestContext | None) -> None:
        """Clear suid, and sgid of an executable, as file_remove_privs() would."""
        kept = node.mode & ~stat.S_ISUID
        if kept & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if self._killpriv or kept == node.mode or not stat.S_ISREG(node.mode):
            return
        reply = await self._session.setattr(node.nodeid, setattr_in(mode=kept), ctx)
        node.saw(reply.attr)


def encode_dev(rdev: int) -> int:
    """The kernel's newencode_dev(): minor bits 0-7 and 20-31, major bits 8-19."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_dev(encoded: int) -> int:
    """The kernel's newdecode_dev()."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))
