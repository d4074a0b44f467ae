"""The C structs of the FUSE protocol as records and codecs.

One NamedTuple per struct of ``linux/fuse.h``, named like it without ``fuse_``; under it a ``Codec``
with the size in the comment. Padding and unused words are not fields. All integers little-endian,
which is "native" on every host that virtio-fs runs on today.

``fuse_attr`` stands inside ``fuse_entry_out`` and ``fuse_attr_out``; those two nest the record.
"""

from __future__ import annotations

from typing import NamedTuple

from vfsmount.wire._codec import Codec, NestedCodec


class InHeader(NamedTuple):
    """``fuse_in_header``: starts every request. ``total_extlen`` is in units of 8 bytes (7.38)."""

    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int


IN_HEADER = Codec(InHeader, "<IIQQIIIH2x")  # 40


class OutHeader(NamedTuple):
    """``fuse_out_header``: starts every reply. ``error`` is 0 or a negated errno."""

    len: int
    error: int
    unique: int


OUT_HEADER = Codec(OutHeader, "<IiQ")  # 16


class Attr(NamedTuple):
    """``fuse_attr``. ``blocks`` in 512 bytes; times in seconds with a nanosecond part."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


_ATTR = "QQQqqqIIIIIIIIII"
ATTR = Codec(Attr, "<" + _ATTR)  # 88


class EntryOut(NamedTuple):
    """``fuse_entry_out``: a node found or made. ``nodeid`` 0 is a negative entry."""

    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int
    attr: Attr


ENTRY_OUT = NestedCodec(EntryOut, "<QQQQII", Attr, _ATTR)  # 128


class AttrOut(NamedTuple):
    """``fuse_attr_out``."""

    attr_valid: int
    attr_valid_nsec: int
    attr: Attr


ATTR_OUT = NestedCodec(AttrOut, "<QI4x", Attr, _ATTR)  # 104


class ForgetIn(NamedTuple):
    """``fuse_forget_in``."""

    nlookup: int


FORGET_IN = Codec(ForgetIn, "<Q")  # 8


class BatchForgetIn(NamedTuple):
    """``fuse_batch_forget_in``: ``count`` ``fuse_forget_one`` follow."""

    count: int  # type: ignore[assignment]  # shadows tuple.count, which no record needs


BATCH_FORGET_IN = Codec(BatchForgetIn, "<I4x")  # 8


class ForgetOne(NamedTuple):
    """``fuse_forget_one``."""

    nodeid: int
    nlookup: int


FORGET_ONE = Codec(ForgetOne, "<QQ")  # 16


class GetattrIn(NamedTuple):
    """``fuse_getattr_in``; ``fh`` counts with GetattrFlag.FH."""

    getattr_flags: int
    fh: int


GETATTR_IN = Codec(GetattrIn, "<I4xQ")  # 16


class StatxIn(NamedTuple):
    """``fuse_statx_in`` (7.39); ``sx_flags`` and ``sx_mask`` are statx(2)'s."""

    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


STATX_IN = Codec(StatxIn, "<I4xQII")  # 24


class Statx(NamedTuple):
    """``fuse_statx``, its four ``fuse_sx_time`` flattened to ``*time`` and ``*timensec``."""

    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: int
    atimensec: int
    btime: int
    btimensec: int
    ctime: int
    ctimensec: int
    mtime: int
    mtimensec: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int


_STATX = "IIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIII112x"
STATX = Codec(Statx, "<" + _STATX)  # 256


class StatxOut(NamedTuple):
    """``fuse_statx_out`` (7.39)."""

    attr_valid: int
    attr_valid_nsec: int
    flags: int
    stat: Statx


STATX_OUT = NestedCodec(StatxOut, "<QII16x", Statx, _STATX)  # 288


class SetattrIn(NamedTuple):
    """``fuse_setattr_in``; ``valid`` holds SetattrValid bits."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


SETATTR_IN = Codec(SetattrIn, "<I4xQQQqqqIIII4xII4x")  # 88


class MknodIn(NamedTuple):
    """``fuse_mknod_in``; ``rdev`` in the kernel's 32-bit encoding."""

    mode: int
    rdev: int
    umask: int


MKNOD_IN = Codec(MknodIn, "<III4x")  # 16


class MkdirIn(NamedTuple):
    """``fuse_mkdir_in``."""

    mode: int
    umask: int


MKDIR_IN = Codec(MkdirIn, "<II")  # 8


class RenameIn(NamedTuple):
    """``fuse_rename_in``."""

    newdir: int


RENAME_IN = Codec(RenameIn, "<Q")  # 8


class Rename2In(NamedTuple):
    """``fuse_rename2_in``; ``flags`` holds RenameFlag bits."""

    newdir: int
    flags: int


RENAME2_IN = Codec(Rename2In, "<QI4x")  # 16


class LinkIn(NamedTuple):
    """``fuse_link_in``: the existing node; the header names the new parent."""

    oldnodeid: int


LINK_IN = Codec(LinkIn, "<Q")  # 8


class OpenIn(NamedTuple):
    """``fuse_open_in``; ``flags`` are open(2)'s."""

    flags: int
    open_flags: int


OPEN_IN = Codec(OpenIn, "<II")  # 8


class CreateIn(NamedTuple):
    """``fuse_create_in``; also of TMPFILE."""

    flags: int
    mode: int
    umask: int
    open_flags: int


CREATE_IN = Codec(CreateIn, "<IIII")  # 16


class OpenOut(NamedTuple):
    """``fuse_open_out``; ``open_flags`` holds OpenOutFlag bits."""

    fh: int
    open_flags: int
    backing_id: int


OPEN_OUT = Codec(OpenOut, "<QIi")  # 16


class ReleaseIn(NamedTuple):
    """``fuse_release_in``."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


RELEASE_IN = Codec(ReleaseIn, "<QIIQ")  # 24


class FlushIn(NamedTuple):
    """``fuse_flush_in``."""

    fh: int
    lock_owner: int


FLUSH_IN = Codec(FlushIn, "<Q8xQ")  # 24


class ReadIn(NamedTuple):
    """``fuse_read_in``; ``offset`` and ``size`` in bytes, in READDIR a cookie and the room."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


READ_IN = Codec(ReadIn, "<QQIIQI4x")  # 40


class WriteIn(NamedTuple):
    """``fuse_write_in``; ``size`` bytes of data follow."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int


WRITE_IN = Codec(WriteIn, "<QQIIQI4x")  # 40


class WriteOut(NamedTuple):
    """``fuse_write_out``; also of COPY_FILE_RANGE."""

    size: int


WRITE_OUT = Codec(WriteOut, "<I4x")  # 8


class Kstatfs(NamedTuple):
    """``fuse_kstatfs``; blocks in ``frsize`` bytes."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


KSTATFS = Codec(Kstatfs, "<QQQQQIII28x")  # 80


class FsyncIn(NamedTuple):
    """``fuse_fsync_in``; ``fsync_flags`` holds FsyncFlag bits."""

    fh: int
    fsync_flags: int


FSYNC_IN = Codec(FsyncIn, "<QI4x")  # 16


class SetxattrIn(NamedTuple):
    """``fuse_setxattr_in`` as negotiated with SETXATTR_EXT."""

    size: int
    flags: int
    setxattr_flags: int


SETXATTR_IN = Codec(SetxattrIn, "<III4x")  # 16


class SetxattrInCompat(NamedTuple):
    """``fuse_setxattr_in`` without SETXATTR_EXT (FUSE_COMPAT_SETXATTR_IN_SIZE)."""

    size: int
    flags: int


SETXATTR_IN_COMPAT = Codec(SetxattrInCompat, "<II")  # 8


class GetxattrIn(NamedTuple):
    """``fuse_getxattr_in``; also of LISTXATTR. ``size`` 0 asks for the size."""

    size: int


GETXATTR_IN = Codec(GetxattrIn, "<I4x")  # 8


class GetxattrOut(NamedTuple):
    """``fuse_getxattr_out``: the answer to size 0."""

    size: int


GETXATTR_OUT = Codec(GetxattrOut, "<I4x")  # 8


class LkIn(NamedTuple):
    """``fuse_lk_in``, its ``fuse_file_lock`` flattened: ``start`` to ``end`` inclusive."""

    fh: int
    owner: int
    start: int
    end: int
    type: int
    pid: int
    lk_flags: int


LK_IN = Codec(LkIn, "<QQQQIII4x")  # 48


class LkOut(NamedTuple):
    """``fuse_lk_out``: one ``fuse_file_lock``."""

    start: int
    end: int
    type: int
    pid: int


LK_OUT = Codec(LkOut, "<QQII")  # 24


class AccessIn(NamedTuple):
    """``fuse_access_in``; ``mask`` is access(2)'s."""

    mask: int


ACCESS_IN = Codec(AccessIn, "<I4x")  # 8


class InitIn(NamedTuple):
    """``fuse_init_in``, with ``flags`` and ``flags2`` (7.36) as two words."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int


INIT_IN = Codec(InitIn, "<IIIII44x")  # 64


class InitInCompat(NamedTuple):
    """``fuse_init_in`` before 7.36."""

    major: int
    minor: int
    max_readahead: int
    flags: int


INIT_IN_COMPAT = Codec(InitInCompat, "<IIII")  # 16


class InitOut(NamedTuple):
    """``fuse_init_out``."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    flags2: int
    max_stack_depth: int
    request_timeout: int


INIT_OUT = Codec(InitOut, "<IIIIHHIIHHIIH22x")  # 64


class InterruptIn(NamedTuple):
    """``fuse_interrupt_in``: ``unique`` of the victim."""

    unique: int


INTERRUPT_IN = Codec(InterruptIn, "<Q")  # 8


class BmapIn(NamedTuple):
    """``fuse_bmap_in``."""

    block: int
    blocksize: int


BMAP_IN = Codec(BmapIn, "<QI4x")  # 16


class BmapOut(NamedTuple):
    """``fuse_bmap_out``."""

    block: int


BMAP_OUT = Codec(BmapOut, "<Q")  # 8


class IoctlIn(NamedTuple):
    """``fuse_ioctl_in``; ``in_size`` bytes of data follow."""

    fh: int
    flags: int
    cmd: int
    arg: int
    in_size: int
    out_size: int


IOCTL_IN = Codec(IoctlIn, "<QIIQII")  # 32


class IoctlOut(NamedTuple):
    """``fuse_ioctl_out``; data follow."""

    result: int
    flags: int
    in_iovs: int
    out_iovs: int


IOCTL_OUT = Codec(IoctlOut, "<iIII")  # 16


class IoctlIovec(NamedTuple):
    """``fuse_ioctl_iovec``."""

    base: int
    len: int


IOCTL_IOVEC = Codec(IoctlIovec, "<QQ")  # 16


class PollIn(NamedTuple):
    """``fuse_poll_in``."""

    fh: int
    kh: int
    flags: int
    events: int


POLL_IN = Codec(PollIn, "<QQII")  # 24


class PollOut(NamedTuple):
    """``fuse_poll_out``."""

    revents: int


POLL_OUT = Codec(PollOut, "<I4x")  # 8


class FallocateIn(NamedTuple):
    """``fuse_fallocate_in``; ``mode`` is fallocate(2)'s."""

    fh: int
    offset: int
    length: int
    mode: int


FALLOCATE_IN = Codec(FallocateIn, "<QQQI4x")  # 32


class LseekIn(NamedTuple):
    """``fuse_lseek_in``."""

    fh: int
    offset: int
    whence: int


LSEEK_IN = Codec(LseekIn, "<QQI4x")  # 24


class LseekOut(NamedTuple):
    """``fuse_lseek_out``."""

    offset: int


LSEEK_OUT = Codec(LseekOut, "<Q")  # 8


class CopyFileRangeIn(NamedTuple):
    """``fuse_copy_file_range_in``; also of COPY_FILE_RANGE_64."""

    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    len: int
    flags: int


COPY_FILE_RANGE_IN = Codec(CopyFileRangeIn, "<QQQQQQQ")  # 56


class CopyFileRangeOut(NamedTuple):
    """``fuse_copy_file_range_out`` (7.45)."""

    bytes_copied: int


COPY_FILE_RANGE_OUT = Codec(CopyFileRangeOut, "<Q")  # 8


class SetupmappingIn(NamedTuple):
    """``fuse_setupmapping_in``: ``foffset`` in the file, ``moffset`` in the DAX window."""

    fh: int
    foffset: int
    len: int
    flags: int
    moffset: int


SETUPMAPPING_IN = Codec(SetupmappingIn, "<QQQQQ")  # 40


class RemovemappingIn(NamedTuple):
    """``fuse_removemapping_in``: ``count`` ``fuse_removemapping_one`` follow, unaligned."""

    count: int  # type: ignore[assignment]  # shadows tuple.count, which no record needs


REMOVEMAPPING_IN = Codec(RemovemappingIn, "<I")  # 4


class RemovemappingOne(NamedTuple):
    """``fuse_removemapping_one``."""

    moffset: int
    len: int


REMOVEMAPPING_ONE = Codec(RemovemappingOne, "<QQ")  # 16


class SyncfsIn(NamedTuple):
    """``fuse_syncfs_in``: only padding."""

    padding: int


SYNCFS_IN = Codec(SyncfsIn, "<Q")  # 8


class Dirent(NamedTuple):
    """``fuse_dirent``: ``namelen`` bytes of name follow, then zeros to a multiple of 8."""

    ino: int
    off: int
    namelen: int
    type: int


DIRENT = Codec(Dirent, "<QQII")  # 24


class ExtHeader(NamedTuple):
    """``fuse_ext_header`` (7.38): ``size`` includes the header and is a multiple of 8."""

    size: int
    type: int


EXT_HEADER = Codec(ExtHeader, "<II")  # 8


class NotifyPollOut(NamedTuple):
    """``fuse_notify_poll_wakeup_out``."""

    kh: int


NOTIFY_POLL_OUT = Codec(NotifyPollOut, "<Q")  # 8


class NotifyInvalInodeOut(NamedTuple):
    """``fuse_notify_inval_inode_out``; ``off`` < 0: attributes only, ``len`` <= 0: to the end."""

    ino: int
    off: int
    len: int


NOTIFY_INVAL_INODE_OUT = Codec(NotifyInvalInodeOut, "<Qqq")  # 24


class NotifyInvalEntryOut(NamedTuple):
    """``fuse_notify_inval_entry_out``: a name of ``namelen`` bytes and a NUL follow."""

    parent: int
    namelen: int
    flags: int


NOTIFY_INVAL_ENTRY_OUT = Codec(NotifyInvalEntryOut, "<QII")  # 16


class NotifyStoreOut(NamedTuple):
    """``fuse_notify_store_out``: ``size`` bytes of data follow."""

    nodeid: int
    offset: int
    size: int


NOTIFY_STORE_OUT = Codec(NotifyStoreOut, "<QQI4x")  # 24


class NotifyRetrieveOut(NamedTuple):
    """``fuse_notify_retrieve_out``; answered by NOTIFY_REPLY."""

    notify_unique: int
    nodeid: int
    offset: int
    size: int


NOTIFY_RETRIEVE_OUT = Codec(NotifyRetrieveOut, "<QQQI4x")  # 32


class NotifyRetrieveIn(NamedTuple):
    """``fuse_notify_retrieve_in``: body of NOTIFY_REPLY; ``size`` bytes of data follow."""

    offset: int
    size: int


NOTIFY_RETRIEVE_IN = Codec(NotifyRetrieveIn, "<8xQI4x16x")  # 40


class NotifyDeleteOut(NamedTuple):
    """``fuse_notify_delete_out``: a name of ``namelen`` bytes and a NUL follow."""

    parent: int
    child: int
    namelen: int


NOTIFY_DELETE_OUT = Codec(NotifyDeleteOut, "<QQI4x")  # 24


class NotifyPruneOut(NamedTuple):
    """``fuse_notify_prune_out`` (7.45): ``count`` nodeids of 8 bytes follow."""

    count: int  # type: ignore[assignment]  # shadows tuple.count, which no record needs


NOTIFY_PRUNE_OUT = Codec(NotifyPruneOut, "<I4x8x")  # 16
