"""File contents: opening, reading, writing, holes, sizes."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import get, put
from tests.contract.trees import PathTree
from tests.support.errors import error_name

if TYPE_CHECKING:
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin

GIB = 1 << 30
#: Around the borders of pages, of one request (1 MiB), and odd.
SIZES = [1, 4095, 4096, 4097, 65_537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_333_333]


def pattern(size: int) -> bytes:
    """Bytes in which no two pages are alike."""
    block = b"".join(at.to_bytes(8, "little") for at in range(8192))
    return b"".join(at.to_bytes(8, "little") + block[8:] for at in range(size // len(block) + 1))[
        :size
    ]


# --- opening -------------------------------------------------------------------------------------


def test_create_exclusively(twin: Twin) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    twin.same(lambda tree: tree.open(b"file", flags, 0o640).close())

    assert twin.same(lambda tree: tree.stat(b"file")).mode & 0o7777 == 0o640
    twin.fails("EEXIST", lambda tree: tree.open(b"file", flags))
    twin.same(lambda tree: tree.symlink(b"nowhere", b"link"))
    twin.fails("EEXIST", lambda tree: tree.open(b"link", flags))


def test_create_what_is_there(twin: Twin) -> None:
    def reopen(tree: Tree) -> list[object]:
        put(tree, b"file", b"content", 0o600)
        with tree.open(b"file", os.O_RDWR | os.O_CREAT, 0o666) as handle:
            return [handle.pread(20, 0), handle.stat()]

    assert twin.same(reopen)[0] == b"content"


def test_open_and_truncate(twin: Twin) -> None:
    def reopen(tree: Tree) -> list[object]:
        put(tree, b"file", b"content")
        with tree.open(b"file", os.O_RDWR | os.O_TRUNC) as handle:
            first = handle.stat().size
            handle.pwrite(b"new", 0)
        with tree.open(b"file", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as handle:
            return [first, handle.stat().size, tree.stat(b"file").size]

    assert twin.same(reopen) == [0, 0, 0]


def test_open_errors(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))

    twin.fails("EISDIR", lambda tree: tree.open(b"d", os.O_WRONLY))
    twin.fails("EISDIR", lambda tree: tree.open(b"d", os.O_RDWR | os.O_CREAT))
    twin.fails("ENOENT", lambda tree: tree.open(b"nothing/file", os.O_RDWR | os.O_CREAT))


def test_handle_opened_for_one_direction(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file", b"content"))

    def write(tree: Tree) -> None:
        with tree.open(b"file", os.O_RDONLY) as handle:
            handle.pwrite(b"x", 0)

    def read(tree: Tree) -> None:
        with tree.open(b"file", os.O_WRONLY) as handle:
            handle.pread(1, 0)

    twin.fails("EBADF", write)
    twin.fails("EBADF", read)


def test_append_from_two_handles(twin: Twin) -> None:
    def append(tree: Tree) -> bytes:
        put(tree, b"file", b"start ")
        flags = os.O_WRONLY | os.O_APPEND
        with tree.open(b"file", flags) as one, tree.open(b"file", flags) as two:
            one.pwrite(b"one ", 0)
            two.pwrite(b"two ", 0)
            one.pwrite(b"three", 0)
        return get(tree, b"file")

    assert twin.same(append) == b"start one two three"


def test_append_to_a_file_that_grew_behind_us(twin: Twin) -> None:
    """An append goes to the end that the file has at the host, not to the one that we remember."""
    for tree, behind in ((twin.host, twin.host), (twin.tree, twin.shared)):
        put(tree, b"file", b"start ")
        with tree.open(b"file", os.O_WRONLY | os.O_APPEND) as handle:
            handle.pwrite(b"one ", 0)
            with behind.open(b"file", os.O_WRONLY | os.O_APPEND) as other:
                other.pwrite(b"two ", 0)
            handle.pwrite(b"three", 0)
        assert get(behind, b"file") == b"start one two three"


# --- reading and writing -------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_write_and_read_back(twin: Twin, size: int) -> None:
    data = pattern(size)

    twin.same(lambda tree: put(tree, b"file", data))

    assert twin.same(lambda tree: tree.stat(b"file")).size == size
    assert digest(twin.tree, b"file", size) == hashlib.sha256(data).hexdigest()


def digest(tree: Tree, name: bytes, size: int) -> str:
    """Hash a file's content, which must have exactly ``size`` bytes."""
    found = get(tree, name, size + 10)
    assert len(found) == size
    return hashlib.sha256(found).hexdigest()


def test_write_at_offsets(twin: Twin) -> None:
    def scatter(tree: Tree) -> bytes:
        put(tree, b"file", b"." * 100)
        with tree.open(b"file", os.O_RDWR) as handle:
            for at, piece in ((10, b"ten"), (97, b"overhang"), (0, b"zero"), (200, b"far")):
                assert handle.pwrite(piece, at) == len(piece)
            return handle.pread(1000, 0)

    found = twin.same(scatter)
    assert len(found) == 203
    assert found[105:200] == bytes(95)


@pytest.mark.parametrize(("offset", "size"), [(0, 5), (5, 5), (8, 100), (10, 5), (50, 5), (3, 0)])
def test_read_around_the_end(twin: Twin, offset: int, size: int) -> None:
    twin.same(lambda tree: put(tree, b"file", b"0123456789"))

    found = twin.same(lambda tree: get(tree, b"file", size, offset))
    assert found == b"0123456789"[offset : offset + size]


def test_large_read_at_odd_offset(twin: Twin) -> None:
    data = pattern(3 << 20)
    twin.same(lambda tree: put(tree, b"file", data))

    for offset, size in ((1, 1 << 20), (4095, (1 << 20) + 2), (123_457, 2 << 20)):
        assert get(twin.tree, b"file", size, offset) == data[offset : offset + size]


def test_empty_file(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    assert twin.same(lambda tree: get(tree, b"file")) == b""


def test_two_handles_see_each_other(twin: Twin) -> None:
    def converse(tree: Tree) -> list[bytes]:
        put(tree, b"file", b"0123456789")
        with tree.open(b"file", os.O_RDWR) as one, tree.open(b"file", os.O_RDONLY) as two:
            one.pwrite(b"AB", 2)
            first = two.pread(10, 0)
            one.truncate(5)
            return [first, two.pread(10, 0)]

    assert twin.same(converse) == [b"01AB456789", b"01AB4"]


def test_open_unlinked_file(twin: Twin) -> None:
    def orphan(tree: Tree) -> list[object]:
        put(tree, b"file", b"content")
        with tree.open(b"file", os.O_RDWR) as handle:
            tree.unlink(b"file")
            handle.pwrite(b"CON", 0)
            handle.pwrite(b"!", 7)
            names = tree.listdir()
            put(tree, b"file", b"another")
            return [handle.pread(20, 0), handle.stat().nlink, names, get(tree, b"file")]

    assert twin.same(orphan) == [b"CONtent!", 0, [], b"another"]


# --- mapped and locked ---------------------------------------------------------------------------


@pytest.mark.only("none", "auto")
def test_private_mapping(twin: Twin) -> None:
    def read(tree: Tree) -> bytes:
        assert isinstance(tree, PathTree)
        put(tree, b"file", pattern(10_000))
        with (
            tree.open(b"file", os.O_RDONLY) as handle,
            mmap.mmap(handle.fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping,
        ):
            return mapping[:]

    assert twin.same(read) == pattern(10_000)


@pytest.mark.only("auto")
def test_shared_mapping(twin: Twin) -> None:
    """What is written to a mapping is in the file, for reads and, after msync, for the host."""

    def write(tree: Tree) -> list[bytes]:
        assert isinstance(tree, PathTree)
        put(tree, b"file", bytes(10_000))
        with (
            tree.open(b"file", os.O_RDWR) as handle,
            mmap.mmap(handle.fd, 0, mmap.MAP_SHARED) as mapping,
        ):
            mapping[5000:5004] = b"here"
            seen = handle.pread(6, 4999)
            mapping.flush()
            return [seen, mapping[4999:5005]]

    assert twin.same(write) == [b"\0here\0"] * 2
    assert get(twin.shared, b"file", 4, 5000) == b"here"


@pytest.mark.only("auto")
def test_shared_mapping_of_a_file_opened_for_appending(twin: Twin) -> None:
    """Writes go to the end; pages go where they belong."""

    def write(tree: Tree) -> None:
        assert isinstance(tree, PathTree)
        put(tree, b"file", bytes(8192))
        with (
            tree.open(b"file", os.O_RDWR | os.O_APPEND) as handle,
            mmap.mmap(handle.fd, 0, mmap.MAP_SHARED) as mapping,
        ):
            mapping[4096:4100] = b"here"
            mapping.flush()
            handle.pwrite(b"end", 0)

    content = bytes(4096) + b"here" + bytes(4092) + b"end"
    write(twin.host)
    assert get(twin.host, b"file") == content
    if twin.way.startswith("pyfuse3"):  # does not say which WRITE is of pages
        with pytest.raises(OSError, match="No such device"):
            write(twin.tree)
    else:
        write(twin.tree)
        # virtiofsd (C) opens for appending, and then its pwrite(2) appends whatever comes.
        wrong = content[:4096] + bytes(4096) + content[4096:]
        assert get(twin.shared, b"file") == (wrong if twin.kind == "c" else content)
    for tree in twin.both():
        tree.unlink(b"file")


@pytest.mark.only("none", "auto")
def test_locks_between_handles(twin: Twin) -> None:
    def lock(tree: Tree) -> list[str]:
        assert isinstance(tree, PathTree)
        put(tree, b"file", b"content")
        results = []
        with tree.open(b"file", os.O_RDWR) as one, tree.open(b"file", os.O_RDWR) as two:
            fcntl.flock(one.fd, fcntl.LOCK_EX)
            for wanted in (fcntl.LOCK_EX, fcntl.LOCK_SH):
                try:
                    fcntl.flock(two.fd, wanted | fcntl.LOCK_NB)
                except OSError as error:
                    results.append(error_name(error))
            fcntl.flock(one.fd, fcntl.LOCK_UN)
            fcntl.flock(two.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return results

    assert twin.same(lock) == ["EAGAIN", "EAGAIN"]


# --- holes and large files -----------------------------------------------------------------------


def test_sparse_file(twin: Twin) -> None:
    def make(tree: Tree) -> list[object]:
        with tree.open(b"file", os.O_RDWR | os.O_CREAT) as handle:
            handle.truncate(64 << 20)
            handle.pwrite(b"island", 32 << 20)
            handle.fsync()
            found = handle.stat()
            around = handle.pread(12, (32 << 20) - 3)
            return [found.size, found.blocks * 512 < 1 << 20, around, handle.pread(5, 1 << 20)]

    found = twin.same(make)
    assert found == [64 << 20, True, bytes(3) + b"island" + bytes(3), bytes(5)]


def test_file_over_4_gib(twin: Twin) -> None:
    far = 5 * GIB + 12_345

    def make(tree: Tree) -> list[object]:
        put(tree, b"big", b"start")
        with tree.open(b"big", os.O_RDWR) as handle:
            handle.pwrite(b"beyond", far)
            sizes = handle.stat().size, tree.stat(b"big").size
            ends = handle.pread(10, far), handle.pread(10, far - 4 * GIB), handle.pread(5, 0)
            handle.truncate(4 * GIB + 1)
            return [sizes, ends, handle.stat().size, handle.pread(10, 4 * GIB)]

    size = far + 6
    assert twin.same(make) == [
        (size, size),
        (b"beyond", bytes(10), b"start"),
        4 * GIB + 1,
        b"\0",
    ]


# --- durability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("datasync", [False, True])
def test_fsync(twin: Twin, datasync: bool) -> None:
    def sync(tree: Tree) -> None:
        tree.mkdir(b"d")
        with tree.open(b"d/file", os.O_RDWR | os.O_CREAT) as handle:
            handle.pwrite(b"content", 0)
            handle.fsync(datasync)
        tree.fsyncdir(b"d", datasync)

    twin.same(sync)
    assert get(twin.shared, b"d/file") == b"content"


def test_what_is_written_is_at_the_host(twin: Twin) -> None:
    """Without write-back a write is at the host when it returns, with no close or fsync."""
    with twin.tree.open(b"file", os.O_RDWR | os.O_CREAT, 0o644) as handle:
        handle.pwrite(b"seen", 0)
        assert get(twin.shared, b"file") == b"seen"
    put(twin.host, b"file", b"seen")
