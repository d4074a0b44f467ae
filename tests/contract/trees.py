"""One set of file operations, however the tree is reached.

``Tree`` is what the contract suite asks of a tree: operations by name, below one folder, that raise
OSError like the system calls they are named after. ``PathTree`` is a folder of the machine: the
mount under test, or the host folder that it is compared with. The session API's implementation is
in ``tests.contract.session_tree``.

Names are bytes, relative to the tree's folder. Times are nanoseconds; ``NOW`` and ``OMIT`` stand
for utimensat(2)'s two special values.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

__all__ = [
    "NOW",
    "OFFSET_MAX",
    "OMIT",
    "Handle",
    "Lock",
    "PathTree",
    "Stat",
    "Statfs",
    "Tree",
]

NOW: Final = (1 << 30) - 1
OMIT: Final = (1 << 30) - 2
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100

#: Last byte of a lock that goes to the end, wherever that is.
OFFSET_MAX: Final = (1 << 63) - 1
#: ``struct flock``: type, whence, start, length (0: to the end), pid.
_STRUCT_FLOCK: Final = struct.Struct("hhqqi0q")

_libc = ctypes.CDLL(None, use_errno=True)


class Stat(NamedTuple):
    """struct stat, as far as a file system decides about it."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    ino: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def plain(self) -> tuple[int, ...]:
        """What two trees with the same history agree on; directories' sizes are not among it."""
        size = 0 if stat.S_ISDIR(self.mode) else self.size
        return (self.mode, self.nlink, self.uid, self.gid, self.rdev, size)

    @classmethod
    def of(cls, found: os.stat_result) -> Stat:
        """Take over what os.stat returns."""
        return cls(
            found.st_mode,
            found.st_nlink,
            found.st_uid,
            found.st_gid,
            found.st_rdev,
            found.st_size,
            found.st_ino,
            found.st_blocks,
            found.st_atime_ns,
            found.st_mtime_ns,
            found.st_ctime_ns,
        )


class Statfs(NamedTuple):
    """The part of struct statvfs that does not change while a test runs."""

    bsize: int
    frsize: int
    blocks: int
    files: int
    namemax: int


class Lock(NamedTuple):
    """A lock: its kind as ``fuse.LockType`` has it, and its first and last byte."""

    kind: int
    start: int
    end: int


class Handle(Protocol):
    """An open file.

    ``lock`` and ``flock`` belong to the handle, like fcntl(2)'s open file description locks, and do
    not wait. ``give_name`` links what ``Tree.tmpfile`` has made.
    """

    def pread(self, size: int, offset: int) -> bytes: ...
    def pwrite(self, data: bytes, offset: int) -> int: ...
    def stat(self) -> Stat: ...
    def truncate(self, size: int) -> None: ...
    def chmod(self, mode: int) -> None: ...
    def utime(self, atime_ns: int, mtime_ns: int) -> None: ...
    def fsync(self, datasync: bool = False) -> None: ...
    def lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> None: ...
    def flock(self, kind: int) -> None: ...
    def find_lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> Lock | None: ...
    def give_name(self, name: bytes) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Handle: ...
    def __exit__(self, *reason: object) -> None: ...


class Tree(Protocol):
    """A folder and the operations below it."""

    def stat(self, name: bytes) -> Stat: ...
    def chmod(self, name: bytes, mode: int) -> None: ...
    def chown(self, name: bytes, uid: int, gid: int) -> None: ...
    def truncate(self, name: bytes, size: int) -> None: ...
    def utime(self, name: bytes, atime_ns: int, mtime_ns: int) -> None: ...
    def access(self, name: bytes, mode: int) -> bool: ...
    def statfs(self) -> Statfs: ...

    def open(self, name: bytes, flags: int, mode: int = 0o644) -> Handle: ...
    def tmpfile(self, flags: int, mode: int = 0o644) -> Handle: ...
    def mkdir(self, name: bytes, mode: int = 0o755) -> None: ...
    def mknod(self, name: bytes, mode: int, rdev: int = 0) -> None: ...
    def symlink(self, target: bytes, name: bytes) -> None: ...
    def readlink(self, name: bytes) -> bytes: ...
    def link(self, old: bytes, new: bytes) -> None: ...
    def unlink(self, name: bytes) -> None: ...
    def rmdir(self, name: bytes) -> None: ...
    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None: ...
    def listdir(self, name: bytes = b".") -> list[tuple[bytes, int]]: ...
    def fsyncdir(self, name: bytes, datasync: bool = False) -> None: ...

    def setxattr(self, name: bytes, key: bytes, value: bytes, flags: int = 0) -> None: ...
    def getxattr(self, name: bytes, key: bytes, size: int = 65536) -> bytes: ...
    def getxattr_size(self, name: bytes, key: bytes) -> int: ...
    def listxattr(self, name: bytes, size: int = 65536) -> list[bytes]: ...
    def listxattr_size(self, name: bytes) -> int: ...
    def removexattr(self, name: bytes, key: bytes) -> None: ...

    def below(self, name: bytes) -> Tree: ...
    def umask(self, mask: int) -> AbstractContextManager[None]: ...
    def caller(
        self, uid: int, gid: int, groups: tuple[int, ...] = ()
    ) -> AbstractContextManager[None]: ...


def _checked(result: int) -> int:
    """Raise OSError when a C library call said -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _times(*times_ns: int) -> ctypes.Array[ctypes.c_long]:
    """Two struct timespec: seconds and nanoseconds, each a long."""
    words = [
        word
        for value in times_ns
        for word in ((0, value) if value in (NOW, OMIT) else divmod(value, 10**9))
    ]
    return (ctypes.c_long * 4)(*words)


class PathHandle:
    """An open descriptor.

    Args:
        fd: It.
        root: The tree's folder.
    """

    def __init__(self, fd: int, root: bytes = b"") -> None:
        self.fd = fd
        self._root = root

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        return os.pwrite(self.fd, data, offset)

    def stat(self) -> Stat:
        return Stat.of(os.fstat(self.fd))

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def chmod(self, mode: int) -> None:
        os.fchmod(self.fd, mode)

    def utime(self, atime_ns: int, mtime_ns: int) -> None:
        _checked(_libc.futimens(self.fd, _times(atime_ns, mtime_ns)))

    def fsync(self, datasync: bool = False) -> None:
        (os.fdatasync if datasync else os.fsync)(self.fd)

    def lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, self._flock(kind, start, end))

    def flock(self, kind: int) -> None:
        fcntl.flock(self.fd, (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)[kind] | fcntl.LOCK_NB)

    def find_lock(self, kind: int, start: int = 0, end: int = OFFSET_MAX) -> Lock | None:
        found = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, self._flock(kind, start, end))
        kind, _, start, length, _ = _STRUCT_FLOCK.unpack(found)
        last = start + length - 1 if length else OFFSET_MAX
        return None if kind == fcntl.F_UNLCK else Lock(kind, start, last)

    def _flock(self, kind: int, start: int, end: int) -> bytes:
        length = 0 if end == OFFSET_MAX else end - start + 1
        return _STRUCT_FLOCK.pack(kind, os.SEEK_SET, start, length, 0)

    def give_name(self, name: bytes) -> None:
        # With a directory it is linkat(2) that Python calls, which follows; link(2) does not.
        folder = os.open(self._root, os.O_PATH)
        try:
            path = b"/proc/self/fd/%d" % self.fd
            os.link(path, name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> PathHandle:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


class PathTree:
    """A folder of this machine, through system calls."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def path(self, name: bytes) -> bytes:
        """The whole path of a name."""
        return os.path.join(self.root, name)

    def stat(self, name: bytes) -> Stat:
        return Stat.of(os.lstat(self.path(name)))

    def chmod(self, name: bytes, mode: int) -> None:
        os.chmod(self.path(name), mode)

    def chown(self, name: bytes, uid: int, gid: int) -> None:
        os.lchown(self.path(name), uid, gid)

    def truncate(self, name: bytes, size: int) -> None:
        os.truncate(self.path(name), size)

    def utime(self, name: bytes, atime_ns: int, mtime_ns: int) -> None:
        times = _times(atime_ns, mtime_ns)
        _checked(_libc.utimensat(AT_FDCWD, self.path(name), times, AT_SYMLINK_NOFOLLOW))

    def access(self, name: bytes, mode: int) -> bool:
        return os.access(self.path(name), mode, effective_ids=True)

    def statfs(self) -> Statfs:
        found = os.statvfs(self.root)
        return Statfs(found.f_bsize, found.f_frsize, found.f_blocks, found.f_files, found.f_namemax)

    def open(self, name: bytes, flags: int, mode: int = 0o644) -> PathHandle:
        return PathHandle(os.open(self.path(name), flags, mode), self.root)

    def tmpfile(self, flags: int, mode: int = 0o644) -> PathHandle:
        return PathHandle(os.open(self.root, flags | os.O_TMPFILE, mode), self.root)

    def mkdir(self, name: bytes, mode: int = 0o755) -> None:
        os.mkdir(self.path(name), mode)

    def mknod(self, name: bytes, mode: int, rdev: int = 0) -> None:
        os.mknod(self.path(name), mode, rdev)

    def symlink(self, target: bytes, name: bytes) -> None:
        os.symlink(target, self.path(name))

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(self.path(name))

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self.path(old), self.path(new), follow_symlinks=False)

    def unlink(self, name: bytes) -> None:
        os.unlink(self.path(name))

    def rmdir(self, name: bytes) -> None:
        os.rmdir(self.path(name))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        _checked(_libc.renameat2(AT_FDCWD, self.path(old), AT_FDCWD, self.path(new), flags))

    def listdir(self, name: bytes = b".") -> list[tuple[bytes, int]]:
        """Names and their file types (as in st_mode), sorted; without "." and ".."."""
        with os.scandir(self.path(name)) as entries:
            return sorted((entry.name, _type_of(entry)) for entry in entries)

    def fsyncdir(self, name: bytes, datasync: bool = False) -> None:
        fd = os.open(self.path(name), os.O_RDONLY | os.O_DIRECTORY)
        with PathHandle(fd) as handle:
            handle.fsync(datasync)

    def setxattr(self, name: bytes, key: bytes, value: bytes, flags: int = 0) -> None:
        os.setxattr(self.path(name), key, value, flags, follow_symlinks=False)

    def getxattr(self, name: bytes, key: bytes, size: int = 65536) -> bytes:
        room = ctypes.create_string_buffer(size)
        used = _checked(_libc.lgetxattr(self.path(name), key, room, size))
        return room.raw[:used]

    def getxattr_size(self, name: bytes, key: bytes) -> int:
        return _checked(_libc.lgetxattr(self.path(name), key, None, 0))

    def listxattr(self, name: bytes, size: int = 65536) -> list[bytes]:
        room = ctypes.create_string_buffer(size)
        used = _checked(_libc.llistxattr(self.path(name), room, size))
        return room.raw[:used].split(b"\0")[:-1]

    def listxattr_size(self, name: bytes) -> int:
        return _checked(_libc.llistxattr(self.path(name), None, 0))

    def removexattr(self, name: bytes, key: bytes) -> None:
        os.removexattr(self.path(name), key, follow_symlinks=False)

    def below(self, name: bytes) -> PathTree:
        """The tree of a folder in this one."""
        return PathTree(self.path(name))

    @contextmanager
    def umask(self, mask: int) -> Iterator[None]:
        before = os.umask(mask)
        try:
            yield
        finally:
            os.umask(before)

    @contextmanager
    def caller(self, uid: int, gid: int, groups: tuple[int, ...] = ()) -> Iterator[None]:
        """Act as somebody else; root only."""
        with acting_as(uid, gid, groups):
            yield


def _type_of(entry: os.DirEntry[bytes]) -> int:
    """File type; from d_type, which readdir delivers, where Python lets us see it."""
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)


@contextmanager
def acting_as(uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[None]:
    """Give this thread another identity towards file systems.

    setfsuid(2) and setfsgid(2) are per thread and, unlike seteuid(2), leave the process as it is;
    from root to somebody else the capabilities that concern files go with them. setgroups(2) is
    made per thread by going around the C library, which would change all threads.
    """
    before = os.getgroups()
    _set_groups(groups)
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        # setfsuid() cannot fail visibly: asked for the impossible -1 it tells what is in force.
        assert (_libc.setfsuid(-1), _libc.setfsgid(-1)) == (uid, gid), "this test needs root"
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())
        _set_groups(tuple(before))


#: setgroups on the machines that virtio-fs runs on: generic numbers, and x86-64's own.
_SYS_SETGROUPS = 116 if os.uname().machine == "x86_64" else 159


def _set_groups(groups: tuple[int, ...]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _checked(_libc.syscall(_SYS_SETGROUPS, len(groups), array))
