"""Security labels that come with the request which makes a file."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import OFFER, ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Extensions, InitFlag, Opcode

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="labelling takes root")

NAME, VALUE = b"security.vfsmount", b"confidential\0"
BODIES = {
    Opcode.CREATE: fuse.CREATE_IN.values(os.O_RDWR, 0o600, 0, 0) + b"new\0",
    Opcode.MKNOD: fuse.MKNOD_IN.values(stat.S_IFIFO | 0o600, 0, 0) + b"new\0",
    Opcode.MKDIR: fuse.MKDIR_IN.values(0o700, 0) + b"new\0",
    Opcode.SYMLINK: b"new\0target\0",
}


@pytest.fixture
def options() -> ShareOptions:
    return ShareOptions(security_label=True)


@pytest.fixture(autouse=True)
def labelling(folder: Path) -> None:
    probe = folder.parent / "probe"
    probe.touch()
    try:
        os.setxattr(probe, NAME, VALUE)
    except OSError as error:
        pytest.skip(f"no labels here: {error}")
    finally:
        probe.unlink()


def labels(*contexts: tuple[bytes, bytes]) -> bytes:
    return fuse.encode_extensions(Extensions(security=contexts))


def make(guest: DirectGuest, opcode: Opcode, ext: bytes) -> fuse.EntryOut:
    entry: fuse.EntryOut = guest.call(opcode, ROOT, BODIES[opcode], ext=ext).records[0]
    return entry


@pytest.mark.parametrize("opcode", BODIES, ids=lambda opcode: opcode.name)
def test_what_is_made_is_labelled(guest: DirectGuest, folder: Path, opcode: Opcode) -> None:
    entry = make(guest, opcode, labels((NAME, VALUE), (b"security.other", b"")))

    path = folder / "new"
    assert os.getxattr(path, NAME, follow_symlinks=False) == VALUE
    assert os.getxattr(path, "security.other", follow_symlinks=False) == b""
    assert entry.attr.ctime * 10**9 + entry.attr.ctimensec == path.lstat().st_ctime_ns
    assert guest.getattr(entry.nodeid).ino == path.lstat().st_ino


@pytest.mark.parametrize("opcode", BODIES, ids=lambda opcode: opcode.name)
@pytest.mark.parametrize(
    ("name", "error"), [(b"user.a", "EINVAL"), (b"trusted.a", "EINVAL"), (b"security.", "EINVAL")]
)
def test_what_cannot_be_labelled_is_not_made(
    guest: DirectGuest, folder: Path, opcode: Opcode, name: bytes, error: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with expect_errno(error, "EOPNOTSUPP"):
        make(guest, opcode, labels((NAME, VALUE), (name, b"value")))
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(guest.session.inodes) == 1


@pytest.mark.parametrize("ext", [b"", labels()])
def test_no_label_is_one_too(guest: DirectGuest, folder: Path, ext: bytes) -> None:
    make(guest, Opcode.MKDIR, ext)
    assert os.listxattr(folder / "new") == []


def test_what_was_there_keeps_its_label(guest: DirectGuest, folder: Path) -> None:
    (folder / "new").touch()
    make(guest, Opcode.CREATE, labels((NAME, VALUE)))
    assert os.listxattr(folder / "new") == []


@pytest.mark.parametrize(
    "options", [ShareOptions(), ShareOptions(security_label=True, xattr=False)]
)
def test_not_unless_agreed(folder: Path, options: ShareOptions) -> None:
    with Share(folder, options) as share, DirectGuest(share) as guest:
        reply = guest.init(OFFER)
        assert not fuse.join_flags(reply.flags, reply.flags2) & InitFlag.SECURITY_CTX
        make(guest, Opcode.MKDIR, labels((NAME, VALUE)))
    assert os.listxattr(folder / "new") == []
