"""Handlers of directories: listings, with the attributes of what is listed.

The kernel takes what a listing says for the truth: names lead where it says, files are as long as
it says. So what was fetched before a change made here is not handed on after it but fetched anew,
and what has waited is valid for that much less.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import EntryAttributes

from vfsmount.client.pyfuse.handlers import Handlers, handler
from vfsmount.client.pyfuse.listings import dot_line, read_dot_line
from vfsmount.errors import RemoteErrno, VfsmountError
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyfuse3 import FileHandleT, InodeT, ReaddirToken, RequestContext

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.pyfuse.nodes import Node
    from vfsmount.client.session import Session

__all__ = ["DirectoryHandlers"]

#: Room of one READDIRPLUS, bytes: 170 to 200 usual names. The kernel reads 4 to 32 KiB at a time.
LISTING_SIZE = 32768
#: The same after a change, when the rest would only be fetched to be dropped; grows again.
_LEAST_SIZE = 4096
#: Room of a READDIR whose names are looked up one by one: 20 to 30.
_PLAIN_SIZE = 1024

_NO_ENTRY = fuse.ENTRY_OUT.unpack(bytes(fuse.ENTRY_OUT.size))
_DOTS = (b".", b"..")


class _Directory:
    """An open directory, and the entries fetched but not yet taken by the kernel.

    Each of ``ahead`` holds a reference to its node at the daemon until it is handed on or dropped.

    Attributes:
        position: The cookie from which the kernel goes on.
        cookie: The one from which the daemon does, behind what is ``ahead``.
        size: Bytes of the next message.
        kept: The listing that is read from, if it is a kept one.
        lines: What was handed on since the beginning, if it is to be kept; else None.
        since: When it was begun, clock seconds, and the version then.
        asked: The same of what is ``ahead``; and how often something had been ``written`` out.
    """

    __slots__ = (
        "ahead",
        "asked",
        "cookie",
        "fh",
        "flags",
        "kept",
        "lines",
        "node",
        "position",
        "since",
        "size",
        "written",
    )

    def __init__(self, node: Node, fh: int, flags: int) -> None:
        self.node = node
        self.fh = fh
        self.flags = flags
        self.ahead: deque[fuse.DirEntryPlus] = deque()
        self.position = self.cookie = 0
        self.size = LISTING_SIZE
        self.written = 0
        self.kept: Sequence[bytes] | None = None
        self.lines: list[bytes] | None = None
        self.since = self.asked = (0.0, 0)


class DirectoryHandlers(Handlers):
    """What is done with open directories."""

    def __init__(self, session: Session, policy: CachePolicy) -> None:
        super().__init__(session, policy)
        self._directories: dict[int, _Directory] = {}

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory."""
        node = self.nodes[inode]
        flags = os.O_RDONLY | os.O_DIRECTORY
        reply = await self._session.opendir(node.nodeid, flags, ctx)
        self._last_fh += 1
        self._directories[self._last_fh] = _Directory(node, reply.fh, flags)
        return pyfuse3.FileHandleT(self._last_fh)

    @handler
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
            self._turn_back(directory, start_id)
            if start_id:
                directory.lines = None
        elif directory.ahead and directory.asked[1] != self._version():
            self._turn_back(directory, start_id)
            directory.size = _LEAST_SIZE
        while await self._have_ahead(directory):
            if await self._hand_on_ahead(directory, token):
                return

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make a directory durable at the host."""
        directory = self._directories[fh]
        await self._session.fsyncdir(directory.node.nodeid, directory.fh, datasync)

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Last close of a directory."""
        directory = self._directories.pop(fh)
        self._drop_ahead(directory)
        await self._session.releasedir(
            directory.node.nodeid, directory.fh, directory.flags, wait=False
        )

    # --- as the daemon lists ---------------------------------------------------------------------

    def _turn_back(self, directory: _Directory, cookie: int) -> None:
        """Go on from a cookie that the kernel had; what is ahead is of no use."""
        self._drop_ahead(directory)
        directory.position = directory.cookie = cookie

    async def _have_ahead(self, directory: _Directory) -> bool:
        """Have something to hand on; False at the end."""
        if not directory.ahead:
            directory.asked = time.monotonic(), self._version()
            directory.written = self._written()
            directory.ahead.extend(await self._list(directory))
            directory.size = min(2 * directory.size, LISTING_SIZE)
            if directory.ahead:
                directory.cookie = directory.ahead[-1].off
            else:
                self._keep_listing(directory)
        return bool(directory.ahead)

    async def _list(self, directory: _Directory) -> list[fuse.DirEntryPlus]:
        """Ask the daemon for what comes next."""
        where = directory.node.nodeid, directory.fh, directory.cookie
        try:
            return await self._session.readdirplus(*where, directory.size)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT:
                raise
        # virtiofsd (C) says so of a name that it had read before it was removed, and programs take
        # it for the end. Without attributes it goes on.
        names = await self._session.readdir(*where, _PLAIN_SIZE)
        return [fuse.DirEntryPlus(_NO_ENTRY, *one) for one in names]

    async def _hand_on_ahead(self, directory: _Directory, token: ReaddirToken) -> bool:
        """Hand on what is ahead, as far as there is room; return whether the kernel has got any."""
        got = False
        while directory.ahead:
            found = directory.ahead[0]
            if not found.entry.nodeid or self.behind is not None:
                try:
                    entry = await self._entry_of(directory, found)
                except VfsmountError:
                    if got:  # the kernel counts these: it is told at its next call
                        return True
                    raise
                if entry is None:
                    directory.ahead.popleft()
                    continue
                found = directory.ahead[0] = found._replace(entry=entry)
            if not self._hand_on(token, found, time.monotonic() - directory.asked[0]):
                return True
            got = True
            directory.ahead.popleft()
            directory.position = found.off
            if directory.lines is not None:
                self._keep_line(directory, directory.lines, found)
        return got

    async def _entry_of(
        self, directory: _Directory, found: fuse.DirEntryPlus
    ) -> fuse.EntryOut | None:
        """Return what a listed name leads to, as it is now; None when it has gone meanwhile."""
        if found.name in _DOTS:
            return found.entry
        if found.entry.nodeid:
            return await self._as_written(found.entry, directory.written)
        return await self._find(directory.node, found.name)

    def _hand_on(self, token: ReaddirToken, found: fuse.DirEntryPlus, age: float) -> bool:
        """Offer one entry to the kernel, which counts as a lookup if there is room for it."""
        name, nodeid = found.name, found.entry.nodeid
        if name in _DOTS:
            return self._hand_on_dot(token, name, found.ino or fuse.ROOT_ID, found.off)
        attributes = self._enter(found.entry)
        _grow_old(attributes, age)
        if pyfuse3.readdir_reply(token, name, attributes, found.off):
            return True
        # It stays in ``ahead`` with its reference: take back only what concerns the kernel.
        self._fresh.was_not_given(nodeid)
        self.nodes.leave(nodeid)
        return False

    def _hand_on_dot(self, token: ReaddirToken, name: bytes, inode: int, cookie: int) -> bool:
        # The kernel takes neither node nor attributes of these, just number and type.
        dot = EntryAttributes()
        dot.st_ino, dot.st_mode = pyfuse3.InodeT(inode), stat.S_IFDIR
        return pyfuse3.readdir_reply(token, name, dot, cookie)

    async def _find(self, parent: Node, name: bytes) -> fuse.EntryOut | None:
        """Look up a listed name that came without its node; None when it has gone meanwhile."""
        try:
            entry = await self._look_up(parent, name)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        return entry if entry.nodeid else None

    def _drop_ahead(self, directory: _Directory) -> None:
        for found in directory.ahead:
            if found.entry.nodeid and found.name not in _DOTS:
                self._session.forget(found.entry.nodeid)
        directory.ahead.clear()

    # --- as it is kept ---------------------------------------------------------------------------

    def _keep_line(
        self, directory: _Directory, lines: list[bytes], found: fuse.DirEntryPlus
    ) -> None:
        """Note what was handed on, and keep what is known of it."""
        if found.name in _DOTS:
            lines.append(dot_line(found.name, found.ino or fuse.ROOT_ID))
            return
        lines.append(found.name)
        sent, version = directory.asked
        if version == self._version() >= 0:
            self._keep_name(directory.node, found.name, found.entry, sent)

    def _keep_name(self, parent: Node, name: bytes, entry: fuse.EntryOut, sent: float) -> None:
        dirty = self.behind is not None and self.behind.settles(entry.nodeid)
        if self._listings is not None and not dirty:
            self._listings.keep_name(parent.nodeid, name, entry.nodeid, entry.attr, sent)

    def _keep_listing(self, directory: _Directory) -> None:
        """All was handed on; keep it if nothing was changed meanwhile."""
        lines, directory.lines = directory.lines, None
        sent, version = directory.since
        if self._listings is not None and lines is not None and version == self._version() >= 0:
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
                try:
                    fits = await self._hand_on_name(token, parent, line, cookie)
                except VfsmountError:
                    if position > start:  # the kernel counts these: it is told at its next call
                        return
                    raise
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
            _grow_old(attributes, known.age)
        else:
            asked = time.monotonic(), self._version()
            entry = await self._find(parent, name)
            if entry is None:
                return True
            attributes = self._enter(entry)
            if asked[1] == self._version() >= 0:
                self._keep_name(parent, name, entry, asked[0])
        if pyfuse3.readdir_reply(token, name, attributes, cookie):
            return True
        self._fresh.was_not_given(self.nodes[attributes.st_ino].nodeid)
        self._give_back(self.nodes.forget([(attributes.st_ino, 1)]))
        return False


def _grow_old(attributes: EntryAttributes, age: float) -> None:
    """What was asked for some seconds ago is valid for that much less."""
    attributes.attr_timeout = max(0.0, attributes.attr_timeout - age)
    attributes.entry_timeout = max(0.0, attributes.entry_timeout - age)
