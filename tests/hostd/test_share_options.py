"""Options of a share that change what INIT offers, or how files are opened."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import OFFER, DirectGuest
from vfsmount.hostd.fs.share import CacheMode, HandleUse, Share, ShareOptions
from vfsmount.wire.fuse import InitFlag, join_flags

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = ShareOptions()
UNCACHED = ShareOptions(cache=CacheMode.METADATA)


def accepted(folder: Path, options: ShareOptions) -> InitFlag:
    with Share(folder, options) as share, DirectGuest(share) as guest:
        reply = guest.init(OFFER)
        return join_flags(reply.flags, reply.flags2)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (PLAIN._replace(submounts=False), InitFlag.SUBMOUNTS),
        (PLAIN._replace(killpriv=False), InitFlag.HANDLE_KILLPRIV_V2),
        (PLAIN._replace(readdirplus=False), InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO),
    ],
)
def test_what_is_not_offered(folder: Path, options: ShareOptions, flags: InitFlag) -> None:
    assert accepted(folder, PLAIN) & flags == flags
    assert not accepted(folder, options) & flags


def test_mapping_uncached_files(folder: Path) -> None:
    assert InitFlag.DIRECT_IO_ALLOW_MMAP not in accepted(folder, UNCACHED)
    assert InitFlag.DIRECT_IO_ALLOW_MMAP in accepted(folder, UNCACHED._replace(allow_mmap=True))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (PLAIN._replace(direct_io=True), os.O_DIRECT),
        (PLAIN._replace(keep_noatime=True), os.O_NOATIME),
    ],
)
def test_open_flags_that_are_for_the_share_to_allow(
    folder: Path, options: ShareOptions, flag: int
) -> None:
    (folder / "file").write_bytes(b"x" * 4096)
    for share_options, expected in ((PLAIN, 0), (options, flag)):
        with Share(folder, share_options) as share, DirectGuest(share) as guest:
            guest.init()
            fh = guest.open(guest.walk("file"), os.O_RDONLY | flag)
            assert fcntl.fcntl(guest.session.files.get(fh).fd, fcntl.F_GETFL) & flag == expected


def test_without_file_handles(folder: Path) -> None:
    with Share(folder, PLAIN._replace(handles=HandleUse.NEVER)) as share:
        assert not share.keeper.by_handle
        with DirectGuest(share) as guest:
            guest.init()
            guest.mkdir(1, b"dir")
            guest.walk("dir")
