"""Extended attributes under other names: the rules alone, and a guest that lives by them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.hostd.fs.xattrmap import parse_xattr_map
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = ":map::user.virtiofs.:"
TRUSTED = "/map/trusted./user.virtiofs./"
#: What the two are short for, by virtiofsd's documentation.
LONG = {
    EVERYTHING: ":prefix:all::user.virtiofs.::bad:all:::",
    TRUSTED: "/prefix/all/trusted./user.virtiofs./  \n /bad/server//trusted./"
    " /bad/client/user.virtiofs.//\n/ok/all///",
}
HIDDEN = "/unsupported/all/security.selinux/security.selinux//ok/all///"

#: Errors stand for what a guest gets, None for what it does not see.
CASES: dict[str, tuple[dict[bytes, bytes | int], dict[bytes, bytes | None]]] = {
    EVERYTHING: (
        {b"trusted.a": b"user.virtiofs.trusted.a", b"user.a": b"user.virtiofs.user.a"},
        {b"user.virtiofs.user.a": b"user.a", b"user.a": None, b"user.virtiofs.": None},
    ),
    TRUSTED: (
        {
            b"trusted.a": b"user.virtiofs.trusted.a",
            b"user.virtiofs.trusted.a": errno.EPERM,
            b"user.a": b"user.a",
        },
        {b"user.virtiofs.trusted.a": b"trusted.a", b"trusted.a": None, b"user.a": b"user.a"},
    ),
    HIDDEN: (
        {b"security.selinux": errno.EOPNOTSUPP, b"security.other": b"security.other"},
        {b"security.selinux": None, b"security.other": b"security.other"},
    ),
    ":ok:client:user.:: :bad:client::: :bad:server::security.: :ok:server:::": (
        {b"user.a": b"user.a", b"trusted.a": errno.EPERM},
        {b"security.a": None, b"trusted.a": b"trusted.a"},
    ),
}


@pytest.mark.parametrize("text", [*CASES, *LONG.values()])
def test_rules(text: str) -> None:
    short = {long: short for short, long in LONG.items()}.get(text, text)
    rules = parse_xattr_map(text)
    to_host, to_guest = CASES[short]
    for name, expected in to_host.items():
        if isinstance(expected, int):
            with pytest.raises(OSError, match="attribute") as caught:
                rules.to_host(name)
            assert caught.value.errno == expected
        else:
            assert rules.to_host(name) == expected
    assert {name: rules.to_guest(name) for name in to_guest} == to_guest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no rule for all other client names"),
        (" \n", "no rule for all other client names"),
        (":ok:client:::", "no rule for all other server names"),
        (":ok:server::: :bad:client:user.::", "no rule for all other client names"),
        (":map:a", "ends too early"),
        (":ok:all::", "ends too early"),
        (":okay:all:::", "'okay' is none of map, prefix, ok"),
        (":ok:guest:::", "'guest' is none of client, server, all"),
        (":map::user.a.::ok:all:::", "must be the last"),
    ],
)
def test_rules_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_xattr_map(text)


# --- a guest -------------------------------------------------------------------------------------


@pytest.fixture
def options(request: pytest.FixtureRequest) -> ShareOptions:
    marker = request.node.get_closest_marker("parametrize")
    text = request.node.callspec.params["rules"] if marker else EVERYTHING
    return ShareOptions(xattrmap=parse_xattr_map(text))


@pytest.fixture
def path(folder: Path) -> Path:
    path = folder / "file"
    path.write_bytes(b"data")
    try:
        os.setxattr(path, "user.virtiofs.user.a", b"1")
    except OSError as error:
        pytest.skip(f"no user attributes here: {error}")
    return path


def test_names_are_changed_both_ways(guest: DirectGuest, path: Path) -> None:
    os.setxattr(path, "user.unseen", b"2")
    node = guest.walk("file")
    guest.setxattr(node, b"trusted.b", b"3")

    assert os.getxattr(path, "user.virtiofs.trusted.b") == b"3"
    assert sorted(guest.listxattr(node).split(b"\0")) == [b"", b"trusted.b", b"user.a"]
    assert fuse.GETXATTR_OUT.unpack(guest.listxattr(node, 0)).size == 17
    assert guest.getxattr(node, b"user.a") == b"1"
    guest.removexattr(node, b"user.a")
    with expect_errno("ENODATA"):
        guest.getxattr(node, b"user.a")
    assert sorted(os.listxattr(path)) == ["user.unseen", "user.virtiofs.trusted.b"]


@pytest.mark.parametrize(
    ("rules", "get", "change"), [(TRUSTED, "ENODATA", "EPERM"), (HIDDEN, "ENOTSUP", "ENOTSUP")]
)
def test_refused(guest: DirectGuest, path: Path, rules: str, get: str, change: str) -> None:
    name = b"user.virtiofs.user.a" if rules == TRUSTED else b"security.selinux"
    node = guest.walk("file")
    with expect_errno(get):
        guest.getxattr(node, name)
    with expect_errno(change):
        guest.setxattr(node, name, b"")
    with expect_errno(change):
        guest.removexattr(node, name)
    assert os.getxattr(path, "user.virtiofs.user.a") == b"1"


CAPABILITY = "user.virtiofs.security.capability"


@pytest.mark.parametrize(
    "change", ["write", "truncate", "chown", "open", "create", "fallocate", "copy"]
)
def test_a_changed_file_loses_its_capabilities(folder: Path, path: Path, change: str) -> None:
    with (
        Share(folder, ShareOptions(xattrmap=parse_xattr_map(EVERYTHING))) as share,
        DirectGuest(share) as guest,
    ):
        guest.init()
        node = guest.walk("file")
        fh = guest.open(node, os.O_RDWR)
        guest.setxattr(node, b"security.capability", b"x")
        guest.setattr(node, SetattrValid.MODE, mode=0o755)
        guest.read(fh, 0, 4)
        assert os.getxattr(path, CAPABILITY) == b"x"
        _change(guest, change, node, fh)
    assert CAPABILITY not in os.listxattr(path)
    assert "user.virtiofs.user.a" in os.listxattr(path)


def _change(guest: DirectGuest, change: str, node: int, fh: int) -> None:
    match change:
        case "write":
            guest.write(fh, 0, b"y")
        case "truncate":
            guest.setattr(node, SetattrValid.SIZE, size=1)
        case "chown":
            guest.setattr(node, SetattrValid.UID, uid=os.geteuid())
        case "open":
            guest.open(node, os.O_RDWR | os.O_TRUNC)
        case "create":
            guest.create(ROOT, b"file", os.O_RDWR | os.O_TRUNC)
        case "fallocate":
            guest.call(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.values(fh, 0, 100, 0))
        case _:
            body = fuse.COPY_FILE_RANGE_IN.values(fh, 0, node, fh, 100, 2, 0)
            guest.call(Opcode.COPY_FILE_RANGE, node, body)


def test_labels_of_new_files_have_the_hosts_names(folder: Path, path: Path) -> None:
    options = ShareOptions(xattrmap=parse_xattr_map(EVERYTHING), security_label=True)
    ext = fuse.encode_extensions(fuse.Extensions(security=((b"security.selinux", b"label"),)))
    with Share(folder, options) as share, DirectGuest(share) as guest:
        guest.init()
        guest.mkdir(ROOT, b"dir", ext=ext)
        guest.create(ROOT, b"new", ext=ext)
    for name in ("dir", "new"):
        assert os.getxattr(folder / name, "user.virtiofs.security.selinux") == b"label"
