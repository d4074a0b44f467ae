"""Other file systems below the share: marked, never mixed up, and kept closed like all others."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest
from vfsmount.wire.fuse import AttrFlag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


@contextmanager
def mounted(target: Path, *arguments: str) -> Iterator[None]:
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, target], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def test_equal_numbers_of_two_file_systems_are_two_nodes(guest: DirectGuest, folder: Path) -> None:
    """Every new tmpfs numbers its files alike."""
    one, two = folder / "one", folder / "two"
    with mounted(one, "-t", "tmpfs", "none"), mounted(two, "-t", "tmpfs", "none"):
        for place in (one, two):
            (place / "file").write_text(place.name)
        assert (one / "file").stat().st_ino == (two / "file").stat().st_ino
        entries = [guest.lookup(ROOT, b"one"), guest.lookup(ROOT, b"two")]
        assert all(entry.attr.flags & AttrFlag.SUBMOUNT for entry in entries)
        assert entries[0].nodeid != entries[1].nodeid
        for path in ("one", "two"):
            fh = guest.open(guest.walk(f"{path}/file"))
            assert guest.read(fh, 0, 10) == path.encode()
            guest.release(fh)
        assert guest.walk("one/file") != guest.walk("two/file")
        guest.destroy()


def test_a_bind_mount_is_a_directory_of_its_own(guest: DirectGuest, folder: Path) -> None:
    """A guest that met the share's root again below itself could not tell the two apart."""
    (folder / "file").touch()
    with mounted(folder / "again", "--bind", str(folder)):
        again = guest.lookup(ROOT, b"again")
        assert again.attr.ino == folder.stat().st_ino
        assert again.nodeid != ROOT
        assert again.attr.flags & AttrFlag.SUBMOUNT
        assert guest.walk("again/file") == guest.walk("file")
        assert not guest.lookup(again.nodeid, b"again").attr.flags & AttrFlag.SUBMOUNT
        guest.destroy()


def test_nodes_of_other_mounts_are_kept_closed_too(guest: DirectGuest, folder: Path) -> None:
    names = [str(number) for number in range(20)]
    with mounted(folder / "other", "-t", "tmpfs", "none"):
        for name in names:
            (folder / "other" / name).write_text(name)
        guest.session.inodes._limit = 3
        nodeids = [guest.walk(f"other/{name}") for name in names]
        assert len(guest.session.inodes.open_nodes()) == 1 + 3
        for nodeid, name in zip(nodeids, names, strict=True):
            assert guest.read(guest.open(nodeid), 0, 10) == name.encode()
        guest.destroy()


def test_another_file_system_with_the_same_numbers(guest: DirectGuest, folder: Path) -> None:
    """The next one mounted gets the device number of the last one."""
    guest.session.inodes._limit = 0
    seen = []
    for content in ("first", "second"):
        with mounted(folder / "other", "-t", "tmpfs", "none"):
            (folder / "other" / "file").write_text(content)
            nodeid = guest.walk("other/file")
            fh = guest.open(nodeid)
            assert guest.read(fh, 0, 10) == content.encode()
            guest.release(fh)
            guest.getattr(ROOT)
            guest.getattr(ROOT)
            seen.append(nodeid)
    assert seen[0] != seen[1]
