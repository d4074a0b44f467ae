"""A share that refuses every change, and still lets everything be read."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def options() -> ShareOptions:
    return ShareOptions(readonly=True, writeback=True)


def test_everything_can_be_read(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").write_bytes(b"text")
    fh = guest.open(guest.walk("file"))

    assert guest.read(fh, 0, 10) == b"text"
    assert {entry.name for entry in guest.readdir(guest.opendir())} == {b".", b"..", b"file"}


def test_no_change_gets_through(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").write_bytes(b"text")
    nodeid = guest.walk("file")
    fh = guest.open(nodeid)
    before = (folder / "file").stat()
    copy = fuse.COPY_FILE_RANGE_IN.values(fh, 0, nodeid, fh, 4, 4, 0)
    tmpfile = fuse.CREATE_IN.values(os.O_RDWR, 0o600, 0, 0) + b"/\0"
    attempts: list[Callable[[], object]] = [
        lambda: guest.open(nodeid, os.O_RDWR),
        lambda: guest.open(nodeid, os.O_WRONLY),
        lambda: guest.open(nodeid, os.O_RDONLY | os.O_TRUNC),
        lambda: guest.create(ROOT, b"file"),
        lambda: guest.create(ROOT, b"new"),
        lambda: guest.mkdir(ROOT, b"new"),
        lambda: guest.mknod(ROOT, b"new", stat.S_IFREG),
        lambda: guest.symlink(ROOT, b"new", b"target"),
        lambda: guest.link(nodeid, ROOT, b"new"),
        lambda: guest.unlink(ROOT, b"file"),
        lambda: guest.rmdir(ROOT, b"file"),
        lambda: guest.rename(ROOT, b"file", ROOT, b"new"),
        lambda: guest.rename2(ROOT, b"file", ROOT, b"new", 0),
        lambda: guest.setattr(nodeid, 1, mode=0o777),
        lambda: guest.setattr(nodeid, 0),
        lambda: guest.write(fh, 0, b"x"),
        lambda: guest.setxattr(nodeid, b"user.x", b"1"),
        lambda: guest.removexattr(nodeid, b"user.x"),
        lambda: guest.call(Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.values(fh, 0, 9, 0)),
        lambda: guest.call(Opcode.COPY_FILE_RANGE, 0, copy),
        lambda: guest.call(Opcode.COPY_FILE_RANGE_64, 0, copy),
        lambda: guest.call(Opcode.TMPFILE, ROOT, tmpfile),
        lambda: guest.call(Opcode.ACCESS, ROOT, fuse.ACCESS_IN.values(os.W_OK)),
    ]
    for attempt in attempts:
        with expect_errno("EROFS"):
            attempt()
    after = (folder / "file").stat()
    assert (before.st_mode, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_mode,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_no_write_back_cache_is_offered(guest: DirectGuest) -> None:
    assert not guest.init().flags & InitFlag.WRITEBACK_CACHE
