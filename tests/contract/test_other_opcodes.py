"""Opcodes that pyfuse3 has no handler for: by the session API, compared with the host."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest

from tests.contract.session_tree import SessionHandle, SessionTree, stat_of
from tests.contract.steps import get, put
from tests.contract.trees import PathHandle, Stat
from tests.support.errors import error_of
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag

if TYPE_CHECKING:
    import vfsmount
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin

pytestmark = pytest.mark.only("session")

KEEP_SIZE, PUNCH_HOLE = 1, 2

#: What the real daemons are known to settle in INIT, started without caching: minor and flags.
INIT_FACTS = {
    "c": (36, 0x0044D039),
    "rust": (38, 0x48449829 | int(InitFlag.CREATE_SUPP_GROUP)),
}

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def tree(twin: Twin) -> SessionTree:
    """The tree under test, by the session API."""
    assert isinstance(twin.tree, SessionTree)
    return twin.tree


def opened(tree: Tree, name: bytes, flags: int = os.O_RDWR) -> SessionHandle | PathHandle:
    """Open a file; the caller closes it."""
    handle = tree.open(name, flags)
    assert isinstance(handle, SessionHandle | PathHandle)
    return handle


def test_init(twin: Twin, tree: SessionTree) -> None:
    facts = tree.session.facts

    minor, flags = INIT_FACTS.get(twin.kind, (facts.minor, int(facts.flags)))
    assert (facts.minor, int(facts.flags)) == (minor, flags)
    assert InitFlag.ATOMIC_O_TRUNC in facts.flags
    assert (facts.max_write, facts.max_read, facts.time_gran) == (1 << 20, 1 << 20, 1)


def fallocate(
    tree: Tree, handle: SessionHandle | PathHandle, mode: int, offset: int, length: int
) -> None:
    """fallocate(2) on either kind of tree."""
    if isinstance(handle, PathHandle):
        offset_t = ctypes.c_int64
        assert _libc.fallocate(handle.fd, mode, offset_t(offset), offset_t(length)) == 0
        return
    assert isinstance(tree, SessionTree)
    tree.run(lambda session: session.fallocate(handle.nodeid, handle.fh, mode, offset, length))


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("mode", [0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE])
def test_fallocate(twin: Twin, mode: int) -> None:
    def allocate(tree: Tree) -> list[object]:
        put(tree, b"file", b"x" * 10_000)
        handle = opened(tree, b"file")
        fallocate(tree, handle, mode, 4096, 16_384)
        found = handle.stat().size, handle.pread(30_000, 0)
        handle.close()
        return [found]

    twin.same(allocate)


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
@pytest.mark.parametrize("offset", [0, 100, 1 << 20, (2 << 20) + 5])
def test_lseek(twin: Twin, whence: int, offset: int) -> None:
    def seek(tree: Tree) -> int:
        put(tree, b"file", b"data at the start")
        handle = opened(tree, b"file")
        handle.truncate(4 << 20)
        handle.pwrite(b"island", 2 << 20)
        handle.fsync()
        try:
            if isinstance(handle, PathHandle):
                return os.lseek(handle.fd, offset, whence)
            assert isinstance(tree, SessionTree)
            return tree.run(lambda s: s.lseek(handle.nodeid, handle.fh, offset, whence))
        finally:
            handle.close()

    twin.same(seek)


@pytest.mark.usefixtures("tree")
def test_lseek_beyond_the_end(twin: Twin, tree: SessionTree) -> None:
    twin.same(lambda each: put(each, b"file", b"short"))
    handle = opened(tree, b"file")
    assert isinstance(handle, SessionHandle)

    error = error_of(tree.run, lambda s: s.lseek(handle.nodeid, handle.fh, 100, os.SEEK_DATA))

    handle.close()
    assert error == "ENXIO"


def test_copy_file_range(twin: Twin, tree: SessionTree) -> None:
    for each in twin.both():
        put(each, b"source", b"0123456789" * 10_000)
        put(each, b"target", b"-" * 20)
    with (
        twin.host.open(b"source", os.O_RDONLY) as source,
        twin.host.open(b"target", os.O_RDWR) as target,
    ):
        expected = os.copy_file_range(source.fd, target.fd, 50_000, 5, 10)
    ours, theirs = opened(tree, b"source", os.O_RDONLY), opened(tree, b"target")
    assert isinstance(ours, SessionHandle)
    assert isinstance(theirs, SessionHandle)

    copy = fuse.CopyFileRangeIn(ours.fh, 5, theirs.nodeid, theirs.fh, 10, 50_000, 0)
    copied = tree.run(lambda session: session.copy_file_range(ours.nodeid, copy))

    for handle in (ours, theirs):
        handle.close()
    assert copied == expected
    assert get(twin.shared, b"target", 60_000) == get(twin.host, b"target", 60_000)


def test_syncfs(tree: SessionTree) -> None:
    assert error_of(tree.run, lambda session: session.syncfs()) == ""


def test_statx(twin: Twin, tree: SessionTree) -> None:
    """A daemon that knows STATX must agree with its own GETATTR; virtiofsd does not know it."""
    twin.same(lambda each: put(each, b"file", b"content"))

    async def ask(session: vfsmount.Session) -> tuple[fuse.StatxOut, Stat]:
        async with tree.node(b"file") as entry:
            attributes = (await session.getattr(entry.nodeid)).attr
            return await session.statx(entry.nodeid), stat_of(attributes)

    if error_of(tree.run, ask) == "ENOSYS":
        assert twin.kind in ("c", "rust")
        return
    found, plain = tree.run(ask)
    assert (found.stat.mode, found.stat.size, found.stat.ino) == (
        plain.mode,
        plain.size,
        plain.ino,
    )
    assert found.stat.mtime * 10**9 + found.stat.mtimensec == plain.mtime_ns


def test_tmpfile(tree: SessionTree) -> None:
    """A file without a name; virtiofsd does not know TMPFILE."""

    async def make(session: vfsmount.Session) -> bytes:
        async with tree.node(b".") as folder:
            entry, handle = await session.tmpfile(folder.nodeid, os.O_RDWR, 0o100600)
            await session.write(entry.nodeid, handle.fh, 0, b"content")
            content = await session.read(entry.nodeid, handle.fh, 0, 100)
            assert entry.attr.nlink == 0
            await session.release(entry.nodeid, handle.fh)
            session.forget(entry.nodeid)
            return content

    if error_of(tree.run, make) not in ("ENOSYS", "EOPNOTSUPP"):
        assert tree.run(make) == b"content"
    assert tree.listdir() == []


def test_what_a_daemon_need_not_know(twin: Twin, tree: SessionTree) -> None:
    """Locks, ioctl, poll and bmap: served, or refused in a way that an application understands."""
    twin.same(lambda each: put(each, b"file", b"content"))
    handle = opened(tree, b"file")
    assert isinstance(handle, SessionHandle)
    node, fh = handle.nodeid, handle.fh
    lock = fuse.LkIn(fh, 1, 0, 10, fuse.LockType.WRITE, os.getpid(), 0)

    errors = [
        error_of(tree.run, lambda session: session.getlk(node, lock)),
        error_of(tree.run, lambda session: session.setlk(node, lock)),
        error_of(tree.run, lambda session: session.ioctl(node, fh, 0x5401)),
        error_of(tree.run, lambda session: session.poll(node, fh, 1)),
        error_of(tree.run, lambda session: session.bmap(node, 0, 512)),
    ]

    handle.close()
    assert set(errors) <= {"", "ENOSYS", "ENOTTY", "EOPNOTSUPP"}


@pytest.mark.parametrize("opcode", [7, 19, 54, 0xFFFFFFFF])
def test_unknown_opcode(tree: SessionTree, opcode: int) -> None:
    """It is refused, and the session goes on.

    Not sent: CUSE_INIT (4096), after which virtiofsd (C) answers everything with EIO.
    """
    assert error_of(tree.run, lambda s: s.raw(opcode, 1, bytes(64), 256)) == "ENOSYS"
    assert tree.listdir() == []


def test_stale_node(tree: SessionTree) -> None:
    """A nodeid that the daemon never gave is an error, not a crash."""
    assert error_of(tree.run, lambda s: s.getattr(0xDEAD_BEEF)) in (
        "EBADF",
        "ESTALE",
        "EINVAL",
        "ENOENT",
    )
    assert tree.listdir() == []


def test_stale_handle(twin: Twin, tree: SessionTree) -> None:
    twin.same(lambda each: put(each, b"file"))

    async def read(session: vfsmount.Session) -> None:
        async with tree.node(b"file") as entry:
            await session.read(entry.nodeid, 0xDEAD_BEEF, 0, 10)

    assert error_of(tree.run, read) == "EBADF"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"../../etc"])
def test_names_that_would_lead_elsewhere(twin: Twin, tree: SessionTree, name: bytes) -> None:
    """Creating them fails; looking them up never leaves the share."""
    if twin.kind == "rust" and b"/" in name:
        pytest.skip("virtiofsd 1.13 walks such a path, and stays below the share")

    async def make(session: vfsmount.Session) -> None:
        async with tree.node(b".") as folder:
            entry = await session.mkdir(folder.nodeid, name, 0o755)
            session.forget(entry.nodeid)

    assert error_of(tree.run, make) in ("EINVAL", "EEXIST", "ENOENT")


def test_dotdot_of_the_root_is_the_root(tree: SessionTree) -> None:
    async def ask(session: vfsmount.Session) -> tuple[int, int]:
        root = (await session.getattr(1)).attr.ino
        up = await session.lookup(1, b"..")
        if up.nodeid != 1:
            session.forget(up.nodeid)
        return root, up.attr.ino

    if (error := error_of(tree.run, ask)) == "":
        root, up = tree.run(ask)
        assert up == root
    else:
        assert error in ("EINVAL", "ENOENT")
