"""From a chain's buffers to a handler, and from its result back into the buffers.

``FuseServer.serve`` is the whole of the FUSE server to the rings: buffers in, number of bytes
written out. Nothing that a request says makes it raise, except ``GuestFault`` where there is no
request at all or no room to answer it.

What a handler raises becomes an errno here and nowhere else:

    OSError                        its errno (EIO where the protocol has no room for it)
    WireError, struct.error        EINVAL: the message does not decode
    OverflowError, ValueError      EINVAL: a number or string that no system call takes
    MemoryError                    ENOMEM
    anything else                  EIO, and a traceback in the log: a bug of ours
"""

from __future__ import annotations

import errno
import logging
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.errors import WireError
from vfsmount.hostd.faults import GuestFault
from vfsmount.hostd.fs import (
    capability,
    files,
    ioctls,
    listing,
    locks,
    mappings,
    nodes,
    tree,
    xattrs,
)
from vfsmount.hostd.fs.call import HEADER_SIZE, REPLY_SIZE, Call, Deferred, window
from vfsmount.hostd.fs.translate import translated_fast, translated_plain
from vfsmount.wire.fuse import (
    INIT_OUT,
    OPERATIONS,
    Opcode,
    decode_request,
    opcode_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfsmount.hostd.fs.call import FastHandler, Handler
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = ["FuseServer"]

logger = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<IIQQ")
_header_of = _HEADER.unpack_from
_REPLY: Final = struct.Struct("<IiQ")
_reply, _reply_into = _REPLY.pack, _REPLY.pack_into
#: Makes a tuple of a class without its ``__new__`` in Python (0.3 us less).
_record = tuple.__new__

#: A request's first bytes are copied out of guest memory before anything looks at them; whatever is
#: longer and no WRITE is copied in full, up to the largest that makes sense.
_HEAD_LIMIT: Final = 4096
_MESSAGE_LIMIT: Final = (1 << 20) + _HEAD_LIMIT

#: Largest reply of a listing, which is put together in our memory. Fewer names than there is room
#: for are in order, and buffers that overlap make room without end.
_LISTING_LIMIT: Final = 1 << 20

#: Errors that the protocol can carry are 1 to 511.
_ERRNO_LIMIT: Final = 512

_INIT, _DESTROY, _WRITE = int(Opcode.INIT), int(Opcode.DESTROY), int(Opcode.WRITE)
_LISTINGS: Final = frozenset((int(Opcode.READDIR), int(Opcode.READDIRPLUS)))

#: How often one guest's malformed requests are worth a line in the log.
_COMPLAINTS: Final = 10


def init(session: Session, request: Request) -> bytes:
    """INIT: negotiate; whatever the guest held before is let go."""
    return INIT_OUT.pack(session.start(request.args))


def destroy(session: Session, _request: Request) -> bytes:
    """DESTROY: the guest unmounts."""
    session.reset()
    return b""


def _ignore(_session: Session, _request: Request) -> None:
    """NOTIFY_REPLY: nobody here asks."""


def _refuse_change(_session: Session, _call: Call) -> bytes:
    raise OSError(errno.EROFS, "shared read-only")


_FAST: Final[Mapping[int, FastHandler]] = {
    Opcode.LOOKUP: tree.lookup,
    Opcode.FORGET: nodes.forget,
    Opcode.GETATTR: nodes.getattr_,
    Opcode.OPEN: files.open_,
    Opcode.READ: files.read,
    Opcode.WRITE: files.write,
    Opcode.FLUSH: files.flush,
    Opcode.RELEASE: files.release,
}

#: What is not here is ENOSYS: poll, bmap, and opcodes to come.
_PLAIN: Final[Mapping[int, Handler]] = {
    Opcode.INIT: init,
    Opcode.DESTROY: destroy,
    Opcode.INTERRUPT: locks.interrupt,
    Opcode.NOTIFY_REPLY: _ignore,
    Opcode.BATCH_FORGET: nodes.batch_forget,
    Opcode.SETATTR: nodes.setattr_,
    Opcode.READLINK: nodes.readlink,
    Opcode.ACCESS: nodes.access,
    Opcode.STATFS: nodes.statfs,
    Opcode.STATX: nodes.statx,
    Opcode.SYMLINK: tree.symlink,
    Opcode.MKNOD: tree.mknod,
    Opcode.MKDIR: tree.mkdir,
    Opcode.UNLINK: tree.unlink,
    Opcode.RMDIR: tree.rmdir,
    Opcode.RENAME: tree.rename,
    Opcode.RENAME2: tree.rename2,
    Opcode.LINK: tree.link,
    Opcode.CREATE: files.create,
    Opcode.TMPFILE: files.tmpfile,
    Opcode.FSYNC: files.fsync,
    Opcode.SYNCFS: files.syncfs,
    Opcode.FALLOCATE: files.fallocate,
    Opcode.LSEEK: files.lseek,
    Opcode.COPY_FILE_RANGE: files.copy_file_range,
    Opcode.COPY_FILE_RANGE_64: files.copy_file_range_64,
    Opcode.SETUPMAPPING: mappings.setupmapping,
    Opcode.REMOVEMAPPING: mappings.removemapping,
    Opcode.IOCTL: ioctls.ioctl,
    Opcode.GETLK: locks.getlk,
    Opcode.SETLK: locks.setlk,
    Opcode.SETLKW: locks.setlkw,
    Opcode.OPENDIR: listing.opendir,
    Opcode.READDIR: listing.readdir,
    Opcode.READDIRPLUS: listing.readdirplus,
    Opcode.RELEASEDIR: listing.releasedir,
    Opcode.FSYNCDIR: listing.fsyncdir,
}

#: ENOSYS as well where the share serves none.
_XATTR: Final[Mapping[int, Handler]] = {
    Opcode.SETXATTR: xattrs.setxattr,
    Opcode.GETXATTR: xattrs.getxattr,
    Opcode.LISTXATTR: xattrs.listxattr,
    Opcode.REMOVEXATTR: xattrs.removexattr,
}

#: Refused on a read-only share before anything else is looked at; OPEN looks for itself.
_CHANGES: Final = (
    Opcode.SETATTR,
    Opcode.SYMLINK,
    Opcode.MKNOD,
    Opcode.MKDIR,
    Opcode.UNLINK,
    Opcode.RMDIR,
    Opcode.RENAME,
    Opcode.RENAME2,
    Opcode.LINK,
    Opcode.WRITE,
    Opcode.SETXATTR,
    Opcode.REMOVEXATTR,
    Opcode.CREATE,
    Opcode.TMPFILE,
    Opcode.FALLOCATE,
    Opcode.COPY_FILE_RANGE,
    Opcode.COPY_FILE_RANGE_64,
)

#: Served without a session. A FORGET that comes late is in order, and has nothing to forget.
_SESSIONLESS: Final = frozenset(
    int(opcode)
    for opcode, operation in OPERATIONS.items()
    if opcode in (Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT) or not operation.has_reply
)

#: Writable bytes that a request must bring: its reply without trailing data; nothing where no reply
#: is sent. DESTROY's and INTERRUPT's are optional: not every guest expects one.
_ROOM: Final[Mapping[int, int]] = {
    int(opcode): REPLY_SIZE + sum(codec.size for codec in operation.reply)
    if operation.has_reply and opcode not in (Opcode.DESTROY, Opcode.INTERRUPT)
    else 0
    for opcode, operation in OPERATIONS.items()
}


class FuseServer:
    """Serves the requests of one guest.

    Args:
        session: What the guest holds.
    """

    __slots__ = ("_complaints", "_fast", "_plain", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self._fast = {int(opcode): handler for opcode, handler in _FAST.items()}
        self._plain = {int(opcode): handler for opcode, handler in _PLAIN.items()}
        self._complaints = 0
        options = session.share.options
        if options.xattr:
            self._plain |= {int(opcode): handler for opcode, handler in _XATTR.items()}
        if options.translation is not None:
            self._fast = translated_fast(self._fast, options.translation)
            self._plain = translated_plain(self._plain, options.translation)
        if options.xattr and options.xattrmap is not None and options.xattrmap.capability:
            capability.guard(self._fast, self._plain, options.xattrmap.capability)
        if options.readonly:
            self._fast |= dict.fromkeys(map(int, _CHANGES), _refuse_change)

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        """Serve one request.

        Args:
            readable: The request, in guest memory.
            writable: Room for the reply, in guest memory.

        Returns:
            Bytes of the reply, from the start of the writable part on; 0 for none.

        Raises:
            GuestFault: No whole header to read, or no room to answer one that wants an answer.
            Deferred: The reply comes later, by ``answer_late``.
        """
        sent, room = _total(readable), _total(writable)
        if sent <= _HEAD_LIMIT and len(readable) == 1:
            head = readable[0].tobytes()
        else:
            head = _copy(readable, _HEAD_LIMIT)
        if len(head) < HEADER_SIZE:
            raise GuestFault(f"request of {len(head)} bytes")
        length, opcode, unique, nodeid = _header_of(head)
        wanted = _ROOM.get(opcode, REPLY_SIZE)
        if room < REPLY_SIZE <= wanted:
            raise GuestFault(f"{opcode_name(opcode)} with room for {room} bytes of reply")
        session = self.session
        try:
            if room < wanted:
                raise WireError(f"room for {room} bytes of reply")
            if not HEADER_SIZE <= length <= sent:
                raise WireError(f"header says {length} bytes, {sent} are there")
            if session.agreed is None and opcode not in _SESSIONLESS:
                raise OSError(errno.EIO, "no INIT yet")
            message = head if length == len(head) else _message(head, length, opcode, readable)
            fast = self._fast.get(opcode)
            if fast is None:
                result: bytes | int | None = self._handle(opcode, message, room)
            else:
                call = _record(Call, (nodeid, message, length, readable, writable, room))
                result = fast(session, call)
        except Deferred:
            raise
        except Exception as error:  # a request's fate ends here, whatever goes wrong with it
            number = self._errno_of(error, opcode)
            return _put_error(writable, unique, number) if wanted else 0
        finally:
            session.inodes.trim()
        if result is None or room < REPLY_SIZE:
            return 0
        return _put(writable, room, unique, result)

    def answer_late(self, writable: list[memoryview], unique: int, number: int) -> int:
        """Answer a request that was put aside, with an errno or 0; returns bytes of the reply.

        Raises:
            GuestFault: The room for the reply has gone.
        """
        if _total(writable) < REPLY_SIZE:
            raise GuestFault("the room for a reply has gone")
        return _put_error(writable, unique, number)

    def _handle(self, opcode: int, message: bytes, room: int) -> bytes | None:
        """Serve a request by a handler that takes it decoded."""
        handler = self._plain.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "not served")
        agreed = self.session.agreed
        setxattr_ext = agreed is None or agreed.setxattr_ext
        request = decode_request(message, setxattr_ext=setxattr_ext)
        if opcode in _LISTINGS:
            size = min(request.args.size, room - REPLY_SIZE, _LISTING_LIMIT)
            request = request._replace(args=request.args._replace(size=size))
        return handler(self.session, request)

    def _errno_of(self, error: Exception, opcode: int) -> int:
        """The table in the module's docstring."""
        if isinstance(error, OSError):
            number = error.errno or 0
            return number if 0 < number < _ERRNO_LIMIT else errno.EIO
        if isinstance(error, WireError | struct.error):
            self._complain(opcode, error)
            return errno.EINVAL
        if isinstance(error, OverflowError | ValueError):
            return errno.EINVAL
        if isinstance(error, MemoryError):
            return errno.ENOMEM
        logger.error("%s failed", opcode_name(opcode), exc_info=error)
        return errno.EIO

    def _complain(self, opcode: int, error: Exception) -> None:
        """Log a malformed request, unless this guest has filled enough of the log already."""
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            last = " (no more of these are logged)" * (self._complaints == _COMPLAINTS)
            logger.warning("malformed %s: %s%s", opcode_name(opcode), str(error), last)


def _total(buffers: list[memoryview]) -> int:
    if len(buffers) == 1:
        return buffers[0].nbytes
    return sum(buffer.nbytes for buffer in buffers)


def _copy(buffers: list[memoryview], limit: int) -> bytes:
    """Copy the first bytes out of guest memory."""
    if len(buffers) == 1:
        return bytes(buffers[0][:limit])
    return b"".join(window(buffers, 0, limit))


def _message(head: bytes, length: int, opcode: int, readable: list[memoryview]) -> bytes:
    """Return the private copy of a message: whole, or its head for a WRITE.

    The guest may write to the original meanwhile, so the header is not taken from it again.
    """
    if length <= len(head):
        return head[:length]
    if opcode == _WRITE:
        return head
    if length > _MESSAGE_LIMIT:
        raise WireError(f"message of {length} bytes")
    return head + _copy(window(readable, len(head), length - len(head)), length)


def _put(writable: list[memoryview], room: int, unique: int, result: bytes | int) -> int:
    """Write a reply: header and body, or the header for a body that is in place."""
    first = writable[0]
    if isinstance(result, int):
        total = REPLY_SIZE + result
        if total <= room and first.nbytes >= REPLY_SIZE:
            _reply_into(first, 0, total, 0, unique)
            return total
        result = b""
    else:
        total = REPLY_SIZE + len(result)
    if total > room:  # data of a size that only the host knows: a link's target, names, a value
        total = REPLY_SIZE
        reply = _reply(REPLY_SIZE, -errno.ERANGE, unique)
    else:
        reply = _reply(total, 0, unique) + result
    if len(reply) <= first.nbytes:
        first[: len(reply)] = reply
    else:
        _scatter(writable, reply)
    return total


def _put_error(writable: list[memoryview], unique: int, number: int) -> int:
    if writable[0].nbytes >= REPLY_SIZE:
        _reply_into(writable[0], 0, REPLY_SIZE, -number, unique)
    else:
        _scatter(writable, _reply(REPLY_SIZE, -number, unique))
    return REPLY_SIZE


def _scatter(writable: list[memoryview], data: bytes) -> None:
    at = 0
    for buffer in window(writable, 0, len(data)):
        buffer[:] = data[at : at + buffer.nbytes]
        at += buffer.nbytes
