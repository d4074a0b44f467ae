"""Operations on file contents: open, create, read, write, and all that happens on a handle.

READ and WRITE hand the kernel the guest's own memory. Offsets of 2^63 and more are EINVAL, wherever
they come from: Python's OverflowError for them is turned into it by the dispatcher.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from vfsmount.hostd import syscalls
from vfsmount.hostd.fs.call import HEADER_SIZE, REPLY_SIZE, window
from vfsmount.hostd.fs.handles import FileHandle, make_durable
from vfsmount.hostd.fs.names import check_name
from vfsmount.hostd.fs.session import MAX_PAGES, MAX_WRITE
from vfsmount.wire.fuse import (
    COPY_FILE_RANGE_OUT,
    LSEEK_OUT,
    OPEN_OUT,
    WRITE_OUT,
    OpenInFlag,
    WriteFlag,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vfsmount.hostd.fs.call import Call
    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = [
    "copy_file_range",
    "copy_file_range_64",
    "create",
    "fallocate",
    "flush",
    "fsync",
    "lseek",
    "open_",
    "read",
    "release",
    "syncfs",
    "tmpfile",
    "write",
]

# As in ``wire``, without the fields that nobody looks at.
_OPEN_IN = struct.Struct("<II")
_OPEN_OUT = struct.Struct("<QIi")
_READ_IN = struct.Struct("<QQI20x")
_WRITE_IN = struct.Struct("<QQII16x")
_WRITE_OUT = struct.Struct("<I4x")
_RELEASE_IN = struct.Struct("<Q16x")
_FLUSH_IN = struct.Struct("<Q8xQ")
#: Where the data of a WRITE begin.
_WRITE_DATA: Final = HEADER_SIZE + 40

_KILL_ON_OPEN = int(OpenInFlag.KILL_SUIDGID)
_KILL_ON_WRITE = int(WriteFlag.KILL_SUIDGID)
#: The guest's own pages, as MAP_SHARED leaves them.
_PAGES = int(WriteFlag.CACHE)

#: MAX_PAGES of 64 KiB, the largest pages that guests have. Buffers may overlap, so the memory that
#: a guest has is no limit, and a read of gigabytes keeps its thread for seconds.
_MAX_READ: Final = MAX_PAGES * 65536
#: Buffers of one preadv(2) or pwritev(2).
_IOV_MAX: Final = 1024
#: Most bytes that one system call moves (MAX_RW_COUNT), which also fits COPY_FILE_RANGE's reply.
_MAX_COUNT: Final = 0x7FFFF000
_MAX_OFFSET: Final = (1 << 63) - 1

_WHENCES: Final = frozenset((os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE))


def open_(session: Session, call: Call) -> bytes:
    """OPEN: a regular file, by its node."""
    flags, open_flags = _OPEN_IN.unpack_from(call.message, HEADER_SIZE)
    inode = session.inodes.get(call.nodeid)
    handle = _open_node(session, inode, flags, open_flags)
    return _OPEN_OUT.pack(session.files.add(handle), session.policy.file_flags, 0)


def _open_node(session: Session, inode: Inode, flags: int, open_flags: int) -> FileHandle:
    if inode.kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, "a directory")
    flags = _allowed_flags(session, flags)
    if flags & os.O_TRUNC and open_flags & _KILL_ON_OPEN:
        with session.credentials.without_fsetid(True):
            return FileHandle(session.reopen(inode, flags), inode, flags)
    return FileHandle(session.reopen(inode, flags), inode, flags)


def _allowed_flags(session: Session, flags: int) -> int:
    """Keep what the guest may choose, and make room for its write-back cache if it has one.

    That cache reads the rest of a page that it writes a part of, and does the appending itself.

    Raises:
        OSError: EROFS: it wants to write to a read-only share.
    """
    flags &= session.share.open_flags
    changing = flags & (os.O_ACCMODE | os.O_TRUNC)
    if changing and session.share.options.readonly:
        raise OSError(errno.EROFS, "shared read-only")
    if changing and session.agreed is not None and session.agreed.writeback_cache:
        flags &= ~os.O_APPEND
        if flags & os.O_ACCMODE == os.O_WRONLY:
            flags += os.O_RDWR - os.O_WRONLY
    return flags


def create(session: Session, request: Request) -> bytes:
    """CREATE: make a regular file and open it, or open what is there.

    The host is asked for a new file in any case (O_EXCL), because opening by name what is already
    there might follow a link or block on a FIFO; an old file is opened by its node.
    """
    parent = session.inodes.get(request.header.nodeid)
    name, args = check_name(request.names[0]), request.args
    flags = _allowed_flags(session, args.flags)
    session.check_room()
    making = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with session.acting_as_caller(request):
            fd = os.open(name, making, stat.S_IMODE(args.mode), dir_fd=parent.fd)
    except FileExistsError:
        if args.flags & os.O_EXCL:
            raise
        return _open_existing(session, parent, request)
    return _opened(session, parent, fd, flags, request, name)


def _open_existing(session: Session, parent: Inode, request: Request) -> bytes:
    args = request.args
    nodeid, _, place = session.inodes.look_up(parent.fd, request.names[0])
    with ExitStack() as undo:
        undo.callback(session.inodes.forget, nodeid, 1)
        handle = _open_node(session, session.inodes.get(nodeid), args.flags, args.open_flags)
        undo.callback(syscalls.close_quietly, handle.fd)
        found = os.fstat(handle.fd)  # again, for O_TRUNC may have changed the size
        undo.pop_all()
    return session.entry(parent, nodeid, found, place) + _open_out(session, handle)


def tmpfile(session: Session, request: Request) -> bytes:
    """TMPFILE: an open file without a name; LINK may give it one. The name sent means nothing."""
    parent = session.inodes.get(request.header.nodeid)
    args = request.args
    flags = _allowed_flags(session, args.flags)
    session.check_room()
    making = flags | os.O_TMPFILE | os.O_CLOEXEC | args.flags & os.O_EXCL
    with session.acting_as_caller(request):
        fd = os.open(b".", making, stat.S_IMODE(args.mode), dir_fd=parent.fd)
    return _opened(session, parent, fd, flags, request, b"")


def _opened(
    session: Session, parent: Inode, fd: int, flags: int, request: Request, name: bytes
) -> bytes:
    """Answer with a file just made. Its node comes from the descriptor: the name may be gone."""
    try:
        node_fd = os.open(b"%d" % fd, os.O_PATH | os.O_CLOEXEC, dir_fd=session.share.proc_fd)
        inode, found = session.inodes.adopt(node_fd)
        if session.wants_labels(request):
            found = session.label(request, inode, parent, name)
    except OSError:
        os.close(fd)
        raise
    handle = FileHandle(fd, inode, flags)
    entry = session.entry(parent, inode.nodeid, found, inode.place)
    return entry + _open_out(session, handle)


def _open_out(session: Session, handle: FileHandle) -> bytes:
    return OPEN_OUT.values(session.files.add(handle), session.policy.file_flags, 0)


def release(session: Session, call: Call) -> bytes:
    """RELEASE: the last close."""
    fh = _RELEASE_IN.unpack_from(call.message, HEADER_SIZE)[0]
    locks = session.locks
    if locks:
        locks.closing(session.files.get(fh), fh)
    session.files.release(fh)
    if locks.board:  # somebody waits, for a flock lock of this handle, perhaps
        locks.notify()
    return b""


def read(session: Session, call: Call) -> int:
    """READ: from the file into the guest's buffers. Fewer bytes than asked mean the end."""
    fh, offset, size = _READ_IN.unpack_from(call.message, HEADER_SIZE)
    fd = session.files.get(fh).fd
    size = min(size, call.room - REPLY_SIZE)
    if size > _MAX_READ:
        raise OSError(errno.EINVAL, "read of more than any guest's pages")
    views = window(call.writable, REPLY_SIZE, size)
    if len(views) <= _IOV_MAX:
        return os.preadv(fd, views, offset)
    return _piecewise(os.preadv, fd, views, offset)


def write(session: Session, call: Call) -> bytes:
    """WRITE: from the guest's buffers into the file. With O_APPEND the host finds the end."""
    fh, offset, size, write_flags = _WRITE_IN.unpack_from(call.message, HEADER_SIZE)
    if size > call.length - _WRITE_DATA or size > MAX_WRITE:
        raise OSError(errno.EINVAL, "write of more than was sent, or may be")
    handle = session.files.get(fh)
    fd = handle.fd
    views = window(call.readable, _WRITE_DATA, size)
    if write_flags & _PAGES and handle.flags & os.O_APPEND:
        return _WRITE_OUT.pack(_write_in_place(session, handle, views, offset))
    if write_flags & _KILL_ON_WRITE and os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID):
        with session.credentials.without_fsetid(True):
            return _WRITE_OUT.pack(_piecewise(os.pwritev, fd, views, offset))
    if len(views) <= _IOV_MAX:
        return _WRITE_OUT.pack(os.pwritev(fd, views, offset))
    return _WRITE_OUT.pack(_piecewise(os.pwritev, fd, views, offset))


def _write_in_place(
    session: Session, handle: FileHandle, views: list[memoryview], offset: int
) -> int:
    """Write pages where they belong, though the handle is one for appending.

    pwrite(2) appends with O_APPEND, whatever the offset. RWF_NOAPPEND would do, but is Linux 6.9's.
    """
    fd = session.reopen(handle.inode, os.O_WRONLY)
    try:
        return _piecewise(os.pwritev, fd, views, offset)
    finally:
        os.close(fd)


def _piecewise(
    move: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview], offset: int
) -> int:
    """Move more buffers than one system call takes; stops where one falls short."""
    done = 0
    for at in range(0, len(views), _IOV_MAX):
        part = views[at : at + _IOV_MAX]
        moved = move(fd, part, offset + done)
        done += moved
        if moved < sum(view.nbytes for view in part):
            break
    return done


def flush(session: Session, call: Call) -> bytes:
    """FLUSH: one close of several, with which the lock owner gives up the file's POSIX locks.

    Closing a duplicate lets a network filesystem report errors.
    """
    fh, lock_owner = _FLUSH_IN.unpack_from(call.message, HEADER_SIZE)
    handle = session.files.get(fh)
    if session.locks:
        session.locks.give_up(handle, lock_owner)
    os.close(os.dup(handle.fd))
    return b""


def fsync(session: Session, request: Request) -> bytes:
    """FSYNC: make a file durable, or only its contents."""
    make_durable(session.files.get(request.args.fh).fd, request)
    return b""


def syncfs(session: Session, request: Request) -> bytes:
    """SYNCFS: write back the filesystem that the node lies on."""
    inode = session.inodes.get(request.header.nodeid)
    fd = session.reopen(inode, os.O_RDONLY | os.O_NONBLOCK)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
    return b""


def fallocate(session: Session, request: Request) -> bytes:
    """FALLOCATE: reserve, punch, zero, collapse or insert; the host judges the mode."""
    args = request.args
    if max(args.offset, args.length) > _MAX_OFFSET:
        raise OSError(errno.EINVAL, "beyond what a file can be")
    fd = session.files.get(args.fh).fd
    with _by_caller(session, request, fd):
        syscalls.fallocate(fd, args.mode, args.offset, args.length)
    return b""


def _by_caller(session: Session, request: Request, fd: int) -> AbstractContextManager[None]:
    """Clear a changed file's set-id bits unless it is root that changes it.

    FALLOCATE and COPY_FILE_RANGE have no flag for that, and a guest that has agreed on
    HANDLE_KILLPRIV_V2 leaves it to us.
    """
    set_id = request.header.uid != 0 and os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID)
    return session.credentials.without_fsetid(bool(set_id))


def lseek(session: Session, request: Request) -> bytes:
    """LSEEK: find data or holes. Reads and writes give their offset, so moving ours harms none."""
    args = request.args
    if args.whence not in _WHENCES:
        raise OSError(errno.EINVAL, "unknown whence")
    return LSEEK_OUT.values(os.lseek(session.files.get(args.fh).fd, args.offset, args.whence))


def copy_file_range(session: Session, request: Request) -> bytes:
    """COPY_FILE_RANGE: between two open files, inside the host."""
    return WRITE_OUT.values(_copy(session, request))


def copy_file_range_64(session: Session, request: Request) -> bytes:
    """COPY_FILE_RANGE_64: the same with a wider count in the reply."""
    return COPY_FILE_RANGE_OUT.values(_copy(session, request))


def _copy(session: Session, request: Request) -> int:
    args = request.args
    if args.flags:
        raise OSError(errno.EINVAL, "copy_file_range has no flags")
    source, target = session.files.get(args.fh_in).fd, session.files.get(args.fh_out).fd
    count = min(args.len, _MAX_COUNT)
    with _by_caller(session, request, target):
        return os.copy_file_range(source, target, count, args.off_in, args.off_out)
