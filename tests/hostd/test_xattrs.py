"""Extended attributes: any name, any value, sizes asked for first, and the kinds without any."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
CREATE, REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "file"
    path.touch()
    try:
        os.setxattr(path, "user.probe", b"")
    except OSError as error:
        pytest.skip(f"no user attributes here: {error}")
    os.removexattr(path, "user.probe")
    return path


@pytest.fixture
def node(guest: DirectGuest, path: Path) -> int:
    return guest.walk("file")


@pytest.mark.parametrize("name", [b"user.a", b"user.\xff\xfe", b"user." + b"n" * 250])
@pytest.mark.parametrize("value", [b"", b"v", b"\0\xff", b"x" * 3000])
def test_set_and_get(guest: DirectGuest, node: int, path: Path, name: bytes, value: bytes) -> None:
    guest.setxattr(node, name, value)

    assert os.getxattr(path, name) == value
    if value:  # asking for 0 bytes asks for the length
        assert guest.getxattr(node, name, len(value)) == value
    assert guest.getxattr(node, name) == value
    assert guest.listxattr(node) == name + b"\0"


def test_lengths_come_first(guest: DirectGuest, node: int) -> None:
    guest.setxattr(node, b"user.a", b"12345")
    guest.setxattr(node, b"user.bc", b"")

    assert fuse.GETXATTR_OUT.unpack(guest.getxattr(node, b"user.a", 0)).size == 5
    assert fuse.GETXATTR_OUT.unpack(guest.listxattr(node, 0)).size == 15
    assert sorted(guest.listxattr(node, 15).split(b"\0")) == [b"", b"user.a", b"user.bc"]


def test_too_little_room(guest: DirectGuest, node: int) -> None:
    guest.setxattr(node, b"user.a", b"12345")
    with expect_errno("ERANGE"):
        guest.getxattr(node, b"user.a", 4)
    with expect_errno("ERANGE"):
        guest.listxattr(node, 6)
    with expect_errno("ERANGE"):  # the room lies about itself
        body = fuse.GETXATTR_IN.values(65536) + b"user.a\0"
        guest.call(Opcode.GETXATTR, node, body, room=18)


def test_flags(guest: DirectGuest, node: int) -> None:
    with expect_errno("ENODATA"):
        guest.setxattr(node, b"user.a", b"1", REPLACE)
    guest.setxattr(node, b"user.a", b"1", CREATE)
    with expect_errno("EEXIST"):
        guest.setxattr(node, b"user.a", b"2", CREATE)
    guest.setxattr(node, b"user.a", b"3", REPLACE)

    assert guest.getxattr(node, b"user.a") == b"3"
    with expect_errno("EINVAL"):
        guest.setxattr(node, b"user.a", b"4", 4)


def test_remove(guest: DirectGuest, node: int, path: Path) -> None:
    guest.setxattr(node, b"user.a", b"1")
    guest.removexattr(node, b"user.a")

    assert os.listxattr(path) == []
    with expect_errno("ENODATA"):
        guest.removexattr(node, b"user.a")
    with expect_errno("ENODATA"):
        guest.getxattr(node, b"user.a")


def test_names_that_cannot_be(guest: DirectGuest, node: int) -> None:
    for name in (b"", b"n" * 256):
        for attempt in (
            lambda name=name: guest.getxattr(node, name),
            lambda name=name: guest.setxattr(node, name, b""),
            lambda name=name: guest.removexattr(node, name),
        ):
            with expect_errno("ERANGE"):
                attempt()
    with expect_errno("EOPNOTSUPP"):
        guest.setxattr(node, b"nonsense.a", b"")


def test_sizes_that_lie(guest: DirectGuest, node: int) -> None:
    for size in (0, 3, 5, 65537, 2**32 - 1):
        body = fuse.SETXATTR_IN.values(size, 0, 0) + b"user.a\0" + b"1234"
        with expect_errno("EINVAL"):
            guest.call(Opcode.SETXATTR, node, body)
    with expect_errno("E2BIG"):
        guest.setxattr(node, b"user.a", bytes(65537))


def test_short_struct_where_the_long_one_is_not_negotiated(
    guest: DirectGuest, node: int, path: Path
) -> None:
    guest.init(InitFlag.BIG_WRITES)
    node = guest.walk("file")
    body = fuse.SETXATTR_IN_COMPAT.values(5, 0) + b"user.a\0" + b"value"

    guest.call(Opcode.SETXATTR, node, body)

    assert os.getxattr(path, "user.a") == b"value"


def test_directory(guest: DirectGuest, path: Path) -> None:
    guest.setxattr(ROOT, b"user.d", b"1")

    assert os.getxattr(path.parent, "user.d") == b"1"
    assert guest.getxattr(ROOT, b"user.d") == b"1"


@as_root
def test_symlink_and_fifo_have_their_own(guest: DirectGuest, path: Path) -> None:
    path.with_name("link").symlink_to("file")
    os.mkfifo(path.with_name("fifo"))
    for name in ("link", "fifo"):
        nodeid = guest.walk(name)
        with expect_errno("EPERM"):
            guest.setxattr(nodeid, b"user.a", b"1")
        guest.setxattr(nodeid, b"trusted.a", b"1")

        assert guest.getxattr(nodeid, b"trusted.a") == b"1"
        assert os.getxattr(path.with_name(name), "trusted.a", follow_symlinks=False) == b"1"
    assert os.listxattr(path) == []


class TestWithoutXattr:
    @pytest.fixture
    def options(self) -> ShareOptions:
        return ShareOptions(xattr=False)

    def test_all_are_unknown(self, guest: DirectGuest) -> None:
        for attempt in (
            lambda: guest.getxattr(ROOT, b"user.a"),
            lambda: guest.setxattr(ROOT, b"user.a", b""),
            lambda: guest.listxattr(ROOT),
            lambda: guest.removexattr(ROOT, b"user.a"),
        ):
            with expect_errno("ENOSYS"):
                attempt()
