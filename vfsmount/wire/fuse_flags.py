"""FUSE opcodes and flag words, protocol 7.1 to 7.46.

Every number here is compared with the kernel's header (``linux/fuse.h``) by
``tests/wire/test_kernel_header.py``: a hand-typed constant table is wrong until a compiler agrees.
Names are the header's, without the prefix that the class already says.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "HEEDS_INTERRUPT",
    "KERNEL_MINOR_VERSION",
    "KERNEL_VERSION",
    "ROOT_ID",
    "AttrFlag",
    "FsyncFlag",
    "GetattrFlag",
    "InitFlag",
    "IoctlFlag",
    "LockFlag",
    "LockType",
    "NotifyCode",
    "Opcode",
    "OpenInFlag",
    "OpenOutFlag",
    "ReadFlag",
    "ReleaseFlag",
    "RenameFlag",
    "SetattrValid",
    "SetupmappingFlag",
    "SetxattrFlag",
    "WriteFlag",
]

#: FUSE_KERNEL_VERSION and the newest minor whose structs we know.
KERNEL_VERSION = 7
KERNEL_MINOR_VERSION = 45

#: FUSE_ROOT_ID: node of the root directory; looked up once for ever and never forgotten.
ROOT_ID = 1


class Opcode(IntEnum):
    """``enum fuse_opcode``; 7 and 19 are unassigned, CUSE_INIT is another protocol."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class InitFlag(IntFlag):
    """INIT flags, both words as one 64-bit number: ``flags2`` holds bits 32 and up."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


#: Not of FUSE: an INIT flag between vfsmount and its bundled daemon, at the end that the kernel's
#: flags do not grow from. The daemon ends a wait for a lock when it is sent INTERRUPT; of the
#: daemons that do not say so, one crashes on it.
HEEDS_INTERRUPT = InitFlag(1 << 63)


class OpenOutFlag(IntFlag):
    """``FOPEN_*``: what the server says of a handle in ``fuse_open_out.open_flags``."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class OpenInFlag(IntFlag):
    """``FUSE_OPEN_*`` in ``open_in.open_flags`` and ``create_in.open_flags``."""

    KILL_SUIDGID = 1 << 0


class SetattrValid(IntFlag):
    """``FATTR_*``: which fields of ``fuse_setattr_in`` count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class GetattrFlag(IntFlag):
    """``FUSE_GETATTR_*``."""

    FH = 1 << 0


class ReadFlag(IntFlag):
    """``FUSE_READ_*``."""

    LOCKOWNER = 1 << 1


class WriteFlag(IntFlag):
    """``FUSE_WRITE_*``."""

    CACHE = 1 << 0
    LOCKOWNER = 1 << 1
    KILL_SUIDGID = 1 << 2


class ReleaseFlag(IntFlag):
    """``FUSE_RELEASE_*``."""

    FLUSH = 1 << 0
    FLOCK_UNLOCK = 1 << 1


class FsyncFlag(IntFlag):
    """``FUSE_FSYNC_*``."""

    FDATASYNC = 1 << 0


class SetxattrFlag(IntFlag):
    """``FUSE_SETXATTR_*`` in ``setxattr_in.setxattr_flags``."""

    ACL_KILL_SGID = 1 << 0


class LockFlag(IntFlag):
    """``FUSE_LK_*``."""

    FLOCK = 1 << 0


class LockType(IntEnum):
    """``F_RDLCK``, ``F_WRLCK``, ``F_UNLCK`` as Linux numbers them."""

    READ = 0
    WRITE = 1
    UNLOCK = 2


class IoctlFlag(IntFlag):
    """``FUSE_IOCTL_*``."""

    COMPAT = 1 << 0
    UNRESTRICTED = 1 << 1
    RETRY = 1 << 2
    IOCTL_32BIT = 1 << 3
    DIR = 1 << 4
    COMPAT_X32 = 1 << 5


class AttrFlag(IntFlag):
    """``FUSE_ATTR_*`` in ``fuse_attr.flags``."""

    SUBMOUNT = 1 << 0
    DAX = 1 << 1


class SetupmappingFlag(IntFlag):
    """``FUSE_SETUPMAPPING_FLAG_*``."""

    WRITE = 1 << 0
    READ = 1 << 1


class RenameFlag(IntFlag):
    """``RENAME_*`` of renameat2(2), which RENAME2 carries as they are."""

    NOREPLACE = 1 << 0
    EXCHANGE = 1 << 1
    WHITEOUT = 1 << 2


class NotifyCode(IntEnum):
    """``enum fuse_notify_code``: travels in ``out_header.error`` with ``unique`` 0."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8
    PRUNE = 9
