"""Names: finding, making, linking and removing them."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import get, put

if TYPE_CHECKING:
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin

#: Not UTF-8, odd in other ways, and as long as a name may be.
STRANGE_NAMES = [
    b"\xff\xfe",
    b"caf\xe9",
    b"\xc3\x28 invalid sequence",
    b"tab\tnewline\nspace ",
    b"\x01\x7f",
    b"*?[a]\\",
    b"-rf",
    b"...",
    b"~",
    b"x" * 255,
    "ü".encode() * 127 + b"x",
]


def test_absent_name(twin: Twin) -> None:
    twin.fails("ENOENT", lambda tree: tree.stat(b"nothing"))
    twin.fails("ENOENT", lambda tree: tree.open(b"nothing", os.O_RDONLY))
    twin.fails("ENOENT", lambda tree: tree.stat(b"nothing/below"))
    twin.fails("ENOENT", lambda tree: tree.mkdir(b"nothing/below"))
    twin.fails("ENOENT", lambda tree: tree.chmod(b"nothing", 0o600))


def test_absent_name_appears(twin: Twin) -> None:
    twin.fails("ENOENT", lambda tree: tree.stat(b"later"))
    twin.same(lambda tree: put(tree, b"later", b"now"))
    twin.same(lambda tree: tree.stat(b"later"))
    twin.same(lambda tree: tree.unlink(b"later"))
    twin.fails("ENOENT", lambda tree: tree.stat(b"later"))


def test_name_below_a_file(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))

    twin.fails("ENOTDIR", lambda tree: tree.stat(b"file/below"))
    twin.fails("ENOTDIR", lambda tree: tree.mkdir(b"file/below"))
    twin.fails("ENOTDIR", lambda tree: tree.unlink(b"file/below"), "unlink below a file")


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_strange_name(twin: Twin, name: bytes) -> None:
    twin.same(lambda tree: put(tree, name, b"content"))
    twin.same(lambda tree: tree.mkdir(b"folder"))

    assert twin.same(lambda tree: get(tree, name)) == b"content"
    assert (name, stat.S_IFREG) in twin.same(lambda tree: tree.listdir())
    twin.same(lambda tree: tree.rename(name, b"folder/" + name))
    twin.same(lambda tree: tree.symlink(name, b"folder/link"))
    assert twin.same(lambda tree: tree.readlink(b"folder/link")) == name


def test_name_of_256_bytes(twin: Twin) -> None:
    long = b"x" * 256
    twin.same(lambda tree: put(tree, b"short"))

    twin.fails("ENAMETOOLONG", lambda tree: tree.stat(long))
    twin.fails("ENAMETOOLONG", lambda tree: put(tree, long))
    twin.fails("ENAMETOOLONG", lambda tree: tree.mkdir(long))
    twin.fails("ENAMETOOLONG", lambda tree: tree.symlink(b"target", long))
    twin.fails("ENAMETOOLONG", lambda tree: tree.link(b"short", long))
    twin.fails("ENAMETOOLONG", lambda tree: tree.rename(b"short", long))
    twin.fails("ENAMETOOLONG", lambda tree: tree.unlink(long), "unlink a name too long")
    twin.fails("ENAMETOOLONG", lambda tree: tree.rmdir(long), "rmdir a name too long")


def test_deep_path(twin: Twin) -> None:
    def dig(tree: Tree) -> None:
        path = b"level"
        for _ in range(100):
            tree.mkdir(path)
            path += b"/level"
        put(tree, path, b"bottom")

    twin.same(dig)
    assert twin.same(lambda tree: get(tree, b"level/" * 100 + b"level")) == b"bottom"


# --- directories ---------------------------------------------------------------------------------


def test_mkdir_and_rmdir(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d", 0o750))
    assert twin.same(lambda tree: tree.stat(b"d")).mode == stat.S_IFDIR | 0o750
    twin.same(lambda tree: tree.mkdir(b"d/e", 0o700))
    twin.same(lambda tree: tree.stat(b"d"))  # one more link

    twin.same(lambda tree: tree.rmdir(b"d/e"))
    twin.same(lambda tree: tree.stat(b"d"))
    twin.same(lambda tree: tree.rmdir(b"d"))
    twin.fails("ENOENT", lambda tree: tree.stat(b"d"))


def test_mkdir_errors(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.symlink(b"nowhere", b"link"))

    twin.fails("EEXIST", lambda tree: tree.mkdir(b"d"))
    twin.fails("EEXIST", lambda tree: tree.mkdir(b"file"))
    twin.fails("EEXIST", lambda tree: tree.mkdir(b"link"))


def test_rmdir_errors(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))
    twin.same(lambda tree: put(tree, b"d/file"))

    twin.fails("ENOTEMPTY", lambda tree: tree.rmdir(b"d"))
    twin.fails("ENOTDIR", lambda tree: tree.rmdir(b"d/file"))
    twin.fails("ENOENT", lambda tree: tree.rmdir(b"nothing"), "rmdir a missing name")


def test_unlink_errors(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))

    twin.fails("EISDIR", lambda tree: tree.unlink(b"d"))
    twin.fails("ENOENT", lambda tree: tree.unlink(b"nothing"), "unlink a missing name")


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [b"t", b"/absolute/path", b"../up", b"\xff\xfe", b"a/" * 500, b"x" * 255, b"x/" * 2047 + b"x"],
    ids=lambda target: f"{len(target)}-bytes",
)
def test_symlink(twin: Twin, target: bytes) -> None:
    twin.same(lambda tree: tree.symlink(target, b"link"))

    assert twin.same(lambda tree: tree.readlink(b"link")) == target
    found = twin.same(lambda tree: tree.stat(b"link"))
    assert (stat.S_IFMT(found.mode), found.size) == (stat.S_IFLNK, len(target))


def test_symlink_errors(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))

    twin.fails("EEXIST", lambda tree: tree.symlink(b"target", b"file"))
    twin.fails("EINVAL", lambda tree: tree.readlink(b"file"), "readlink a file")


@pytest.mark.only("none", "auto")
def test_symlink_is_followed_by_the_kernel_alone(twin: Twin) -> None:
    """An absolute link leads out of the share here, and never anywhere at the host."""
    secret = os.path.join(os.path.dirname(twin.host.root), b"secret")
    with open(secret, "wb") as file:
        file.write(b"of this machine")
    for tree in twin.both():
        tree.symlink(secret, b"absolute")
        put(tree, b"file", b"inside")
        tree.symlink(b"file", b"relative")
        tree.symlink(b"loop", b"loop")

    assert twin.same(lambda tree: get(tree, b"absolute")) == b"of this machine"
    assert twin.same(lambda tree: get(tree, b"relative")) == b"inside"
    twin.fails("ELOOP", lambda tree: get(tree, b"loop"))
    os.unlink(secret)


def test_hard_links(twin: Twin) -> None:
    def count_links(tree: Tree) -> list[int]:
        put(tree, b"one", b"shared")
        tree.mkdir(b"d")
        counts = [tree.stat(b"one").nlink]
        for name in (b"two", b"d/three"):
            tree.link(b"one", name)
            counts.append(tree.stat(b"one").nlink)
        assert tree.stat(b"one").ino == tree.stat(b"d/three").ino
        with tree.open(b"d/three", os.O_WRONLY) as handle:
            handle.pwrite(b"S", 0)
        assert get(tree, b"one") == b"Shared"
        for name in (b"one", b"two"):
            tree.unlink(name)
            counts.append(tree.stat(b"d/three").nlink)
        return counts

    assert twin.same(count_links) == [1, 2, 3, 2, 1]


def test_hard_link_errors(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.mkdir(b"d"))

    twin.fails("EEXIST", lambda tree: tree.link(b"file", b"d"))
    twin.fails("EPERM", lambda tree: tree.link(b"d", b"e"))
    twin.fails("ENOENT", lambda tree: tree.link(b"nothing", b"e"))


def test_hard_link_to_a_symlink(twin: Twin) -> None:
    twin.same(lambda tree: tree.symlink(b"target", b"link"))
    twin.same(lambda tree: tree.link(b"link", b"again"))

    assert twin.same(lambda tree: tree.stat(b"again")).nlink == 2
    assert twin.same(lambda tree: tree.readlink(b"again")) == b"target"


# --- special files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK], ids=oct)
def test_mknod(twin: Twin, kind: int) -> None:
    twin.same(lambda tree: tree.mknod(b"node", kind | 0o640))

    assert twin.same(lambda tree: tree.stat(b"node")).mode == kind | 0o640
    assert twin.same(lambda tree: tree.listdir()) == [(b"node", kind)]
    twin.fails("EEXIST", lambda tree: tree.mknod(b"node", kind | 0o640))


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK], ids=oct)
@pytest.mark.parametrize("device", [(1, 3), (0xABC, 0xDE), (4095, 0xFFFFF)], ids=str)
def test_device_node(twin: Twin, kind: int, device: tuple[int, int]) -> None:
    twin.same(lambda tree: tree.mknod(b"node", kind | 0o600, os.makedev(*device)))

    found = twin.same(lambda tree: tree.stat(b"node"))
    assert (stat.S_IFMT(found.mode), found.rdev) == (kind, os.makedev(*device))


# --- rename --------------------------------------------------------------------------------------

NOREPLACE, EXCHANGE = 1, 2


def test_rename(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"old", b"content")
        tree.mkdir(b"d")

    twin.same(lambda tree: tree.rename(b"old", b"new"))
    twin.fails("ENOENT", lambda tree: tree.stat(b"old"))
    twin.same(lambda tree: tree.rename(b"new", b"d/moved"))
    assert twin.same(lambda tree: get(tree, b"d/moved")) == b"content"
    twin.same(lambda tree: tree.rename(b"d/moved", b"d/moved"))


def test_rename_over(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"a", b"A")
        put(tree, b"b", b"B")
        tree.mkdir(b"empty")
        tree.mkdir(b"full")
        put(tree, b"full/file")

    twin.same(lambda tree: tree.rename(b"a", b"b"))
    assert twin.same(lambda tree: get(tree, b"b")) == b"A"
    twin.same(lambda tree: tree.rename(b"full", b"empty"))
    assert twin.same(lambda tree: tree.listdir(b"empty")) == [(b"file", stat.S_IFREG)]


def test_rename_directory_with_all_below(twin: Twin) -> None:
    for tree in twin.both():
        tree.mkdir(b"a")
        tree.mkdir(b"a/b")
        put(tree, b"a/b/file", b"content")
        tree.mkdir(b"other")
        get(tree, b"a/b/file")

    twin.same(lambda tree: tree.rename(b"a", b"other/c"))

    assert twin.same(lambda tree: get(tree, b"other/c/b/file")) == b"content"
    twin.fails("ENOENT", lambda tree: tree.stat(b"a/b/file"))
    twin.same(lambda tree: tree.stat(b"other"))


def test_rename_errors(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"file")
        tree.mkdir(b"d")
        tree.mkdir(b"d/sub")
        tree.mkdir(b"e")

    twin.fails("ENOENT", lambda tree: tree.rename(b"nothing", b"x"), "rename a missing name")
    twin.fails("EISDIR", lambda tree: tree.rename(b"file", b"e"))
    twin.fails("ENOTDIR", lambda tree: tree.rename(b"e", b"file"))
    twin.fails("ENOTEMPTY", lambda tree: tree.rename(b"e", b"d"))
    twin.fails("EINVAL", lambda tree: tree.rename(b"d", b"d/sub/loop"))
    twin.fails("ENOENT", lambda tree: tree.rename(b"file", b"nothing/file"))


def test_rename_noreplace(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"a", b"A")
        put(tree, b"b", b"B")

    twin.fails("EEXIST", lambda tree: tree.rename(b"a", b"b", NOREPLACE))
    twin.same(lambda tree: tree.rename(b"a", b"c", NOREPLACE))
    assert twin.same(lambda tree: (get(tree, b"b"), get(tree, b"c"))) == (b"B", b"A")


def test_rename_exchange(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"a", b"A")
        tree.mkdir(b"d")
        put(tree, b"d/file", b"D")

    twin.same(lambda tree: tree.rename(b"a", b"d", EXCHANGE))

    assert twin.same(lambda tree: get(tree, b"d")) == b"A"
    assert twin.same(lambda tree: get(tree, b"a/file")) == b"D"
    twin.fails("ENOENT", lambda tree: tree.rename(b"a", b"nothing", EXCHANGE), "exchange missing")
    twin.fails("EINVAL", lambda tree: tree.rename(b"a", b"d", NOREPLACE | EXCHANGE))


def test_rename_of_one_file_over_its_other_name(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"one", b"content")
        tree.link(b"one", b"two")

    twin.same(lambda tree: tree.rename(b"one", b"two"))  # POSIX: does nothing
    assert twin.same(lambda tree: tree.stat(b"one")).nlink == 2


def test_open_file_survives_rename_over_it(twin: Twin) -> None:
    def replaced(tree: Tree) -> list[object]:
        put(tree, b"new", b"new")
        put(tree, b"file", b"old")
        with tree.open(b"file", os.O_RDONLY) as handle:
            tree.rename(b"new", b"file")
            return [handle.pread(10, 0), handle.stat().nlink, get(tree, b"file")]

    assert twin.same(replaced) == [b"old", 0, b"new"]
