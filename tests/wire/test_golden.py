"""Messages that neither end of which is ours: the kernel's requests and real daemons' replies.

``tools/capture_golden.py`` captured them. Each must decode, and encode again to the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from vfsmount.wire import fuse
from vfsmount.wire.fuse import OPERATIONS, InitFlag, Opcode

GOLDEN = Path(__file__).parent / "golden"


class Exchange(NamedTuple):
    """One request and its reply, which is empty where there is none."""

    opcode: Opcode
    request: bytes
    reply: bytes


def load(kind: str) -> list[Exchange]:
    """Return what was captured from one kind of daemon."""
    rows = json.loads((GOLDEN / f"{kind}.json").read_text())
    return [
        Exchange(Opcode[row["opcode"]], bytes.fromhex(row["request"]), bytes.fromhex(row["reply"]))
        for row in rows
    ]


KINDS = ["c", "rust"]
ALL = [(kind, number, one) for kind in KINDS for number, one in enumerate(load(kind))]
everything = pytest.mark.parametrize(
    ("kind", "exchange"),
    [pytest.param(kind, one, id=f"{kind}-{number}-{one.opcode.name}") for kind, number, one in ALL],
)


def init_of(kind: str) -> tuple[fuse.InitIn, fuse.InitOut]:
    """Return what INIT settled in a capture."""
    (exchange,) = [one for one in load(kind) if one.opcode == Opcode.INIT]
    request = fuse.decode_request(exchange.request).args
    (reply,) = fuse.decode_reply(Opcode.INIT, exchange.reply).records
    return request, reply


def has_setxattr_ext(kind: str) -> bool:
    """Whether SETXATTR_EXT is in force in a capture."""
    _, reply = init_of(kind)
    return InitFlag.SETXATTR_EXT in fuse.join_flags(reply.flags, reply.flags2)


@everything
def test_request(kind: str, exchange: Exchange) -> None:
    ext = has_setxattr_ext(kind)
    request = fuse.decode_request(exchange.request, setxattr_ext=ext)

    header = request.header
    assert header.opcode == exchange.opcode
    codec = OPERATIONS[exchange.opcode].args
    if exchange.opcode == Opcode.SETXATTR and not ext:
        codec = fuse.SETXATTR_IN_COMPAT
    struct = b"" if codec is None else codec.pack(request.args)
    body = struct + b"".join(name + b"\0" for name in request.names) + bytes(request.data)
    again = fuse.encode_request(
        header.opcode,
        header.unique,
        header.nodeid,
        body,
        uid=header.uid,
        gid=header.gid,
        pid=header.pid,
        extensions=fuse.encode_extensions(request.extensions),
    )
    assert again == exchange.request


@everything
def test_reply(kind: str, exchange: Exchange) -> None:
    if not OPERATIONS[exchange.opcode].has_reply:
        assert exchange.reply == b""
        return
    reply = fuse.decode_reply(exchange.opcode, exchange.reply)

    codecs = OPERATIONS[exchange.opcode].reply
    packed = [codec.pack(record) for codec, record in zip(codecs, reply.records, strict=False)]
    body = b"".join(packed) + bytes(reply.data)
    again = fuse.encode_reply(reply.header.unique, body, error=-reply.header.error)
    assert again == exchange.reply
    assert reply.header.unique == fuse.IN_HEADER.unpack(exchange.request).unique


@everything
def test_listing(kind: str, exchange: Exchange) -> None:
    """Directory records are taken apart and put together again, padding included."""
    if not exchange.reply:
        return
    data = fuse.decode_reply(exchange.opcode, exchange.reply).data
    if exchange.opcode == Opcode.READDIR:
        records = list(fuse.iter_dirents(data))
        assert b"".join(fuse.encode_dirent(*one) for one in records) == data
    elif exchange.opcode == Opcode.READDIRPLUS:
        entries = list(fuse.iter_direntplus(data))
        assert b"".join(fuse.encode_direntplus(*one) for one in entries) == data


@pytest.mark.parametrize("kind", KINDS)
def test_every_opcode_is_there(kind: str) -> None:
    """All that the kernel sends on /dev/fuse with ``default_permissions`` and no locks."""
    captured = {one.opcode for one in load(kind)}

    absent = set(Opcode) - captured
    assert absent <= {
        Opcode.ACCESS,  # without default_permissions
        Opcode.INTERRUPT,  # a signal
        Opcode.POLL,
        Opcode.NOTIFY_REPLY,  # needs a notification
        Opcode.BMAP,  # fuseblk
        Opcode.DESTROY,  # fuseblk and virtio-fs
        Opcode.SETUPMAPPING,  # virtio-fs
        Opcode.REMOVEMAPPING,
        Opcode.SYNCFS,
        Opcode.GETLK,
        Opcode.SETLK,  # with POSIX_LOCKS
        Opcode.SETLKW,
        Opcode.STATX,
    }


@pytest.mark.parametrize(
    ("kind", "minor", "flags", "flags2"),
    [("c", 36, 0x0044F039, 0), ("rust", 38, 0x4844F829 & ~(1 << 27), 0x104)],
)
def test_init(kind: str, minor: int, flags: int, flags2: int) -> None:
    """What both daemons are known to answer to a kernel that offers no SUBMOUNTS."""
    request, reply = init_of(kind)

    assert (request.major, reply.major) == (7, 7)
    assert request.minor >= 38
    assert reply.minor == minor
    assert reply.flags == flags
    if flags & InitFlag.INIT_EXT:
        assert reply.flags2 == flags2
    assert (reply.max_write, reply.max_pages, reply.time_gran) == (1 << 20, 256, 1)


def test_group_extension_was_sent() -> None:
    """CREATE_SUPP_GROUP, which virtiofsd (Rust) accepts: the group of a directory, by a member."""
    groups = [
        fuse.decode_request(one.request).extensions.groups
        for one in load("rust")
        if one.opcode in (Opcode.MKDIR, Opcode.CREATE)
    ]
    assert (4003,) in groups


def test_numbers_that_are_known() -> None:
    """Some facts of the script that made the messages."""
    exchanges = load("rust")
    (mknod,) = [
        one.args
        for one in (fuse.decode_request(each.request) for each in exchanges)
        if one.header.opcode == Opcode.MKNOD and one.names == (b"null",)
    ]
    assert (mknod.mode, mknod.rdev) == (0o20600, 0x103)
    times = [
        fuse.decode_request(one.request).args for one in exchanges if one.opcode == Opcode.SETATTR
    ]
    assert any((one.atime, one.atimensec) == (1_500_000_000, 123_456_789) for one in times)
    assert any((one.mtime, one.mtimensec) == (-1, 999_999_999) for one in times)
