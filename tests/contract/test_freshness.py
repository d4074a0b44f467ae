"""What others change at the host is seen: at once without caching, else within the timeout."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import get, put
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.trees import PathTree, Tree
    from tests.contract.twin import Twin

#: Seconds: the timeout of mode auto, and as much again for a busy machine.
PATIENCE = 2.0


def prime(tree: Tree) -> None:
    """Make some files, and have everything about them cached."""
    put(tree, b"file", b"old")
    put(tree, b"doomed", b"old")
    tree.mkdir(b"d")
    put(tree, b"d/inside")
    for name in (b"file", b"doomed", b"d", b"d/inside"):
        tree.stat(name)
    get(tree, b"file")
    tree.listdir()
    tree.listdir(b"d")
    for name in (b"appearing", b"d/appearing"):
        assert not exists(tree, name)


def exists(tree: Tree, name: bytes) -> bool:
    """Whether a name is there."""
    try:
        tree.stat(name)
    except FileNotFoundError:
        return False
    return True


def replace_content(behind: PathTree) -> None:
    with behind.open(b"file", os.O_WRONLY | os.O_TRUNC) as handle:
        handle.pwrite(b"new and longer", 0)


def replace_file(behind: PathTree) -> None:
    put(behind, b"other", b"another file")
    behind.rename(b"other", b"file")


#: What happens at the host, and what to look at.
CHANGES: list[tuple[Callable[[PathTree], None], Callable[[Tree], object]]] = [
    (replace_content, lambda tree: get(tree, b"file")),
    (replace_content, lambda tree: tree.stat(b"file")),
    (replace_file, lambda tree: get(tree, b"file")),
    (lambda behind: behind.chmod(b"file", 0o600), lambda tree: tree.stat(b"file")),
    (lambda behind: behind.link(b"file", b"d/hard"), lambda tree: tree.stat(b"file")),
    (lambda behind: put(behind, b"appearing"), lambda tree: exists(tree, b"appearing")),
    (lambda behind: put(behind, b"d/appearing"), lambda tree: tree.listdir(b"d")),
    (lambda behind: behind.unlink(b"doomed"), lambda tree: exists(tree, b"doomed")),
    (lambda behind: behind.unlink(b"doomed"), lambda tree: tree.listdir()),
    (lambda behind: behind.rename(b"d", b"e"), lambda tree: exists(tree, b"d/inside")),
]


def test_changes_at_the_host(twin: Twin) -> None:
    """All changes in one test, each in a folder of its own: waiting takes a second."""
    folders = [b"%d" % number for number in range(len(CHANGES))]
    for tree in twin.both():
        for folder in folders:
            tree.mkdir(folder)
            prime(tree.below(folder))
    looks: list[Callable[[Tree], object]] = [
        functools.partial(look_below, look, folder)
        for folder, (_, look) in zip(folders, CHANGES, strict=True)
    ]
    before = [twin.same(look) for look in looks]

    for folder, (change, _) in zip(folders, CHANGES, strict=True):
        change(twin.host.below(folder))
        change(twin.shared.below(folder))

    if twin.way.endswith("auto"):
        wait_until(lambda: agrees(twin, looks), PATIENCE, "all changes to be seen")
    after = [twin.same(look) for look in looks]
    assert [one == two for one, two in zip(before, after, strict=True)] == [False] * len(looks)


def test_open_handle_sees_changes(twin: Twin) -> None:
    """No path is walked, so nothing is looked up again: attributes and contents stand alone."""
    for tree in twin.both():
        put(tree, b"file", b"old content")
    with twin.tree.open(b"file", os.O_RDONLY) as handle:
        # Attributes last: reading makes the kernel ask for the time of access again.
        assert (handle.pread(20, 0), handle.stat().size) == (b"old content", 11)

        replace_content(twin.host)
        replace_content(twin.shared)

        def is_seen() -> bool:
            return (handle.stat().size, handle.pread(20, 0)) == (14, b"new and longer")

        if twin.way.endswith("auto"):
            wait_until(is_seen, PATIENCE, "the change to be seen")
        assert is_seen()


def test_create_what_appeared_meanwhile(twin: Twin) -> None:
    """The kernel may remember that a name is absent, and ask for it to be created: it is opened."""
    for tree, behind in ((twin.host, twin.host), (twin.tree, twin.shared)):
        assert not exists(tree, b"file")
        put(behind, b"file", b"made at the host")
        with tree.open(b"file", os.O_RDWR | os.O_CREAT, 0o600) as handle:
            assert handle.pread(20, 0) == b"made at the host"


@pytest.mark.parametrize("operation", ["unlink", "rename"])
def test_removal_of_what_was_replaced(twin: Twin, operation: str) -> None:
    """A name that has come to mean another file, while the kernel remembers the old one."""

    def remove(tree: Tree) -> None:
        if operation == "unlink":
            tree.unlink(b"file")
        else:
            tree.rename(b"file", b"moved")

    for tree, behind in ((twin.host, twin.host), (twin.tree, twin.shared)):
        put(tree, b"file", b"old")
        tree.stat(b"file")
        replace_file(behind)

    twin.same_unless_known(remove, "remove what was replaced at the host")
    if exists(twin.host, b"file"):
        # It was refused. Some time later it is not.
        wait_until(lambda: succeeds(lambda: remove(twin.tree)), PATIENCE, "it to be removed")
        remove(twin.host)
    if twin.way.endswith("auto"):
        # The kernel has moved the old file to the new name, for as long as it believes in it.
        wait_until(lambda: agrees(twin, []), PATIENCE, "the new file to be seen")


def succeeds(call: Callable[[], None]) -> bool:
    """Whether a call raises no OSError."""
    try:
        call()
    except OSError:
        return False
    return True


def look_below(look: Callable[[Tree], object], folder: bytes, tree: Tree) -> object:
    """Look at something in a folder of a tree."""
    return look(tree.below(folder))


def agrees(twin: Twin, looks: list[Callable[[Tree], object]]) -> bool:
    """Whether the tree under test shows what is at the host."""
    try:
        twin.check()
        for look in looks:
            twin.same(look)
    except (AssertionError, FileNotFoundError):
        return False
    return True
