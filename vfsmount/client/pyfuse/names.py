"""Handlers of names, attributes and extended attributes."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from vfsmount.client.pyfuse.handlers import Handlers, encode_dev, handler
from vfsmount.client.session import setattr_in
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyfuse3 import FileHandleT, InodeT, RequestContext, SetattrFields, StatvfsData

__all__ = ["NameHandlers"]

_CAPABILITY = b"security.capability"


class NameHandlers(Handlers):
    """What is asked and changed without opening anything."""

    # --- names -----------------------------------------------------------------------------------

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; absence is remembered by the kernel for ``negative_timeout``."""
        parent = self.nodes[parent_inode]
        try:
            entry = await self._look_up(parent, name, ctx)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT or not self._policy.negative_timeout:
                raise
            return self._absent()
        if not entry.nodeid:
            return self._absent()
        return self._enter(entry)

    def _absent(self) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(0)
        attributes.entry_timeout = self._policy.negative_timeout if self._version() >= 0 else 0.0
        return attributes

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Give back what the kernel forgot; raises nothing, waits for nothing."""
        self._give_back(self.nodes.forget(inode_list))

    @handler
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

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self.nodes[parent_inode]
        group = self._group(parent, ctx)
        return self._enter(
            await self._session.mkdir(parent.nodeid, name, mode, ctx.umask, ctx, group)
        )

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        parent = self.nodes[parent_inode]
        group = self._group(parent, ctx)
        return self._enter(await self._session.symlink(parent.nodeid, name, target, ctx, group))

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a hard link."""
        nodeid, parent = self.nodes[inode].nodeid, self.nodes[new_parent_inode]
        written = self._written()
        entry = await self._session.link(nodeid, parent.nodeid, new_name, ctx)
        return self._enter(await self._as_written(entry, written))

    @handler
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove a name."""
        await self._session.unlink(self.nodes[parent_inode].nodeid, name, ctx)

    @handler
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        await self._session.rmdir(self.nodes[parent_inode].nodeid, name, ctx)

    @handler
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

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        """Read a symbolic link."""
        return await self._session.readlink(self.nodes[inode].nodeid, ctx)

    # --- attributes ------------------------------------------------------------------------------

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes of a node."""
        node = self.nodes[inode]
        parked, node.parked = node.parked, None
        if parked is not None and not self._settles(node) and parked[2] == self._version():
            age = time.monotonic() - parked[1]
            if age < self._policy.attr_timeout:
                attributes = self._attributes(node, parked[0])
                attributes.attr_timeout = max(0.0, attributes.attr_timeout - age)
                return attributes
        await self._write_out(node)
        reply = await self._session.getattr(node.nodeid, None, ctx)
        return self._attributes(node, reply.attr, reply)

    @handler
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
            self._was_cut(node.nodeid, attr.st_size)
        return self._attributes(node, reply.attr, reply)

    @handler
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

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Size of the host's file system."""
        reply = await self._session.statfs(fuse.ROOT_ID, ctx)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize, data.f_namemax = reply.bsize, reply.frsize, reply.namelen
        data.f_blocks, data.f_bfree, data.f_bavail = reply.blocks, reply.bfree, reply.bavail
        data.f_files, data.f_ffree, data.f_favail = reply.files, reply.ffree, reply.ffree
        return data

    # --- extended attributes ---------------------------------------------------------------------

    @handler
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

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute. pyfuse3 keeps XATTR_CREATE and XATTR_REPLACE to itself."""
        node = self.nodes[inode]
        self._absent_xattrs.changed(node.nodeid)
        try:
            await self._session.setxattr(node.nodeid, name, value, caller=ctx)
        finally:
            self._absent_xattrs.changed(node.nodeid)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[bytes]:
        """Names of the extended attributes."""
        return await self._session.listxattr(self.nodes[inode].nodeid, caller=ctx)

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        await self._session.removexattr(self.nodes[inode].nodeid, name, ctx)
