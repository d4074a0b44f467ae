"""The session API as a tree of files: names are walked with LOOKUP, as the kernel would.

``SessionThread`` runs trio and one session in a thread, so that tests of the session API read like
tests of a mount. ``SessionTree`` does what the kernel's FUSE client does above the protocol: it
walks paths, applies the umask, chooses the group to send, and gives back every lookup it gets.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import trio

import vfsmount
from tests.contract.trees import NOW, OFFSET_MAX, OMIT, Lock, Stat, Statfs
from vfsmount.client.session import setattr_in
from vfsmount.errors import RemoteErrno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, SetattrValid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

__all__ = ["SessionThread", "SessionTree"]

T = TypeVar("T")

# Seconds for the handshake with a daemon that listens.
START_DEADLINE = 30.0
#: Room for one listing, bytes.
LISTING_SIZE = 32768


async def map_start(session: vfsmount.Session, nodeid: int, flags: int) -> None:
    """Map the start of a file that was opened, so that DAX has to keep the contract as well."""
    if session.dax is not None:
        await session.dax.map(nodeid, 0, 1, write=flags & os.O_ACCMODE != os.O_RDONLY)


class SessionThread:
    """One session and its event loop, in a thread of its own."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="session")
        self._thread.start()
        self._ready.wait(START_DEADLINE)
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as failure:  # top of the thread: the other one raises it
            self._failure = failure
            self._ready.set()

    async def _main(self) -> None:
        # Where the daemon has a window, each file is mapped when it is opened: see `map_start`.
        async with vfsmount.connect(self._socket, dax=64 << 20) as session:
            self.session = session
            self._token = trio.lowlevel.current_trio_token()
            self._leave = trio.Event()
            self._ready.set()
            await self._leave.wait()

    def run(self, call: Callable[[vfsmount.Session], Awaitable[T]]) -> T:
        """Run an async function of the session, and return what it returns.

        Raises:
            OSError: The daemon said no.
        """

        async def task() -> T:
            return await call(self.session)

        try:
            return trio.from_thread.run(task, trio_token=self._token)
        except RemoteErrno as error:
            raise OSError(error.errno, os.strerror(error.errno)) from error

    def is_alive(self) -> bool:
        """Whether the session has not ended yet."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the session and wait for its end."""
        trio.from_thread.run_sync(self._leave.set, trio_token=self._token)
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class SessionTree:
    """A folder of the share, reached by the session API.

    Args:
        thread: The session.
        root: Path of the folder from the root of the share.
    """

    def __init__(self, thread: SessionThread, root: bytes) -> None:
        self._thread = thread
        self._root = root
        self._umask = 0o022
        self._caller: vfsmount.Caller | None = None
        self._groups: tuple[int, ...] = ()

    @property
    def session(self) -> vfsmount.Session:
        """The session, for what is not in ``Tree``; its methods must be run by ``run``."""
        return self._thread.session

    def run(self, call: Callable[[vfsmount.Session], Awaitable[T]]) -> T:
        """Run an async function of the session."""
        return self._thread.run(call)

    # --- walking ---------------------------------------------------------------------------------

    async def walk(self, name: bytes) -> fuse.EntryOut:
        """Walk to a name; the caller owes the reference."""
        held = fuse.ROOT_ID
        entry: fuse.EntryOut | None = None
        try:
            for part in os.path.join(self._root, name).split(b"/"):
                if part == b".":
                    continue
                entry = await self.session.lookup(held, part, self._caller)
                if not entry.nodeid:
                    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
                self._give_back(held)
                held = entry.nodeid
        except BaseException:
            self._give_back(held)
            raise
        assert entry is not None
        return entry

    @asynccontextmanager
    async def node(self, name: bytes) -> AsyncIterator[fuse.EntryOut]:
        """Walk to a name; the reference is given back at the end of the block."""
        entry = await self.walk(name)
        try:
            yield entry
        finally:
            self._give_back(entry.nodeid)

    @asynccontextmanager
    async def parent(self, name: bytes) -> AsyncIterator[tuple[fuse.EntryOut, bytes]]:
        """Walk to the folder that a name is in; yields it and the last part."""
        folder, _, last = name.rpartition(b"/")
        async with self.node(folder or b".") as entry:
            yield entry, last

    @asynccontextmanager
    async def _held(self, folder: fuse.EntryOut, name: bytes) -> AsyncIterator[None]:
        """Hold a name's node while it is removed or renamed, as the kernel does.

        virtiofsd (C) answers EIO for a name that the guest has not looked up. A name that cannot be
        looked up is sent all the same, to see what the daemon says.
        """
        nodeid = fuse.ROOT_ID
        with suppress(RemoteErrno):
            nodeid = (await self.session.lookup(folder.nodeid, name)).nodeid
        try:
            yield
        finally:
            self._give_back(nodeid)

    def _give_back(self, nodeid: int) -> None:
        if nodeid != fuse.ROOT_ID:
            self.session.forget(nodeid)

    def _mode(self, mode: int) -> int:
        """As the kernel: the umask is applied here unless the daemon does it (DONT_MASK)."""
        return mode if InitFlag.DONT_MASK in self.session.facts.flags else mode & ~self._umask

    def _group(self, parent: fuse.EntryOut) -> int | None:
        """The parent's group, if the caller is in it, as get_create_supp_group() in fs/fuse."""
        gid = parent.attr.gid
        if self._caller is None or gid == self._caller.gid or gid not in self._groups:
            return None
        return gid

    # --- attributes ------------------------------------------------------------------------------

    def stat(self, name: bytes) -> Stat:
        async def call(session: vfsmount.Session) -> Stat:
            async with self.node(name) as entry:
                found = await session.getattr(entry.nodeid, caller=self._caller)
                # LOOKUP's own attributes must be the same.
                assert entry.attr._replace(atime=0, atimensec=0) == found.attr._replace(
                    atime=0, atimensec=0
                )
                return stat_of(found.attr)

        return self.run(call)

    def _setattr(self, name: bytes, changes: fuse.SetattrIn) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.node(name) as entry:
                await session.setattr(entry.nodeid, changes, self._caller)

        self.run(call)

    def chmod(self, name: bytes, mode: int) -> None:
        self._setattr(name, setattr_in(mode=mode))

    def chown(self, name: bytes, uid: int, gid: int) -> None:
        changes = setattr_in(uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)
        self._setattr(name, changes)

    def truncate(self, name: bytes, size: int) -> None:
        self._setattr(name, setattr_in(size=size))

    def utime(self, name: bytes, atime_ns: int, mtime_ns: int) -> None:
        self._setattr(name, times_in(atime_ns, mtime_ns))

    def access(self, name: bytes, mode: int) -> bool:
        async def call(session: vfsmount.Session) -> bool:
            async with self.node(name) as entry:
                await session.access(entry.nodeid, mode, self._caller)
                return True

        try:
            return self.run(call)
        except PermissionError:
            return False

    def statfs(self) -> Statfs:
        found = self.run(lambda session: session.statfs())
        return Statfs(found.bsize, found.frsize, found.blocks, found.files, found.namelen)

    # --- names -----------------------------------------------------------------------------------

    def _entered(self, entry: fuse.EntryOut) -> None:
        self._give_back(entry.nodeid)

    def mkdir(self, name: bytes, mode: int = 0o755) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last):
                entry = await session.mkdir(
                    folder.nodeid,
                    last,
                    self._mode(mode),
                    self._umask,
                    self._caller,
                    self._group(folder),
                )
                self._entered(entry)

        self.run(call)

    def mknod(self, name: bytes, mode: int, rdev: int = 0) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last):
                entry = await session.mknod(
                    folder.nodeid,
                    last,
                    self._mode(mode),
                    encode_dev(rdev),
                    self._umask,
                    self._caller,
                    self._group(folder),
                )
                self._entered(entry)

        self.run(call)

    def symlink(self, target: bytes, name: bytes) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last):
                group = self._group(folder)
                entry = await session.symlink(folder.nodeid, last, target, self._caller, group)
                self._entered(entry)

        self.run(call)

    def readlink(self, name: bytes) -> bytes:
        async def call(session: vfsmount.Session) -> bytes:
            async with self.node(name) as entry:
                return await session.readlink(entry.nodeid, self._caller)

        return self.run(call)

    def link(self, old: bytes, new: bytes) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.node(old) as entry, self.parent(new) as (folder, last):
                linked = await session.link(entry.nodeid, folder.nodeid, last, self._caller)
                assert linked.nodeid == entry.nodeid
                self._entered(linked)

        self.run(call)

    def link_node(self, nodeid: int, name: bytes) -> None:
        """Link a node that the caller holds."""

        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last):
                linked = await session.link(nodeid, folder.nodeid, last, self._caller)
                assert linked.nodeid == nodeid
                self._entered(linked)

        self.run(call)

    def unlink(self, name: bytes) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last), self._held(folder, last):
                await session.unlink(folder.nodeid, last, self._caller)

        self.run(call)

    def rmdir(self, name: bytes) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.parent(name) as (folder, last), self._held(folder, last):
                await session.rmdir(folder.nodeid, last, self._caller)

        self.run(call)

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with (
                self.parent(old) as (source, first),
                self.parent(new) as (target, last),
                self._held(source, first),
                self._held(target, last),
            ):
                await session.rename(source.nodeid, first, target.nodeid, last, flags, self._caller)

        self.run(call)

    def listdir(self, name: bytes = b".") -> list[tuple[bytes, int]]:
        """List with READDIRPLUS; every entry's attributes must agree with its type."""

        async def call(session: vfsmount.Session) -> list[tuple[bytes, int]]:
            async with self.node(name) as entry:
                opened = await session.opendir(entry.nodeid, caller=self._caller)
                try:
                    return sorted([found async for found in self._listing(entry, opened.fh)])
                finally:
                    await session.releasedir(entry.nodeid, opened.fh)

        return self.run(call)

    async def _listing(self, folder: fuse.EntryOut, fh: int) -> AsyncIterator[tuple[bytes, int]]:
        cookie = 0
        while True:
            batch = await self.session.readdirplus(folder.nodeid, fh, cookie, LISTING_SIZE)
            if not batch:
                return
            for found in batch:
                cookie = found.off
                if found.entry.nodeid and found.name not in (b".", b".."):
                    self._give_back(found.entry.nodeid)
                    assert stat.S_IFMT(found.entry.attr.mode) == found.type << 12
                if found.name not in (b".", b".."):
                    yield found.name, found.type << 12

    def fsyncdir(self, name: bytes, datasync: bool = False) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.node(name) as entry:
                opened = await session.opendir(entry.nodeid)
                await session.fsyncdir(entry.nodeid, opened.fh, datasync)
                await session.releasedir(entry.nodeid, opened.fh)

        self.run(call)

    # --- extended attributes ---------------------------------------------------------------------

    def setxattr(self, name: bytes, key: bytes, value: bytes, flags: int = 0) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.node(name) as entry:
                await session.setxattr(entry.nodeid, key, value, flags, caller=self._caller)

        self.run(call)

    def getxattr(self, name: bytes, key: bytes, size: int = 65536) -> bytes:
        async def call(session: vfsmount.Session) -> bytes:
            async with self.node(name) as entry:
                return await session.getxattr(entry.nodeid, key, size, self._caller)

        return self.run(call)

    def getxattr_size(self, name: bytes, key: bytes) -> int:
        async def call(session: vfsmount.Session) -> int:
            async with self.node(name) as entry:
                return await session.getxattr_size(entry.nodeid, key, self._caller)

        return self.run(call)

    def listxattr(self, name: bytes, size: int = 65536) -> list[bytes]:
        async def call(session: vfsmount.Session) -> list[bytes]:
            async with self.node(name) as entry:
                return await session.listxattr(entry.nodeid, size, self._caller)

        return self.run(call)

    def listxattr_size(self, name: bytes) -> int:
        async def call(session: vfsmount.Session) -> int:
            async with self.node(name) as entry:
                return await session.listxattr_size(entry.nodeid, self._caller)

        return self.run(call)

    def removexattr(self, name: bytes, key: bytes) -> None:
        async def call(session: vfsmount.Session) -> None:
            async with self.node(name) as entry:
                await session.removexattr(entry.nodeid, key, self._caller)

        self.run(call)

    # --- files -----------------------------------------------------------------------------------

    def open(self, name: bytes, flags: int, mode: int = 0o644) -> SessionHandle:
        """Open or create, as the kernel: CREATE is sent only for a name that it cannot find."""

        async def call(session: vfsmount.Session) -> SessionHandle:
            if not flags & os.O_CREAT:
                return await self._open(session, name, flags)
            try:
                async with self.node(name):
                    pass
            except (RemoteErrno, OSError):
                return await self._create(session, name, flags, mode)
            if flags & os.O_EXCL:
                return await self._create(session, name, flags, mode)
            return await self._open(session, name, flags & ~os.O_CREAT)

        return self.run(call)

    def tmpfile(self, flags: int, mode: int = 0o644) -> SessionHandle:
        async def call(session: vfsmount.Session) -> SessionHandle:
            async with self.node(b".") as folder:
                masked = stat.S_IFREG | mode & ~self._umask
                made = await session.tmpfile(folder.nodeid, flags, masked, caller=self._caller)
                entry, opened = made
                self._entered(entry)
                return SessionHandle(self, entry.nodeid, opened.fh, flags)

        return self.run(call)

    async def _open(self, session: vfsmount.Session, name: bytes, flags: int) -> SessionHandle:
        entry = await self.walk(name)  # the reference goes on in the handle
        try:
            opened = await session.open(entry.nodeid, flags, caller=self._caller)
        except BaseException:
            self._give_back(entry.nodeid)
            raise
        await map_start(session, entry.nodeid, flags)
        return SessionHandle(self, entry.nodeid, opened.fh, flags)

    async def _create(
        self, session: vfsmount.Session, name: bytes, flags: int, mode: int
    ) -> SessionHandle:
        async with self.parent(name) as (folder, last):
            entry, opened = await session.create(
                folder.nodeid,
                last,
                flags,
                stat.S_IFREG | self._mode(mode),
                self._umask,
                caller=self._caller,
                group=self._group(folder),
            )
            await map_start(session, entry.nodeid, flags)
            return SessionHandle(self, entry.nodeid, opened.fh, flags)

    # --- who -------------------------------------------------------------------------------------

    def below(self, name: bytes) -> SessionTree:
        """The tree of a folder in this one."""
        return SessionTree(self._thread, os.path.join(self._root, name))

    @contextmanager
    def umask(self, mask: int) -> Iterator[None]:
        before, self._umask = self._umask, mask
        try:
            yield
        finally:
            self._umask = before

    @contextmanager
    def caller(self, uid: int, gid: int, groups: tuple[int, ...] = ()) -> Iterator[None]:
        self._caller, self._groups = vfsmount.Caller(uid, gid), groups
        try:
            yield
        finally:
            self._caller, self._groups = None, ()


class SessionHandle:
    """An open file: a handle of the daemon and a reference to its node."""

    def __init__(self, tree: SessionTree, nodeid: int, fh: int, flags: int) -> None:
        self._tree = tree
        self.nodeid = nodeid
        self.fh = fh
        self._flags = flags

    def pread(self, size: int, offset: int) -> bytes:
        """Read in pieces of at most max_read, as the kernel does."""

        async def call(session: vfsmount.Session) -> bytes:
            pieces = []
            at = 0
            while at < size:
                wanted = min(size - at, session.facts.max_read)
                piece = await session.read(self.nodeid, self.fh, offset + at, wanted)
                pieces.append(piece)
                at += len(piece)
                if len(piece) < wanted:
                    break
            return b"".join(pieces)

        return self._tree.run(call)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write in pieces of at most max_write, as the kernel does."""

        async def call(session: vfsmount.Session) -> int:
            at = 0
            while True:
                piece = data[at : at + session.facts.max_write]
                written = await session.write(
                    self.nodeid, self.fh, offset + at, piece, flags=self._flags
                )
                at += written
                if at >= len(data) or written < len(piece):
                    return at

        return self._tree.run(call)

    def stat(self) -> Stat:
        found = self._tree.run(lambda session: session.getattr(self.nodeid, self.fh))
        return stat_of(found.attr)

    def _setattr(self, changes: fuse.SetattrIn) -> None:
        with_fh = changes._replace(valid=changes.valid | SetattrValid.FH, fh=self.fh)
        self._tree.run(lambda session: session.setattr(self.nodeid, with_fh))

    def truncate(self, size: int) -> None:
        self._setattr(setattr_in(size=size))

    def chmod(self, mode: int) -> None:
        self._setattr(setattr_in(mode=mode))

    def utime(self, atime_ns: int, mtime_ns: int) -> None:
        self._setattr(times_in(atime_ns, mtime_ns))

    def fsync(self, datasync: bool = False) -> None:
        self._tree.run(lambda session: session.fsync(self.nodeid, self.fh, datasync))

    def lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> None:
        self._lock(kind, start, end, 0)

    def flock(self, kind: int) -> None:
        self._lock(kind, 0, OFFSET_MAX, fuse.LockFlag.FLOCK)

    def _lock(self, kind: int, start: int, end: int, flags: int) -> None:
        wanted = fuse.LkIn(self.fh, self._owner, start, end, kind, os.getpid(), flags)
        self._tree.run(lambda session: session.setlk(self.nodeid, wanted))

    def find_lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> Lock | None:
        asked = fuse.LkIn(self.fh, self._owner, start, end, kind, os.getpid(), 0)
        found = self._tree.run(lambda session: session.getlk(self.nodeid, asked))
        if found.type == fuse.LockType.UNLOCK:
            return None
        return Lock(found.type, found.start, found.end)

    @property
    def _owner(self) -> int:
        """A lock owner of its own for each handle, as the kernel makes for a file description."""
        return 0xACE0_0000_0000 + self.fh

    def give_name(self, name: bytes) -> None:
        self._tree.link_node(self.nodeid, name)

    def close(self) -> None:
        async def call(session: vfsmount.Session) -> None:
            await session.flush(self.nodeid, self.fh)
            await session.release(self.nodeid, self.fh, self._flags)
            session.forget(self.nodeid)

        self._tree.run(call)

    def __enter__(self) -> SessionHandle:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def times_in(atime_ns: int, mtime_ns: int) -> fuse.SetattrIn:
    """Build a SETATTR from utimensat(2)'s two times."""
    return setattr_in(
        atime_ns=None if atime_ns in (NOW, OMIT) else atime_ns,
        mtime_ns=None if mtime_ns in (NOW, OMIT) else mtime_ns,
        atime_now=atime_ns == NOW,
        mtime_now=mtime_ns == NOW,
    )


def encode_dev(rdev: int) -> int:
    """The kernel's new_encode_dev(): minor bits 0-7, major 8-19, the rest of minor 20-31."""
    major, minor = os.major(rdev), os.minor(rdev)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def stat_of(attr: fuse.Attr) -> Stat:
    """Turn a fuse_attr into what stat(2) shows."""
    rdev = os.makedev(attr.rdev >> 8 & 0xFFF, attr.rdev & 0xFF | attr.rdev >> 12 & 0xFFF00)
    return Stat(
        attr.mode,
        attr.nlink,
        attr.uid,
        attr.gid,
        rdev,
        attr.size,
        attr.ino,
        attr.blocks,
        attr.atime * 10**9 + attr.atimensec,
        attr.mtime * 10**9 + attr.mtimensec,
        attr.ctime * 10**9 + attr.ctimensec,
    )
