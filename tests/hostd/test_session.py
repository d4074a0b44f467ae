"""INIT, cache modes, and the beginning and end of what a guest holds."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import OFFER, ROOT, DirectGuest, expect_errno
from vfsmount.errors import UsageError
from vfsmount.hostd.fs.share import CacheMode, Share, ShareOptions, open_directory
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = InitFlag((1 << 43) - 1) & ~InitFlag.INIT_RESERVED


def flags_for(folder: Path, options: ShareOptions, offer: InitFlag = EVERYTHING) -> InitFlag:
    with Share(folder, options) as share, DirectGuest(share) as guest:
        reply = guest.init(offer)
        return fuse.join_flags(reply.flags, reply.flags2)


def test_init_reply(guest: DirectGuest) -> None:
    reply = guest.init()

    assert (reply.major, reply.minor) == (7, 45)
    assert (reply.max_readahead, reply.time_gran) == (131072, 1)
    assert (reply.max_write, reply.max_pages) == (1 << 20, 256)
    assert reply.map_alignment == reply.max_stack_depth == reply.request_timeout == 0


def test_only_what_was_offered_comes_back(folder: Path) -> None:
    for offer in (InitFlag(0), InitFlag.BIG_WRITES, InitFlag.INIT_EXT, OFFER, EVERYTHING):
        assert flags_for(folder, ShareOptions(), offer) & ~offer == 0


def test_second_word_needs_init_ext(folder: Path) -> None:
    offer = InitFlag.CREATE_SUPP_GROUP | InitFlag.BIG_WRITES
    assert flags_for(folder, ShareOptions(), offer) == InitFlag.BIG_WRITES


def test_without_max_pages_the_old_limit_holds(guest: DirectGuest) -> None:
    reply = guest.init(InitFlag.BIG_WRITES)

    assert (reply.max_write, reply.max_pages) == (131072, 0)


def test_flags_that_are_not_served_yet_are_never_offered(folder: Path) -> None:
    unserved = (
        InitFlag.POSIX_ACL
        | InitFlag.DONT_MASK
        | InitFlag.SECURITY_CTX
        | InitFlag.MAP_ALIGNMENT
        | InitFlag.HANDLE_KILLPRIV
        | InitFlag.NO_OPEN_SUPPORT
        | InitFlag.PASSTHROUGH
        | InitFlag.OVER_IO_URING
        | InitFlag.EXPORT_SUPPORT
    )
    for mode in CacheMode:
        options = ShareOptions(cache=mode, writeback=True)
        assert flags_for(folder, options) & unserved == 0


@pytest.mark.parametrize(
    ("mode", "valid", "file_flags", "dir_flags", "plus"),
    [
        (CacheMode.AUTO, 1, 0, 0, True),
        (CacheMode.ALWAYS, 86400, 0x2, 0xA, True),
        (CacheMode.NEVER, 0, 0x1, 0, False),
        (CacheMode.METADATA, 86400, 0x1, 0xA, True),
    ],
)
def test_cache_modes(
    folder: Path, mode: CacheMode, valid: int, file_flags: int, dir_flags: int, plus: bool
) -> None:
    with Share(folder, ShareOptions(cache=mode)) as share, DirectGuest(share) as guest:
        reply = guest.init()
        flags = fuse.join_flags(reply.flags, reply.flags2)
        made = guest.call(
            Opcode.CREATE, ROOT, fuse.CREATE_IN.values(os.O_RDWR, 0o600, 0, 0) + b"new\0"
        )
        entry, created = made.records
        opened = guest.record(Opcode.OPEN, entry.nodeid, fuse.OPEN_IN.values(0, 0))
        listed = guest.record(Opcode.OPENDIR, ROOT, fuse.OPEN_IN.values(0, 0))
        attr = guest.record(Opcode.GETATTR, ROOT, fuse.GETATTR_IN.values(0, 0))
        listing = [e for e in guest.readdirplus(listed.fh) if e.name == b"new"]
    assert entry.entry_valid == entry.attr_valid == attr.attr_valid == valid
    assert listing[0].entry.entry_valid == valid
    assert created.open_flags == opened.open_flags == file_flags
    assert listed.open_flags == dir_flags
    assert bool(flags & InitFlag.DO_READDIRPLUS) is plus
    assert bool(flags & InitFlag.DIRECT_IO_ALLOW_MMAP) is (mode is CacheMode.NEVER)


@pytest.mark.parametrize(("writeback", "flag"), [(False, 0), (True, InitFlag.WRITEBACK_CACHE)])
def test_writeback_is_a_choice(folder: Path, writeback: bool, flag: int) -> None:
    flags = flags_for(folder, ShareOptions(writeback=writeback))
    assert flags & InitFlag.WRITEBACK_CACHE == flag


def test_versions(guest: DirectGuest) -> None:
    assert guest.init(minor=27).minor == 45
    assert guest.init(minor=99).minor == 45
    with expect_errno("EPROTO"):
        guest.init(minor=26)
    with expect_errno("EPROTO"):
        guest.call(Opcode.INIT, 0, fuse.INIT_IN.values(6, 45, 0, 0, 0))
    newer = guest.record(Opcode.INIT, 0, fuse.INIT_IN.values(8, 0, 0, 0, 0))
    assert (newer.major, newer.flags) == (7, 0)
    with expect_errno("EIO"):  # that was no INIT yet
        guest.getattr(ROOT)


def test_short_init(guest: DirectGuest) -> None:
    reply = guest.record(Opcode.INIT, 0, fuse.INIT_IN_COMPAT.values(7, 31, 4096, 0))
    assert reply.max_readahead == 4096


def test_nothing_is_served_before_init_and_after_destroy(share: Share) -> None:
    with DirectGuest(share) as guest:
        with expect_errno("EIO"):
            guest.lookup(ROOT, b"x")
        guest.forget(7)
        guest.init()
        guest.getattr(ROOT)
        guest.destroy()
        with expect_errno("EIO"):
            guest.getattr(ROOT)


def test_destroy_without_room_for_a_reply(guest: DirectGuest) -> None:
    message = fuse.encode_request(Opcode.DESTROY, 2, 0)
    assert guest.exchange(message, 0) == b""


@pytest.mark.parametrize("end", ["destroy", "init"])
def test_an_end_gives_everything_back(guest: DirectGuest, folder: Path, end: str) -> None:
    (folder / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    nodeid = guest.walk("file")
    fh, dir_fh = guest.open(nodeid), guest.opendir()

    getattr(guest, end)()
    guest.init()

    assert len(os.listdir("/proc/self/fd")) == before
    with expect_errno("EBADF"):
        guest.getattr(nodeid)
    with expect_errno("EBADF"):
        guest.read(fh, 0, 1)
    with expect_errno("EBADF"):
        guest.readdir(dir_fh)
    assert guest.walk("file") != nodeid


def test_interrupts_and_notify_replies_are_not_answered(guest: DirectGuest) -> None:
    interrupt = fuse.encode_request(Opcode.INTERRUPT, 3, 0, fuse.INTERRUPT_IN.values(2))
    reply = fuse.encode_request(Opcode.NOTIFY_REPLY, 5, 1, fuse.NOTIFY_RETRIEVE_IN.values(0, 0))
    for message in (interrupt, reply):
        for room in (0, 100):
            assert guest.exchange(message, room) == b""


@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.BMAP, bytes(16)),
        (Opcode.POLL, bytes(24)),
        (Opcode.SETUPMAPPING, bytes(40)),
        (Opcode.REMOVEMAPPING, bytes(4)),
    ],
)
def test_what_is_not_served_yet(guest: DirectGuest, opcode: Opcode, body: bytes) -> None:
    with expect_errno("ENOSYS"):
        guest.call(opcode, ROOT, body)


def test_two_guests_have_their_own_nodes(share: Share, folder: Path) -> None:
    (folder / "a").touch()
    with DirectGuest(share) as one, DirectGuest(share) as two:
        one.init()
        two.init()
        nodeid = one.walk("a")

        with expect_errno("EBADF"):
            two.getattr(nodeid)
        assert two.walk("a") == nodeid
        one.destroy()
        assert two.getattr(nodeid).nlink == 1


@pytest.mark.parametrize("what", ["missing", "file", "nul\0byte"])
def test_what_cannot_be_shared(folder: Path, what: str) -> None:
    (folder / "file").touch()
    with pytest.raises(UsageError, match="cannot share"):
        Share(folder / what, ShareOptions())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_entered() -> None:
    with tempfile.TemporaryDirectory(prefix="vfsmount-") as name:  # closed to others
        os.seteuid(65534)
        try:
            with pytest.raises(UsageError, match=f"cannot share {name}: Permission denied"):
                open_directory(name)
        finally:
            os.seteuid(0)
