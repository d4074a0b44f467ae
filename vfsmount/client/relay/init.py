"""INIT between the kernel and the daemon: what each side is told of the other.

The session has done its INIT with the daemon before there is a mount. The kernel's is answered from
what came out: what the daemon accepted, less what cannot be honoured, plus what concerns the kernel
alone. Where the kernel lacks what the daemon accepted and what changes the bytes of requests, INIT
is repeated with the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, InitIn, InitOut

if TYPE_CHECKING:
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.session import InitFacts

__all__ = ["Terms", "flags_to_withdraw", "init_answer", "settled_terms", "why_no_passthrough"]

PAGE_SIZE: Final = 4096

#: Accepted by both sides or by none, because they change the bytes of requests or who does what:
#: struct sizes, extensions behind names, who masks modes, keeps sizes, and clears set-id bits. With
#: one exception: we have HANDLE_KILLPRIV_V2 where the daemon has not.
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

#: Never told to the kernel because the daemon accepts it: /dev/fuse has no submounts and no DAX; an
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


def why_no_passthrough(offered: InitFlag, facts: InitFacts, policy: CachePolicy) -> str:
    """Return why the kernel cannot read and write files by itself; empty when it can.

    Args:
        offered: What the kernel offers.
        facts: What was settled with the daemon.
        policy: The cache policy.
    """
    if InitFlag.PASSTHROUGH not in offered:
        return "the kernel has no FUSE passthrough (Linux 6.9)"
    if policy.writeback and InitFlag.WRITEBACK_CACHE in facts.flags & offered:
        return "--writeback: the kernel does one or the other"
    if InitFlag.HANDLE_KILLPRIV_V2 not in facts.flags & offered:
        # The kernel would ask for security.capability before each write.
        return "the daemon or the kernel lacks HANDLE_KILLPRIV_V2"
    return ""


def init_answer(
    kernel: InitIn, facts: InitFacts, policy: CachePolicy, *, passthrough: bool = False
) -> InitOut:
    """Return what to tell the kernel: what the daemon accepted, and what we add.

    Args:
        kernel: The kernel's INIT.
        facts: What was settled with the daemon, ``flags_to_withdraw`` heeded.
        policy: The cache policy.
        passthrough: The kernel is to read and write files by itself where it gets backing files.
    """
    offered = fuse.join_flags(kernel.flags, kernel.flags2)
    flags = ((facts.flags & ~HIDDEN_FLAGS) | OWN_FLAGS) & offered
    if not policy.writeback:
        flags &= ~InitFlag.WRITEBACK_CACHE
    if policy.direct_io:
        flags &= ~InitFlag.CACHE_SYMLINKS
    elif not policy.from_host:
        # No host changes a target: another one is another node, found by its name. Where that is
        # valid, the kernel need not ask what it has asked before.
        flags |= InitFlag.CACHE_SYMLINKS & offered
    if InitFlag.HANDLE_KILLPRIV_V2 in flags:
        flags &= ~InitFlag.HANDLE_KILLPRIV
    elif InitFlag.HANDLE_KILLPRIV not in flags:
        # Without, the kernel asks for attributes before each chown, and for security.capability
        # before each write. What the flag promises is done by us (``set_id``). A file that is
        # opened to be truncated is opened like any other first, and checked, then it has a SETATTR.
        flags |= InitFlag.HANDLE_KILLPRIV_V2 & offered
        flags &= ~InitFlag.ATOMIC_O_TRUNC
    if passthrough:
        flags |= InitFlag.PASSTHROUGH
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
        # 1: below a file that is not stacked itself; 2 would keep this mount from being a lower
        # directory of an overlay.
        max_stack_depth=1 if passthrough else 0,
        request_timeout=0,
    )


@dataclass(frozen=True, slots=True)
class Terms:
    """What INIT has settled, as far as the relay has to know it.

    Attributes:
        max_message: Bytes of the largest READ or WRITE.
        clears_set_id: The daemon takes set-id bits off when it is told.
        quiet_flush: A FLUSH means nothing to the daemon but "tell me of errors in writing", and "I
            give my locks up". Then one that says neither is answered by the relay.
        keeps_locks: The daemon has POSIX locks of ours.
        heeds_interrupts: The daemon ends a wait for a lock when it is told to, on the hiprio queue.
    """

    max_message: int
    clears_set_id: bool
    quiet_flush: bool
    keeps_locks: bool
    heeds_interrupts: bool

    @property
    def quiet_reads(self) -> bool:
        """Whether a handle for reading needs no FLUSH."""
        return self.quiet_flush and not self.keeps_locks


def settled_terms(facts: InitFacts, told: InitFlag) -> Terms:
    """Return the terms.

    Args:
        facts: What was settled with the daemon.
        told: The flags that the kernel was told.
    """
    clears = InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2
    return Terms(
        max_message=max(facts.max_write, facts.max_read),
        clears_set_id=bool(facts.flags & clears),
        quiet_flush=InitFlag.WRITEBACK_CACHE not in told,  # which a FLUSH ends
        keeps_locks=InitFlag.POSIX_LOCKS in told,
        heeds_interrupts=fuse.HEEDS_INTERRUPT in facts.flags,
    )
