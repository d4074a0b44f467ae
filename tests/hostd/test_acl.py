"""Access control lists: who applies the umask, what new files inherit, and when it is offered."""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import OFFER, ROOT, DirectGuest
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ACL_FLAGS = InitFlag.POSIX_ACL | InitFlag.DONT_MASK | InitFlag.SETXATTR_EXT
NOBODY = 0xFFFFFFFF
#: rwx for the owner, r-x for user 7, r-x for the group, rwx as the mask, nothing for others.
ENTRIES = [(1, 7, NOBODY), (2, 5, 7), (4, 5, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)]
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ENTRIES)
NAMES = {"access": "system.posix_acl_access", "default": "system.posix_acl_default"}


@pytest.fixture
def options() -> ShareOptions:
    return ShareOptions(posix_acl=True)


@pytest.fixture
def guest(share: Share, folder: Path) -> Iterator[DirectGuest]:
    """A guest that heeds lists; this thread, which serves it, has no umask."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, NAMES["access"], ACL)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")
    probe.unlink()
    before = os.umask(0)
    with DirectGuest(share) as guest:
        guest.session.credentials.own_umask = True
        guest.init(OFFER | InitFlag.DONT_MASK)
        yield guest
    os.umask(before)


def agreed(folder: Path, options: ShareOptions, offer: InitFlag, own_umask: bool) -> InitFlag:
    with Share(folder, options) as share, DirectGuest(share) as guest:
        guest.session.credentials.own_umask = own_umask
        reply = guest.init(offer)
        return fuse.join_flags(reply.flags, reply.flags2)


def test_all_of_it_is_offered_or_none(folder: Path) -> None:
    everything = OFFER | InitFlag.DONT_MASK
    lists = ShareOptions(posix_acl=True)
    assert agreed(folder, lists, everything, True) & ACL_FLAGS == ACL_FLAGS
    for options, offer, own_umask in (
        (ShareOptions(), everything, True),
        (ShareOptions(posix_acl=True, xattr=False), everything, True),
        (lists, everything & ~InitFlag.DONT_MASK, True),
        (lists, everything & ~InitFlag.POSIX_ACL, True),
        (lists, everything & ~InitFlag.SETXATTR_EXT, True),
        (lists, everything, False),
    ):
        flags = agreed(folder, options, offer, own_umask)
        assert not flags & (InitFlag.POSIX_ACL | InitFlag.DONT_MASK)


def make(guest: DirectGuest, opcode: Opcode, mode: int, umask: int) -> None:
    body = {
        Opcode.CREATE: fuse.CREATE_IN.values(os.O_RDWR, mode, umask, 0) + b"new\0",
        Opcode.MKNOD: fuse.MKNOD_IN.values(stat.S_IFIFO | mode, 0, umask) + b"new\0",
        Opcode.MKDIR: fuse.MKDIR_IN.values(mode, umask) + b"new\0",
    }[opcode]
    guest.call(opcode, ROOT, body)


HOST: dict[Opcode, Callable[[Path, int], object]] = {
    Opcode.CREATE: lambda path, mode: os.close(os.open(path, os.O_CREAT | os.O_RDWR, mode)),
    Opcode.MKNOD: os.mkfifo,
    Opcode.MKDIR: os.mkdir,
}


def lists_of(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in NAMES.values() if name in os.listxattr(path)}


@pytest.mark.parametrize("opcode", HOST, ids=lambda opcode: opcode.name)
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("umask", [0, 0o22, 0o77, 0o777777])
def test_new_files_are_as_at_the_host(
    guest: DirectGuest, folder: Path, opcode: Opcode, default: bool, umask: int
) -> None:
    twin = folder / "twin"
    twin.mkdir()
    if default:
        for path in (folder, twin):
            os.setxattr(path, NAMES["default"], ACL)
    before = os.umask(umask & 0o777)
    HOST[opcode](twin / "new", 0o777)
    os.umask(before)

    make(guest, opcode, 0o777, umask)

    assert (folder / "new").stat().st_mode == (twin / "new").stat().st_mode
    assert lists_of(folder / "new") == lists_of(twin / "new")
    assert (folder / "new").stat().st_mode & 0o777 == (0o770 if default else 0o777 & ~umask)
    assert os.umask(0) == 0


def test_the_umask_ends_with_the_request(guest: DirectGuest, folder: Path) -> None:
    (folder / "new").mkdir()
    with pytest.raises(FileExistsError):
        make(guest, Opcode.MKDIR, 0o777, 0o77)
    assert os.umask(0) == 0
    guest.symlink(ROOT, b"link", b"target")


def test_a_file_without_a_name_inherits_too(guest: DirectGuest, folder: Path) -> None:
    os.setxattr(folder, NAMES["default"], ACL)
    body = fuse.CREATE_IN.values(os.O_RDWR, 0o666, 0o77, 0) + b"/\0"
    try:
        entry, _ = guest.call(Opcode.TMPFILE, ROOT, body).records
    except OSError as error:
        pytest.skip(f"no files without a name here: {error}")
    assert stat.S_IMODE(entry.attr.mode) == 0o660


def test_lists_are_set_and_read(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    nodeid = guest.walk("file")
    guest.setxattr(nodeid, NAMES["access"].encode(), ACL)
    assert os.getxattr(folder / "file", NAMES["access"]) == ACL
    assert guest.getxattr(nodeid, NAMES["access"].encode()) == ACL
    assert stat.S_IMODE(guest.getattr(nodeid).mode) == 0o770
    guest.removexattr(nodeid, NAMES["access"].encode())
    assert NAMES["access"] not in os.listxattr(folder / "file")
