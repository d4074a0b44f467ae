"""Listings: complete, of any length, and sane while the directory changes."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contract.session_tree import SessionTree
from tests.contract.steps import put
from tests.contract.trees import PathTree

if TYPE_CHECKING:
    import vfsmount
    from tests.contract.conftest import Site
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin
    from vfsmount.wire import fuse


def test_empty_directory(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))
    assert twin.same(lambda tree: tree.listdir(b"d")) == []


def test_types_in_listing(twin: Twin) -> None:
    def make(tree: Tree) -> list[tuple[bytes, int]]:
        put(tree, b"file")
        tree.mkdir(b"directory")
        tree.symlink(b"file", b"symlink")
        tree.mknod(b"fifo", stat.S_IFIFO | 0o600)
        tree.mknod(b"socket", stat.S_IFSOCK | 0o600)
        return tree.listdir()

    assert len(twin.same(make)) == 5


def test_listing_follows_changes(twin: Twin) -> None:
    def change(tree: Tree) -> list[list[tuple[bytes, int]]]:
        listings = [tree.listdir()]
        for name in (b"a", b"b", b"c"):
            put(tree, name)
        listings.append(tree.listdir())
        tree.unlink(b"b")
        tree.rename(b"c", b"d")
        listings.append(tree.listdir())
        return listings

    assert [len(listing) for listing in twin.same(change)] == [0, 3, 2]


def test_listing_errors(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))

    twin.fails("ENOTDIR", lambda tree: tree.listdir(b"file"), "list a file")
    twin.fails("ENOENT", lambda tree: tree.listdir(b"nothing"))


def test_a_thousand_entries_of_long_names(twin: Twin) -> None:
    """Many requests for one listing: 1000 names of 200 bytes do not fit into one reply."""

    def make(tree: Tree) -> list[tuple[bytes, int]]:
        for number in range(1000):
            tree.mknod(b"%04d" % number + b"x" * 196, stat.S_IFREG | 0o600)
        return tree.listdir()

    assert len(twin.same(make)) == 1000


@pytest.mark.slow
@pytest.mark.only("session", "none")
def test_a_hundred_thousand_entries(site: Site, twin: Twin) -> None:
    """All of them; by pyfuse3 as many as the daemon can know at once.

    pyfuse3 lists with READDIRPLUS only, where each name comes with a node, which costs every daemon
    a descriptor until the kernel forgets it. Where a daemon may have fewer, there are fewer names.
    """
    count = 100_000
    if site.way.startswith("pyfuse3"):
        count = min(count, site.daemon.fd_limit() // 2)  # the next tests need some, too
    folder = twin.shared.path(b"d")
    os.mkdir(folder)
    for number in range(count):
        os.mknod(folder + b"/%06d" % number, stat.S_IFREG | 0o600)

    names = [name for name, _ in twin.tree.listdir(b"d")]

    assert names == [b"%06d" % number for number in range(count)]
    shutil.rmtree(folder)


def test_listing_while_it_changes(twin: Twin) -> None:
    """POSIX: what was there all the time is listed exactly once."""
    stable = {b"stable-%03d" % number for number in range(500)}
    for tree in twin.both():
        for name in stable:
            tree.mknod(name, stat.S_IFREG | 0o600)

    found = list_and_change(twin)

    assert sorted(name for name in found if name in stable) == sorted(stable)
    for name, _ in twin.shared.listdir():
        if name not in stable:
            twin.shared.unlink(name)


def list_and_change(twin: Twin) -> list[bytes]:
    """List the tree under test; after each batch of names, make and remove others."""
    if isinstance(twin.tree, SessionTree):
        return _list_by_session(twin, twin.tree)
    assert isinstance(twin.tree, PathTree)
    found = []
    with os.scandir(twin.tree.root) as entries:
        for number, entry in enumerate(entries):
            found.append(entry.name)
            if number % 50 == 0:
                _disturb(twin.tree, number)
    return found


def _list_by_session(twin: Twin, tree: SessionTree) -> list[bytes]:
    async def opened(session: vfsmount.Session) -> tuple[fuse.EntryOut, int]:
        entry = await tree.walk(b".")
        return entry, (await session.opendir(entry.nodeid)).fh

    entry, fh = tree.run(opened)
    found, cookie = [], 0
    while batch := tree.run(lambda s, at=cookie: s.readdir(entry.nodeid, fh, at, 4096)):  # type: ignore[misc]
        found += [one.name for one in batch]
        cookie = batch[-1].off
        _disturb(twin.tree, cookie % 1000)

    async def close(session: vfsmount.Session) -> None:
        await session.releasedir(entry.nodeid, fh)
        session.forget(entry.nodeid)

    tree.run(close)
    return found


def _disturb(tree: Tree, number: int) -> None:
    for at in range(5):
        put(tree, b"passing-%d-%d" % (number, at))
    for at in range(4):
        tree.unlink(b"passing-%d-%d" % (number, at))


@pytest.mark.only("none", "auto")
def test_changes_between_two_looks_at_a_listing(twin: Twin) -> None:
    """What is listed after a change was made here does not bring back what was before it."""
    names = [b"file-%03d" % number for number in range(400)]
    for tree in twin.both():
        for name in names:
            put(tree, name)

    def look_and_change(tree: Tree) -> tuple[int, int]:
        assert isinstance(tree, PathTree)
        fd = os.open(tree.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = _getdents(fd)
            later = names[50:200]
            for name in later[::3]:
                tree.unlink(name)
            for name in later[1::3]:
                with tree.open(name, os.O_WRONLY) as handle:
                    handle.pwrite(b"longer", 0)
            for name in later[2::3]:
                tree.rename(name, b"new-" + name)
            while batch := _getdents(fd):
                found += batch
        finally:
            os.close(fd)
        still_there = {name for name in names if name not in later[::3] + later[2::3]}
        missing = still_there - set(found)
        gone = [name for name in later[::3] + later[2::3] if os.path.lexists(tree.path(name))]
        short = [name for name in later[1::3] if tree.stat(name).size != 6]
        return len(missing), len(gone) + len(short)

    assert twin.same(look_and_change) == (0, 0)


def _getdents(fd: int) -> list[bytes]:
    """Names of one getdents64(2) of 4 KiB, as the C library asked for when it was smaller."""
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(4096)
    length = libc.getdents64(fd, room, len(room))
    if length < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    data, at, names = room.raw[:length], 0, []
    while at < length:
        # struct linux_dirent64: d_ino u64, d_off s64, d_reclen u16, d_type u8, d_name
        (size,) = struct.unpack_from("<16xH", data, at)
        names.append(data[at + 19 : at + size].partition(b"\0")[0])
        at += size
    return names


@pytest.mark.only("session")
def test_seek_in_a_listing(twin: Twin) -> None:
    """Telldir and seekdir: each cookie leads to what came after it, in any order."""
    tree = twin.tree
    assert isinstance(tree, SessionTree)
    for each in twin.both():
        for number in range(300):
            each.mknod(b"%03d" % number, stat.S_IFREG | 0o600)

    async def seek(session: vfsmount.Session) -> None:
        async with tree.node(b".") as entry:
            fh = (await session.opendir(entry.nodeid)).fh
            everything: list[fuse.DirEntry] = []
            while batch := await session.readdir(
                entry.nodeid, fh, everything[-1].off if everything else 0, 4096
            ):
                everything += batch
            assert len(everything) == 302  # with "." and ".."
            for at in (250, 3, 120, 0, 299):
                after = await session.readdir(entry.nodeid, fh, everything[at].off, 4096)
                assert after[0] == everything[at + 1]
            again = await session.readdir(entry.nodeid, fh, 0, 4096)
            assert again == everything[: len(again)]
            assert await session.readdir(entry.nodeid, fh, everything[-1].off, 4096) == []
            await session.releasedir(entry.nodeid, fh)

    tree.run(seek)


@pytest.mark.only("none", "auto")
def test_rewind(twin: Twin) -> None:
    """A directory that is read twice through one descriptor shows what came in between."""
    for tree in twin.both():
        put(tree, b"first")

    def read_twice(tree: Tree) -> list[list[str]]:
        assert isinstance(tree, PathTree)
        fd = os.open(tree.path(b"."), os.O_RDONLY)
        try:
            first = sorted(os.listdir(fd))
            put(tree, b"second")
            return [first, sorted(os.listdir(fd))]
        finally:
            os.close(fd)

    assert twin.same(read_twice) == [["first"], ["first", "second"]]


@pytest.mark.only("none", "auto")
def test_getcwd_and_dotdot(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))

    def parent(tree: Tree) -> tuple[bytes, bool]:
        assert isinstance(tree, PathTree)
        path = tree.path(b"d")
        before = Path.cwd()
        os.chdir(path)
        try:
            here = os.getcwdb() == path
            same = os.stat(b"..").st_ino == os.stat(os.path.dirname(path)).st_ino
            return os.path.basename(os.getcwdb()), here and same
        finally:
            os.chdir(before)

    assert twin.same(parent) == (b"d", True)
