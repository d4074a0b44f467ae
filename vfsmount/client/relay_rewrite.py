"""What the relay changes in the messages that it hands on, and what it must know of their shapes.

A FUSE request of the kernel is a virtio-fs message as it stands, and so is the reply; this file is
the complete list of exceptions:

* INIT is answered here: the session has done its own with the daemon (``init_answer``).
* Validity times and open flags in replies become those of the cache policy (``reply_rewriters``),
  except in mode ``host``.
* Validity times and open flags in replies become those of the cache policy (``reply_rewriters``).
* A handle that cannot write wants no FLUSH, and one that has written nothing gets none, where the
  daemon has no locks to give up at a FLUSH.
* "No such name" becomes a negative entry where the policy remembers absence (``negative_entry``).
* Set-id bits are taken off before a write that must clear them, where the daemon will not
  (``SetIdMemory``).
* Below the kernel's write-back a file is opened readable and not for appending
  (``flags_below_writeback``).
* An unlock that may wait (SETLKW) becomes one that may not (SETLK).
* CREATE goes without O_CREAT, which it implies: virtiofsd (C) would pass it to openat(2) without a
  mode, and abort, when the file exists already, as it may while the kernel remembers its absence.
* ``security.capability``, for which the kernel asks before each write, is answered from memory once
  it is known to be absent (``CapabilityMemory``).

The room for each reply follows from the request (``room_for_reply``). Rewriters get shared memory
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
from vfsmount.cache.policy import FOREVER
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, InitIn, InitOut, Opcode, OpenOutFlag

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from typing import TypeAlias

    from vfsmount.cache.freshness import Freshness
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.session import InitFacts

    #: Puts the policy's values into a reply body: memory, offset there, bytes of body, and the node
    #: that the request named, and the offset of that.
    Rewriter: TypeAlias = Callable[[mmap.mmap, int, int, int, int], None]

__all__ = [
    "CapabilityMemory",
    "SetIdMemory",
    "asks_for_capability",
    "flags_below_writeback",
    "flags_to_withdraw",
    "init_answer",
    "largest_request",
    "negative_entry",
    "reply_rewriters",
    "room_for_reply",
    "small_rooms",
    "wants_set_id_cleared",
]

PAGE_SIZE: Final = 4096
_IN: Final = fuse.IN_HEADER.size
_OUT: Final = fuse.OUT_HEADER.size

# --- INIT ----------------------------------------------------------------------------------------

#: Accepted by both sides or by none, because they change the bytes of requests or who does what:
#: struct sizes, extensions behind names, who masks modes, keeps sizes, and clears set-id bits.
SHARED_FLAGS: Final = (
    InitFlag.SETXATTR_EXT
    | InitFlag.SECURITY_CTX
    | InitFlag.CREATE_SUPP_GROUP
    | InitFlag.DONT_MASK
    | InitFlag.POSIX_ACL
    | InitFlag.HANDLE_KILLPRIV
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.WRITEBACK_CACHE
)

#: Never told to the kernel, whatever the daemon accepts: /dev/fuse has no submounts and no DAX; an
#: OPEN answered with ENOSYS by accident would end all opens; idmapped ids need a daemon that knows.
HIDDEN_FLAGS: Final = (
    InitFlag.SUBMOUNTS
    | InitFlag.MAP_ALIGNMENT
    | InitFlag.HAS_INODE_DAX
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.ALLOW_IDMAP
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.HAS_RESEND
    | InitFlag.OVER_IO_URING
    | InitFlag.PASSTHROUGH
    | InitFlag.REQUEST_TIMEOUT
)

#: Between the kernel and us alone; the daemon never notices. ABORT_ERROR tells an aborted
#: connection from an unmounted one. DIRECT_IO_ALLOW_MMAP lets mode "none" map files.
OWN_FLAGS: Final = (
    InitFlag.ABORT_ERROR
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.BIG_WRITES
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | InitFlag.HAS_EXPIRE_ONLY
    | InitFlag.INIT_EXT
    | InitFlag.MAX_PAGES
)

#: Requests that the kernel sends at once without somebody waiting (read-ahead, write-back); its own
#: choice, 12, is too few to keep a pipe of 1 MiB messages full. Congestion as the kernel: 3/4.
MAX_BACKGROUND: Final = 64


def flags_to_withdraw(offered: InitFlag, facts: InitFacts) -> InitFlag:
    """Return what the daemon must not accept because the kernel does not know it.

    When this is not empty, INIT has to be repeated with the daemon, without these flags.

    Args:
        offered: What the kernel offers.
        facts: What was settled with the daemon.
    """
    return facts.flags & SHARED_FLAGS & ~offered


def init_answer(kernel: InitIn, facts: InitFacts, policy: CachePolicy) -> InitOut:
    """Return what to tell the kernel: what the daemon accepted, and what we add.

    Args:
        kernel: The kernel's INIT.
        facts: What was settled with the daemon, ``flags_to_withdraw`` heeded.
        policy: The cache policy.
    """
    offered = fuse.join_flags(kernel.flags, kernel.flags2)
    flags = ((facts.flags & ~HIDDEN_FLAGS) | OWN_FLAGS) & offered
    if not policy.writeback:
        flags &= ~InitFlag.WRITEBACK_CACHE
    if InitFlag.HANDLE_KILLPRIV_V2 in flags:
        flags &= ~InitFlag.HANDLE_KILLPRIV
    elif InitFlag.HANDLE_KILLPRIV not in flags:
        # The kernel clears set-id bits itself then, but not of what an OPEN truncates.
        flags &= ~InitFlag.ATOMIC_O_TRUNC
    flags1, flags2 = fuse.split_flags(flags)
    max_pages = facts.max_read // PAGE_SIZE
    return InitOut(
        major=fuse.KERNEL_VERSION,
        minor=min(kernel.minor, facts.minor),
        max_readahead=min(kernel.max_readahead, facts.max_read),
        flags=flags1,
        max_background=MAX_BACKGROUND,
        congestion_threshold=MAX_BACKGROUND * 3 // 4,
        max_write=facts.max_write,
        time_gran=facts.time_gran,
        max_pages=min(max_pages, 0xFFFF) if InitFlag.MAX_PAGES in flags else 0,
        map_alignment=0,
        flags2=flags2,
        max_stack_depth=0,
        request_timeout=0,
    )


def largest_request(max_write: int) -> int:
    """Return the bytes that a read(2) of the device must have room for (``fuse_dev_do_read``)."""
    return max(_IN + fuse.WRITE_IN.size + max_write, 2 * PAGE_SIZE)


# --- room for replies ----------------------------------------------------------------------------

#: Codes in ``ROOMS`` for replies whose size the request names: it is at this offset of the body.
_NAMED_SIZE: Final = {
    Opcode.READ: 16,
    Opcode.READDIR: 16,
    Opcode.READDIRPLUS: 16,
    Opcode.GETXATTR: 0,
    Opcode.LISTXATTR: 0,
    Opcode.IOCTL: 28,
}
#: What a request without known reply gets: room for the largest struct and then some. A kernel
#: newer than this file sends such opcodes; the daemon judges them.
_UNKNOWN_ROOM: Final = _OUT + PAGE_SIZE
_SIZE: Final = struct.Struct("<I").unpack_from


def _rooms() -> list[int]:
    """Bytes of reply, header included, by opcode; negative: the offset where the size stands."""
    rooms = [_UNKNOWN_ROOM] * (max(Opcode.COPY_FILE_RANGE_64, 63) + 1)
    for opcode, operation in fuse.OPERATIONS.items():
        room = _OUT + sum(codec.size for codec in operation.reply)
        if not operation.has_reply:
            room = 0
        elif opcode in _NAMED_SIZE:
            room = -(_IN + _NAMED_SIZE[opcode])
        elif opcode == Opcode.READLINK:
            room += fuse.PATH_MAX
        rooms[opcode] = room
    return rooms


_ROOMS: Final = _rooms()
#: What is in the reply besides the bytes that the request names.
_FIXED: Final = {int(Opcode.IOCTL): _OUT + fuse.IOCTL_OUT.size}


def small_rooms(limit: int) -> dict[int, int]:
    """Return the room of each opcode whose reply is always the same and at most ``limit`` bytes."""
    return {opcode: room for opcode, room in enumerate(_ROOMS) if 0 < room <= limit}


def room_for_reply(opcode: int, memory: mmap.mmap, at: int) -> int:
    """Return the bytes that the reply may have, its header included; 0 when there is none.

    READ gets exactly 16 more than it asks for: virtiofsd (Rust) refuses anything else, the C one
    fills whatever there is.

    Args:
        opcode: FUSE opcode.
        memory: Shared memory.
        at: Where the request begins there.
    """
    room = _ROOMS[opcode] if opcode < len(_ROOMS) else _UNKNOWN_ROOM
    if room >= 0:
        return room
    size: int = _SIZE(memory, at - room)[0]
    if size == 0 and opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        return _OUT + fuse.GETXATTR_OUT.size
    return size + _FIXED.get(opcode, _OUT)


# --- replies -------------------------------------------------------------------------------------

_ENTRY_VALID: Final = struct.Struct("<QQII")  # entry_out from offset 16: both validities
_ENTRY_VALID_AT: Final = 16
_ATTR_VALID: Final = struct.Struct("<QI")  # attr_out and statx_out from offset 0
_ENTRY: Final = fuse.ENTRY_OUT.size
_ATTR_OUT: Final = fuse.ATTR_OUT.size
_MODE_AT: Final = 76  # of attr_out: 16 and 60
_ENTRY_MODE: Final = struct.Struct("<Q92xI").unpack_from  # entry_out: nodeid, and mode at 100
_U32: Final = struct.Struct("<I")
_OPEN_FLAGS_AT: Final = 8
_DIRENTPLUS: Final = _ENTRY + fuse.DIRENT.size
_NAME_LENGTH: Final = struct.Struct("<I").unpack_from
_NAME_LENGTH_AT: Final = _ENTRY + 16
_NODEID: Final = struct.Struct("<Q").unpack_from
_ENTRY_SIGNATURE: Final = 40 + SIGNATURE_AT  # fuse_attr is at 40 of entry_out, at 16 of attr_out
_ATTR_SIGNATURE: Final = 16 + SIGNATURE_AT

#: Open flags that the policy decides; the others (STREAM, NONSEEKABLE, ...) are the daemon's.
_POLICY_FLAGS: Final = OpenOutFlag.DIRECT_IO | OpenOutFlag.KEEP_CACHE | OpenOutFlag.CACHE_DIR
#: Means something only with backing files, which there are none of.
_NEVER_FLAGS: Final = OpenOutFlag.PASSTHROUGH


def _split(seconds: float) -> tuple[int, int]:
    """Seconds as whole ones and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


def reply_rewriters(
    policy: CachePolicy,
    modes: SetIdMemory | None = None,
    fresh: Freshness | None = None,
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
        no_flush: No FLUSH is wanted of handles that cannot write.
    """
    (entry_s, entry_ns), (attr_s, attr_ns) = (
        _split(policy.entry_timeout),
        _split(policy.attr_timeout),
    )
    entry_valid = _ENTRY_VALID.pack(entry_s, attr_s, entry_ns, attr_ns)
    attr_valid = _ATTR_VALID.pack(attr_s, attr_ns)
    absent_s, absent_ns = _split(policy.negative_timeout)
    absent_valid = _ENTRY_VALID.pack(absent_s, 0, absent_ns, 0)
    no_node = bytes(8)
    file_flags = _open_flags(policy)
    from_host = policy.from_host
    listings = ListingAges()

    def learn(memory: mmap.mmap, at: int) -> None:
        if modes is not None:
            modes.see(*_ENTRY_MODE(memory, at))
        if fresh is not None:
            start = at + _ENTRY_SIGNATURE
            fresh.gave(_NODEID(memory, at)[0], memory[start : start + SIGNATURE_SIZE])

    def entry(memory: mmap.mmap, at: int, length: int, _nodeid: int, _request: int) -> None:
        if length < _ENTRY:
            return
        start = at + _ENTRY_VALID_AT
        end = start + _ENTRY_VALID.size
        if memory[start:end] != entry_valid and not from_host:
            exists = memory[at : at + 8] != no_node
            memory[start:end] = entry_valid if exists else absent_valid
        learn(memory, at)

    def attr(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        if length < _ATTR_OUT:
            return
        if memory[at : at + _ATTR_VALID.size] != attr_valid and not from_host:
            memory[at : at + _ATTR_VALID.size] = attr_valid
        if modes is not None:
            modes.see(nodeid, _U32.unpack_from(memory, at + _MODE_AT)[0])
        if fresh is not None:
            start = at + _ATTR_SIGNATURE
            fresh.gave(nodeid, memory[start : start + SIGNATURE_SIZE])

    def statx(memory: mmap.mmap, at: int, length: int, _nodeid: int, _request: int) -> None:
        if length >= _ATTR_VALID.size and memory[at : at + _ATTR_VALID.size] != attr_valid:
            memory[at : at + _ATTR_VALID.size] = attr_valid

    def opened(memory: mmap.mmap, at: int, length: int, ours: int) -> None:
        if length < fuse.OPEN_OUT.size:
            return
        theirs: int = _U32.unpack_from(memory, at + _OPEN_FLAGS_AT)[0]
        flags = theirs & ~_NEVER_FLAGS
        if not from_host:
            flags = (flags & ~_POLICY_FLAGS) | ours
        if flags != theirs:
            _U32.pack_into(memory, at + _OPEN_FLAGS_AT, flags)

    def opened_file(memory: mmap.mmap, at: int, length: int, _nodeid: int, request: int) -> None:
        ours = file_flags
        if no_flush and _U32.unpack_from(memory, request + _IN)[0] & os.O_ACCMODE == os.O_RDONLY:
            ours |= OpenOutFlag.NOFLUSH
        opened(memory, at, length, ours)

    def opened_dir(memory: mmap.mmap, at: int, length: int, nodeid: int, _request: int) -> None:
        opened(memory, at, length, listings.flags(nodeid, policy, monotonic()))

    def created(memory: mmap.mmap, at: int, length: int, nodeid: int, request: int) -> None:
        entry(memory, at, length, nodeid, request)
        opened(memory, at + _ENTRY, length - _ENTRY, file_flags)

    def listed(memory: mmap.mmap, at: int, length: int, _nodeid: int, _request: int) -> None:
        end = at + length
        while at + _DIRENTPLUS <= end:
            start = at + _ENTRY_VALID_AT
            if memory[start : start + _ENTRY_VALID.size] != entry_valid and not from_host:
                memory[start : start + _ENTRY_VALID.size] = entry_valid
            learn(memory, at)
            # The length may lie; the kernel then refuses the reply. Each step goes on by 152 at
            # least, so this ends, and stays inside the reply.
            at += (_DIRENTPLUS + _NAME_LENGTH(memory, at + _NAME_LENGTH_AT)[0] + 7) & -8

    table: dict[Opcode, Rewriter] = {Opcode.OPEN: opened_file, Opcode.OPENDIR: opened_dir}
    table |= dict.fromkeys((Opcode.CREATE, Opcode.TMPFILE), created)
    if not from_host or modes is not None:
        names = (Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK)
        table |= dict.fromkeys(names, entry)
        table |= dict.fromkeys((Opcode.GETATTR, Opcode.SETATTR), attr)
        table[Opcode.READDIRPLUS] = listed
    if not from_host:
        table[Opcode.STATX] = statx
    return {int(opcode): rewriter for opcode, rewriter in table.items()}


def _open_flags(policy: CachePolicy) -> int:
    """The policy's open flags for files, as far as they are the same for all."""
    if policy.direct_io:
        return OpenOutFlag.DIRECT_IO
    return OpenOutFlag.KEEP_CACHE if policy.keep_cache else OpenOutFlag(0)


class ListingAges:
    """When the kernel began to keep the listing of each directory; bounded."""

    __slots__ = ("_since",)
    _LIMIT: Final = 1 << 14

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def flags(self, nodeid: int, policy: CachePolicy, now: float) -> int:
        """Return the open flags of a directory that is opened at ``now`` seconds."""
        if not policy.dir_timeout:
            return 0
        if policy.dir_timeout == FOREVER:
            return OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE
        since = self._since.get(nodeid)
        if policy.keeps_listing(None if since is None else now - since):
            return OpenOutFlag.CACHE_DIR | OpenOutFlag.KEEP_CACHE
        self._since.pop(nodeid, None)
        self._since[nodeid] = now
        if len(self._since) > self._LIMIT:
            del self._since[next(iter(self._since))]
        return OpenOutFlag.CACHE_DIR


def negative_entry(policy: CachePolicy) -> bytes | None:
    """Return the body that stands for "no such name, and you may remember it", or None."""
    if not policy.negative_timeout:
        return None
    seconds, nanoseconds = _split(policy.negative_timeout)
    body = bytearray(_ENTRY)
    _ENTRY_VALID.pack_into(body, _ENTRY_VALID_AT, seconds, 0, nanoseconds, 0)
    return bytes(body)


def flags_below_writeback(flags: int) -> int:
    """Return the flags with which the daemon opens or creates a file that the kernel writes back.

    The kernel reads around what it writes, and appends by itself: O_APPEND would move its pages.
    virtiofsd does the same by itself when told ``--writeback``, but the Rust one not in CREATE.
    """
    if flags & os.O_ACCMODE == os.O_WRONLY:
        flags = (flags & ~os.O_ACCMODE) | os.O_RDWR
    return flags & ~os.O_APPEND


# --- set-id bits ---------------------------------------------------------------------------------

_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_WRITE_FLAGS_AT: Final = _IN + 20


def wants_set_id_cleared(memory: mmap.mmap, at: int) -> bool:
    """Whether the WRITE at ``at`` comes from somebody whose writing clears set-id bits."""
    flags: int = _U32.unpack_from(memory, at + _WRITE_FLAGS_AT)[0]
    return bool(flags & fuse.WriteFlag.KILL_SUIDGID)


class SetIdMemory:
    """Which files have set-id bits that somebody's write would clear, as last seen.

    The kernel leaves that to the daemon for direct writes, even to one without HANDLE_KILLPRIV_V2,
    and virtiofsd (Rust) then does nothing. So the bits are taken off before such a write is passed
    on. Nearly always there is nothing here.
    """

    __slots__ = ("_modes",)

    def __init__(self) -> None:
        self._modes: dict[int, int] = {}

    def see(self, nodeid: int, mode: int) -> None:
        """The daemon says so of a node."""
        if mode & _SET_ID and stat.S_ISREG(mode):
            self._modes[nodeid] = mode
        elif self._modes:
            self._modes.pop(nodeid, None)

    def drop(self, nodeid: int) -> None:
        """The node is forgotten."""
        if self._modes:
            self._modes.pop(nodeid, None)

    def mode_to_set(self, nodeid: int) -> int | None:
        """Return the mode that a write leaves (``file_remove_privs``), None when that is the same.

        It counts as set from now on.
        """
        mode = self._modes.pop(nodeid, None)
        if mode is None:
            return None
        kept = mode & ~stat.S_ISUID
        if kept & stat.S_IXGRP:  # without, sgid means mandatory locking and stays
            kept &= ~stat.S_ISGID
        return stat.S_IMODE(kept) if kept != mode else None


# --- security.capability -------------------------------------------------------------------------

_CAPABILITY: Final = b"security.capability\0"
_XATTR_NAME_AT: Final = _IN + fuse.GETXATTR_IN.size


def asks_for_capability(memory: mmap.mmap, at: int, size: int) -> bool:
    """Whether the GETXATTR of ``size`` bytes at ``at`` is about ``security.capability``."""
    return (
        size == _XATTR_NAME_AT + len(_CAPABILITY)
        and memory[at + _XATTR_NAME_AT : at + size] == _CAPABILITY
    )


class CapabilityMemory:
    """Which nodes are known to have no ``security.capability``, and until when.

    Without HANDLE_KILLPRIV_V2 the kernel asks before each write: a write of 4 KiB took 101 us, and
    41 with this. An answer holds as long as attributes do. No entry outlives the kernel's knowledge
    of its node, so there are never more of them than nodes.

    Args:
        seconds: How long attributes are valid; 0 remembers nothing.
    """

    __slots__ = ("_seconds", "_until")

    #: What the kernel is told.
    errno = errno.ENODATA

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[int, float] = {}

    def __len__(self) -> int:
        """Nodes that are remembered, expired ones included."""
        return len(self._until)

    def is_absent(self, nodeid: int, now: float) -> bool:
        """Whether the node is known to have none at ``now`` seconds."""
        until = self._until.get(nodeid)
        if until is None:
            return False
        if now < until:
            return True
        del self._until[nodeid]
        return False

    def note_absent(self, nodeid: int, now: float) -> None:
        """The daemon has said so, to a question that was asked at ``now`` seconds."""
        if self._seconds:
            self._until[nodeid] = now + self._seconds

    def drop(self, nodeid: int) -> None:
        """An attribute of the node is being changed, or the node is forgotten."""
        if self._until:
            self._until.pop(nodeid, None)
