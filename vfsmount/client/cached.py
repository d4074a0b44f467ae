"""A cached view of a session: files by path, for programs that have no mount.

    with guest.cached(CachePolicy.for_mode("auto")) as view:
        await view.read("etc/hostname")

The promises are those of a mount in the same cache mode (docs/semantics.md), kept by the caches of
``cache/``. One ``read`` is an open, a read and a close; one ``write`` is at the host on return, so
write-back has nothing to do here. In mode ``host`` names and attributes are believed as long as the
daemon says, and contents never.

What is changed by other means than this view, also through the same session, counts as changed
elsewhere. Symbolic links are not followed. The daemon checks no permissions.

Rules inside:

* A node is used only below ``_pinned``: a reference that is given back meanwhile goes to the daemon
  when nobody uses the node any more, and with it all that was known, because the number may come
  back as another node's.
* ``_changes`` counts changes made here, when they are through. Answers to what was asked before the
  last one are used, but not believed.
* A change whose caller was cancelled counts as through, and may be carried out at any time
  until the daemon answers it. Nothing that is asked meanwhile is believed (``_version``).
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final, Self

import trio

from vfsmount.cache.attributes import Attributes
from vfsmount.cache.freshness import Freshness, signature_of
from vfsmount.cache.names import ABSENT, Names
from vfsmount.cache.pages import BLOCK, Pages
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import TypeAlias

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.session import Session

    #: A path from the root of the share, or a node that ``CachedSession.node`` gave.
    Where: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes] | int

__all__ = ["CachedSession"]

#: Bytes of one listing message, and of one read of contents that are to be kept.
_LISTING: Final = 1 << 17
_AHEAD: Final = 1 << 20
_DOTS: Final = (b".", b"..")
#: How often a name whose file was replaced is looked up anew by one call.
_ATTEMPTS: Final = 3
#: Seconds for giving a handle back when nobody waits for more.
_CLOSE_SECONDS: Final = 2.0


class CachedSession:
    """Files of a session by path; made by ``Session.cached``.

    Every method takes a path from the root of the share or a node, and raises what the session
    raises; ENOENT and ENOTDIR of a path as ``RemoteErrno``, too.

    Args:
        session: Where is asked what is not known.
        policy: What is believed, and for how long.
        names: Most names and attributes that are remembered.
        cache_size: Bytes of contents.
        clock: Seconds.
    """

    def __init__(
        self,
        session: Session,
        policy: CachePolicy,
        *,
        names: int,
        cache_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._policy = policy
        self._clock = clock
        self._names = Names(names, self._give_back)
        self._attributes = Attributes(names)
        self._pages = Pages(cache_size)
        self._fresh = Freshness()
        self._keeps_pages = not policy.direct_io and not policy.from_host
        self._pins: Counter[int] = Counter()
        self._given_back: Counter[int] = Counter()
        self._changes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything, and give all references back."""
        self._names.clear()

    # --- nodes -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def node(self, where: Where) -> AsyncIterator[int]:
        """Walk a path; the node can be used in place of the path until the block is left."""
        if isinstance(where, int):
            with self._pinned(where):
                yield where
            return
        async with self._below(fuse.ROOT_ID, _parts(where)) as nodeid:
            yield nodeid

    @asynccontextmanager
    async def _below(self, parent: int, parts: list[bytes]) -> AsyncIterator[int]:
        nodeid = parent
        self._pins[nodeid] += 1
        try:
            for name in parts:
                child = await self._child(nodeid, name)
                self._unpin(nodeid)
                nodeid = child
            yield nodeid
        finally:
            self._unpin(nodeid)

    @asynccontextmanager
    async def _name(self, path: Where) -> AsyncIterator[tuple[int, bytes]]:
        """Walk to the directory of a path; (nodeid of it, last part)."""
        if isinstance(path, int):
            raise TypeError("a path is needed: a node may have many names")
        parts = _parts(path)
        if not parts:
            raise RemoteErrno(Opcode.LOOKUP, fuse.ROOT_ID, errno.EBUSY)
        async with self._below(fuse.ROOT_ID, parts[:-1]) as parent:
            yield parent, parts[-1]

    async def _child(self, parent: int, name: bytes) -> int:
        """Return the node that a name leads to, pinned once."""
        found = self._names.find(parent, name, self._clock())
        if found is None:
            found = await self._lookup(parent, name)
        elif found != ABSENT:
            self._pins[found] += 1
        if found == ABSENT:
            raise RemoteErrno(Opcode.LOOKUP, parent, errno.ENOENT)
        return found

    async def _lookup(self, parent: int, name: bytes) -> int:
        """Ask where a name leads; the node is pinned once."""
        sent, before = self._clock(), self._version()
        try:
            entry = await self._session.lookup(parent, name)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT:
                raise
            entry = None
        if entry is None or not entry.nodeid:
            if self._policy.negative_timeout and before == self._changes:
                until = sent + self._policy.negative_timeout
                self._names.put(parent, name, ABSENT, until)
            return ABSENT
        self._pins[entry.nodeid] += 1
        self._learn(parent, name, entry, sent, before)
        return entry.nodeid

    def _learn(
        self, parent: int, name: bytes, entry: fuse.EntryOut, sent: float, before: int
    ) -> None:
        """Take over an entry that was asked for at ``sent`` seconds, with its reference."""
        valid = self._policy.entry_timeout
        if self._policy.from_host:
            valid = entry.entry_valid + entry.entry_valid_nsec / 1e9
        if not valid or before != self._changes:
            self._give_back(entry.nodeid)
            return
        theirs = entry.attr_valid + entry.attr_valid_nsec / 1e9
        with self._pinned(entry.nodeid):  # it may be pushed out again at once, with its directory
            self._names.put(parent, name, entry.nodeid, sent + valid)
            self._believe(entry.nodeid, entry.attr, sent, theirs)

    def _believe(self, nodeid: int, attr: fuse.Attr, sent: float, theirs: float) -> None:
        valid = theirs if self._policy.from_host else self._policy.attr_timeout
        if valid:
            self._attributes.put(nodeid, attr, sent + valid)

    @contextmanager
    def _pinned(self, nodeid: int) -> Iterator[None]:
        self._pins[nodeid] += 1
        try:
            yield
        finally:
            self._unpin(nodeid)

    def _unpin(self, nodeid: int) -> None:
        self._pins[nodeid] -= 1
        if not self._pins[nodeid]:
            del self._pins[nodeid]
            count = self._given_back.pop(nodeid, 0)
            if count:
                self._forget(nodeid, count)

    def _give_back(self, nodeid: int, gone: bool = True) -> None:
        if not gone:
            self._session.forget(nodeid)
        elif nodeid in self._pins:
            self._given_back[nodeid] += 1
        else:
            self._forget(nodeid, 1)

    def _forget(self, nodeid: int, count: int) -> None:
        self._attributes.drop(nodeid)
        self._pages.drop(nodeid)
        self._fresh.forget(nodeid)
        self._session.forget(nodeid, count)

    def _version(self) -> int:
        """Return what ``_changes`` has to be still when an answer comes that is to be believed."""
        return -1 if self._session.channel.orphans else self._changes

    # --- looking ---------------------------------------------------------------------------------

    async def stat(self, where: Where) -> fuse.Attr:
        """Attributes, of a symbolic link itself."""
        async with self.node(where) as nodeid:
            attr = self._attributes.get(nodeid, self._clock())
            return attr or await self._getattr(nodeid)

    async def _getattr(self, nodeid: int) -> fuse.Attr:
        sent, before = self._clock(), self._version()
        reply = await self._session.getattr(nodeid)
        if before == self._changes:
            theirs = reply.attr_valid + reply.attr_valid_nsec / 1e9
            self._believe(nodeid, reply.attr, sent, theirs)
        return reply.attr

    async def readlink(self, where: Where) -> bytes:
        """Target of a symbolic link; asked for each time."""
        async with self.node(where) as nodeid:
            return await self._session.readlink(nodeid)

    async def listdir(self, where: Where = b"") -> list[bytes]:
        """Names in a directory, without "." and "..", in no particular order."""
        async with self.node(where) as nodeid:
            listing = self._names.listing(nodeid, self._clock())
            if listing is None:
                listing = await self._list(nodeid, plus=False)
            return list(listing)

    async def scandir(self, where: Where = b"") -> list[tuple[bytes, fuse.Attr]]:
        """As ``listdir``, with the attributes of each: what ``ls -l`` needs, in few messages."""
        async with self.node(where) as nodeid:
            listing = self._names.listing(nodeid, self._clock())
            if listing is not None:
                known = [(name, self._known(nodeid, name)) for name in listing]
                found = [(name, attr) for name, attr in known if attr is not None]
                if len(found) == len(known):
                    return found
            return await self._list_attributes(nodeid)

    def _known(self, parent: int, name: bytes) -> fuse.Attr | None:
        now = self._clock()
        nodeid = self._names.find(parent, name, now)
        return self._attributes.get(nodeid, now) if nodeid else None

    async def _list_attributes(self, nodeid: int) -> list[tuple[bytes, fuse.Attr]]:
        found: dict[bytes, fuse.Attr] = {}
        names = await self._list(nodeid, plus=True, found=found)
        for name in names:
            if name not in found:  # the daemon listed it without its node
                try:
                    async with self._below(nodeid, [name]) as child:
                        found[name] = await self.stat(child)
                except RemoteErrno as error:
                    if error.errno != errno.ENOENT:  # removed meanwhile
                        raise
        return [(name, found[name]) for name in names if name in found]

    async def _list(
        self, nodeid: int, *, plus: bool, found: dict[bytes, fuse.Attr] | None = None
    ) -> list[bytes]:
        """Fetch a listing, and keep it if it may be; ``found`` gets attributes that came along."""
        sent, before = self._clock(), self._version()
        names: list[bytes] = []
        opened = await self._session.opendir(nodeid)
        try:
            position: int | None = 0
            while position is not None:
                if plus:
                    position = await self._list_plus(nodeid, opened.fh, position, names, found)
                else:
                    position = await self._list_plain(nodeid, opened.fh, position, names)
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self._session.releasedir(nodeid, opened.fh, wait=False)
        if self._policy.dir_timeout and before == self._changes:
            self._names.list(nodeid, names, sent + self._policy.dir_timeout)
        return names

    async def _list_plain(
        self, nodeid: int, fh: int, position: int, names: list[bytes]
    ) -> int | None:
        entries = await self._session.readdir(nodeid, fh, position, _LISTING)
        names += [entry.name for entry in entries if entry.name not in _DOTS]
        return entries[-1].off if entries else None

    async def _list_plus(
        self,
        nodeid: int,
        fh: int,
        position: int,
        names: list[bytes],
        found: dict[bytes, fuse.Attr] | None,
    ) -> int | None:
        sent, before = self._clock(), self._version()
        try:
            entries = await self._session.readdirplus(nodeid, fh, position, _LISTING)
        except RemoteErrno as error:
            if error.errno != errno.ENOENT:
                raise
            # virtiofsd (C) has read a name that was removed before it looked that up.
            return await self._list_plain(nodeid, fh, position, names)
        for listed in entries:
            if listed.name in _DOTS:
                continue
            names.append(listed.name)
            if listed.entry.nodeid:
                if found is not None:
                    found[listed.name] = listed.entry.attr
                self._learn(nodeid, listed.name, listed.entry, sent, before)
        return entries[-1].off if entries else None

    # --- contents --------------------------------------------------------------------------------

    async def read(self, where: Where, size: int | None = None, position: int = 0) -> bytes:
        """Read from a file as an open, a read and a close would: up to its end without ``size``.

        Args:
            where: Path or node.
            size: Bytes.
            position: Byte of the file to begin at.
        """
        async with self._compared(where) as nodeid:
            return await self._read(nodeid, size, position)

    @asynccontextmanager
    async def _compared(self, where: Where) -> AsyncIterator[int]:
        """As ``node``, for an open: what is known is compared with what is there."""
        for _ in range(_ATTEMPTS):
            async with self.node(where) as nodeid:
                if await self._may_open(nodeid):
                    yield nodeid
                    return
            if not isinstance(where, int):
                await self._walk_anew(where)
        raise RemoteErrno(Opcode.OPEN, 0, errno.ESTALE)

    async def _may_open(self, nodeid: int) -> bool:
        """Drop contents that are old; False when the file has no name any more."""
        if not self._policy.revalidate:
            return True
        before = self._version()
        verdict = self._fresh.open(nodeid, signature_of(await self._getattr(nodeid)))
        if not verdict.keep_pages or before != self._changes:
            self._pages.drop(nodeid)
        return not verdict.replaced

    async def _walk_anew(self, path: Where) -> None:
        async with self._name(path) as (parent, name):
            self._names.drop(parent, name)

    async def _read(self, nodeid: int, size: int | None, position: int) -> bytes:
        left = size if size is not None else 1 << 62
        pieces: list[bytes] = []
        opened: fuse.OpenOut | None = None
        try:
            ended = False
            while left and not ended:
                wanted = min(left, BLOCK - position % BLOCK)
                piece = self._pages.read(nodeid, position, wanted) if self._keeps_pages else None
                if piece is not None:
                    ended = len(piece) < wanted
                else:
                    if opened is None:
                        opened = await self._session.open(nodeid, os.O_RDONLY)
                    piece, ended = await self._fetch(nodeid, opened.fh, position, left)
                pieces.append(piece)
                position, left = position + len(piece), left - len(piece)
        finally:
            if opened is not None:
                await self._release(nodeid, opened, os.O_RDONLY)
        return b"".join(pieces)

    async def _fetch(self, nodeid: int, fh: int, position: int, wanted: int) -> tuple[bytes, bool]:
        """Read by message, whole blocks and ahead where they are kept; (bytes, whether at the end).

        More than one block is wanted only by who reads in order.
        """
        limit = self._session.facts.max_read
        if not self._keeps_pages or limit < BLOCK:
            wanted = min(wanted, limit)
            data = await self._session.read(nodeid, fh, position, wanted)
            return data, len(data) < wanted
        start = position - position % BLOCK
        size = min(_AHEAD, limit) // BLOCK * BLOCK if wanted > BLOCK else BLOCK
        sure = self._version() >= 0
        with self._pages.fetching(nodeid) as fetch:
            data = await self._session.read(nodeid, fh, start, size)
            if fetch.is_true and sure:
                self._pages.put(nodeid, start, data, ends=len(data) < size)
        return data[position - start :][:wanted], len(data) < size

    async def _release(self, nodeid: int, opened: fuse.OpenOut, flags: int) -> None:
        """Give a handle back; also when this task is cancelled."""
        with trio.move_on_after(_CLOSE_SECONDS, shield=True):
            await self._session.release(nodeid, opened.fh, flags, wait=False)

    # --- changing --------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, *nodeids: int) -> Iterator[None]:
        """Whatever becomes of a change: what was known of these nodes' attributes is old then."""
        try:
            yield
        finally:
            self._changes += 1
            for nodeid in nodeids:
                self._attributes.drop(nodeid)

    @contextmanager
    def _changing_name(self, parent: int, name: bytes) -> Iterator[None]:
        """As ``_changing``, for a name, its directory, and the node that it leads to."""
        child = self._names.find(parent, name, 0.0) or ABSENT
        try:
            with self._changing(parent, child):
                yield
        finally:
            self._names.drop(parent, name)

    @contextmanager
    def _emptying(self) -> Iterator[None]:
        """Whoever leaves before the answer does not know which file will be empty."""
        try:
            yield
        except RemoteErrno:
            raise
        except BaseException:  # a cancellation, above all
            self._pages.clear()
            self._attributes.clear()
            raise

    @asynccontextmanager
    async def _moving_name(self, parent: int, name: bytes) -> AsyncIterator[None]:
        """As ``_changing_name``, for a name that may lead somewhere: that may have other names.

        So it is looked up when it is not known, as the kernel does.
        """
        child = self._names.find(parent, name, self._clock())
        if child is None and (self._policy.attr_timeout or self._policy.from_host):
            child = await self._lookup(parent, name)
        elif child:
            self._pins[child] += 1
        try:
            with self._changing_name(parent, name), self._changing(child or ABSENT):
                yield
        finally:
            if child:
                self._unpin(child)

    async def write(self, where: Where, data: bytes, position: int = 0) -> int:
        """Write to a file that exists; everything is at the host on return.

        Returns:
            Bytes written; fewer than given only when the daemon takes no more.
        """
        async with self._compared(where) as nodeid:
            opened = await self._session.open(nodeid, os.O_WRONLY)
            try:
                return await self._write(nodeid, opened.fh, data, position)
            finally:
                await self._release(nodeid, opened, os.O_WRONLY)

    async def _write(self, nodeid: int, fh: int, data: bytes, position: int) -> int:
        done, view = 0, memoryview(data)
        limit = self._session.facts.max_write
        try:
            while done < len(data):
                piece = view[done : done + limit]
                with self._changing(nodeid):
                    written = await self._session.write(
                        nodeid, fh, position + done, piece, flags=os.O_WRONLY
                    )
                done += written
                if not written:
                    break
        finally:
            self._pages.wrote(nodeid, position, len(data))
        return done

    async def create(self, path: Where, data: bytes = b"", mode: int = 0o666) -> None:
        """Make a file, or empty one that exists, and write to it.

        Args:
            path: Its path.
            data: All of its contents.
            mode: Permissions of a new file; there is no umask here.
        """
        flags = os.O_WRONLY | os.O_TRUNC
        async with self._name(path) as (parent, name):
            sent, before = self._clock(), self._version()
            with self._changing_name(parent, name), self._emptying():
                entry, opened = await self._session.create(parent, name, flags, mode)
                alone = before == self._changes
            with self._pinned(entry.nodeid):
                self._attributes.drop(entry.nodeid)  # it may have other names
                self._learn(parent, name, entry, sent, self._changes if alone else -1)
                self._pages.drop(entry.nodeid)
                try:
                    await self._write(entry.nodeid, opened.fh, data, 0)
                finally:
                    await self._release(entry.nodeid, opened, flags)

    async def setattr(self, where: Where, changes: fuse.SetattrIn) -> fuse.Attr:
        """Change attributes; ``vfsmount.client.session.setattr_in`` builds what to change."""
        async with self.node(where) as nodeid:
            try:
                with self._changing(nodeid):
                    return (await self._session.setattr(nodeid, changes)).attr
            finally:
                self._pages.drop(nodeid)  # it may have been truncated

    async def mkdir(self, path: Where, mode: int = 0o777) -> None:
        """Make a directory; there is no umask here."""
        async with self._name(path) as (parent, name):
            sent, before = self._clock(), self._version()
            with self._changing_name(parent, name):
                entry = await self._session.mkdir(parent, name, mode)
                alone = before == self._changes
            self._learn(parent, name, entry, sent, self._changes if alone else -1)

    async def unlink(self, path: Where) -> None:
        """Remove a name that is no directory."""
        async with self._name(path) as (parent, name), self._moving_name(parent, name):
            await self._session.unlink(parent, name)

    async def rmdir(self, path: Where) -> None:
        """Remove an empty directory."""
        async with self._name(path) as (parent, name):
            with self._changing_name(parent, name):
                await self._session.rmdir(parent, name)

    async def rename(self, old: Where, new: Where) -> None:
        """Rename, over what is there."""
        async with (
            self._name(old) as (parent, name),
            self._name(new) as (new_parent, new_name),
            self._moving_name(parent, name),
            self._moving_name(new_parent, new_name),
        ):
            await self._session.rename(parent, name, new_parent, new_name)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the caches are as they say and nothing is used in vain."""
        self._names.check_invariants()
        self._attributes.check_invariants()
        self._pages.check_invariants()
        assert all(self._pins.values())
        assert set(self._given_back) <= set(self._pins)


def _parts(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> list[bytes]:
    parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ValueError(f"a path within the share has no '..': {path!r}")
    return parts
