"""Who: owners of what is made, permissions, groups, umask, and set-id bits.

Mounted, the kernel checks permissions; by the session API nobody does (``Session`` says so), so
refusals are only expected of mounts. Whom new files belong to is the daemon's business in both.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.contract.steps import get, put
from tests.support.errors import error_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.trees import Tree
    from tests.contract.twin import Twin

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("as_root")

ALICE, ALICES, STAFF, OTHERS = 4001, 4002, 4003, 4004


def make_everything(tree: Tree, prefix: bytes) -> list[tuple[int, int, int]]:
    """Make one of each kind; return (mode, uid, gid) of each."""
    put(tree, prefix + b"file", mode=0o666)
    tree.mkdir(prefix + b"dir", 0o777)
    tree.symlink(b"target", prefix + b"link")
    tree.mknod(prefix + b"fifo", stat.S_IFIFO | 0o666)
    found = [tree.stat(prefix + kind) for kind in (b"file", b"dir", b"link", b"fifo")]
    return [(one.mode, one.uid, one.gid) for one in found]


def test_new_files_belong_to_their_maker(twin: Twin) -> None:
    for tree in twin.both():
        tree.chmod(b".", 0o777)

    def make(tree: Tree) -> list[tuple[int, int, int]]:
        with tree.caller(ALICE, ALICES):
            return make_everything(tree, b"")

    assert {(uid, gid) for _, uid, gid in twin.same(make)} == {(ALICE, ALICES)}


@pytest.mark.parametrize("mask", [0, 0o022, 0o027, 0o077, 0o777], ids=oct)
def test_umask(twin: Twin, mask: int) -> None:
    def make(tree: Tree) -> list[int]:
        with tree.umask(mask):
            return [mode for mode, _, _ in make_everything(tree, b"")]

    file, folder, _, fifo = (stat.S_IMODE(mode) for mode in twin.same(make))
    assert (file, folder, fifo) == (0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask)


def test_setgid_directory(twin: Twin) -> None:
    """What is made in a setgid directory gets its group, and directories its bit."""
    for tree in twin.both():
        tree.mkdir(b"d")
        tree.chown(b"d", 0, STAFF)
        tree.chmod(b"d", 0o2777)

    def make(tree: Tree) -> list[tuple[int, int, int]]:
        with tree.caller(ALICE, ALICES, (STAFF,)):
            return make_everything(tree, b"d/")

    made = twin.same(make)
    assert {gid for _, _, gid in made} == {STAFF}
    assert made[1][0] & stat.S_ISGID


def test_supplementary_group_may_write(twin: Twin) -> None:
    """A directory that only a supplementary group of the caller may write to."""
    for tree in twin.both():
        tree.mkdir(b"d")
        tree.chown(b"d", 0, STAFF)
        tree.chmod(b"d", 0o770)
        put(tree, b"d/theirs", b"content", 0o660)
        tree.chown(b"d/theirs", 0, STAFF)
        tree.chmod(b"d/theirs", 0o660)

    def make(tree: Tree) -> None:
        with tree.caller(ALICE, ALICES, (OTHERS, STAFF)):
            put(tree, b"d/mine", b"content")

    def use(tree: Tree) -> bytes:
        with tree.caller(ALICE, ALICES, (OTHERS, STAFF)):
            with tree.open(b"d/theirs", os.O_WRONLY) as handle:
                handle.pwrite(b"C", 0)
            return get(tree, b"d/theirs")

    assert twin.same(use) == b"Content"
    twin.same_unless_known(make, "create by a supplementary group")


# --- permissions ---------------------------------------------------------------------------------


@pytest.fixture
def private(twin: Twin) -> Twin:
    """A tree with a private file and folder of root's, and one file that anybody may read."""
    for tree in twin.both():
        put(tree, b"private", b"secret", 0o600)
        put(tree, b"public", b"content", 0o644)
        tree.mkdir(b"closed", 0o700)
        put(tree, b"closed/file", b"secret", 0o644)
    return twin


def as_alice(call: Callable[[Tree], T]) -> Callable[[Tree], T]:
    """Wrap a call so that somebody else makes it."""

    def wrapped(tree: Tree) -> T:
        with tree.caller(ALICE, ALICES):
            return call(tree)

    return wrapped


@pytest.mark.only("none", "auto")
@pytest.mark.parametrize(
    "call",
    [
        lambda tree: get(tree, b"private"),
        lambda tree: tree.open(b"public", os.O_WRONLY),
        lambda tree: tree.truncate(b"public", 0),
        lambda tree: tree.stat(b"closed/file"),
        lambda tree: get(tree, b"closed/file"),
        lambda tree: tree.listdir(b"closed"),
        lambda tree: put(tree, b"new"),
        lambda tree: tree.mkdir(b"new"),
        lambda tree: tree.symlink(b"x", b"new"),
        lambda tree: tree.unlink(b"public"),
        lambda tree: tree.rename(b"public", b"new"),
        lambda tree: tree.link(b"public", b"new"),
        lambda tree: tree.setxattr(b"public", b"user.key", b"v"),
        lambda tree: tree.getxattr(b"private", b"user.key"),
    ],
)
def test_refused(private: Twin, call: Callable[[Tree], object]) -> None:
    with pytest.raises(PermissionError) as caught:
        as_alice(call)(private.host)
    # EACCES, or EPERM for a hard link where the sysctl fs.protected_hardlinks is set.
    private.fails(error_name(caught.value), as_alice(call))


@pytest.mark.only("none", "auto")
@pytest.mark.parametrize("name", [b"private", b"public", b"closed", b"."])
@pytest.mark.parametrize("wanted", [os.F_OK, os.R_OK, os.W_OK, os.X_OK])
def test_access_as_somebody_else(private: Twin, name: bytes, wanted: int) -> None:
    def ask(tree: Tree) -> bool:
        with tree.caller(ALICE, ALICES):
            return tree.access(name, wanted)

    private.same(ask)


def test_access(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same_unless_known(lambda tree: tree.access(b"file", os.R_OK), "access")


@pytest.mark.only("none", "auto")
def test_only_owners_change_attributes(private: Twin) -> None:
    private.fails("EPERM", as_alice(lambda tree: tree.chmod(b"public", 0o666)))
    private.fails("EPERM", as_alice(lambda tree: tree.chown(b"public", ALICE, -1)))
    private.fails("EPERM", as_alice(lambda tree: tree.utime(b"public", 1, 1)))


@pytest.mark.only("none", "auto")
def test_sticky_directory(private: Twin) -> None:
    for tree in private.both():
        tree.mkdir(b"tmp")
        tree.chmod(b"tmp", 0o1777)
        put(tree, b"tmp/roots")

    private.fails("EPERM", as_alice(lambda tree: tree.unlink(b"tmp/roots")))
    private.same(as_alice(lambda tree: put(tree, b"tmp/mine")))
    private.same(as_alice(lambda tree: tree.unlink(b"tmp/mine")))


# --- set-id bits ---------------------------------------------------------------------------------


def set_id_file(tree: Tree) -> None:
    """Make an executable with both set-id bits that anybody may write to."""
    put(tree, b"program", b"#!content")
    tree.chmod(b"program", 0o6777)


@pytest.mark.only("none", "auto")
def test_write_by_somebody_else_clears_set_id(twin: Twin) -> None:
    def write(tree: Tree) -> int:
        set_id_file(tree)
        with tree.caller(ALICE, ALICES), tree.open(b"program", os.O_WRONLY) as handle:
            handle.pwrite(b"X", 0)
        return stat.S_IMODE(tree.stat(b"program").mode)

    assert twin.same(write) == 0o777


@pytest.mark.only("none", "auto")
def test_truncate_by_somebody_else_clears_set_id(twin: Twin) -> None:
    def cut(tree: Tree) -> list[int]:
        modes = []
        changes: list[Callable[[], None]] = [
            lambda: tree.truncate(b"program", 3),
            lambda: tree.open(b"program", os.O_WRONLY | os.O_TRUNC).close(),
        ]
        for change in changes:
            set_id_file(tree)
            with tree.caller(ALICE, ALICES):
                change()
            modes.append(stat.S_IMODE(tree.stat(b"program").mode))
            tree.unlink(b"program")
        return modes

    assert twin.same(cut) == [0o777, 0o777]


def test_write_by_root_keeps_set_id(twin: Twin) -> None:
    def write(tree: Tree) -> int:
        set_id_file(tree)
        with tree.open(b"program", os.O_WRONLY) as handle:
            handle.pwrite(b"X", 0)
        return stat.S_IMODE(tree.stat(b"program").mode)

    twin.same_unless_known(write, "write by root keeps set-id")
