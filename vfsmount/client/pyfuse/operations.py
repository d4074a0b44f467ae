"""The pyfuse3 file system: each VFS operation becomes requests of one session.

    kernel ──/dev/fuse──> pyfuse3 ──> a handler here ──> Session ──> virtqueue

A handler looks up the node, sends the request and turns the reply into pyfuse3's terms. It raises
FUSEError and nothing else: ``_handler`` is the one place where our errors become errno values.

The kernel checks permissions (``default_permissions``), because the daemon does not.

Set-id bits. libfuse tells the kernel that *we* clear suid and sgid bits when somebody without
CAP_FSETID writes or truncates (HANDLE_KILLPRIV). A daemon with HANDLE_KILLPRIV_V2 does that when
told; for any other we send a SETATTR first. pyfuse3 does not say who writes, so the opener counts.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from vfsmount.cache.freshness import NOTHING_KNOWN, Freshness, signature_of
from vfsmount.cache.shortages import Shortages
from vfsmount.cache.xattrs import AbsentXattrs
from vfsmount.client.pyfuse.listings import KeptListings, dot_line, read_dot_line
from vfsmount.client.pyfuse.nodes import NodeTable
from vfsmount.client.pyfuse.reading import Reader
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
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, OpenInFlag, OpenOutFlag, WriteFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from pyfuse3 import (
        FileHandleT,
        InodeT,
        ReaddirToken,
        RequestContext,
        SetattrFields,
        StatvfsData,
    )

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.pyfuse.nodes import Node
    from vfsmount.client.pyfuse.reading import Reading
    from vfsmount.client.session import Session

__all__ = ["VirtioFsOperations"]

log = logging.getLogger(__name__)

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

#: Room of one READDIRPLUS, bytes: 170 to 200 usual names. The kernel reads 4 to 32 KiB at a time.
LISTING_SIZE = 32768

_CAPABILITY = b"security.capability"
_DOTS = (b".", b"..")
#: Handles that could map a file for writing, and append.
_MAPS_APPENDING = os.O_RDWR | os.O_APPEND
#: Handles whose writes are not held back: the host appends, or durability is asked for.
_WRITE_NOW = os.O_APPEND | os.O_DSYNC | os.O_DIRECT
_DIRECT_IO = OpenOutFlag.DIRECT_IO
_KEEP_CACHE = OpenOutFlag.KEEP_CACHE
_SET_ID = stat.S_ISUID | stat.S_ISGID


#: Handlers after which what was asked for before is old, by what their arguments begin with: a
#: node, a handle, or a directory and a name in it.
_NODE_CHANGES = frozenset(("setattr", "setxattr", "removexattr", "link"))
_FILE_CHANGES = frozenset(("write", "flush", "fsync"))
_NAME_CHANGES = frozenset(("create", "mkdir", "mknod", "rename", "rmdir", "symlink", "unlink"))
_CHANGES = _NODE_CHANGES | _FILE_CHANGES | _NAME_CHANGES


def _handler(
    method: Callable[Concatenate[VirtioFsOperations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[VirtioFsOperations, P], Coroutine[Any, Any, T]]:
    """Make a method raise FUSEError and nothing else, and count it if it changes attributes."""
    changes = method.__name__ in _CHANGES

    @functools.wraps(method)
    async def handler(self: VirtioFsOperations, /, *args: P.args, **kwargs: P.kwargs) -> T:
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

    return handler


def _errno_of(method: str, error: VfsmountError) -> int:
    # The channel has told of its end already, once for all.
    if not isinstance(error, ChannelBroken | ChannelClosed):
        log.error("%s failed: %s", method, error)
    return next(number for kind, number in _ERRNO_OF if isinstance(error, kind))


class _File:
    """An open file: where it is at the daemon, and what its opener may not keep."""

    __slots__ = ("fh", "flags", "kills_set_id", "node", "number", "reader", "wrote")

    def __init__(self, node: Node, fh: int, flags: int, kills_set_id: bool) -> None:
        self.number = 0
        self.node = node
        self.fh = fh
        self.flags = flags
        self.kills_set_id = kills_set_id
        self.wrote = False
        self.reader: Reader | None = None


class _Directory:
    """An open directory, and the entries fetched but not yet taken by the kernel.

    Each of ``ahead`` holds a reference to its node at the daemon until it is handed on or dropped.

    Attributes:
        kept: The listing that is read from, if it is a kept one.
        lines: What was handed on since the beginning, if it is to be kept; else None.
        since: When it was begun, clock seconds, and the version then.
        asked: The same of what is ``ahead``.
    """

    __slots__ = ("ahead", "asked", "fh", "flags", "kept", "lines", "node", "position", "since")

    def __init__(self, node: Node, fh: int, flags: int) -> None:
        self.node = node
        self.fh = fh
        self.flags = flags
        self.ahead: deque[fuse.DirEntryPlus] = deque()
        self.position = 0
        self.kept: Sequence[bytes] | None = None
        self.lines: list[bytes] | None = None
        self.since = self.asked = (0.0, 0)


class VirtioFsOperations(pyfuse3.Operations):
    """The handlers that pyfuse3 calls.

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
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {}
        self._last_fh = 0
        self._killpriv_v2 = InitFlag.HANDLE_KILLPRIV_V2 in flags
        self._killpriv = bool(flags & (InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2))
        self._supp_group = InitFlag.CREATE_SUPP_GROUP in flags

    def init(self) -> None:
        """Libfuse answers the kernel's INIT right after this."""
        self.initialised.set()

    # --- names -----------------------------------------------------------------------------------

    @_handler
    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; absence is remembered by the kernel for ``negative_timeout``."""
        parent = self.nodes[parent_inode]
        try:
            entry = await self._session.lookup(parent.nodeid, name, ctx)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT or not self._policy.negative_timeout:
                raise
            return self._absent()
        if not entry.nodeid:
            return self._absent()
        return self._enter(entry)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Give back what the kernel forgot; raises nothing, waits for nothing."""
        self._give_back(self.nodes.forget(inode_list))

    def _give_back(self, owed: list[tuple[int, int]]) -> None:
        for nodeid, nlookup in owed:
            self._fresh.forget(nodeid)
            self._absent_xattrs.forget(nodeid)
            self._shortages.truncate(nodeid, 0)
            self._drop_pages(nodeid)
            if self._listings is not None:
                self._listings.gone(nodeid)
            self._session.forget(nodeid, nlookup)

    def _wrote(self, nodeid: int, start: int, size: int) -> None:
        if self.reading is not None:
            self.reading.pages.wrote(nodeid, start, size)

    def _drop_pages(self, nodeid: int) -> None:
        if self.reading is not None:
            self.reading.pages.drop(nodeid)

    def _release_node(self, nodeid: int) -> None:
        self._give_back(self.nodes.release(nodeid))

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
        """What was asked at another version may be old."""
        return self._changes + (self.behind.written if self.behind is not None else 0)

    @_handler
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a node of any type."""
        parent = self.nodes[parent_inode]
        # struct stat's dev_t has 64 bits, the wire has the kernel's 32 (newencode_dev).
        device = encode_dev(rdev)
        group = self._group(parent, ctx)
        umask = ctx.umask
        return self._enter(
            await self._session.mknod(parent.nodeid, name, mode, device, umask, ctx, group)
        )

    @_handler
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self.nodes[parent_inode]
        group = self._group(parent, ctx)
        return self._enter(
            await self._session.mkdir(parent.nodeid, name, mode, ctx.umask, ctx, group)
        )

    @_handler
    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        parent = self.nodes[parent_inode]
        group = self._group(parent, ctx)
        return self._enter(await self._session.symlink(parent.nodeid, name, target, ctx, group))

    @_handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a hard link."""
        nodeid, parent = self.nodes[inode].nodeid, self.nodes[new_parent_inode]
        return self._enter(await self._session.link(nodeid, parent.nodeid, new_name, ctx))

    @_handler
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove a name."""
        await self._session.unlink(self.nodes[parent_inode].nodeid, name, ctx)

    @_handler
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        await self._session.rmdir(self.nodes[parent_inode].nodeid, name, ctx)

    @_handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename, with the flags of renameat2(2)."""
        old, new = self.nodes[parent_inode_old].nodeid, self.nodes[parent_inode_new].nodeid
        await self._session.rename(old, name_old, new, name_new, flags, ctx)

    @_handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        """Read a symbolic link."""
        return await self._session.readlink(self.nodes[inode].nodeid, ctx)

    # --- attributes ------------------------------------------------------------------------------

    @_handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes of a node."""
        node = self.nodes[inode]
        parked, node.parked = node.parked, None
        if parked is not None and parked[2] == self._changes:
            age = time.monotonic() - parked[1]
            if age < self._policy.attr_timeout:
                attributes = self._attributes(node, parked[0])
                attributes.attr_timeout -= age
                return attributes
        await self._write_out(node)
        reply = await self._session.getattr(node.nodeid, None, ctx)
        return self._attributes(node, reply.attr, reply)

    @_handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Change what ``fields`` names; the kernel has turned "now" into times already."""
        node = self.nodes[inode]
        await self._write_out(node)  # else it would undo the times, or the truncation
        kills = fields.update_size and ctx.uid != 0
        if kills and not fields.update_mode:
            await self._drop_set_id(node, ctx)
        changes = setattr_in(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            fh=None if fh is None else self._files[fh].fh,
            kill_suidgid=kills and self._killpriv_v2,
        )
        try:
            reply = await self._session.setattr(node.nodeid, changes, ctx)
        finally:
            if fields.update_size:
                self._drop_pages(node.nodeid)
        if fields.update_size:
            self._shortages.truncate(node.nodeid, attr.st_size)
            if self.behind is not None:
                self.behind.truncate(node.nodeid, attr.st_size)
        return self._attributes(node, reply.attr, reply)

    @_handler
    async def access(self, inode: InodeT, mode: int, ctx: RequestContext) -> bool:
        """Only called without ``default_permissions``; a daemon without ACCESS allows all."""
        try:
            await self._session.access(self.nodes[inode].nodeid, mode, ctx)
        except RemoteErrno as error:
            if error.errno == errno.EACCES:
                return False
            if error.errno != errno.ENOSYS:
                raise
        return True

    @_handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Size of the host's file system."""
        reply = await self._session.statfs(fuse.ROOT_ID, ctx)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize, data.f_namemax = reply.bsize, reply.frsize, reply.namelen
        data.f_blocks, data.f_bfree, data.f_bavail = reply.blocks, reply.bfree, reply.bavail
        data.f_files, data.f_ffree, data.f_favail = reply.files, reply.ffree, reply.ffree
        return data

    @_handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute, whole: pyfuse3 does the sizes.

        The kernel asks for security.capability before every write. "There is none" is remembered
        as long as attributes are, of any name.
        """
        node, asked, changes = self.nodes[inode], time.monotonic(), self._absent_xattrs.changes
        if self._absent_xattrs.is_absent(node.nodeid, name, asked):
            raise FUSEError(errno.ENODATA)
        dax = self._session.dax
        if name == _CAPABILITY and dax is not None and dax.lacks_xattr(node.nodeid, name):
            raise FUSEError(errno.ENODATA)
        try:
            return await self._session.getxattr(node.nodeid, name, caller=ctx)
        except RemoteErrno as error:
            if error.errno == errno.ENODATA:
                self._absent_xattrs.note_absent(node.nodeid, name, asked, changes)
            raise

    @_handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute. pyfuse3 keeps XATTR_CREATE and XATTR_REPLACE to itself."""
        node = self.nodes[inode]
        self._absent_xattrs.changed(node.nodeid)
        try:
            await self._session.setxattr(node.nodeid, name, value, caller=ctx)
        finally:
            self._absent_xattrs.changed(node.nodeid)

    @_handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[bytes]:
        """Names of the extended attributes."""
        return await self._session.listxattr(self.nodes[inode].nodeid, caller=ctx)

    @_handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        await self._session.removexattr(self.nodes[inode].nodeid, name, ctx)

    # --- files -----------------------------------------------------------------------------------

    @_handler
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; O_TRUNC comes along (ATOMIC_O_TRUNC)."""
        node = self.nodes[inode]
        await self._write_out(node)
        kills = ctx.uid != 0
        open_flags = 0
        if kills and flags & os.O_TRUNC:
            if self._killpriv_v2:
                open_flags = OpenInFlag.KILL_SUIDGID
            else:
                await self._drop_set_id(node, ctx)
        reply = await self._session.open(node.nodeid, flags, open_flags, ctx)
        keep = self._policy.keep_cache
        if flags & os.O_TRUNC:
            self._fresh.forget(node.nodeid)
            self._shortages.truncate(node.nodeid, 0)
            self._drop_pages(node.nodeid)
            if self.behind is not None:
                self.behind.truncate(node.nodeid, 0)
            self._changes += 1
            if self._listings is not None:
                self._listings.changed(node.nodeid)
        elif self._policy.revalidate:
            keep = await self._may_keep(node, reply.fh, flags, ctx)
        return self._file_info(_File(node, reply.fh, flags, kills), reply.open_flags, keep)

    async def _may_keep(self, node: Node, fh: int, flags: int, ctx: RequestContext) -> bool:
        """Compare a file that was opened with what the kernel knows; whether its pages may stay.

        Raises:
            FUSEError: ESTALE, at which the kernel looks the name up anew: the node has none left.
        """
        sent, before = time.monotonic(), self._changes
        verdict, attr = NOTHING_KNOWN, None
        try:
            attr = (await self._session.getattr(node.nodeid, None, ctx)).attr
        except RemoteErrno:
            pass  # then nothing is known
        else:
            verdict = self._fresh.open(node.nodeid, signature_of(attr))
        if verdict.replaced:
            await self._session.release(node.nodeid, fh, flags, wait=False)
            raise FUSEError(errno.ESTALE)
        if not verdict.keep_attributes:
            if attr is not None and before == self._changes:
                node.parked = attr, sent, before
            # Of attributes alone: that takes no lock that a request could hold.
            with suppress(OSError):  # forgotten meanwhile
                pyfuse3.invalidate_inode(pyfuse3.InodeT(node.inode), attr_only=True)
        return verdict.keep_pages

    @_handler
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it.

        The kernel sends this for a name that it remembers as absent, too, and it may exist by now.
        CREATE implies O_CREAT; virtiofsd (C), told so, would then open without a mode, and abort.
        """
        parent = self.nodes[parent_inode]
        flags &= ~os.O_CREAT
        kills = ctx.uid != 0
        entry, opened = await self._session.create(
            parent.nodeid,
            name,
            flags,
            mode,
            ctx.umask,
            OpenInFlag.KILL_SUIDGID if kills and self._killpriv_v2 and flags & os.O_TRUNC else 0,
            ctx,
            self._group(parent, ctx),
        )
        attributes = self._enter(entry)
        node = self.nodes[attributes.st_ino]
        self._drop_pages(node.nodeid)  # it may have been there, and is empty now
        file = _File(node, opened.fh, flags, kills)
        return self._file_info(file, opened.open_flags, self._policy.keep_cache), attributes

    @_handler
    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer
        self, fh: FileHandleT, off: int, size: int
    ) -> bytes | memoryview:
        """Read; the reply is a view of shared memory, which pyfuse3 hands to the kernel at once."""
        file = self._files[fh]
        if self._listings is not None:
            self._listings.changed(file.node.nodeid)  # the time of the last access
        if self.behind is not None:
            await self.behind.flush(file.node.nodeid)
        if size <= self._session.facts.max_read:
            if file.reader is not None:
                return await self._read_kept(file, file.reader, off, size)
            return await self._session.read_view(file.node.nodeid, file.fh, off, size)
        return await self._read_pieces(file, off, size)

    async def _read_kept(self, file: _File, reader: Reader, off: int, size: int) -> bytes:
        """What DAX has mapped comes from there: it is newer than anything that is kept."""
        assert self.reading is not None
        dax = self._session.dax
        if dax is not None:
            data = dax.read(file.node.nodeid, file.fh, off, size)
            await dax.give_way()
            if data is not None:
                return data
        return await self.reading.read(reader, off, size)

    async def _read_pieces(self, file: _File, off: int, size: int) -> bytes:
        """A kernel's READ that is longer than the daemon's max_pages."""
        pieces = []
        while size:
            wanted = min(size, self._session.facts.max_read)
            piece = await self._session.read(file.node.nodeid, file.fh, off, wanted)
            pieces.append(piece)
            off, size = off + len(piece), size - len(piece)
            if len(piece) < wanted:
                break
        return b"".join(pieces)

    @_handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write; without write-behind it is at the host when this returns."""
        file = self._files[fh]
        node = file.node
        file.wrote = True
        write_flags = 0
        if file.kills_set_id:
            if self._killpriv_v2:
                write_flags = WriteFlag.KILL_SUIDGID
            elif node.mode & _SET_ID:
                await self._drop_set_id(node, None)
        if self.behind is not None:
            if not file.flags & _WRITE_NOW:
                return await self.behind.write(node.nodeid, file, off, buf, write_flags)
            await self.behind.flush(node.nodeid)
        return await self._write_through(file, off, buf, write_flags)

    async def _write_through(self, file: _File, off: int, buf: bytes, write_flags: int) -> int:
        nodeid = file.node.nodeid
        try:
            if len(buf) <= self._session.facts.max_write:
                done = await self._session.write(nodeid, file.fh, off, buf, write_flags, file.flags)
            else:
                done = await self._write_pieces(file, off, buf, write_flags)
        finally:
            self._wrote(nodeid, off, len(buf))
        if done < len(buf) or self._shortages:
            self._note_shortage(nodeid, off, done, len(buf))
        return done

    async def _write_pieces(self, file: _File, off: int, buf: bytes, write_flags: int) -> int:
        done, view, limit = 0, memoryview(buf), self._session.facts.max_write
        while done < len(buf):
            piece = view[done : done + limit]
            written = await self._session.write(
                file.node.nodeid, file.fh, off + done, piece, write_flags, file.flags
            )
            done += written
            if written < len(piece):
                break
        return done

    def _note_shortage(self, nodeid: int, off: int, done: int, size: int) -> None:
        if self._shortages:
            self._shortages.wrote(nodeid, off, off + done)
        if done < size:
            self._shortages.missed(nodeid, off + done, off + size)

    async def _settle(self, file: _File) -> None:
        """Write behind no more for a handle.

        Raises:
            FUSEError: Something that was written before could not be; told once to each handle.
        """
        if self.behind is not None:
            number = await self.behind.settle(file.node.nodeid, file)
            if number:
                raise FUSEError(number)
        if self._shortages and self._shortages.take(file.node.nodeid):
            # The host did not say why: at the end of the room, nearly always.
            raise FUSEError(errno.ENOSPC)

    async def _write_out(self, node: Node) -> None:
        if self.behind is not None and self.behind.settles(node.nodeid):
            await self.behind.flush(node.nodeid)

    @_handler
    async def flush(self, fh: FileHandleT) -> None:
        """One close(2) of a handle.

        It tells of errors in writing what was written; a handle that wrote nothing since has none,
        and locks are not the daemon's here: no message then (open+read+close: 14 % less).
        """
        file = self._files[fh]
        if file.wrote:
            await self._settle(file)
            file.wrote = False
            await self._session.flush(file.node.nodeid, file.fh)

    @_handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Make everything durable at the host."""
        file = self._files[fh]
        await self._settle(file)
        await self._session.fsync(file.node.nodeid, file.fh, datasync)

    @_handler
    async def release(self, fh: FileHandleT) -> None:
        """Last close of a handle."""
        file = self._files.pop(fh)
        if file.reader is not None and file.reader.ahead is not None:
            # The kernel does not wait for us before it forgets the node.
            self.nodes.hold(file.node.nodeid)
            try:
                await file.reader.leave()
                await self._release(file)
            finally:
                self._release_node(file.node.nodeid)
        else:
            await self._release(file)

    async def _release(self, file: _File) -> None:
        if self.behind is not None:
            await self.behind.release(file.node.nodeid, file)
        await self._session.release(file.node.nodeid, file.fh, file.flags, wait=False)

    # --- directories -----------------------------------------------------------------------------

    @_handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory."""
        node = self.nodes[inode]
        flags = os.O_RDONLY | os.O_DIRECTORY
        reply = await self._session.opendir(node.nodeid, flags, ctx)
        self._last_fh += 1
        self._directories[self._last_fh] = _Directory(node, reply.fh, flags)
        return pyfuse3.FileHandleT(self._last_fh)

    @_handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Hand on names with their attributes until the kernel's buffer is full.

        We fetch more than the kernel takes at once and keep the rest for its next call.
        """
        directory = self._directories[fh]
        if self._listings is not None and start_id == 0:
            directory.kept = self._listings.find(directory.node.nodeid)
            directory.lines, directory.since = [], (time.monotonic(), self._version())
        if directory.kept is not None:
            await self._hand_on_kept(directory.kept, directory.node, start_id, token)
            return
        if start_id != directory.position:
            self._drop_ahead(directory)
            directory.position = start_id
            if start_id:
                directory.lines = None
        if not directory.ahead:
            directory.asked = time.monotonic(), self._version()
            directory.ahead.extend(
                await self._session.readdirplus(
                    directory.node.nodeid, directory.fh, start_id, LISTING_SIZE
                )
            )
            if not directory.ahead:
                self._keep_listing(directory)
        while directory.ahead:
            found = directory.ahead[0]
            if not found.entry.nodeid and found.name not in _DOTS:
                entry = await self._find(directory.node, found.name)
                if entry is None:
                    directory.ahead.popleft()
                    continue
                found = directory.ahead[0] = found._replace(entry=entry)
            if not self._hand_on(token, found):
                return
            directory.ahead.popleft()
            directory.position = found.off
            if directory.lines is not None:
                self._keep_line(directory, directory.lines, found)

    def _keep_line(
        self, directory: _Directory, lines: list[bytes], found: fuse.DirEntryPlus
    ) -> None:
        """Note what was handed on, and keep what is known of it."""
        if found.name in _DOTS:
            lines.append(dot_line(found.name, found.ino or fuse.ROOT_ID))
            return
        lines.append(found.name)
        sent, version = directory.asked
        if version == self._version():
            self._keep_name(directory.node, found.name, found.entry, sent)

    def _keep_name(self, parent: Node, name: bytes, entry: fuse.EntryOut, sent: float) -> None:
        dirty = self.behind is not None and self.behind.settles(entry.nodeid)
        if self._listings is not None and not dirty:
            self._listings.keep_name(parent.nodeid, name, entry.nodeid, entry.attr, sent)

    def _keep_listing(self, directory: _Directory) -> None:
        """All was handed on; keep it if nothing was changed meanwhile."""
        lines, directory.lines = directory.lines, None
        sent, version = directory.since
        if self._listings is not None and lines is not None and version == self._version():
            self._listings.keep(directory.node.nodeid, lines, sent)

    async def _hand_on_kept(
        self, kept: Sequence[bytes], parent: Node, start: int, token: ReaddirToken
    ) -> None:
        """Hand on lines of a kept listing; their cookies are positions in it."""
        for position in range(start, len(kept)):
            line, cookie = kept[position], position + 1
            if (dot := read_dot_line(line)) is not None:
                fits = self._hand_on_dot(token, *dot, cookie)
            else:
                fits = await self._hand_on_name(token, parent, line, cookie)
            if not fits:
                return

    async def _hand_on_name(
        self, token: ReaddirToken, parent: Node, name: bytes, cookie: int
    ) -> bool:
        """Offer a kept name to the kernel, looked up where its node is not known any more."""
        assert self._listings is not None
        known = self._listings.known(parent.nodeid, name)
        if known is not None:
            attributes = self._attributes(self.nodes.hold(known.nodeid), known.attr)
            attributes.attr_timeout -= known.age
            attributes.entry_timeout -= known.age
        else:
            asked = time.monotonic(), self._version()
            entry = await self._find(parent, name)
            if entry is None:
                return True
            attributes = self._enter(entry)
            if asked[1] == self._version():
                self._keep_name(parent, name, entry, asked[0])
        if pyfuse3.readdir_reply(token, name, attributes, cookie):
            return True
        self._give_back(self.nodes.forget([(attributes.st_ino, 1)]))
        return False

    async def _find(self, parent: Node, name: bytes) -> fuse.EntryOut | None:
        """Look up a listed name that came without its node; None when it has gone meanwhile."""
        try:
            entry = await self._session.lookup(parent.nodeid, name)
        except RemoteErrno:
            return None
        return entry if entry.nodeid else None

    def _hand_on(self, token: ReaddirToken, found: fuse.DirEntryPlus) -> bool:
        """Offer one entry to the kernel, which counts as a lookup if there is room for it."""
        name, nodeid = found.name, found.entry.nodeid
        if name in _DOTS:
            return self._hand_on_dot(token, name, found.ino or fuse.ROOT_ID, found.off)
        attributes = self._enter(found.entry)
        if pyfuse3.readdir_reply(token, name, attributes, found.off):
            return True
        # It stays in ``ahead`` with its reference: take back only the count towards the kernel.
        self.nodes.leave(nodeid)
        return False

    def _hand_on_dot(self, token: ReaddirToken, name: bytes, inode: int, cookie: int) -> bool:
        # The kernel takes neither node nor attributes of these, just number and type.
        dot = EntryAttributes()
        dot.st_ino, dot.st_mode = pyfuse3.InodeT(inode), stat.S_IFDIR
        return pyfuse3.readdir_reply(token, name, dot, cookie)

    def _drop_ahead(self, directory: _Directory) -> None:
        for found in directory.ahead:
            if found.entry.nodeid and found.name not in _DOTS:
                self._session.forget(found.entry.nodeid)
        directory.ahead.clear()

    @_handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make a directory durable at the host."""
        directory = self._directories[fh]
        await self._session.fsyncdir(directory.node.nodeid, directory.fh, datasync)

    @_handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Last close of a directory."""
        directory = self._directories.pop(fh)
        self._drop_ahead(directory)
        await self._session.releasedir(
            directory.node.nodeid, directory.fh, directory.flags, wait=False
        )

    # --- pieces ----------------------------------------------------------------------------------

    def _file_info(self, file: _File, theirs: int, keep: bool) -> FileInfo:
        self._last_fh += 1
        self._files[self._last_fh] = file
        file.number = self._last_fh
        direct = self._policy.direct_io
        if self._policy.from_host:
            direct, keep = (bool(theirs & flag) for flag in (_DIRECT_IO, _KEEP_CACHE))
        # Pages mapped through a handle for appending would be appended, and pyfuse3 does not say
        # which WRITE is of pages: such a file cannot be mapped for writing (ENODEV).
        direct = direct or file.flags & _MAPS_APPENDING == _MAPS_APPENDING
        if self.reading is not None:
            if not keep:
                self.reading.pages.drop(file.node.nodeid)
            if not direct and not file.flags & os.O_DIRECT:
                file.reader = Reader(file.node.nodeid, file.fh)
        return FileInfo(fh=pyfuse3.FileHandleT(self._last_fh), direct_io=direct, keep_cache=keep)

    def _absent(self) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(0)
        attributes.entry_timeout = self._policy.negative_timeout
        return attributes

    def _enter(self, entry: fuse.EntryOut) -> EntryAttributes:
        out = self._attributes(self.nodes.enter(entry.nodeid, entry.attr), entry.attr, entry)
        if self._policy.from_host:
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
        out.st_mode = attr.mode
        out.st_nlink = attr.nlink
        out.st_uid = attr.uid
        out.st_gid = attr.gid
        if attr.rdev:
            out.st_rdev = decode_dev(attr.rdev)
        out.st_size = attr.size
        out.st_blksize = attr.blksize
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
