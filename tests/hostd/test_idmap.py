"""Users and groups under other numbers: the rules alone, and a guest that lives by them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.idmap import Translation, parse_id_map
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@pytest.mark.parametrize(
    ("rule", "guest_to_host", "host_to_guest"),
    [
        ("guest:10:100:5", {9: 9, 10: 100, 14: 104, 15: 15}, {100: 100}),
        ("host:100:10:5", {10: 10}, {99: 99, 100: 10, 104: 14, 105: 105}),
        ("map:10:100:5", {10: 100, 14: 104, 15: 15}, {100: 10, 104: 14, 105: 105}),
        ("squash-guest:10:7:5", {9: 9, 10: 7, 14: 7, 15: 15}, {7: 7}),
        ("squash-host:10:7:5", {7: 7}, {9: 9, 10: 7, 14: 7, 15: 15}),
        ("squash-guest:0:1001:4294967295", {0: 1001, 4294967294: 1001, 4294967295: 4294967295}, {}),
    ],
)
def test_rules(rule: str, guest_to_host: dict[int, int], host_to_guest: dict[int, int]) -> None:
    ids = parse_id_map([rule])
    assert {number: ids.to_host(number) for number in guest_to_host} == guest_to_host
    assert {number: ids.to_guest(number) for number in host_to_guest} == host_to_guest


def test_forbidden() -> None:
    ids = parse_id_map(["forbid-guest:10:2", "guest:20:30:1"])
    for number in (10, 11):
        assert not ids.may_use(number)
        with expect_errno("EPERM"):
            ids.to_host(number)
    assert (ids.to_host(9), ids.to_host(12), ids.to_host(20)) == (9, 12, 30)
    assert ids.to_guest(10) == 10


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (["10:20:1"], "begins with none of guest"),
        (["guest:1:2"], "is not guest:BASE:TARGET:COUNT"),
        (["forbid-guest:1:2:3"], "is not forbid-guest:BASE:COUNT"),
        (["guest:a:2:3"], "'a' is no user"),
        (["guest:1:2:0"], "leaves the numbers"),
        (["guest:0:0:4294967296"], "leaves the numbers"),
        (["guest:0:4294967290:6"], "leaves the numbers"),
        (["guest:0:100:10", "squash-guest:9:1:1"], "overlap at 9"),
        (["map:0:100:10", "host:109:1:1"], "overlap at 109"),
        (["forbid-guest:5:1", "forbid-guest:5:1"], "overlap at 5"),
    ],
)
def test_rules_that_are_none(rules: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_id_map(rules)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 3000))
def test_map_leads_back(guest: int, host: int, count: int, number: int) -> None:
    ids = parse_id_map([f"map:{guest}:{host}:{count}"])
    if guest <= number < guest + count:
        assert ids.to_guest(ids.to_host(number)) == number


# --- a guest -------------------------------------------------------------------------------------


@pytest.fixture
def options() -> ShareOptions:
    uid = parse_id_map(["map:1000:2000:10", "forbid-guest:5000:10"])
    gid = parse_id_map(["map:100:3000:10", "squash-host:0:77:1", "forbid-guest:5000:10"])
    return ShareOptions(translation=Translation(uid, gid))


@pytest.fixture
def user(guest: DirectGuest, folder: Path) -> DirectGuest:
    folder.chmod(0o777)
    guest.uid, guest.gid = 1001, 102
    return guest


@as_root
def test_what_is_made_belongs_to_the_hosts_user(user: DirectGuest, folder: Path) -> None:
    entries = [
        user.mkdir(ROOT, b"dir"),
        user.create(ROOT, b"file")[0],
        user.symlink(ROOT, b"link", b"x"),
        user.mknod(ROOT, b"fifo", 0o010644),
    ]
    for entry in entries:
        assert (entry.attr.uid, entry.attr.gid) == (1001, 102)
    for path in folder.iterdir():
        info = path.lstat()
        assert (info.st_uid, info.st_gid) == (2001, 3002), path


@as_root
def test_every_way_to_see_attributes(user: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    os.chown(folder / "file", 2003, 3004)
    node = user.lookup(ROOT, b"file")
    link = user.link(node.nodeid, ROOT, b"longer-name")
    listed = {entry.name: entry.entry.attr for entry in user.readdirplus(user.opendir())}
    statx = user.record(Opcode.STATX, node.nodeid, fuse.STATX_IN.values(0, 0, 0, 0x7FF)).stat
    seen = [node.attr, link.attr, user.getattr(node.nodeid), statx]
    seen += [listed[b"file"], listed[b"longer-name"]]
    for attr in seen:
        assert (attr.uid, attr.gid) == (1003, 104)
    # One direction says nothing of the other.
    assert (user.getattr(ROOT).uid, user.getattr(ROOT).gid) == (0, 77)


@as_root
def test_chown(user: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    node = user.walk("file")
    attr = user.setattr(node, SetattrValid.UID, uid=1009)
    assert (attr.uid, attr.gid) == (1009, 77)
    user.setattr(node, SetattrValid.GID, gid=109)
    info = (folder / "file").stat()
    assert (info.st_uid, info.st_gid) == (2009, 3009)
    # Numbers that are not to be set are not looked at.
    user.setattr(node, SetattrValid.MODE, mode=0o600, uid=5000, gid=5000)


@as_root
def test_forbidden_users_get_nothing(user: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    node = user.walk("file")
    with expect_errno("EPERM"):
        user.setattr(node, SetattrValid.UID, uid=5003)
    with expect_errno("EPERM"):
        user.setattr(node, SetattrValid.GID, gid=5003)
    for user.uid, user.gid in ((5003, 0), (0, 5003)):
        with expect_errno("EPERM"):
            user.mkdir(ROOT, b"dir")
        with expect_errno("EPERM"):
            user.create(ROOT, b"new")
    assert sorted(os.listdir(folder)) == ["file"]


@as_root
def test_access_is_asked_for_as_the_hosts_user(user: DirectGuest, folder: Path) -> None:
    (folder / "file").touch(0o600)
    os.chown(folder / "file", 2001, 0)
    node = user.walk("file")
    mine = fuse.ACCESS_IN.values(os.R_OK | os.W_OK)
    user.call(Opcode.ACCESS, node, mine)
    for user.uid in (1002, 5001):
        with expect_errno("EACCES"):
            user.call(Opcode.ACCESS, node, mine)


@as_root
def test_supplementary_groups(user: DirectGuest, folder: Path) -> None:
    os.chown(folder, 0, 3005)
    folder.chmod(0o770)
    with expect_errno("EACCES"):
        user.mkdir(ROOT, b"no", ext=groups_ext(104))
    user.mkdir(ROOT, b"yes", ext=groups_ext(105, 5001))


def groups_ext(*groups: int) -> bytes:
    return fuse.encode_extensions(fuse.Extensions(groups=groups))


def test_others_pay_nothing(share: Share, folder: Path) -> None:
    plain = Share(folder, ShareOptions())
    with plain, DirectGuest(plain) as guest, DirectGuest(share) as translated:
        for opcode in (Opcode.LOOKUP, Opcode.GETATTR):
            assert guest.server._fast[opcode].__module__.startswith("vfsmount.hostd.fs.")
            assert "translate" not in guest.server._fast[opcode].__module__
            assert "translate" in translated.server._fast[opcode].__module__
