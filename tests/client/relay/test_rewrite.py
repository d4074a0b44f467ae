"""What the relay changes on the way, message by message, without any I/O."""

from __future__ import annotations

import mmap
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.cache.policy import IO_SIZE, CachePolicy
from vfsmount.client.relay.init import Terms, flags_to_withdraw, init_answer, settled_terms
from vfsmount.client.relay.memory import (
    SetIdMemory,
    flags_of_write,
)
from vfsmount.client.relay.rewrite import negative_entry, reply_rewriters
from vfsmount.client.relay.rooms import largest_request, room_for_reply
from vfsmount.client.session import InitFacts
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode, OpenOutFlag

SIZE = 1 << 17
AT = 4016

NONE = CachePolicy.for_mode("none")
AUTO = CachePolicy.for_mode("auto", 1.5)
ALWAYS = CachePolicy.for_mode("always")
HOST = CachePolicy.for_mode("host")

ATTR = fuse.Attr(7, 100, 8, 1, 2, 3, 4, 5, 6, 0o100644, 1, 0, 0, 0, 4096, 0)
LARGE = ATTR._replace(blksize=IO_SIZE)
ENTRY = fuse.EntryOut(42, 0, 86400, 86400, 5, 5, ATTR)


def memory_with(data: bytes, at: int = AT) -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE)
    memory[at : at + len(data)] = data
    return memory


def rewritten(policy: CachePolicy, opcode: Opcode, body: bytes) -> bytes:
    memory = memory_with(body)
    reply_rewriters(policy)[opcode](memory, AT, len(body), 42, AT - 256)
    assert memory[AT + len(body) : AT + len(body) + 64] == bytes(64), "wrote behind the reply"
    assert memory[AT - 64 : AT] == bytes(64), "wrote before the reply"
    return memory[AT : AT + len(body)]


# --- INIT ---


def facts(flags: InitFlag, minor: int = 38) -> InitFacts:
    return InitFacts(minor, flags, 1 << 20, 1 << 20, 1 << 20, 1, 0)


def kernel(flags: InitFlag, minor: int = 45) -> fuse.InitIn:
    return fuse.InitIn(7, minor, 131072, *fuse.split_flags(flags | InitFlag.INIT_EXT))


EVERYTHING = InitFlag(sum(InitFlag))


def told(offered: InitFlag, accepted: InitFlag, policy: CachePolicy = AUTO) -> InitFlag:
    answer = init_answer(kernel(offered), facts(accepted), policy)
    return fuse.join_flags(answer.flags, answer.flags2)


def test_only_what_both_have_reaches_the_kernel() -> None:
    accepted = InitFlag.ASYNC_READ | InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS

    flags = told(InitFlag.ASYNC_READ | InitFlag.POSIX_LOCKS, accepted)

    assert flags & accepted == InitFlag.ASYNC_READ | InitFlag.POSIX_LOCKS


def test_targets_of_links_are_kept_unless_nothing_is() -> None:
    for policy, kept in ((NONE, False), (AUTO, True), (ALWAYS, True), (HOST, False)):
        assert (InitFlag.CACHE_SYMLINKS in told(EVERYTHING, InitFlag(0), policy)) == kept
    assert InitFlag.CACHE_SYMLINKS not in told(EVERYTHING, EVERYTHING, NONE)
    assert InitFlag.CACHE_SYMLINKS in told(EVERYTHING, EVERYTHING, HOST)
    assert InitFlag.CACHE_SYMLINKS not in told(InitFlag(0), EVERYTHING)


def test_what_dev_fuse_cannot_is_hidden() -> None:
    hidden = InitFlag.SUBMOUNTS | InitFlag.MAP_ALIGNMENT | InitFlag.ALLOW_IDMAP
    hidden |= InitFlag.NO_OPEN_SUPPORT | InitFlag.NO_OPENDIR_SUPPORT | InitFlag.PASSTHROUGH

    assert not told(EVERYTHING, EVERYTHING) & hidden


def test_what_the_kernel_can_alone_is_added() -> None:
    flags = told(EVERYTHING, InitFlag(0))

    assert InitFlag.DIRECT_IO_ALLOW_MMAP in flags
    assert InitFlag.MAX_PAGES in flags
    assert not flags & (InitFlag.POSIX_LOCKS | InitFlag.POSIX_ACL | InitFlag.WRITEBACK_CACHE)


KINDS = InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2 | InitFlag.ATOMIC_O_TRUNC


def test_writeback_needs_policy_and_daemon() -> None:
    policy = CachePolicy.for_mode("auto", writeback=True)

    assert InitFlag.WRITEBACK_CACHE in told(EVERYTHING, EVERYTHING, policy)
    assert InitFlag.WRITEBACK_CACHE not in told(EVERYTHING, EVERYTHING, AUTO)
    assert InitFlag.WRITEBACK_CACHE not in told(EVERYTHING, InitFlag(0), policy)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (InitFlag(0), InitFlag.HANDLE_KILLPRIV_V2),
        (InitFlag.HANDLE_KILLPRIV, InitFlag.HANDLE_KILLPRIV | InitFlag.ATOMIC_O_TRUNC),
        (
            InitFlag.HANDLE_KILLPRIV | InitFlag.HANDLE_KILLPRIV_V2,
            InitFlag.HANDLE_KILLPRIV_V2 | InitFlag.ATOMIC_O_TRUNC,
        ),
    ],
)
def test_set_id_bits_are_somebodys_business(accepted: InitFlag, expected: InitFlag) -> None:
    """Where it is not the daemon's it is ours, and an O_TRUNC must be a SETATTR."""
    assert told(EVERYTHING, accepted | InitFlag.ATOMIC_O_TRUNC) & KINDS == expected


def test_an_old_kernel_sees_to_set_id_bits_itself() -> None:
    """But not of what an OPEN truncates."""
    old = EVERYTHING & ~InitFlag.HANDLE_KILLPRIV_V2

    assert told(old, InitFlag.ATOMIC_O_TRUNC) & KINDS == InitFlag(0)


def test_limits_are_the_daemons() -> None:
    answer = init_answer(kernel(EVERYTHING), facts(EVERYTHING), AUTO)

    assert (answer.major, answer.minor) == (7, 38)
    assert answer.max_write == 1 << 20
    assert answer.max_pages == 256
    assert answer.max_readahead == 131072
    assert init_answer(kernel(EVERYTHING, 31), facts(EVERYTHING), AUTO).minor == 31


def test_flags_that_change_requests_are_withdrawn_from_the_daemon() -> None:
    accepted = InitFlag.SETXATTR_EXT | InitFlag.SECURITY_CTX | InitFlag.ASYNC_READ

    assert flags_to_withdraw(EVERYTHING, facts(accepted)) == InitFlag(0)
    assert flags_to_withdraw(InitFlag.SETXATTR_EXT, facts(accepted)) == InitFlag.SECURITY_CTX


def test_the_terms_are_what_both_sides_have_settled() -> None:
    nothing = settled_terms(facts(InitFlag(0)), InitFlag(0))
    assert nothing == Terms(
        max_message=1 << 20,
        clears_set_id=False,
        quiet_flush=True,
        keeps_locks=False,
        heeds_interrupts=False,
    )
    for flag in (InitFlag.HANDLE_KILLPRIV, InitFlag.HANDLE_KILLPRIV_V2):
        assert settled_terms(facts(flag), InitFlag(0)).clears_set_id
    assert settled_terms(facts(fuse.HEEDS_INTERRUPT), InitFlag(0)).heeds_interrupts
    # Of these it counts what the kernel was told: the daemon alone could not use them.
    both = InitFlag.POSIX_LOCKS | InitFlag.WRITEBACK_CACHE
    assert settled_terms(facts(both), InitFlag(0)) == nothing
    told = settled_terms(facts(both), both)
    assert (told.keeps_locks, told.quiet_flush) == (True, False)


def test_reads_are_large_enough_for_the_kernel() -> None:
    assert largest_request(4096) == 8192
    assert largest_request(1 << 20) == (1 << 20) + 80


# --- room for replies ---


def request(opcode: int, body: bytes = b"") -> mmap.mmap:
    return memory_with(fuse.encode_request(opcode, 2, 42, body))


@pytest.mark.parametrize(
    ("opcode", "body", "room"),
    [
        (Opcode.LOOKUP, b"name\0", 144),
        (Opcode.GETATTR, bytes(16), 120),
        (Opcode.OPEN, bytes(8), 32),
        (Opcode.CREATE, bytes(16) + b"name\0", 160),
        (Opcode.WRITE, bytes(40), 24),
        (Opcode.UNLINK, b"name\0", 16),
        (Opcode.READLINK, b"", 16 + 4096),
        (Opcode.READ, fuse.READ_IN.values(1, 0, 5000, 0, 0, 0), 5016),
        (Opcode.READDIRPLUS, fuse.READ_IN.values(1, 0, 32768, 0, 0, 0), 32784),
        (Opcode.GETXATTR, fuse.GETXATTR_IN.values(77) + b"user.x\0", 93),
        (Opcode.GETXATTR, fuse.GETXATTR_IN.values(0) + b"user.x\0", 24),
        (Opcode.LISTXATTR, fuse.GETXATTR_IN.values(0), 24),
        (Opcode.IOCTL, fuse.IOCTL_IN.values(1, 0, 2, 3, 4, 100), 132),
        (Opcode.STATX, bytes(24), 304),
        (Opcode.LSEEK, bytes(24), 24),
        (Opcode.FORGET, bytes(8), 0),
    ],
)
def test_room(opcode: Opcode, body: bytes, room: int) -> None:
    assert room_for_reply(opcode, request(opcode, body), AT) == room


def test_an_opcode_of_the_future_gets_room() -> None:
    for opcode in (7, 60, 99, 4096, 1 << 31):
        assert room_for_reply(opcode, request(opcode), AT) >= 16 + 288


# --- validity and open flags ---


@pytest.mark.parametrize("policy", [NONE, AUTO, ALWAYS], ids=lambda policy: policy.name)
@pytest.mark.parametrize(
    "opcode", [Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK]
)
def test_entries_get_the_policys_validity(policy: CachePolicy, opcode: Opcode) -> None:
    entry = fuse.ENTRY_OUT.unpack(rewritten(policy, opcode, fuse.ENTRY_OUT.pack(ENTRY)))

    assert entry.entry_valid + entry.entry_valid_nsec / 1e9 == policy.entry_timeout
    assert entry.attr_valid + entry.attr_valid_nsec / 1e9 == policy.attr_timeout
    assert (entry.nodeid, entry.attr) == (ENTRY.nodeid, LARGE)


@pytest.mark.parametrize("policy", [NONE, AUTO, ALWAYS], ids=lambda policy: policy.name)
@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.SETATTR])
def test_attributes_get_the_policys_validity(policy: CachePolicy, opcode: Opcode) -> None:
    body = fuse.ATTR_OUT.pack(fuse.AttrOut(86400, 9, ATTR))

    out = fuse.ATTR_OUT.unpack(rewritten(policy, opcode, body))

    assert out.attr_valid + out.attr_valid_nsec / 1e9 == policy.attr_timeout
    assert out.attr == LARGE


def test_a_daemons_own_negative_entry_gets_the_negative_timeout() -> None:
    body = fuse.ENTRY_OUT.pack(ENTRY._replace(nodeid=0))

    entry = fuse.ENTRY_OUT.unpack(rewritten(AUTO, Opcode.LOOKUP, body))

    assert entry.entry_valid + entry.entry_valid_nsec / 1e9 == AUTO.negative_timeout


@pytest.mark.parametrize(
    ("policy", "file", "folder"),
    [
        (NONE, OpenOutFlag.DIRECT_IO, 0),
        (AUTO, 0, 0),
        (ALWAYS, OpenOutFlag.KEEP_CACHE, OpenOutFlag.KEEP_CACHE | OpenOutFlag.CACHE_DIR),
    ],
    ids=["none", "auto", "always"],
)
@pytest.mark.parametrize("theirs", [0, 0x1, 0x2, 0xB])
def test_open_flags(policy: CachePolicy, file: int, folder: int, theirs: int) -> None:
    kept = OpenOutFlag.NONSEEKABLE | OpenOutFlag.NOFLUSH
    body = fuse.OPEN_OUT.values(5, theirs | kept, 0)

    opened = fuse.OPEN_OUT.unpack(rewritten(policy, Opcode.OPEN, body))
    opened_dir = fuse.OPEN_OUT.unpack(rewritten(policy, Opcode.OPENDIR, body))
    created = rewritten(policy, Opcode.CREATE, fuse.ENTRY_OUT.pack(ENTRY) + body)

    assert opened.open_flags == file | kept
    assert opened_dir.open_flags == folder | kept
    assert opened.fh == 5
    assert fuse.OPEN_OUT.unpack(created, fuse.ENTRY_OUT.size) == opened


@pytest.mark.parametrize(
    ("flags", "quiet"),
    [
        (os.O_RDONLY, True),
        (os.O_RDONLY | os.O_NOFOLLOW, True),
        (os.O_RDWR, False),
        (os.O_WRONLY, False),
    ],
)
def test_a_handle_that_cannot_write_wants_no_flush(flags: int, quiet: bool) -> None:
    memory = memory_with(fuse.OPEN_OUT.values(5, 0, 0))
    request = AT - 256
    asked = fuse.OPEN_IN.values(flags, 0)
    memory[request + 40 : request + 40 + len(asked)] = asked

    reply_rewriters(AUTO, no_flush=True)[Opcode.OPEN](memory, AT, 16, 42, request)

    told = fuse.OPEN_OUT.unpack(memory, AT).open_flags
    assert bool(told & fuse.OpenOutFlag.NOFLUSH) is quiet


def test_each_record_of_a_listing_gets_the_policys_validity() -> None:
    names = [b"a", b"seven77", b"eight888", b"x" * 255]
    body = b"".join(
        fuse.encode_direntplus(ENTRY._replace(nodeid=number), 9, number, 8, name)
        for number, name in enumerate(names)
    )

    found = list(fuse.iter_direntplus(rewritten(AUTO, Opcode.READDIRPLUS, body)))

    assert [record.name for record in found] == names
    assert {record.entry.entry_valid for record in found} == {1}
    assert {record.entry.attr_valid_nsec for record in found} == {500_000_000}
    assert {record.entry.attr for record in found} == {LARGE}


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK])
def test_only_files_say_how_they_are_best_read(kind: int) -> None:
    attr = ATTR._replace(mode=kind | 0o777)
    entry = ENTRY._replace(attr=attr)

    found = fuse.ENTRY_OUT.unpack(rewritten(AUTO, Opcode.LOOKUP, fuse.ENTRY_OUT.pack(entry)))
    body = fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr))
    asked = fuse.ATTR_OUT.unpack(rewritten(AUTO, Opcode.GETATTR, body))
    listed = rewritten(AUTO, Opcode.READDIRPLUS, fuse.encode_direntplus(entry, 9, 1, 4, b"name"))
    out = fuse.STATX_OUT.unpack(rewritten(AUTO, Opcode.STATX, statx_reply(kind)))

    (record,) = fuse.iter_direntplus(listed)
    assert found.attr == asked.attr == record.entry.attr == attr
    assert out.stat.blksize == 4096


def test_statx_says_how_files_are_best_read() -> None:
    out = fuse.STATX_OUT.unpack(rewritten(AUTO, Opcode.STATX, statx_reply(stat.S_IFREG)))

    assert (out.attr_valid, out.stat.blksize, out.stat.mode) == (1, IO_SIZE, stat.S_IFREG)


def statx_reply(mode: int) -> bytes:
    blank = fuse.STATX_OUT.unpack(bytes(fuse.STATX_OUT.size))
    return fuse.STATX_OUT.pack(blank._replace(stat=blank.stat._replace(blksize=4096, mode=mode)))


@given(
    opcode=st.sampled_from(sorted(reply_rewriters(NONE))),
    body=st.binary(max_size=700),
    policy=st.sampled_from([NONE, AUTO, ALWAYS]),
)
def test_no_reply_makes_a_rewriter_leave_its_bytes(
    opcode: int, body: bytes, policy: CachePolicy
) -> None:
    rewritten(policy, Opcode(opcode), body)


def test_negative_entry() -> None:
    assert negative_entry(NONE) is None
    body = negative_entry(AUTO)
    assert body is not None
    entry = fuse.ENTRY_OUT.unpack(body)
    assert (entry.nodeid, entry.entry_valid, entry.entry_valid_nsec) == (0, 1, 500_000_000)


# --- set-id bits ---


def test_modes_are_seen_in_all_replies_that_have_them() -> None:
    entry = ENTRY._replace(attr=ATTR._replace(mode=stat.S_IFREG | 0o4755))
    bodies = {
        Opcode.LOOKUP: fuse.ENTRY_OUT.pack(entry),
        Opcode.GETATTR: fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, entry.attr)),
        Opcode.READDIRPLUS: fuse.encode_direntplus(entry, 9, 1, 8, b"name"),
        Opcode.CREATE: fuse.ENTRY_OUT.pack(entry) + fuse.OPEN_OUT.values(1, 0, 0),
        Opcode.STATX: statx_reply(entry.attr.mode),
    }
    for opcode, body in bodies.items():
        for policy in (NONE, CachePolicy.for_mode("host")):
            modes = SetIdMemory()
            reply_rewriters(policy, modes)[opcode](memory_with(body), AT, len(body), 42, AT - 256)
            assert 42 in modes.suspects, opcode.name


def test_who_writes() -> None:
    for flags in (0, fuse.WriteFlag.KILL_SUIDGID, fuse.WriteFlag.CACHE):
        body = fuse.WRITE_IN.values(1, 0, 4, flags, 0, 0) + b"data"
        assert flags_of_write(request(Opcode.WRITE, body), AT) == flags
