"""Extended attributes: values of all sizes, lists, flags and errors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import put
from tests.support.environment import supports_user_xattr, unavailable

if TYPE_CHECKING:
    from tests.contract.conftest import Site
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin


@pytest.fixture(autouse=True)
def _host_has_xattrs(site: Site) -> None:
    if not supports_user_xattr(site.shared):
        unavailable(f"the file system of {site.shared} has no user.* attributes")


@pytest.mark.parametrize("value", [b"v", b"", b"\0\xff\0", b"x" * 255, b"x" * 3000])
def test_set_and_get(twin: Twin, value: bytes) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.setxattr(b"file", b"user.key", value))

    assert twin.same(lambda tree: tree.getxattr(b"file", b"user.key")) == value
    assert twin.same(lambda tree: tree.getxattr_size(b"file", b"user.key")) == len(value)


def test_room(twin: Twin) -> None:
    """A room of exactly the size is enough, one byte less is ERANGE."""
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.setxattr(b"file", b"user.key", b"0123456789"))

    assert twin.same(lambda tree: tree.getxattr(b"file", b"user.key", 10)) == b"0123456789"
    twin.fails("ERANGE", lambda tree: tree.getxattr(b"file", b"user.key", 9))
    needed = twin.same(lambda tree: tree.listxattr_size(b"file"))
    assert twin.same(lambda tree: tree.listxattr(b"file", needed)) == [b"user.key"]
    twin.fails("ERANGE", lambda tree: tree.listxattr(b"file", needed - 1))


def test_list(twin: Twin) -> None:
    keys = [b"user.a", b"user.B.c", b"user." + b"x" * 250, "user.ü".encode()]

    def make(tree: Tree) -> list[bytes]:
        put(tree, b"file")
        for key in keys:
            tree.setxattr(b"file", key, b"value of " + key[:20])
        return sorted(tree.listxattr(b"file"))

    assert twin.same(make) == sorted(keys)


def test_no_attributes(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))

    assert twin.same(lambda tree: tree.listxattr(b"file")) == []
    assert twin.same(lambda tree: tree.listxattr_size(b"file")) == 0
    twin.fails("ENODATA", lambda tree: tree.getxattr(b"file", b"user.key"))
    twin.fails("ENODATA", lambda tree: tree.getxattr_size(b"file", b"user.key"))
    twin.fails("ENODATA", lambda tree: tree.removexattr(b"file", b"user.key"))


def test_replace_and_remove(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.setxattr(b"file", b"user.key", b"first, and longer"))
    twin.same(lambda tree: tree.setxattr(b"file", b"user.key", b"second"))
    assert twin.same(lambda tree: tree.getxattr(b"file", b"user.key")) == b"second"

    twin.same(lambda tree: tree.removexattr(b"file", b"user.key"))
    twin.fails("ENODATA", lambda tree: tree.getxattr(b"file", b"user.key"))
    twin.fails("ENODATA", lambda tree: tree.removexattr(b"file", b"user.key"))


def test_create_and_replace_flags(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    key = b"user.key"

    twin.fails("ENODATA", lambda tree: tree.setxattr(b"file", key, b"v", os.XATTR_REPLACE))
    twin.same(lambda tree: tree.setxattr(b"file", key, b"one", os.XATTR_CREATE))
    twin.fails("EEXIST", lambda tree: tree.setxattr(b"file", key, b"two", os.XATTR_CREATE))
    assert twin.same(lambda tree: tree.getxattr(b"file", key)) == b"one"
    twin.same(lambda tree: tree.setxattr(b"file", key, b"three", os.XATTR_REPLACE))
    assert twin.same(lambda tree: tree.getxattr(b"file", key)) == b"three"


def test_attributes_of_a_directory(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))
    twin.same(lambda tree: tree.setxattr(b"d", b"user.key", b"value"))

    assert twin.same(lambda tree: tree.listxattr(b"d")) == [b"user.key"]


def test_errors(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"file")
        tree.symlink(b"file", b"link")

    twin.fails("ENOTSUP", lambda tree: tree.setxattr(b"file", b"nonsense.key", b"v"))
    twin.fails("EPERM", lambda tree: tree.setxattr(b"link", b"user.key", b"v"), "xattr on symlink")
    twin.fails("ENOENT", lambda tree: tree.getxattr(b"nothing", b"user.key"))


def test_attributes_follow_the_file(twin: Twin) -> None:
    def move(tree: Tree) -> bytes:
        put(tree, b"file")
        tree.setxattr(b"file", b"user.key", b"value")
        tree.link(b"file", b"link")
        tree.rename(b"file", b"moved")
        tree.unlink(b"link")
        return tree.getxattr(b"moved", b"user.key")

    assert twin.same(move) == b"value"
