"""Listing directories: everything once, whole records, and cookies that hold under change."""

from __future__ import annotations

import os
import resource
import stat
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfsmount.wire.fuse import DirEntry, DirEntryPlus

#: A page, which is what guests ask for; and less than two of the longest names.
SIZES = [280, 512, 4096, 65536]


def listing(guest: DirectGuest, fh: int, size: int = 4096) -> Iterator[DirEntry]:
    cookie = 0
    while entries := guest.readdir(fh, cookie, size):
        yield from entries
        cookie = entries[-1].off


def listing_plus(guest: DirectGuest, fh: int, size: int = 4096) -> Iterator[DirEntryPlus]:
    cookie = 0
    while entries := guest.readdirplus(fh, cookie, size):
        yield from entries
        cookie = entries[-1].off


def names(entries: Iterator[DirEntry] | Iterator[DirEntryPlus]) -> list[bytes]:
    return sorted(entry.name for entry in entries)


@pytest.fixture
def many(folder: Path) -> list[bytes]:
    """Many names of all lengths, and what a listing must show."""
    made = [b"%04d" % number + b"n" * (number % 252) for number in range(600)]
    for name in made:
        with open(os.fsencode(folder) + b"/" + name, "wb"):
            pass
    return sorted([b".", b"..", *made])


def test_empty_directory(guest: DirectGuest, folder: Path) -> None:
    entries = list(listing(guest, guest.opendir()))

    assert [entry.type for entry in entries] == [stat.S_IFDIR >> 12] * 2
    assert {entry.name: entry.ino for entry in entries} == {
        b".": folder.stat().st_ino,
        b"..": folder.stat().st_ino,  # what is above is not shown
    }


@pytest.mark.parametrize("size", SIZES)
def test_every_name_once(guest: DirectGuest, many: list[bytes], size: int) -> None:
    fh = guest.opendir()

    assert names(listing(guest, fh, size)) == many
    assert names(listing(guest, fh, size)) == many, "and again from the start"


@pytest.mark.parametrize("size", [440, 4096, 65536])
def test_every_name_once_with_attributes(guest: DirectGuest, many: list[bytes], size: int) -> None:
    assert names(listing_plus(guest, guest.opendir(), size)) == many


def test_types_and_numbers(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    (folder / "dir").mkdir()
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")

    for entry in listing(guest, guest.opendir()):
        if entry.name not in (b".", b".."):
            info = (folder / entry.name.decode()).lstat()
            assert (entry.ino, entry.type) == (info.st_ino, info.st_mode >> 12)


def test_attributes_are_those_of_lookup(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").write_text("hello")
    (folder / "dir").mkdir()

    for entry in listing_plus(guest, guest.opendir()):
        if entry.name in (b".", b".."):
            assert entry.entry.nodeid == 0
            continue
        found = guest.lookup(ROOT, entry.name)
        assert found == entry.entry
        assert (entry.ino, entry.type) == (found.attr.ino, found.attr.mode >> 12)


def test_lookup_counts_of_a_listing(guest: DirectGuest, folder: Path) -> None:
    for number in range(50):
        (folder / str(number)).touch()
    fh = guest.opendir()
    before = len(os.listdir("/proc/self/fd"))

    first = [e.entry.nodeid for e in listing_plus(guest, fh) if e.entry.nodeid]
    second = [e.entry.nodeid for e in listing_plus(guest, fh, 500) if e.entry.nodeid]
    assert sorted(first) == sorted(second)
    guest.batch_forget(*[(nodeid, 1) for nodeid in first])
    assert len(guest.session.inodes) == 51
    guest.batch_forget(*[(nodeid, 1) for nodeid in second])

    assert len(guest.session.inodes) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_cookie_can_be_returned_to(guest: DirectGuest, many: list[bytes]) -> None:
    fh = guest.opendir()
    entries = list(listing(guest, fh, 65536))

    for at in (0, 1, 17, 300, len(entries) - 2):
        after = guest.readdir(fh, entries[at].off, 65536)
        assert after[0] == entries[at + 1]
    assert guest.readdir(fh, entries[-1].off) == []


def test_cookies_hold_on_another_handle(guest: DirectGuest, many: list[bytes]) -> None:
    entries = list(listing(guest, guest.opendir()))
    other = guest.opendir()

    assert guest.readdir(other, entries[99].off)[0] == entries[100]


def test_names_that_stay_are_listed_once_while_others_come_and_go(
    guest: DirectGuest, folder: Path, many: list[bytes]
) -> None:
    fh = guest.opendir()
    seen = [entry.name for entry in guest.readdir(fh)]
    cookie = guest.readdir(fh)[-1].off
    removed = [name for name in many if name not in seen][::2]
    for name in removed:
        os.unlink(os.fsencode(folder) + b"/" + name)
    for number in range(100):
        (folder / f"fresh{number}").touch()
    while entries := guest.readdir(fh, cookie):
        seen += [entry.name for entry in entries]
        cookie = entries[-1].off

    assert len(seen) == len(set(seen))
    assert set(many) - set(removed) <= set(seen)


def test_rewinding_shows_what_is_new(guest: DirectGuest, folder: Path) -> None:
    fh = guest.opendir()
    list(listing(guest, fh))
    (folder / "new").touch()

    assert b"new" in names(listing(guest, fh))


def test_name_removed_while_it_is_listed(guest: DirectGuest, folder: Path) -> None:
    (folder / "a").touch()
    (folder / "b").touch()
    fh = guest.opendir()
    first = guest.readdirplus(fh, 0, 160)  # one entry; the rest has been read from the host
    (folder / "a").unlink()
    (folder / "b").unlink()

    rest = guest.readdirplus(fh, first[-1].off)

    nodeids = {entry.name: entry.entry.nodeid for entry in rest}
    assert nodeids.get(b"a", 0) == nodeids.get(b"b", 0) == 0


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
def test_room_for_less_than_one_entry(guest: DirectGuest, opcode: Opcode) -> None:
    fh = guest.opendir()
    for size, room in ((24, 4096), (0, 4096), (4096, 16 + 24)):
        body = fuse.READ_IN.values(fh, 0, size, 0, 0, 0)
        with expect_errno("EINVAL"):
            guest.call(opcode, ROOT, body, room=room)


def test_reply_is_bounded_by_the_room_for_it(guest: DirectGuest, many: list[bytes]) -> None:
    body = fuse.READ_IN.values(guest.opendir(), 0, 2**32 - 1, 0, 0, 0)

    reply = guest.call(Opcode.READDIRPLUS, ROOT, body, room=1000)

    assert 0 < len(list(fuse.iter_direntplus(bytes(reply.data)))) < 7


@pytest.mark.parametrize("cookie", [2**63, 2**64 - 1])
def test_cookies_that_cannot_be(guest: DirectGuest, cookie: int) -> None:
    with expect_errno("EINVAL"):
        guest.readdir(guest.opendir(), cookie)


def test_opendir_of_a_file(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    os.mkfifo(folder / "fifo")
    for name in ("file", "fifo"):
        with expect_errno("ENOTDIR"):
            guest.opendir(guest.walk(name))


def test_no_name_is_lost_when_descriptors_run_out(guest: DirectGuest, folder: Path) -> None:
    for number in range(100):
        (folder / str(number)).touch()
    fh = guest.opendir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/", os.O_PATH)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 10, hard))
    try:
        entries = list(listing_plus(guest, fh))
        with expect_errno("EMFILE"):
            held = {entry.name for entry in entries if entry.entry.nodeid}
            guest.lookup(ROOT, next(e.name for e in entries if e.name not in held | {b".", b".."}))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert len({entry.name for entry in entries}) == 102
    assert 0 < sum(entry.entry.nodeid != 0 for entry in entries) < 100
