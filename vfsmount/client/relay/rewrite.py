"""What the relay changes in the messages that it hands on, and what it must know of their shapes.

A FUSE request of the kernel is a virtio-fs message as it stands, and so is the reply; this file is
the complete list of exceptions:

* INIT is answered by us: the session has done its own with the daemon (``init``).
* Validity times and open flags in replies become those of the cache policy (``reply_rewriters``),
  except in mode ``host``; so does what files are best read and written by (``IO_SIZE``).
* A handle that cannot write wants no FLUSH, and one that has written nothing gets none, where the
  daemon has no locks to give up at a FLUSH.
* "No such name" becomes a negative entry where the policy remembers absence (``negative_entry``).
* Where the daemon does not clear set-id bits, they are taken off before a request that must clear
  them, and FATTR_KILL_SUIDGID does not reach it (``set_id``).
* After a short WRITE of the kernel's pages, which it would not notice, the rest is sent again
  (``TookPart``); the daemon says then why it takes no more.
* Below the kernel's write-back a WRITE of its pages that fails has succeeded for the kernel, and
  FSYNC and FLUSH fail for that (``unwritten``).
* Below the kernel's write-back a file is opened readable and not for appending
  (``flags_below_writeback``).
* An unlock that may wait (SETLKW) becomes one that may not (SETLK).
* CREATE goes without O_CREAT, which it implies: virtiofsd (C) would pass it to openat(2) without a
  mode, and abort, when the file exists already, as it may while the kernel remembers its absence.
* READDIRPLUS of a directory whose names the kernel knows becomes READDIR (``listings``). So does
  one that comes upon a name which was removed meanwhile, instead of ENOENT (``known``), and one of
  who lists and looks at nothing (``walkers``).
* To find that out, attributes of one file in a listing get no validity (``walkers``).
* Extended attributes that are known to be absent are answered from memory (``cache.xattrs``), above
  all ``security.capability``, for which the kernel asks before it writes to a file.

The room for each reply follows from the request (``rooms``). Rewriters get shared memory
that the daemon can still write to. They only ever store the policy's own values at offsets that lie
inside the reply, so a daemon that writes at the same time can spoil nothing but its own reply.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from time import monotonic
from typing import TYPE_CHECKING, Final

from vfsmount.cache.freshness import SIGNATURE_AT, SIGNATURE_SIZE
from vfsmount.cache.policy import IO_SIZE
from vfsmount.client.relay.listings import ListingAges
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, OpenOutFlag

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import TypeAlias

    from vfsmount.cache.freshness import Freshness
    from vfsmount.cache.known_names import KnownNames
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.cache.walkers import Walkers
    from vfsmount.client.relay.memory import SetIdMemory
    from vfsmount.client.relay.unwritten import Unwritten

    #: Puts the policy's values into a reply body: memory, offset there, bytes of body, and the node
    #: that the request named, and the offset of that.
    Rewriter: TypeAlias = Callable[[mmap.mmap, int, int, int, int], None]

__all__ = [
    "FailsHere",
    "TookPart",
    "flags_below_writeback",
    "judge_write_back",
    "negative_entry",
    "reply_rewriters",
]

_IN: Final = fuse.IN_HEADER.size
_ENTRY_VALID: Final = struct.Struct("<QQII")  # entry_out from offset 16: both validities
_ENTRY_VALID_AT: Final = 16
_ATTR_VALID: Final = struct.Struct("<QI")  # attr_out and statx_out from offset 0
_ENTRY: Final = fuse.ENTRY_OUT.size
_ATTR_OUT: Final = fuse.ATTR_OUT.size
_MODE_AT: Final = 76  # of attr_out: 16 and 60
_ENTRY_MODE: Final = struct.Struct("<Q92xI").unpack_from  # entry_out: nodeid, and mode at 100
_U32: Final = struct.Struct("<I")
_PUT_U32: Final = _U32.pack_into
_U16: Final = struct.Struct("<H").unpack_from
#: Offsets of the byte of ``mode`` that has the file's type, and of ``blksize``.
_ENTRY_TYPE_AT: Final = 101
_ENTRY_BLKSIZE_AT: Final = 120
_ATTR_TYPE_AT: Final = 77
_ATTR_BLKSIZE_AT: Final = 96
_STATX_TYPE_AT: Final = 61
_STATX_MODE_AT: Final = 60
_STATX_BLKSIZE_AT: Final = 36
_REGULAR: Final = stat.S_IFREG >> 12
_DIRECTORY: Final = stat.S_IFDIR >> 12
_OPEN_FLAGS_AT: Final = 8
_DIRENTPLUS: Final = _ENTRY + fuse.DIRENT.size
#: Of fuse_direntplus, in one go: nodeid, both validities, signature, blksize and namelen. Field by
#: field an entry takes 0.67 us instead of 0.42.
_LISTED: Final = struct.Struct(f"<Q8x24s8x{SIGNATURE_SIZE}s12xI20xI").unpack_from
_PUT_VALID: Final = struct.Struct("24s").pack_into
#: Within a signature: mode, its byte with the file's type, and the set-id bits of that.
_SIGNED_MODE: Final = struct.Struct("<52xI").unpack_from
_SIGNED_TYPE_AT: Final = 53
_SIGNED_SET_ID: Final = (stat.S_ISUID | stat.S_ISGID) >> 8
_U64: Final = struct.Struct("<Q").unpack_from
_ENTRY_SIGNATURE: Final = 40 + SIGNATURE_AT  # fuse_attr is at 40 of entry_out, at 16 of attr_out
_ATTR_SIGNATURE: Final = 16 + SIGNATURE_AT

#: Open flags that the policy decides; the others (STREAM, NONSEEKABLE, ...) are the daemon's.
#: Plain numbers, all of these: an operation on an IntFlag takes 0.5 us.
_POLICY_FLAGS: Final = int(OpenOutFlag.DIRECT_IO | OpenOutFlag.KEEP_CACHE | OpenOutFlag.CACHE_DIR)
#: Means something only with backing files, which there are none of.
_NEVER_FLAGS: Final = int(OpenOutFlag.PASSTHROUGH)
_NO_FLUSH: Final = int(OpenOutFlag.NOFLUSH)
_WRITE_SIZE_AT: Final = _IN + 16


class FailsHere(Exception):
    """The daemon says that a request has succeeded, and its caller is to be told otherwise.

    Attributes:
        errno: What.
    """

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


class TookPart(Exception):
    """The daemon has written a part of the kernel's pages; the rest is to be sent.

    Attributes:
        count: Bytes that it took.
    """

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} bytes taken")
        self.count = count


def _split(seconds: float) -> tuple[int, int]:
    """Seconds as whole ones and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


def reply_rewriters(
    policy: CachePolicy,
    modes: SetIdMemory | None = None,
    fresh: Freshness | None = None,
    known: KnownNames | None = None,
    unwritten: Unwritten | None = None,
    walkers: Walkers | None = None,
    *,
    no_flush: bool = False,
) -> dict[int, Rewriter]:
    """Return what is to be done to a successful reply, by opcode; most opcodes have nothing.

    Bytes are compared first and stored only when they differ: a daemon in the same cache mode has
    its replies left alone.

    Args:
        policy: The cache policy.
        modes: Is told each mode that passes, where somebody needs to know.
        fresh: Is told the attributes that pass, likewise.
        known: Is told of names that pass one by one, likewise.
        unwritten: Is told of handles that may write, likewise.
        walkers: Is told of names that are looked up where names alone were given, likewise.
        no_flush: No FLUSH is wanted of handles that cannot write.
    """
    learn = _learner(modes, fresh)
    entry = _of_entry(policy, learn, known)
    table: dict[Opcode, Rewriter] = {
        Opcode.OPEN: _of_open(policy, unwritten, no_flush=no_flush),
        Opcode.OPENDIR: _of_opendir(policy),
        **dict.fromkeys((Opcode.CREATE, Opcode.TMPFILE), _of_create(policy, entry, unwritten)),
    }
    if not policy.from_host or modes is not None:
        names = (Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK)
        table |= dict.fromkeys(names, entry)
        if walkers is not None:
            table[Opcode.LOOKUP] = _of_entry(policy, learn, known, walkers)
        attributes = _of_attributes(policy, modes, fresh)
        table |= dict.fromkeys((Opcode.GETATTR, Opcode.SETATTR), attributes)
        table[Opcode.READDIRPLUS] = _of_listing(policy, modes, fresh)
        table[Opcode.STATX] = _of_statx(policy, modes)
    return {int(opcode): rewriter for opcode, rewriter in table.items()}


# --- names and attributes ------------------------------------------------------------------------


def _entry_valid(policy: CachePolicy) -> bytes:
    (entry_s, entry_ns), (attr_s, attr_ns) = (
        _split(policy.entry_timeout),
        _split(policy.attr_timeout),
    )
    return _ENTRY_VALID.pack(entry_s, attr_s, entry_ns, attr_ns)


def _absent_valid(policy: CachePolicy) -> bytes:
    seconds, nanoseconds = _split(policy.negative_timeout)
    return _ENTRY_VALID.pack(seconds, 0, nanoseconds, 0)


def _learner(
    modes: SetIdMemory | None, fresh: Freshness | None
) -> Callable[[mmap.mmap, int], None] | None:
    """Return what looks at the ``fuse_entry_out`` at an offset, None when nobody wants to know."""
    if modes is None and fresh is None:
        return None

    def learn(memory: mmap.mmap, at: int) -> None:
        if modes is not None:
            modes.see(*_ENTRY_MODE(memory, at))
        if fresh is not None:
            start = at + _ENTRY_SIGNATURE
            fresh.gave(_U64(memory, at)[0], memory[start : start + SIGNATURE_SIZE])

    return learn


def _of_entry(
    policy: CachePolicy,
    learn: Callable[[mmap.mmap, int], None] | None,
    known: KnownNames | None,
    walkers: Walkers | None = None,
) -> Rewriter:
    valid, absent_valid, no_node = _entry_valid(policy), _absent_valid(policy), bytes(8)
    from_host = policy.from_host
    told = None if walkers is None else walkers.told

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        if length < _ENTRY:
            return
        if known is not None:
            known.named(nodeid, monotonic())
        start = at + _ENTRY_VALID_AT
        end = start + _ENTRY_VALID.size
        if memory[start:end] != valid and not from_host:
            exists = memory[at : at + 8] != no_node
            memory[start:end] = valid if exists else absent_valid
        if memory[at + _ENTRY_TYPE_AT] >> 4 == _REGULAR and not from_host:
            _PUT_U32(memory, at + _ENTRY_BLKSIZE_AT, IO_SIZE)
        if learn is not None:
            learn(memory, at)
        if told and walkers is not None and nodeid in told and _is_no_directory(memory, at):
            walkers.looked_up(nodeid, monotonic())

    return rewrite


def _is_no_directory(memory: mmap.mmap, at: int) -> bool:
    """Whether the ``fuse_entry_out`` at an offset is of something else than a directory."""
    return bool(_U64(memory, at)[0]) and memory[at + _ENTRY_TYPE_AT] >> 4 != _DIRECTORY


def _of_listing(
    policy: CachePolicy, modes: SetIdMemory | None, fresh: Freshness | None
) -> Rewriter:
    valid, from_host = _entry_valid(policy), policy.from_host
    gave = None if fresh is None else fresh.gave

    def rewrite(memory: mmap.mmap, at: int, length: int, _nodeid: int, _request: int) -> None:
        last = at + length - _DIRENTPLUS
        while at <= last:
            nodeid, told, signature, blksize, name_length = _LISTED(memory, at)
            if not from_host:
                if told != valid:
                    _PUT_VALID(memory, at + _ENTRY_VALID_AT, valid)
                if signature[_SIGNED_TYPE_AT] >> 4 == _REGULAR and blksize != IO_SIZE:
                    _PUT_U32(memory, at + _ENTRY_BLKSIZE_AT, IO_SIZE)
            if modes is not None and signature[_SIGNED_TYPE_AT] & _SIGNED_SET_ID:
                modes.see(nodeid, _SIGNED_MODE(signature)[0])
            if gave is not None:
                gave(nodeid, signature)
            # The length may lie; the kernel then refuses the reply. Each step goes on by 152 at
            # least, so this ends, and stays inside the reply.
            at += (_DIRENTPLUS + name_length + 7) & -8

    return rewrite


def _of_attributes(
    policy: CachePolicy, modes: SetIdMemory | None, fresh: Freshness | None
) -> Rewriter:
    valid, from_host = _ATTR_VALID.pack(*_split(policy.attr_timeout)), policy.from_host

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        if length < _ATTR_OUT:
            return
        if memory[at : at + _ATTR_VALID.size] != valid and not from_host:
            memory[at : at + _ATTR_VALID.size] = valid
        if memory[at + _ATTR_TYPE_AT] >> 4 == _REGULAR and not from_host:
            _PUT_U32(memory, at + _ATTR_BLKSIZE_AT, IO_SIZE)
        if modes is not None:
            modes.see(nodeid, _U32.unpack_from(memory, at + _MODE_AT)[0])
        if fresh is not None:
            start = at + _ATTR_SIGNATURE
            fresh.gave(nodeid, memory[start : start + SIGNATURE_SIZE])

    return rewrite


def _of_statx(policy: CachePolicy, modes: SetIdMemory | None) -> Rewriter:
    valid, from_host = _ATTR_VALID.pack(*_split(policy.attr_timeout)), policy.from_host

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        if length < fuse.STATX_OUT.size:
            return
        if memory[at : at + _ATTR_VALID.size] != valid and not from_host:
            memory[at : at + _ATTR_VALID.size] = valid
        if memory[at + _STATX_TYPE_AT] >> 4 == _REGULAR and not from_host:
            _PUT_U32(memory, at + _STATX_BLKSIZE_AT, IO_SIZE)
        if modes is not None:
            modes.see(nodeid, _U16(memory, at + _STATX_MODE_AT)[0])

    return rewrite


# --- opens ---------------------------------------------------------------------------------------


def _of_open(policy: CachePolicy, unwritten: Unwritten | None, *, no_flush: bool) -> Rewriter:
    put, file_flags = _flag_rewriter(policy), _open_flags(policy)

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, request: int) -> None:
        ours = file_flags
        if unwritten is not None and length >= fuse.OPEN_OUT.size:
            _note_writer(unwritten, memory, at, nodeid, request)
        if no_flush and _U32.unpack_from(memory, request + _IN)[0] & os.O_ACCMODE == os.O_RDONLY:
            ours |= _NO_FLUSH
        put(memory, at, length, ours)

    return rewrite


def _of_opendir(policy: CachePolicy) -> Rewriter:
    put, listings = _flag_rewriter(policy), ListingAges()

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        put(memory, at, length, listings.flags(nodeid, policy, monotonic()))

    return rewrite


def _of_create(policy: CachePolicy, entry: Rewriter, unwritten: Unwritten | None) -> Rewriter:
    put, file_flags = _flag_rewriter(policy), _open_flags(policy)

    def rewrite(memory: mmap.mmap, at: int, length: int, nodeid: int, request: int) -> None:
        entry(memory, at, length, nodeid, request)
        put(memory, at + _ENTRY, length - _ENTRY, file_flags)
        if unwritten is not None and length >= _ENTRY + fuse.OPEN_OUT.size:
            _note_writer(unwritten, memory, at + _ENTRY, _U64(memory, at)[0], request)

    return rewrite


def _flag_rewriter(policy: CachePolicy) -> Callable[[mmap.mmap, int, int, int], None]:
    """Return what puts our flags into a ``fuse_open_out`` of a given length."""
    from_host = policy.from_host

    def put(memory: mmap.mmap, at: int, length: int, ours: int) -> None:
        if length < fuse.OPEN_OUT.size:
            return
        theirs: int = _U32.unpack_from(memory, at + _OPEN_FLAGS_AT)[0]
        flags = theirs & ~_NEVER_FLAGS
        if not from_host:
            flags = (flags & ~_POLICY_FLAGS) | ours
        if flags != theirs:
            _U32.pack_into(memory, at + _OPEN_FLAGS_AT, flags)

    return put


def _note_writer(
    unwritten: Unwritten, memory: mmap.mmap, opened_at: int, nodeid: int, request: int
) -> None:
    """Take note of a handle that was opened or created, if it may write."""
    if _U32.unpack_from(memory, request + _IN)[0] & os.O_ACCMODE != os.O_RDONLY:
        unwritten.opened(nodeid, _U64(memory, opened_at)[0])


def _open_flags(policy: CachePolicy) -> int:
    """The policy's open flags for files, as far as they are the same for all."""
    if policy.direct_io:
        return int(OpenOutFlag.DIRECT_IO)
    return int(OpenOutFlag.KEEP_CACHE) if policy.keep_cache else 0


# --- the rest ------------------------------------------------------------------------------------


def judge_write_back(memory: mmap.mmap, at: int, _length: int, _nodeid: int, request: int) -> None:
    """As a rewriter, of a WRITE of the kernel's own pages (FUSE_WRITE_CACHE).

    Raises:
        TookPart: The daemon took less than all. The kernel heeds only errors there: the rest would
            be lost untold.
        FailsHere: It took nothing, and does not say why.
    """
    (asked,) = _U32.unpack_from(memory, request + _WRITE_SIZE_AT)
    (taken,) = _U32.unpack_from(memory, at)
    if not taken < asked:
        return
    raise TookPart(taken) if taken else FailsHere(errno.ENOSPC)


def negative_entry(policy: CachePolicy) -> bytes | None:
    """Return the body that stands for "no such name, and you may remember it", or None."""
    if not policy.negative_timeout:
        return None
    return (bytes(_ENTRY_VALID_AT) + _absent_valid(policy)).ljust(_ENTRY, b"\0")


def flags_below_writeback(flags: int) -> int:
    """Return the flags with which the daemon opens or creates a file that the kernel writes back.

    The kernel reads around what it writes, and appends by itself: O_APPEND would move its pages.
    virtiofsd does the same by itself when told ``--writeback``, but the Rust one not in CREATE.
    """
    if flags & os.O_ACCMODE == os.O_WRONLY:
        flags = (flags & ~os.O_ACCMODE) | os.O_RDWR
    return flags & ~os.O_APPEND
