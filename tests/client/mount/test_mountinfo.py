"""Reading the mount table; the golden lines are from proc(5) and from a real machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.client.mount.mountinfo import (
    find_mount,
    locate,
    parse_mountinfo,
    read_mountinfo,
    unescape,
)

if TYPE_CHECKING:
    from pathlib import Path

TABLE = r"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
40 35 0:52 / /mnt/a\040b\134c rw,nodev shared:7 master:2 - fuse.vfsmount /s\054x rw,user_id=1000
41 35 0:53 / /mnt/plain rw - fuse.sshfs host: rw,user_id=0,group_id=0
42 41 0:54 / /mnt/plain rw - fuse.vfsmount x rw,user_id=0
43 35 0:55 / /dash-in-name rw - tmpfs - rw
"""


def test_fields_of_an_entry() -> None:
    entry = list(parse_mountinfo(TABLE))[1]
    assert entry.device == "0:52"
    assert entry.minor == 52
    assert entry.root == "/"
    assert entry.mountpoint == r"/mnt/a b\c"
    assert entry.options == ("rw", "nodev")
    assert entry.fstype == "fuse.vfsmount"
    assert entry.source == "/s,x"
    assert entry.owner_uid == 1000
    assert entry.is_fuse


def test_other_file_systems() -> None:
    root, *_, tmpfs = parse_mountinfo(TABLE)
    assert (root.root, root.fstype, root.source) == ("/mnt1", "ext3", "/dev/root")
    assert root.owner_uid is None
    assert not root.is_fuse
    assert (tmpfs.mountpoint, tmpfs.source) == ("/dash-in-name", "-")


def test_the_last_of_several_covers_the_others() -> None:
    entry = find_mount(parse_mountinfo(TABLE), "/mnt/plain")
    assert entry is not None
    assert entry.device == "0:54"
    assert find_mount(parse_mountinfo(TABLE), "/mnt") is None


@given(st.text())
def test_any_text_is_read_or_passed_over(text: str) -> None:
    for entry in parse_mountinfo(text):
        assert len(entry) == 7


@given(st.text(alphabet=" \t\n\\#abc", max_size=20))
def test_unescape_undoes_the_kernels_escapes(path: str) -> None:
    escaped = "".join(f"\\{ord(char):03o}" if char in " \t\n\\#" else char for char in path)
    assert unescape(escaped) == path


def test_read_on_this_machine() -> None:
    assert find_mount(read_mountinfo(), "/") is not None


class TestLocate:
    def test_a_mount(self) -> None:
        path, entry = locate("/proc")
        assert path == "/proc"
        assert entry is not None
        assert entry.fstype == "proc"

    @pytest.mark.parametrize("spelling", ["/proc/", "/proc/.", "/proc/../proc", "//proc"])
    def test_spellings(self, spelling: str) -> None:
        assert locate(spelling)[0] == "/proc"

    def test_a_link_in_the_way_and_at_the_end(self, tmp_path: Path) -> None:
        (tmp_path / "root").symlink_to("/")
        (tmp_path / "proc").symlink_to("root/proc")
        assert locate(str(tmp_path / "root" / "proc"))[0] == "/proc"
        assert locate(str(tmp_path / "proc"))[0] == "/proc"

    def test_relative(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/")
        assert locate("proc")[0] == "/proc"

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert locate(str(tmp_path / "absent")) == (os.path.realpath(tmp_path) + "/absent", None)
        assert locate(str(tmp_path))[1] is None

    def test_a_loop_of_links_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        assert locate(str(tmp_path / "a"))[1] is None
