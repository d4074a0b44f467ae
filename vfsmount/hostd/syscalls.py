"""System calls that the standard library does not offer, through ctypes.

Names are bytes, descriptors ints, and failure is an ``OSError`` as from ``os``. Calls named
``thread_*`` change the calling thread alone: they avoid glibc's wrappers, which change all threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from contextlib import suppress
from typing import Any, Final

__all__ = [
    "AT_EMPTY_PATH",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "STATX_SIZE",
    "UTIME_NOW",
    "UTIME_OMIT",
    "MountIds",
    "birth_time",
    "close_quietly",
    "detach",
    "drop_bounding_set",
    "enter_mount_namespace",
    "fallocate",
    "getdents64",
    "mount",
    "name_to_handle_at",
    "open_beneath",
    "open_by_handle_at",
    "pivot_root",
    "renameat2",
    "set_no_new_privs",
    "set_parent_death_signal",
    "statx",
    "syncfs",
    "thread_capabilities",
    "thread_set_capabilities",
    "thread_set_groups",
    "thread_setegid",
    "thread_seteuid",
    "thread_unshare_fs",
    "unshare",
    "utimensat",
]

AT_EMPTY_PATH: Final = 0x1000
#: utimensat(2): the current time, and leave it alone.
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
#: Bytes of ``struct statx``.
STATX_SIZE: Final = 256

CAP_DAC_OVERRIDE: Final = 1
CAP_FSETID: Final = 4

#: AT_SYMLINK_NOFOLLOW and AT_STATX_DONT_SYNC: through no link, and no server is asked.
_OF_ITSELF = AT_EMPTY_PATH | 0x100 | 0x4000
_STATX_BTIME, _STX_BTIME = 0x800, struct.Struct("=80xqI")
_STATX_MNT_ID, _STX_MNT_ID = 0x1000, struct.Struct("=144xQ")
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_MAX_HANDLE_SZ = 128
_UNCHANGED = -1
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

#: Numbers that differ between machines; the second column is the generic table (arm64, riscv64).
_X86 = platform.machine() in {"x86_64", "AMD64"}
_SYS_OPENAT2: Final = 437
_SYS_PIVOT_ROOT = 155 if _X86 else 41
_SYS_SETRESUID, _SYS_SETRESGID, _SYS_SETGROUPS = (117, 119, 116) if _X86 else (147, 149, 159)

_libc = ctypes.CDLL(None, use_errno=True)

_int, _uint, _long, _ulong = ctypes.c_int, ctypes.c_uint, ctypes.c_long, ctypes.c_ulong
_path, _pointer, _int64 = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64


def _function(name: str, *arguments: Any, result: Any = _int) -> Any:
    function = _libc[name]
    function.argtypes = arguments
    function.restype = result
    return function


def _check(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


_renameat2 = _function("renameat2", _int, _path, _int, _path, _uint)
_utimensat = _function("utimensat", _int, _path, _pointer, _int)
_fallocate = _function("fallocate", _int, _int, _int64, _int64)
_getdents64 = _function("getdents64", _int, _pointer, _ulong, result=_long)
_syncfs = _function("syncfs", _int)
_statx = _function("statx", _int, _path, _int, _uint, _pointer)
_name_to_handle_at = _function("name_to_handle_at", _int, _path, _pointer, _pointer, _int)
_open_by_handle_at = _function("open_by_handle_at", _int, _pointer, _int)
_unshare = _function("unshare", _int)
_setns = _function("setns", _int, _int)
_capget = _function("capget", _pointer, _pointer)
_capset = _function("capset", _pointer, _pointer)
_prctl = _function("prctl", _int, _ulong, _ulong, _ulong, _ulong)
_mount = _function("mount", _path, _path, _path, _ulong, _pointer)
_umount2 = _function("umount2", _path, _int)
_pivot_root = _function("syscall", _long, _path, _path, result=_long)
_syscall3 = _function("syscall", _long, _long, _long, _long, result=_long)
_openat2 = _function("syscall", _long, _int, _path, _pointer, _ulong, result=_long)

_Timespecs = _int64 * 4
#: ``struct open_how``, 24 bytes: flags, mode, resolve.
_OpenHow = ctypes.c_uint64 * 3


#: Version and pid; 0 is the calling thread.
_CapHeader = ctypes.c_uint32 * 2
#: Effective, permitted, inheritable of capabilities 0 to 31, then of 32 to 63.
_CapData = ctypes.c_uint32 * 6


def close_quietly(fd: int) -> None:
    """close(2), which closes in any case, without its error.

    Some file systems tell of earlier writes here. FLUSH has told the guest; where many descriptors
    are let go of, the others must be, too.
    """
    with suppress(OSError):
        os.close(fd)


def renameat2(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    """renameat2(2): rename with RENAME_* flags."""
    _check(_renameat2(old_dir, old_name, new_dir, new_name, flags))


def utimensat(dir_fd: int, name: bytes, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """utimensat(2): set both times, each (seconds, nanoseconds, or UTIME_NOW or UTIME_OMIT).

    The last component of ``name`` is followed when it is a link.
    """
    _check(_utimensat(dir_fd, name, _Timespecs(*atime, *mtime), 0))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with any mode."""
    _check(_fallocate(fd, mode, offset, length))


def getdents64(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    """getdents64(2): the next ``struct linux_dirent64`` records, as many as fit; empty at the end.

    The read position is the descriptor's own.
    """
    count = _check(_getdents64(fd, ctypes.addressof(buffer), len(buffer)))
    return ctypes.string_at(buffer, count)


def syncfs(fd: int) -> None:
    """syncfs(2): write back the filesystem that an open file lies on."""
    _check(_syncfs(fd))


def statx(fd: int, flags: int, mask: int) -> bytes:
    """statx(2) of a descriptor, which may be an O_PATH one; returns ``struct statx``, 256 bytes."""
    buffer = ctypes.create_string_buffer(STATX_SIZE)
    _check(_statx(fd, b"", flags | AT_EMPTY_PATH, mask, ctypes.addressof(buffer)))
    return buffer.raw


class MountIds:
    """Asks statx(2) for mounts. For one thread: it has a buffer, which halves the time (2 us)."""

    __slots__ = ("_address", "_buffer")

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(STATX_SIZE)
        self._address = ctypes.addressof(self._buffer)

    def of(self, fd: int, name: bytes = b"") -> int:
        """Return the id of the mount that a descriptor, or a name in it, lies on.

        Ids are given out again after an unmount. Before Linux 5.8 they are all 0.
        """
        if _statx(fd, name, _OF_ITSELF, _STATX_MNT_ID, self._address) == -1:
            _check(-1)
        number: int = _STX_MNT_ID.unpack_from(self._buffer)[0]
        return number


def birth_time(fd: int) -> int:
    """Return when a file was made, in ns since the epoch; 0 where nobody knows."""
    found = statx(fd, _OF_ITSELF, _STATX_BTIME)
    seconds, nanoseconds = _STX_BTIME.unpack_from(found)
    return int(seconds * 1_000_000_000 + nanoseconds)


def open_beneath(dir_fd: int, path: bytes, flags: int) -> int:
    """openat2(2) of a path that may neither leave the directory nor go through a link.

    Raises:
        OSError: ELOOP: a link on the way; EXDEV: it leads out; ENOENT and the like.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    how = _OpenHow(flags, 0, resolve)
    return int(_check(_openat2(_SYS_OPENAT2, dir_fd, path, ctypes.addressof(how), 24)))


class _HandleRoom(threading.local):
    """Where the kernel writes a file handle: made once for each thread, which halves the time."""

    def __init__(self) -> None:
        self._handle = ctypes.create_string_buffer(8 + _MAX_HANDLE_SZ)
        self.size = ctypes.c_uint32.from_buffer(self._handle)
        self.mount_id = _int()
        self.handle_at = ctypes.addressof(self._handle)
        self.mount_id_at = ctypes.addressof(self.mount_id)


_handle_room = _HandleRoom()


def name_to_handle_at(fd: int, name: bytes = b"") -> tuple[bytes, int]:
    """name_to_handle_at(2) of a descriptor, which may be an O_PATH one, or of a name in it.

    A link is not followed.

    Returns:
        ``struct file_handle`` as it stands, 8 to 136 bytes, and the id of the mount.

    Raises:
        OSError: EOPNOTSUPP, EOVERFLOW: the filesystem has none.
    """
    room = _handle_room
    room.size.value = _MAX_HANDLE_SZ
    _check(_name_to_handle_at(fd, name, room.handle_at, room.mount_id_at, AT_EMPTY_PATH))
    return ctypes.string_at(room.handle_at, 8 + room.size.value), room.mount_id.value


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2); takes CAP_DAC_READ_SEARCH.

    Args:
        mount_fd: Descriptor of anything on the mount, no O_PATH one.
        handle: From ``name_to_handle_at``.
        flags: As to open(2).

    Raises:
        OSError: ESTALE: the file is no more.
    """
    return _check(_open_by_handle_at(mount_fd, handle, flags))


def thread_unshare_fs() -> None:
    """unshare(CLONE_FS): give this thread a umask and working directory of its own."""
    _check(_unshare(_CLONE_FS))


def thread_seteuid(uid: int) -> None:
    """Change this thread's effective user; 0xffffffff would mean "leave it", so is refused."""
    _check(_syscall3(_SYS_SETRESUID, _UNCHANGED, _real_id(uid), _UNCHANGED))


def thread_setegid(gid: int) -> None:
    """Change this thread's effective group; as ``thread_seteuid``."""
    _check(_syscall3(_SYS_SETRESGID, _UNCHANGED, _real_id(gid), _UNCHANGED))


def _real_id(number: int) -> int:
    if not 0 <= number < 0xFFFFFFFF:
        raise ValueError(f"{number} is no user or group")
    return number


def thread_set_groups(groups: tuple[int, ...]) -> None:
    """Replace this thread's supplementary groups."""
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _check(_syscall3(_SYS_SETGROUPS, len(groups), ctypes.addressof(array), 0))


def thread_capabilities() -> list[int]:
    """Return this thread's capability words: effective, permitted, inheritable, low then high."""
    header, data = _CapHeader(_CAPABILITY_VERSION_3, 0), _CapData()
    _check(_capget(ctypes.addressof(header), ctypes.addressof(data)))
    return list(data)


def thread_set_capabilities(words: list[int]) -> None:
    """Set this thread's capability words."""
    header, data = _CapHeader(_CAPABILITY_VERSION_3, 0), _CapData(*words)
    _check(_capset(ctypes.addressof(header), ctypes.addressof(data)))


def drop_bounding_set() -> None:
    """PR_CAPBSET_DROP of every capability that there is; takes CAP_SETPCAP."""
    for number in range(64):
        if _prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == -1:
            return  # beyond the last that this kernel knows


def set_no_new_privs() -> None:
    """PR_SET_NO_NEW_PRIVS: no program that is executed gets more rights than this process."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def set_parent_death_signal(number: int) -> None:
    """PR_SET_PDEATHSIG: get this signal when the thread that forked this process ends."""
    _check(_prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def unshare(flags: int) -> None:
    """unshare(2): leave namespaces for new ones (CLONE_NEW*)."""
    _check(_unshare(flags))


def enter_mount_namespace(fd: int) -> None:
    """setns(2); root and working directory are that namespace's root then."""
    _check(_setns(fd, _CLONE_NEWNS))


def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    """mount(2) without data."""
    filesystem = None if kind is None else kind.encode()
    _check(_mount(os.fsencode(source), os.fsencode(target), filesystem, flags, None))


def detach(target: str) -> None:
    """umount2(2) with MNT_DETACH: out of sight at once, descriptors of it stay good."""
    _check(_umount2(os.fsencode(target), _MNT_DETACH))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _check(_pivot_root(_SYS_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old)))
