"""A FUSE session with a virtio-fs daemon: INIT, one method per opcode, DESTROY.

This is the guest's half of virtio-fs without a mount. A method sends one request and returns the
reply's records as ``vfsmount.wire.fuse`` defines them; nothing is cached, retried or split here.

Errors, the same for every method:
    RemoteErrno: the daemon said no; ``.errno`` is what the application should see.
    ProtocolViolation, ChannelBroken, ChannelClosed: the channel is over, for everybody.
    RequestTimeout: this request had no reply in time (only with ``request_timeout``).

Counts. Each LOOKUP, CREATE, MKDIR, MKNOD, SYMLINK, LINK and TMPFILE reply and each READDIRPLUS
record with a nodeid gives the caller one reference to that node; it owes ``forget`` for each.
A handle from OPEN, CREATE, TMPFILE or OPENDIR is owed a ``release`` or ``releasedir``.

After cancellation the request may still take effect at the daemon. A reply that arrives for a
caller who has gone is undone: its lookup is forgotten, its handle released.
"""

from __future__ import annotations

import os
import stat
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import trio

from vfsmount.channel import ChannelOptions, open_channel
from vfsmount.channel.nursery import open_helpers
from vfsmount.client.dax import Dax
from vfsmount.dax_shm.window import Window
from vfsmount.errors import (
    ChannelBroken,
    ChannelClosed,
    HandshakeError,
    ProtocolViolation,
    RemoteErrno,
    RequestTimeout,
    WireError,
)
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode, SetattrValid

if TYPE_CHECKING:
    import socket as socket_module
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from typing_extensions import Buffer

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel import Channel
    from vfsmount.client.cached import CachedSession
    from vfsmount.wire._codec import Codec

__all__ = ["GUEST_FLAGS", "OLDEST_MINOR", "Caller", "InitFacts", "Session", "connect"]

R = TypeVar("R", bound=tuple[object, ...])
T = TypeVar("T")

#: Oldest minor version that we speak: 7.27 (libfuse 3.4's time). Structs have not changed since
#: 7.23 but for setxattr_in, which follows SETXATTR_EXT; what came later is behind INIT flags.
OLDEST_MINOR = 27

#: What we offer in INIT: what a Linux guest offers (``fuse_send_init`` for virtio-fs), less what we
#: could not honour: answers of ENOSYS to OPEN, splice, idmapped ids, io_uring, resending, and
#: WRITEBACK_CACHE and DAX, which ``connect`` adds when asked.
GUEST_FLAGS = (
    InitFlag.ASYNC_READ
    | InitFlag.POSIX_LOCKS
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.EXPORT_SUPPORT
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.FLOCK_LOCKS
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.HANDLE_KILLPRIV
    | InitFlag.POSIX_ACL
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.SUBMOUNTS
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.SECURITY_CTX
    | InitFlag.CREATE_SUPP_GROUP
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | fuse.HEEDS_INTERRUPT
)

_NO_FLAGS = InitFlag(0)
_DAX_FLAGS = InitFlag.MAP_ALIGNMENT | InitFlag.HAS_INODE_DAX

#: Bytes of one page in INIT's max_pages, and how many pages there are without MAX_PAGES.
PAGE_SIZE = 4096
DEFAULT_MAX_PAGES = 32

#: Seconds that the end of a session waits for the daemon to take DESTROY.
DESTROY_PATIENCE = 2.0

_DOTS = (b".", b"..")
_WANTS_ENTRY = fuse.ENTRY_OUT.size
_WANTS_OPENED = fuse.ENTRY_OUT.size + fuse.OPEN_OUT.size


class Identity(Protocol):
    """Whose request it is; a ``pyfuse3.RequestContext`` is one."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...


class Caller(NamedTuple):
    """The identity in a request's header. The daemon trusts it; see Session on permissions."""

    uid: int
    gid: int
    pid: int = 0


class InitFacts(NamedTuple):
    """What INIT settled.

    Attributes:
        minor: Minor version in force, the smaller of both.
        flags: What was offered and accepted.
        max_readahead: Bytes.
        max_write: Largest WRITE, bytes.
        max_read: Largest READ, bytes; follows from max_pages.
        time_gran: Granularity of the daemon's times, nanoseconds.
        map_alignment: log2 of the DAX alignment in bytes; 0 without DAX.
    """

    minor: int
    flags: InitFlag
    max_readahead: int
    max_write: int
    max_read: int
    time_gran: int
    map_alignment: int


@asynccontextmanager
async def connect(
    path: str | os.PathLike[str] | None = None,
    *,
    sock: socket_module.socket | None = None,
    options: ChannelOptions | None = None,
    extra_flags: InitFlag = _NO_FLAGS,
    dax: int = 0,
) -> AsyncIterator[Session]:
    """Connect to a daemon, start a session, and end it with DESTROY.

    Args:
        path: The daemon's vhost-user socket.
        sock: A connected stream socket instead of ``path``; closed with the session.
        options: Queue size, time limits, polling.
        extra_flags: INIT flags to offer beyond GUEST_FLAGS (for example WRITEBACK_CACHE).
        dax: Bytes of the DAX window to use at most, if the daemon has one; 0 for none.

    Raises:
        ConnectError: Nobody there.
        HandshakeError: The peer does not speak vhost-user or FUSE as we can.
        Exception: What the body raises, as it is: never in an exception group.
    """
    window = Window(dax) if dax else None
    async with (
        open_channel(path, options or ChannelOptions(), sock=sock, window=window) as channel,
        open_helpers() as nursery,
    ):
        session = Session(channel, nursery)
        await session._start(GUEST_FLAGS | extra_flags, window)
        try:
            yield session
        finally:
            with trio.CancelScope(deadline=trio.current_time() + DESTROY_PATIENCE, shield=True):
                await session._destroy()


class Session:
    """One FUSE session; made by ``connect``.

    The daemon checks no permissions (it runs most requests as itself): whoever lets others use a
    session must check first. ``caller`` defaults to this process's own identity.

    Attributes:
        channel: The virtqueues under the session, with their statistics.
        facts: What INIT settled.
        window: The DAX window; None without one.
        dax: What it is used for; reads and writes go through it where they can.
    """

    def __init__(self, channel: Channel, nursery: trio.Nursery) -> None:
        self.channel = channel
        self.facts = InitFacts(0, InitFlag(0), 0, 0, 0, 1, 0)
        self.window: Window | None = None
        self.dax: Dax | None = None
        self._nursery = nursery
        self._self = Caller(os.geteuid(), os.getegid(), os.getpid())
        self._offered = InitFlag(0)
        self._security = b""
        self._supp_group = False
        self._setxattr_ext = False

    def cached(
        self, policy: CachePolicy, *, names: int = 100_000, cache_size: int = 64 << 20
    ) -> CachedSession:
        """Return a view of files by path that keeps what ``policy`` lets it believe.

        Args:
            policy: ``CachePolicy.for_mode("auto")``, say.
            names: Most names and attributes that it remembers, and so of nodes that the daemon
                holds for it; 400 bytes each.
            cache_size: Bytes of contents that it keeps.
        """
        from vfsmount.client.cached import CachedSession

        return CachedSession(self, policy, names=names, cache_size=cache_size)

    # --- start and end ---------------------------------------------------------------------------

    async def _start(self, offered: InitFlag, window: Window | None) -> None:
        if window is not None and window.size:
            offered |= _DAX_FLAGS
        flags, flags2 = fuse.split_flags(offered)
        body = fuse.INIT_IN.values(
            fuse.KERNEL_VERSION, fuse.KERNEL_MINOR_VERSION, 1 << 20, flags, flags2
        )
        try:
            reply = await self.channel.request(Opcode.INIT, 0, body, reply_size=fuse.INIT_OUT.size)
        except RemoteErrno as error:
            raise HandshakeError(
                f"the daemon refused INIT of FUSE 7.{fuse.KERNEL_MINOR_VERSION}: "
                f"{os.strerror(error.errno)}"
            ) from error
        self._offered = offered
        self.facts = decode_init(reply, offered)
        accepted = self.facts.flags
        self.window = None
        if window is not None and InitFlag.MAP_ALIGNMENT in accepted:
            self.window = window if window.align(self.facts.map_alignment) else None
        self.dax = None
        if self.window is not None:
            per_inode = InitFlag.HAS_INODE_DAX in accepted
            self.dax = Dax(self, self.window, self._nursery.start_soon, per_inode=per_inode)
        if InitFlag.SECURITY_CTX in accepted:
            # Each creating request must carry a context then; none is a set of none.
            self._security = fuse.encode_extensions(fuse.Extensions(security=()))
        self._supp_group = InitFlag.CREATE_SUPP_GROUP in accepted
        self._setxattr_ext = InitFlag.SETXATTR_EXT in accepted

    async def begin_again(self, without: InitFlag) -> None:
        """INIT once more, offering less. Nothing may have been looked up or opened.

        Raises:
            HandshakeError: The daemon does not want that.
        """
        await self._start(self._offered & ~without, self.window)

    async def _destroy(self) -> None:
        # It is over either way.
        with suppress(RemoteErrno, ChannelBroken, ChannelClosed, RequestTimeout):
            await self.channel.request(Opcode.DESTROY, 0, b"", reply_size=0)

    # --- names -----------------------------------------------------------------------------------

    async def lookup(
        self, parent: int, name: bytes, caller: Identity | None = None
    ) -> fuse.EntryOut:
        """LOOKUP: find ``name`` in ``parent``. A nodeid of 0 is a cacheable "no such name"."""
        reply = await self._send(
            Opcode.LOOKUP, parent, _names(name), _WANTS_ENTRY, caller, self._undo_entry
        )
        entry = self._unpack(Opcode.LOOKUP, fuse.ENTRY_OUT, reply)
        return self._checked(entry, dots=name in _DOTS) if entry.nodeid else entry

    def forget(self, nodeid: int, nlookup: int = 1) -> None:
        """FORGET: give back ``nlookup`` references. Never blocks, never fails, is batched."""
        if self.dax is not None:
            self.dax.forget(nodeid)
        self.channel.forget(nodeid, nlookup)

    async def mknod(
        self,
        parent: int,
        name: bytes,
        mode: int,
        rdev: int = 0,
        umask: int = 0,
        caller: Identity | None = None,
        group: int | None = None,
    ) -> fuse.EntryOut:
        """MKNOD: make a node of any type. ``rdev`` in the kernel's 32-bit encoding."""
        body = fuse.MKNOD_IN.values(mode, rdev, umask) + _names(name)
        return await self._make(Opcode.MKNOD, parent, body, caller, self._extensions(group))

    async def mkdir(
        self,
        parent: int,
        name: bytes,
        mode: int,
        umask: int = 0,
        caller: Identity | None = None,
        group: int | None = None,
    ) -> fuse.EntryOut:
        """MKDIR: make a directory. ``mode`` must be masked already unless DONT_MASK is accepted."""
        body = fuse.MKDIR_IN.values(mode, umask) + _names(name)
        return await self._make(Opcode.MKDIR, parent, body, caller, self._extensions(group))

    async def symlink(
        self,
        parent: int,
        name: bytes,
        target: bytes,
        caller: Identity | None = None,
        group: int | None = None,
    ) -> fuse.EntryOut:
        """SYMLINK: make ``name`` a link to ``target``."""
        return await self._make(
            Opcode.SYMLINK, parent, _names(name, target), caller, self._extensions(group)
        )

    async def link(
        self, nodeid: int, new_parent: int, new_name: bytes, caller: Identity | None = None
    ) -> fuse.EntryOut:
        """LINK: give ``nodeid`` one more name. The reply is one more reference to it."""
        body = fuse.LINK_IN.values(nodeid) + _names(new_name)
        return await self._make(Opcode.LINK, new_parent, body, caller, b"")

    async def unlink(self, parent: int, name: bytes, caller: Identity | None = None) -> None:
        """UNLINK: remove a name that is no directory."""
        await self._send(Opcode.UNLINK, parent, _names(name), 0, caller)

    async def rmdir(self, parent: int, name: bytes, caller: Identity | None = None) -> None:
        """RMDIR: remove an empty directory."""
        await self._send(Opcode.RMDIR, parent, _names(name), 0, caller)

    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int = 0,
        caller: Identity | None = None,
    ) -> None:
        """RENAME, or RENAME2 when ``flags`` (RenameFlag) are given, as the kernel chooses."""
        names = _names(name, new_name)
        if flags:
            body = fuse.RENAME2_IN.values(new_parent, flags) + names
            await self._send(Opcode.RENAME2, parent, body, 0, caller)
        else:
            body = fuse.RENAME_IN.values(new_parent) + names
            await self._send(Opcode.RENAME, parent, body, 0, caller)

    async def readlink(self, nodeid: int, caller: Identity | None = None) -> bytes:
        """READLINK: the target, 1 to 4095 bytes."""
        return await self._send(Opcode.READLINK, nodeid, b"", fuse.PATH_MAX, caller)

    # --- attributes ------------------------------------------------------------------------------

    async def getattr(
        self, nodeid: int, fh: int | None = None, caller: Identity | None = None
    ) -> fuse.AttrOut:
        """GETATTR: of the node, through ``fh`` where given."""
        body = _NO_FH if fh is None else fuse.GETATTR_IN.values(fuse.GetattrFlag.FH, fh)
        reply = await self._send(Opcode.GETATTR, nodeid, body, fuse.ATTR_OUT.size, caller)
        return self._attributes(Opcode.GETATTR, reply)

    async def setattr(
        self, nodeid: int, changes: fuse.SetattrIn, caller: Identity | None = None
    ) -> fuse.AttrOut:
        """SETATTR: change what ``changes.valid`` names; see ``setattr_in`` for building it."""
        body = fuse.SETATTR_IN.pack(changes)
        reply = await self._send(Opcode.SETATTR, nodeid, body, fuse.ATTR_OUT.size, caller)
        return self._attributes(Opcode.SETATTR, reply)

    async def statx(
        self,
        nodeid: int,
        fh: int | None = None,
        flags: int = 0,
        mask: int = 0xFFF,
        caller: Identity | None = None,
    ) -> fuse.StatxOut:
        """STATX (7.39): ``flags`` and ``mask`` as in statx(2)."""
        has_fh = 0 if fh is None else fuse.GetattrFlag.FH
        body = fuse.STATX_IN.values(has_fh, fh or 0, flags, mask)
        return await self._ask(Opcode.STATX, fuse.STATX_OUT, nodeid, body, caller)

    async def access(self, nodeid: int, mask: int, caller: Identity | None = None) -> None:
        """ACCESS: may ``caller`` do ``mask`` (R_OK, W_OK, X_OK)? Real daemons say yes or ENOSYS."""
        await self._send(Opcode.ACCESS, nodeid, fuse.ACCESS_IN.values(mask), 0, caller)

    async def statfs(
        self, nodeid: int = fuse.ROOT_ID, caller: Identity | None = None
    ) -> fuse.Kstatfs:
        """STATFS: of the file system that holds ``nodeid``."""
        return await self._ask(Opcode.STATFS, fuse.KSTATFS, nodeid, b"", caller)

    async def setxattr(
        self,
        nodeid: int,
        name: bytes,
        value: bytes,
        flags: int = 0,
        setxattr_flags: int = 0,
        caller: Identity | None = None,
    ) -> None:
        """SETXATTR: ``flags`` as in setxattr(2), ``setxattr_flags`` SetxattrFlag."""
        if self._setxattr_ext:
            body = fuse.SETXATTR_IN.values(len(value), flags, setxattr_flags)
        else:
            body = fuse.SETXATTR_IN_COMPAT.values(len(value), flags)
        await self._send(Opcode.SETXATTR, nodeid, body + _names(name) + value, 0, caller)

    async def getxattr(
        self,
        nodeid: int,
        name: bytes,
        size: int = fuse.XATTR_SIZE_MAX,
        caller: Identity | None = None,
    ) -> bytes:
        """GETXATTR: the value; ERANGE when it is longer than ``size`` (1 or more) bytes."""
        body = fuse.GETXATTR_IN.values(_nonzero(size)) + _names(name)
        return await self._send(Opcode.GETXATTR, nodeid, body, size, caller)

    async def getxattr_size(self, nodeid: int, name: bytes, caller: Identity | None = None) -> int:
        """GETXATTR with size 0: bytes that the value takes."""
        body = fuse.GETXATTR_IN.values(0) + _names(name)
        reply = await self._ask(Opcode.GETXATTR, fuse.GETXATTR_OUT, nodeid, body, caller)
        return reply.size

    async def listxattr(
        self, nodeid: int, size: int = fuse.XATTR_SIZE_MAX, caller: Identity | None = None
    ) -> list[bytes]:
        """LISTXATTR: the names; ERANGE when the list is longer than ``size`` bytes."""
        body = fuse.GETXATTR_IN.values(_nonzero(size))
        listing = await self._send(Opcode.LISTXATTR, nodeid, body, size, caller)
        if listing and not listing.endswith(b"\0"):
            raise self._violation("LISTXATTR reply whose last name has no NUL")
        return listing.split(b"\0")[:-1]

    async def listxattr_size(self, nodeid: int, caller: Identity | None = None) -> int:
        """LISTXATTR with size 0: bytes that the list takes."""
        body = fuse.GETXATTR_IN.values(0)
        reply = await self._ask(Opcode.LISTXATTR, fuse.GETXATTR_OUT, nodeid, body, caller)
        return reply.size

    async def removexattr(self, nodeid: int, name: bytes, caller: Identity | None = None) -> None:
        """REMOVEXATTR: ENODATA when it is not there."""
        await self._send(Opcode.REMOVEXATTR, nodeid, _names(name), 0, caller)

    # --- files -----------------------------------------------------------------------------------

    async def open(
        self, nodeid: int, flags: int, open_flags: int = 0, caller: Identity | None = None
    ) -> fuse.OpenOut:
        """OPEN: ``flags`` as in open(2), which O_CREAT, O_EXCL and O_NOCTTY never reach."""
        body = fuse.OPEN_IN.values(flags, open_flags)
        undo = partial(self._undo_open, Opcode.RELEASE, nodeid)
        opened = await self._ask(Opcode.OPEN, fuse.OPEN_OUT, nodeid, body, caller, undo)
        if self.dax is not None:
            self.dax.opened(nodeid, opened.fh, flags)
        return opened

    async def create(
        self,
        parent: int,
        name: bytes,
        flags: int,
        mode: int,
        umask: int = 0,
        open_flags: int = 0,
        caller: Identity | None = None,
        group: int | None = None,
    ) -> tuple[fuse.EntryOut, fuse.OpenOut]:
        """CREATE: make or open a regular file. One reference and one handle."""
        args = fuse.CREATE_IN.values(flags, mode, umask, open_flags)
        return await self._create(
            Opcode.CREATE, parent, flags, args + _names(name), caller, self._extensions(group)
        )

    async def tmpfile(
        self,
        parent: int,
        flags: int,
        mode: int,
        umask: int = 0,
        caller: Identity | None = None,
        group: int | None = None,
    ) -> tuple[fuse.EntryOut, fuse.OpenOut]:
        """TMPFILE (7.37): a file without a name. Linux sends "/" where the name would be."""
        args = fuse.CREATE_IN.values(flags, mode, umask, 0)
        return await self._create(
            Opcode.TMPFILE, parent, flags, args + _names(b"/"), caller, self._extensions(group)
        )

    async def read(
        self, nodeid: int, fh: int, offset: int, size: int, caller: Identity | None = None
    ) -> bytes:
        """READ: up to ``size`` bytes (at most ``facts.max_read``); fewer only at the end."""
        if self.dax is not None:
            data = self.dax.read(nodeid, fh, offset, size)
            await self.dax.give_way()
            if data is not None:
                return data
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        return await self._send(Opcode.READ, nodeid, body, size, caller)

    async def read_view(
        self, nodeid: int, fh: int, offset: int, size: int, caller: Identity | None = None
    ) -> memoryview:
        """As ``read``, without a copy.

        The view points into shared memory, which the daemon can still write, and is valid only
        until anybody next calls into this session.
        """
        if self.dax is not None:
            data = self.dax.read(nodeid, fh, offset, size)
            await self.dax.give_way()
            if data is not None:
                return memoryview(data)
        who = caller or self._self
        return await self.channel.request_view(
            Opcode.READ,
            nodeid,
            fuse.READ_IN.values(fh, offset, size, 0, 0, 0),
            reply_size=size,
            uid=who.uid,
            gid=who.gid,
            pid=who.pid,
        )

    async def read_mapped(
        self, nodeid: int, fh: int, offset: int, size: int, caller: Identity | None = None
    ) -> memoryview:
        """As ``read_view``, and of what is mapped by DAX a view of the file itself: no copy at all.

        Such a view stays good, and shows the file as it is whenever it is looked at; where it has
        been truncated since, and once the mapping is gone, zeros. ``dax.map`` maps what is to be
        read so; a part that is not mapped, or lies in two ranges, is read by message.
        """
        if self.dax is not None:
            view = self.dax.view(nodeid, fh, offset, size)
            if view is not None:
                await self.dax.give_way()
                return view
        return await self.read_view(nodeid, fh, offset, size, caller)

    async def write(
        self,
        nodeid: int,
        fh: int,
        offset: int,
        data: Buffer,
        write_flags: int = 0,
        flags: int = 0,
        caller: Identity | None = None,
    ) -> int:
        """WRITE: at most ``facts.max_write`` bytes; returns how many were taken.

        ``flags`` are those that the file was opened with: virtiofsd (Rust) appends only when
        O_APPEND is among them here, whatever it was at OPEN.
        """
        if self.dax is not None:
            done = self.dax.write(nodeid, fh, offset, data)
            await self.dax.give_way()
            if done is not None:
                return done
        size = memoryview(data).nbytes
        body = fuse.WRITE_IN.values(fh, offset, size, write_flags, 0, flags)
        who = caller or self._self
        reply = await self.channel.request(
            Opcode.WRITE,
            nodeid,
            body,
            payload=data,
            reply_size=fuse.WRITE_OUT.size,
            uid=who.uid,
            gid=who.gid,
            pid=who.pid,
        )
        written = self._unpack(Opcode.WRITE, fuse.WRITE_OUT, reply).size
        if written > size:
            raise self._violation(f"WRITE of {size} bytes answered with {written}")
        return written

    async def flush(
        self, nodeid: int, fh: int, lock_owner: int = 0, caller: Identity | None = None
    ) -> None:
        """FLUSH: each close(2) of a handle."""
        await self._send(Opcode.FLUSH, nodeid, fuse.FLUSH_IN.values(fh, lock_owner), 0, caller)

    async def fsync(
        self, nodeid: int, fh: int, datasync: bool = False, caller: Identity | None = None
    ) -> None:
        """FSYNC: everything written through any handle is durable at the host."""
        body = fuse.FSYNC_IN.values(fh, fuse.FsyncFlag.FDATASYNC if datasync else 0)
        await self._send(Opcode.FSYNC, nodeid, body, 0, caller)

    async def release(
        self,
        nodeid: int,
        fh: int,
        flags: int = 0,
        release_flags: int = 0,
        lock_owner: int = 0,
        caller: Identity | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """RELEASE: the last close of a handle; ``flags`` as it was opened.

        Without ``wait`` it goes with the next request, or within 10 ms, and its reply is ignored.
        """
        if self.dax is not None:
            self.dax.released(fh)
        body = fuse.RELEASE_IN.values(fh, flags, release_flags, lock_owner)
        await self._release(Opcode.RELEASE, nodeid, body, caller, wait)

    async def fallocate(
        self,
        nodeid: int,
        fh: int,
        mode: int,
        offset: int,
        length: int,
        caller: Identity | None = None,
    ) -> None:
        """FALLOCATE: as fallocate(2)."""
        body = fuse.FALLOCATE_IN.values(fh, offset, length, mode)
        await self._send(Opcode.FALLOCATE, nodeid, body, 0, caller)

    async def lseek(
        self, nodeid: int, fh: int, offset: int, whence: int, caller: Identity | None = None
    ) -> int:
        """LSEEK: for SEEK_DATA and SEEK_HOLE; ENXIO at the end."""
        body = fuse.LSEEK_IN.values(fh, offset, whence)
        return (await self._ask(Opcode.LSEEK, fuse.LSEEK_OUT, nodeid, body, caller)).offset

    async def copy_file_range(
        self,
        nodeid: int,
        copy: fuse.CopyFileRangeIn,
        caller: Identity | None = None,
    ) -> int:
        """COPY_FILE_RANGE: copies at the host; returns the bytes copied (32 bits of them)."""
        body = fuse.COPY_FILE_RANGE_IN.pack(copy)
        reply = await self._ask(Opcode.COPY_FILE_RANGE, fuse.WRITE_OUT, nodeid, body, caller)
        return reply.size

    async def copy_file_range_64(
        self,
        nodeid: int,
        copy: fuse.CopyFileRangeIn,
        caller: Identity | None = None,
    ) -> int:
        """COPY_FILE_RANGE_64 (7.45): as copy_file_range with a 64-bit count."""
        opcode, codec = Opcode.COPY_FILE_RANGE_64, fuse.COPY_FILE_RANGE_OUT
        body = fuse.COPY_FILE_RANGE_IN.pack(copy)
        return (await self._ask(opcode, codec, nodeid, body, caller)).bytes_copied

    async def getlk(
        self, nodeid: int, lock: fuse.LkIn, caller: Identity | None = None
    ) -> fuse.LkOut:
        """GETLK: the lock that stands in the way of ``lock``, or type UNLOCK."""
        body = fuse.LK_IN.pack(lock)
        return await self._ask(Opcode.GETLK, fuse.LK_OUT, nodeid, body, caller)

    async def setlk(
        self, nodeid: int, lock: fuse.LkIn, wait: bool = False, caller: Identity | None = None
    ) -> None:
        """SETLK, or SETLKW when it may ``wait``.

        A lock that is granted after this was cancelled is given up again.
        """
        opcode = Opcode.SETLKW if wait else Opcode.SETLK
        undo = partial(self._undo_lock, nodeid, lock)
        body = fuse.LK_IN.pack(lock)
        await self._send(opcode, nodeid, body, 0, caller, undo)

    async def ioctl(
        self,
        nodeid: int,
        fh: int,
        cmd: int,
        data: bytes = b"",
        out_size: int = 0,
        arg: int = 0,
        flags: int = 0,
        caller: Identity | None = None,
    ) -> tuple[fuse.IoctlOut, bytes]:
        """IOCTL: ``cmd`` with ``data`` in and up to ``out_size`` bytes back."""
        body = fuse.IOCTL_IN.values(fh, flags, cmd, arg, len(data), out_size) + data
        size = fuse.IOCTL_OUT.size
        reply = await self._send(Opcode.IOCTL, nodeid, body, size + out_size, caller)
        return self._unpack(Opcode.IOCTL, fuse.IOCTL_OUT, reply[:size]), reply[size:]

    async def poll(
        self, nodeid: int, fh: int, events: int, kh: int = 0, caller: Identity | None = None
    ) -> int:
        """POLL: which of ``events`` (poll(2)) are true now."""
        body = fuse.POLL_IN.values(fh, kh, 0, events)
        return (await self._ask(Opcode.POLL, fuse.POLL_OUT, nodeid, body, caller)).revents

    async def bmap(
        self, nodeid: int, block: int, blocksize: int, caller: Identity | None = None
    ) -> int:
        """BMAP: where ``block`` of the file lies on the device."""
        body = fuse.BMAP_IN.values(block, blocksize)
        return (await self._ask(Opcode.BMAP, fuse.BMAP_OUT, nodeid, body, caller)).block

    async def syncfs(self, nodeid: int = fuse.ROOT_ID, caller: Identity | None = None) -> None:
        """SYNCFS: as syncfs(2) at the host."""
        await self._send(Opcode.SYNCFS, nodeid, fuse.SYNCFS_IN.values(0), 0, caller)

    # --- directories -----------------------------------------------------------------------------

    async def opendir(
        self, nodeid: int, flags: int = os.O_DIRECTORY, caller: Identity | None = None
    ) -> fuse.OpenOut:
        """OPENDIR."""
        body = fuse.OPEN_IN.values(flags, 0)
        undo = partial(self._undo_open, Opcode.RELEASEDIR, nodeid)
        return await self._ask(Opcode.OPENDIR, fuse.OPEN_OUT, nodeid, body, caller, undo)

    async def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, caller: Identity | None = None
    ) -> list[fuse.DirEntry]:
        """READDIR: names after cookie ``offset`` that fit into ``size`` bytes; [] at the end."""
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        data = await self._send(Opcode.READDIR, nodeid, body, size, caller)
        return self._listed(Opcode.READDIR, fuse.iter_dirents(data))

    async def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, caller: Identity | None = None
    ) -> list[fuse.DirEntryPlus]:
        """READDIRPLUS: as readdir, each name with its entry: a reference, if it has a nodeid."""
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        data = await self._send(
            Opcode.READDIRPLUS, nodeid, body, size, caller, on_abandoned=self._undo_listing
        )
        entries = self._listed(Opcode.READDIRPLUS, fuse.iter_direntplus(data))
        for found in entries:
            if found.entry.nodeid:
                self._checked(found.entry, dots=found.name in _DOTS)
        return entries

    async def fsyncdir(
        self, nodeid: int, fh: int, datasync: bool = False, caller: Identity | None = None
    ) -> None:
        """FSYNCDIR."""
        body = fuse.FSYNC_IN.values(fh, fuse.FsyncFlag.FDATASYNC if datasync else 0)
        await self._send(Opcode.FSYNCDIR, nodeid, body, 0, caller)

    async def releasedir(
        self,
        nodeid: int,
        fh: int,
        flags: int = 0,
        caller: Identity | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """RELEASEDIR; ``wait`` as in ``release``."""
        body = fuse.RELEASE_IN.values(fh, flags, 0, 0)
        await self._release(Opcode.RELEASEDIR, nodeid, body, caller, wait)

    async def _release(
        self, opcode: int, nodeid: int, body: bytes, caller: Identity | None, wait: bool
    ) -> None:
        who = caller or self._self
        posted = not wait and self.channel.post(
            opcode, nodeid, body, uid=who.uid, gid=who.gid, pid=who.pid
        )
        if not posted:
            await self._send(opcode, nodeid, body, 0, caller)

    # --- DAX -------------------------------------------------------------------------------------

    async def setupmapping(
        self,
        nodeid: int,
        foffset: int,
        length: int,
        flags: int,
        moffset: int,
        fh: int = 0xFFFFFFFFFFFFFFFF,
    ) -> None:
        """SETUPMAPPING: map ``length`` bytes of the file at ``moffset`` of the window."""
        body = fuse.SETUPMAPPING_IN.values(fh, foffset, length, flags, moffset)
        await self._send(Opcode.SETUPMAPPING, nodeid, body, 0, None)

    async def removemapping(self, nodeid: int, ranges: Sequence[tuple[int, int]]) -> None:
        """REMOVEMAPPING: of (moffset, length) pairs."""
        body = fuse.REMOVEMAPPING_IN.values(len(ranges)) + b"".join(
            fuse.REMOVEMAPPING_ONE.values(*one) for one in ranges
        )
        await self._send(Opcode.REMOVEMAPPING, nodeid, body, 0, None)

    # --- anything --------------------------------------------------------------------------------

    async def raw(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        reply_size: int,
        caller: Identity | None = None,
        extensions: bytes = b"",
    ) -> bytes:
        """Send any request and return the body of the reply, unchecked.

        For those who write daemons. ``reply_size`` is the room for the reply's body in bytes.
        What the daemon hands out (references, handles) is the caller's to give back.
        """
        who = caller or self._self
        return await self.channel.request(
            opcode,
            nodeid,
            body + extensions,
            reply_size=reply_size,
            uid=who.uid,
            gid=who.gid,
            pid=who.pid,
            extlen=len(extensions) // 8,
        )

    # --- how requests are sent -------------------------------------------------------------------

    def _send(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        reply_size: int,
        caller: Identity | None,
        on_abandoned: Callable[[bytes], None] | None = None,
        extlen: int = 0,
    ) -> Coroutine[Any, Any, bytes]:
        # Not async itself: each coroutine between an application and the ring costs 1 to 2 us.
        # A reply_size of 0 is room for success or an error: the channel lets no body through.
        who = caller or self._self
        return self.channel.request(
            opcode,
            nodeid,
            body,
            reply_size=reply_size,
            uid=who.uid,
            gid=who.gid,
            pid=who.pid,
            extlen=extlen,
            on_abandoned=on_abandoned,
        )

    async def _ask(
        self,
        opcode: int,
        codec: Codec[R],
        nodeid: int,
        body: bytes,
        caller: Identity | None,
        on_abandoned: Callable[[bytes], None] | None = None,
    ) -> R:
        """Send what is answered with one struct."""
        reply = await self._send(opcode, nodeid, body, codec.size, caller, on_abandoned)
        return self._unpack(opcode, codec, reply)

    async def _make(
        self,
        opcode: int,
        parent: int,
        body: bytes,
        caller: Identity | None,
        extensions: bytes,
    ) -> fuse.EntryOut:
        reply = await self._send(
            opcode,
            parent,
            body + extensions,
            _WANTS_ENTRY,
            caller,
            self._undo_entry,
            len(extensions) // 8,
        )
        return self._checked(self._unpack(opcode, fuse.ENTRY_OUT, reply))

    async def _create(
        self,
        opcode: int,
        parent: int,
        flags: int,
        body: bytes,
        caller: Identity | None,
        extensions: bytes,
    ) -> tuple[fuse.EntryOut, fuse.OpenOut]:
        reply = await self._send(
            opcode,
            parent,
            body + extensions,
            _WANTS_OPENED,
            caller,
            self._undo_create,
            len(extensions) // 8,
        )
        if len(reply) != _WANTS_OPENED:
            raise self._violation(f"reply to {fuse.opcode_name(opcode)} of {len(reply)} bytes")
        entry = self._checked(fuse.ENTRY_OUT.unpack(reply))
        opened = fuse.OPEN_OUT.unpack(reply, fuse.ENTRY_OUT.size)
        if self.dax is not None:
            self.dax.opened(entry.nodeid, opened.fh, flags)
        return entry, opened

    def _extensions(self, group: int | None) -> bytes:
        if group is None or not self._supp_group:
            return self._security
        return self._security + fuse.encode_extensions(fuse.Extensions(groups=(group,)))

    # --- checks: each reply is read once and believed only after them ----------------------------

    def _unpack(self, opcode: int, codec: Codec[R], reply: bytes) -> R:
        if len(reply) != codec.size:
            name = fuse.opcode_name(opcode)
            raise self._violation(f"reply to {name} of {len(reply)} bytes, {codec.size} expected")
        return codec.unpack(reply)

    def _attributes(self, opcode: int, reply: bytes) -> fuse.AttrOut:
        out = self._unpack(opcode, fuse.ATTR_OUT, reply)
        if not _sane(out.attr):
            raise self._violation(f"impossible attributes: {out.attr}")
        return out

    def _listed(self, opcode: int, entries: Iterator[T]) -> list[T]:
        try:
            return list(entries)
        except WireError as error:
            raise self._violation(f"reply to {fuse.opcode_name(opcode)}: {error}") from error

    def _checked(self, entry: fuse.EntryOut, *, dots: bool = False) -> fuse.EntryOut:
        """As the kernel's ``invalid_nodeid`` and ``fuse_invalid_attr``; "." may be the root."""
        if entry.nodeid == 0 or (entry.nodeid == fuse.ROOT_ID and not dots):
            raise self._violation(f"entry with nodeid {entry.nodeid}")
        if not _sane(entry.attr):
            raise self._violation(f"impossible attributes of node {entry.nodeid}: {entry.attr}")
        if self.dax is not None:
            self.dax.found(entry.nodeid, entry.attr.flags)
        return entry

    def _violation(self, what: str) -> ProtocolViolation:
        violation = ProtocolViolation(f"the daemon broke the FUSE protocol: {what}")
        self.channel.fail(violation)
        return violation

    # --- undoing replies that nobody waits for ---------------------------------------------------

    def _undo_entry(self, reply: bytes) -> None:
        if len(reply) >= _WANTS_ENTRY:
            entry = fuse.ENTRY_OUT.unpack(reply)
            if entry.nodeid:
                self.forget(entry.nodeid)

    def _undo_create(self, reply: bytes) -> None:
        if len(reply) == _WANTS_OPENED:
            entry = fuse.ENTRY_OUT.unpack(reply)
            self._undo_open(Opcode.RELEASE, entry.nodeid, reply[_WANTS_ENTRY:])
            self._undo_entry(reply)

    def _undo_listing(self, reply: bytes) -> None:
        try:
            for found in fuse.iter_direntplus(reply):
                if found.entry.nodeid:
                    self.forget(found.entry.nodeid)
        except WireError:
            pass  # nobody reads this listing; the next one that is bad for a reader tells

    def _undo_open(self, release: Opcode, nodeid: int, reply: bytes) -> None:
        if len(reply) == fuse.OPEN_OUT.size:
            body = fuse.RELEASE_IN.values(fuse.OPEN_OUT.unpack(reply).fh, 0, 0, 0)
            self._nursery.start_soon(self._release_quietly, release, nodeid, body)

    def _undo_lock(self, nodeid: int, lock: fuse.LkIn, _reply: bytes) -> None:
        unlock = fuse.LK_IN.pack(lock._replace(type=fuse.LockType.UNLOCK))
        self._nursery.start_soon(self._unlock_quietly, nodeid, unlock)

    async def _unlock_quietly(self, nodeid: int, body: bytes) -> None:
        with suppress(RemoteErrno, ChannelBroken, ChannelClosed, RequestTimeout):
            await self._send(Opcode.SETLK, nodeid, body, 0, None)

    async def _release_quietly(self, release: Opcode, nodeid: int, body: bytes) -> None:
        # close(2) has nobody to tell either.
        with suppress(RemoteErrno, ChannelBroken, ChannelClosed, RequestTimeout):
            await self._release(release, nodeid, body, None, wait=False)


def decode_init(reply: bytes, offered: InitFlag) -> InitFacts:
    """Check the reply to INIT and say what is in force.

    Raises:
        HandshakeError: It is too short, of another major version or a minor below 7.27, or its
            limits are impossible.
    """
    try:
        out = fuse.INIT_OUT.unpack(reply)
    except WireError as error:
        raise HandshakeError(f"the daemon's INIT reply is too short: {error}") from error
    if out.major != fuse.KERNEL_VERSION:
        raise HandshakeError(f"the daemon speaks FUSE {out.major}.{out.minor}, we need 7.x")
    if out.minor < OLDEST_MINOR:
        raise HandshakeError(
            f"the daemon speaks FUSE 7.{out.minor}, too old for us",
            f"use one that speaks 7.{OLDEST_MINOR} or newer",
        )
    # Bits that were not offered mean nothing; virtiofsd (C) sets some of the second word.
    flags = fuse.join_flags(out.flags, out.flags2) & offered
    if out.max_write < PAGE_SIZE:
        raise HandshakeError(f"the daemon's INIT reply has max_write {out.max_write}, below 4096")
    max_pages = out.max_pages if InitFlag.MAX_PAGES in flags else DEFAULT_MAX_PAGES
    max_read = max(max_pages, 1) * PAGE_SIZE
    return InitFacts(
        minor=min(out.minor, fuse.KERNEL_MINOR_VERSION),
        flags=flags,
        max_readahead=out.max_readahead,
        max_write=min(out.max_write, max_read),
        max_read=max_read,
        time_gran=out.time_gran or 1,
        map_alignment=out.map_alignment if InitFlag.MAP_ALIGNMENT in flags else 0,
    )


def setattr_in(
    *,
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    size: int | None = None,
    atime_ns: int | None = None,
    mtime_ns: int | None = None,
    ctime_ns: int | None = None,
    atime_now: bool = False,
    mtime_now: bool = False,
    fh: int | None = None,
    kill_suidgid: bool = False,
) -> fuse.SetattrIn:
    """Build the argument of ``Session.setattr`` from what is to change; times in nanoseconds."""
    given: dict[SetattrValid, Any] = {
        SetattrValid.MODE: mode,
        SetattrValid.UID: uid,
        SetattrValid.GID: gid,
        SetattrValid.SIZE: size,
        SetattrValid.FH: fh,
        SetattrValid.ATIME: 0 if atime_now else atime_ns,
        SetattrValid.MTIME: 0 if mtime_now else mtime_ns,
        SetattrValid.CTIME: ctime_ns,
        SetattrValid.ATIME_NOW: atime_now or None,
        SetattrValid.MTIME_NOW: mtime_now or None,
        SetattrValid.KILL_SUIDGID: kill_suidgid or None,
    }
    valid = sum(bit for bit, value in given.items() if value is not None)
    (atime, atimensec), (mtime, mtimensec), (ctime, ctimensec) = (
        divmod(ns or 0, 1_000_000_000) for ns in (atime_ns, mtime_ns, ctime_ns)
    )
    return fuse.SetattrIn(
        valid=valid,
        fh=fh or 0,
        size=size or 0,
        lock_owner=0,
        atime=atime,
        mtime=mtime,
        ctime=ctime,
        atimensec=atimensec,
        mtimensec=mtimensec,
        ctimensec=ctimensec,
        mode=mode or 0,
        uid=uid or 0,
        gid=gid or 0,
    )


_NO_FH = fuse.GETATTR_IN.values(0, 0)
_TYPES = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
)


def _sane(attr: fuse.Attr) -> bool:
    """As the kernel's ``fuse_invalid_attr``: a known file type, and a size that is an off_t."""
    return attr.mode & 0o170000 in _TYPES and attr.size >> 63 == 0


def _names(*names: bytes) -> bytes:
    """Return the names as FUSE carries them, each with its NUL."""
    for name in names:
        if b"\0" in name:
            raise ValueError(f"a name cannot hold NUL: {name!r}")
    return b"\0".join(names) + b"\0"


def _nonzero(size: int) -> int:
    if size < 1:
        raise ValueError("size 0 asks for the size: use the method that ends in _size")
    return size
