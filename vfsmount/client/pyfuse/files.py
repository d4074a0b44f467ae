"""Handlers of files: open, read, write, close."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from vfsmount.cache.freshness import NOTHING_KNOWN, signature_of
from vfsmount.client.pyfuse.handlers import Handlers, OpenFile, handler
from vfsmount.client.pyfuse.reading import Reader
from vfsmount.errors import RemoteErrno, RequestTimeout
from vfsmount.wire.fuse import OpenInFlag, OpenOutFlag, WriteFlag

if TYPE_CHECKING:
    from pyfuse3 import FileHandleT, InodeT, RequestContext

    from vfsmount.client.pyfuse.nodes import Node

__all__ = ["FileHandlers"]

#: Handles that could map a file for writing, and append.
_MAPS_APPENDING = os.O_RDWR | os.O_APPEND
#: Handles whose writes are not held back: the host appends, or durability is asked for.
_WRITE_NOW = os.O_APPEND | os.O_DSYNC | os.O_DIRECT
_DIRECT_IO = OpenOutFlag.DIRECT_IO
_KEEP_CACHE = OpenOutFlag.KEEP_CACHE
_SET_ID = stat.S_ISUID | stat.S_ISGID


class FileHandlers(Handlers):
    """What is done with open files."""

    # --- opening ---------------------------------------------------------------------------------

    @handler
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
            if self._policy.revalidate:
                await self._check_name(node, reply.fh, flags, ctx)
            self._fresh.changed(node.nodeid)
            self._was_cut(node.nodeid, 0)
            self._changes += 1
            if self._listings is not None:
                self._listings.changed(node.nodeid)
        elif self._policy.revalidate:
            keep = await self._may_keep(node, reply.fh, flags, ctx)
        return self._file_info(OpenFile(node, reply.fh, flags, kills), reply.open_flags, keep)

    async def _check_name(self, node: Node, fh: int, flags: int, ctx: RequestContext) -> None:
        """Make sure that a file that was emptied by its open has a name.

        Raises:
            FUSEError: ESTALE: what is written would be lost with the file.
        """
        try:
            attr = (await self._session.getattr(node.nodeid, None, ctx)).attr
        except (RemoteErrno, RequestTimeout):
            return  # nothing is known; the handle is there all the same
        if self._fresh.is_replaced(node.nodeid, signature_of(attr)):
            await self._refuse(node, fh, flags)

    async def _refuse(self, node: Node, fh: int, flags: int) -> NoReturn:
        """Give back the handle of a node that has no name left.

        Raises:
            FUSEError: ESTALE, at which the kernel looks the name up anew.
        """
        await self._session.release(node.nodeid, fh, flags, wait=False)
        raise FUSEError(errno.ESTALE)

    async def _may_keep(self, node: Node, fh: int, flags: int, ctx: RequestContext) -> bool:
        """Compare a file that was opened with what the kernel knows; whether its pages may stay.

        Raises:
            FUSEError: ESTALE: the node has no name left.
        """
        sent, before = time.monotonic(), self._version()
        verdict, attr = NOTHING_KNOWN, None
        try:
            attr = (await self._session.getattr(node.nodeid, None, ctx)).attr
        except (RemoteErrno, RequestTimeout):
            pass  # then nothing is known; the handle is there all the same
        else:
            verdict = self._fresh.open(node.nodeid, signature_of(attr))
        if verdict.replaced:
            await self._refuse(node, fh, flags)
        if not verdict.keep_attributes:
            if attr is not None and before == self._version():
                node.parked = attr, sent, before
            # Of attributes alone: that takes no lock that a request could hold.
            with suppress(OSError):  # forgotten meanwhile
                pyfuse3.invalidate_inode(pyfuse3.InodeT(node.inode), attr_only=True)
        return verdict.keep_pages

    @handler
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
        if flags & os.O_TRUNC:
            self._was_cut(entry.nodeid, 0)  # it may have been there, by another name
        attributes = self._enter(entry)
        node = self.nodes[attributes.st_ino]
        file = OpenFile(node, opened.fh, flags, kills)
        return self._file_info(file, opened.open_flags, self._policy.keep_cache), attributes

    def _file_info(self, file: OpenFile, theirs: int, keep: bool) -> FileInfo:
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

    # --- contents --------------------------------------------------------------------------------

    @handler
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

    async def _read_kept(self, file: OpenFile, reader: Reader, off: int, size: int) -> bytes:
        """What DAX has mapped comes from there: it is newer than anything that is kept."""
        assert self.reading is not None
        dax = self._session.dax
        if dax is not None:
            data = dax.read(file.node.nodeid, file.fh, off, size)
            await dax.give_way()
            if data is not None:
                return data
        return await self.reading.read(reader, off, size)

    async def _read_pieces(self, file: OpenFile, off: int, size: int) -> bytes:
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

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write; without write-behind it is at the host when this returns."""
        file = self._files[fh]
        node = file.node
        file.writes += 1
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

    async def _write_through(self, file: OpenFile, off: int, buf: bytes, write_flags: int) -> int:
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

    async def _write_pieces(self, file: OpenFile, off: int, buf: bytes, write_flags: int) -> int:
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

    # --- closing ---------------------------------------------------------------------------------

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """One close(2) of a handle.

        It tells of errors in writing what was written; a handle that wrote nothing since has none,
        and locks are not the daemon's here: no message then (open+read+close: 14 % less).
        """
        file = self._files[fh]
        writes = file.writes
        if writes != file.flushed:
            await self._settle(file)
            await self._session.flush(file.node.nodeid, file.fh)
            # Somebody may have written, or flushed, through a duplicate meanwhile.
            file.flushed = max(file.flushed, writes)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Make everything durable at the host."""
        file = self._files[fh]
        await self._settle(file)
        await self._session.fsync(file.node.nodeid, file.fh, datasync)

    async def _settle(self, file: OpenFile) -> None:
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

    @handler
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

    async def _release(self, file: OpenFile) -> None:
        if self.behind is not None:
            await self.behind.release(file.node.nodeid, file)
        await self._session.release(file.node.nodeid, file.fh, file.flags, wait=False)
