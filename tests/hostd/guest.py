"""A guest for tests: builds FUSE requests and takes replies apart, over any carrier of messages.

``DirectGuest`` calls the FUSE server with buffers of its own: no ring, no socket, no thread.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from tests.support.errors import error_name
from vfsmount.hostd.fs.dispatch import FuseServer
from vfsmount.hostd.fs.session import Session
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from vfsmount.hostd.fs.share import Share
    from vfsmount.wire.fuse import Attr, DirEntry, DirEntryPlus, EntryOut, InitOut, OpenOut

ROOT = 1

#: What the Linux guest kernel offers, near enough.
OFFER = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.WRITEBACK_CACHE
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.POSIX_ACL
    | InitFlag.MAX_PAGES
    | InitFlag.SUBMOUNTS
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.CREATE_SUPP_GROUP
    | InitFlag.SECURITY_CTX
    | InitFlag.DIRECT_IO_ALLOW_MMAP
)


class Guest:
    """Typed requests; the carrier is the subclass's ``exchange``.

    A failing request raises OSError with the errno of the reply.
    """

    uid = 0
    gid = 0

    def exchange(self, message: bytes, room: int) -> bytes:
        """Carry one request; returns what was written of ``room`` bytes."""
        raise NotImplementedError

    def call(
        self, opcode: int, nodeid: int, body: bytes = b"", *, room: int = 8192, ext: bytes = b""
    ) -> fuse.Reply:
        message = fuse.encode_request(
            opcode, 2, nodeid, body, uid=self.uid, gid=self.gid, pid=1, extensions=ext
        )
        reply = fuse.decode_reply(opcode, self.exchange(message, room))
        assert reply.header.unique == 2
        if reply.header.error:
            raise OSError(-reply.header.error, os.strerror(-reply.header.error))
        return reply

    def record(self, opcode: int, nodeid: int, body: bytes = b"", **options: Any) -> Any:
        return self.call(opcode, nodeid, body, **options).records[0]

    # --- session ---------------------------------------------------------------------------------

    def init(self, flags: InitFlag = OFFER, minor: int = 45) -> InitOut:
        first, second = fuse.split_flags(flags)
        body = fuse.INIT_IN.values(7, minor, 131072, first, second)
        reply: InitOut = self.record(Opcode.INIT, 0, body)
        return reply

    def destroy(self) -> None:
        self.call(Opcode.DESTROY, 0)

    # --- names -----------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> EntryOut:
        entry: EntryOut = self.record(Opcode.LOOKUP, parent, name + b"\0")
        return entry

    def walk(self, path: str) -> int:
        """Look up each part of a path; returns the last nodeid, with all lookups owed."""
        nodeid = ROOT
        for part in path.split("/"):
            nodeid = self.lookup(nodeid, part.encode()).nodeid
        return nodeid

    def forget(self, nodeid: int, nlookup: int = 1) -> None:
        message = fuse.encode_request(Opcode.FORGET, 4, nodeid, fuse.FORGET_IN.values(nlookup))
        assert self.exchange(message, 0) == b""

    def batch_forget(self, *forgets: tuple[int, int]) -> None:
        body = fuse.encode_batch_forget(forgets)
        assert self.exchange(fuse.encode_request(Opcode.BATCH_FORGET, 4, 0, body), 0) == b""

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755, ext: bytes = b"") -> EntryOut:
        body = fuse.MKDIR_IN.values(mode, 0o022) + name + b"\0"
        entry: EntryOut = self.record(Opcode.MKDIR, parent, body, ext=ext)
        return entry

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0) -> EntryOut:
        body = fuse.MKNOD_IN.values(mode, rdev, 0) + name + b"\0"
        entry: EntryOut = self.record(Opcode.MKNOD, parent, body)
        return entry

    def symlink(self, parent: int, name: bytes, target: bytes) -> EntryOut:
        entry: EntryOut = self.record(Opcode.SYMLINK, parent, name + b"\0" + target + b"\0")
        return entry

    def readlink(self, nodeid: int) -> bytes:
        return bytes(self.call(Opcode.READLINK, nodeid).data)

    def link(self, nodeid: int, parent: int, name: bytes) -> EntryOut:
        body = fuse.LINK_IN.values(nodeid) + name + b"\0"
        entry: EntryOut = self.record(Opcode.LINK, parent, body)
        return entry

    def unlink(self, parent: int, name: bytes) -> None:
        self.call(Opcode.UNLINK, parent, name + b"\0")

    def rmdir(self, parent: int, name: bytes) -> None:
        self.call(Opcode.RMDIR, parent, name + b"\0")

    def rename(self, parent: int, old: bytes, new_parent: int, new: bytes) -> None:
        body = fuse.RENAME_IN.values(new_parent) + old + b"\0" + new + b"\0"
        self.call(Opcode.RENAME, parent, body)

    def rename2(self, parent: int, old: bytes, new_parent: int, new: bytes, flags: int) -> None:
        body = fuse.RENAME2_IN.values(new_parent, flags) + old + b"\0" + new + b"\0"
        self.call(Opcode.RENAME2, parent, body)

    # --- nodes -----------------------------------------------------------------------------------

    def getattr(self, nodeid: int, fh: int | None = None) -> Attr:
        body = fuse.GETATTR_IN.values(0 if fh is None else 1, fh or 0)
        attr: Attr = self.record(Opcode.GETATTR, nodeid, body).attr
        return attr

    def setattr(self, nodeid: int, valid: int, **fields: int) -> Attr:
        args = fuse.SetattrIn(valid, *[0] * 12)._replace(**fields)
        attr: Attr = self.record(Opcode.SETATTR, nodeid, fuse.SETATTR_IN.pack(args)).attr
        return attr

    # --- files -----------------------------------------------------------------------------------

    def open(self, nodeid: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> int:
        reply: OpenOut = self.record(Opcode.OPEN, nodeid, fuse.OPEN_IN.values(flags, open_flags))
        return reply.fh

    def create(
        self,
        parent: int,
        name: bytes,
        flags: int = os.O_RDWR,
        mode: int = 0o644,
        ext: bytes = b"",
    ) -> tuple[EntryOut, int]:
        body = fuse.CREATE_IN.values(flags | os.O_CREAT, mode, 0, 0) + name + b"\0"
        entry, opened = self.call(Opcode.CREATE, parent, body, ext=ext).records
        return entry, opened.fh

    def read(self, fh: int, offset: int, size: int, *, room: int | None = None) -> bytes:
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        reply = self.call(Opcode.READ, 0, body, room=16 + size if room is None else room)
        return bytes(reply.data)

    def write(self, fh: int, offset: int, data: bytes, write_flags: int = 0) -> int:
        body = fuse.WRITE_IN.values(fh, offset, len(data), write_flags, 0, 0) + data
        size: int = self.record(Opcode.WRITE, 0, body).size
        return size

    def release(self, fh: int) -> None:
        self.call(Opcode.RELEASE, 0, fuse.RELEASE_IN.values(fh, 0, 0, 0))

    # --- directories -----------------------------------------------------------------------------

    def opendir(self, nodeid: int = ROOT) -> int:
        reply: OpenOut = self.record(Opcode.OPENDIR, nodeid, fuse.OPEN_IN.values(0, 0))
        return reply.fh

    def releasedir(self, fh: int) -> None:
        self.call(Opcode.RELEASEDIR, 0, fuse.RELEASE_IN.values(fh, 0, 0, 0))

    def readdir(self, fh: int, offset: int = 0, size: int = 4096) -> list[DirEntry]:
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        reply = self.call(Opcode.READDIR, 0, body, room=16 + size)
        return list(fuse.iter_dirents(bytes(reply.data)))

    def readdirplus(self, fh: int, offset: int = 0, size: int = 4096) -> list[DirEntryPlus]:
        body = fuse.READ_IN.values(fh, offset, size, 0, 0, 0)
        reply = self.call(Opcode.READDIRPLUS, 0, body, room=16 + size)
        return list(fuse.iter_direntplus(bytes(reply.data)))

    # --- extended attributes ---------------------------------------------------------------------

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        body = fuse.SETXATTR_IN.values(len(value), flags, 0) + name + b"\0" + value
        self.call(Opcode.SETXATTR, nodeid, body)

    def getxattr(self, nodeid: int, name: bytes, size: int = 65536) -> bytes:
        body = fuse.GETXATTR_IN.values(size) + name + b"\0"
        return bytes(self.call(Opcode.GETXATTR, nodeid, body, room=16 + max(size, 8)).data)

    def listxattr(self, nodeid: int, size: int = 65536) -> bytes:
        body = fuse.GETXATTR_IN.values(size)
        return bytes(self.call(Opcode.LISTXATTR, nodeid, body, room=16 + max(size, 8)).data)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        self.call(Opcode.REMOVEXATTR, nodeid, name + b"\0")


class DirectGuest(Guest):
    """A guest in the same thread as the server.

    Args:
        share: What it sees.
        pieces: Cut buffers into pieces of this many bytes, as a driver may; 0 leaves them whole.
    """

    def __init__(self, share: Share, *, pieces: int = 0) -> None:
        self.session = Session(share)
        self.server = FuseServer(self.session)
        self.pieces = pieces

    def exchange(self, message: bytes, room: int) -> bytes:
        reply = bytearray(room)
        used = self.server.serve(self._buffers(bytearray(message)), self._buffers(reply))
        assert 0 <= used <= room
        self.session.inodes.check_invariants()
        return bytes(reply[:used])

    def _buffers(self, data: bytearray) -> list[memoryview]:
        view = memoryview(data)
        if not self.pieces:
            return [view] if data else []
        return [view[at : at + self.pieces] for at in range(0, len(data), self.pieces)]

    def __enter__(self) -> DirectGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


class expect_errno:  # reads like pytest.raises
    """A block that must fail with one of these errors: ``with expect_errno("ENOENT"):``."""

    def __init__(self, *names: str) -> None:
        self.numbers = {getattr(errno, name): name for name in names}

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        wanted = " or ".join(self.numbers.values())
        assert error is not None, f"succeeded; expected {wanted}"
        if not isinstance(error, OSError):
            return False
        got = error_name(error)
        assert error.errno in self.numbers, f"{got}; expected {wanted}"
        return True
