"""FUSE messages: bytes built by hand, round trips, and any bytes at all.

The bytes built by hand follow the layout tables of the protocol, field by field, and not our
formats: a codec cannot test itself.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsmount.errors import WireError
from vfsmount.wire import fuse, fuse_structs
from vfsmount.wire._codec import Codec
from vfsmount.wire.fuse import OPERATIONS, Extensions, NotifyCode, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable

#: For what is parametrised over all opcodes or structs; the usual 100 examples each take 15 s.
few = settings(max_examples=30)

CODECS = {value.name: value for value in vars(fuse_structs).values() if isinstance(value, Codec)}
#: Structs without padding: there, bytes come back as they were.
DENSE = ["Attr", "EntryOut", "OpenIn", "OpenOut", "SetupmappingIn", "Dirent", "LkOut", "IoctlOut"]


def u16(*values: int) -> bytes:
    """Little-endian 16-bit words."""
    return b"".join(value.to_bytes(2, "little") for value in values)


def u32(*values: int) -> bytes:
    """Little-endian 32-bit words."""
    return b"".join(value.to_bytes(4, "little") for value in values)


def u64(*values: int) -> bytes:
    """Little-endian 64-bit words."""
    return b"".join(value.to_bytes(8, "little") for value in values)


def i32(value: int) -> bytes:
    """One signed little-endian 32-bit word."""
    return value.to_bytes(4, "little", signed=True)


def i64(value: int) -> bytes:
    """One signed little-endian 64-bit word."""
    return value.to_bytes(8, "little", signed=True)


def head(opcode: int, body: bytes, *, extlen: int = 0, nodeid: int = 1) -> bytes:
    """A fuse_in_header and what follows it: unique 0x1122, uid 1000, gid 100, pid 4711."""
    length = 40 + len(body)
    ids = u32(1000, 100, 4711) + u16(extlen, 0)
    return u32(length, opcode) + u64(0x1122, nodeid) + ids + body


def answer(body: bytes, *, error: int = 0, unique: int = 0x1122) -> bytes:
    """A fuse_out_header and what follows it."""
    return u32(16 + len(body)) + i32(error) + u64(unique) + body


ATTR_BYTES = (
    u64(77, 4097, 16)
    + (i64(-1) + i64(1_600_000_000) + i64(1_700_000_000))
    + u32(1, 2, 999_999_999)
    + u32(0o100644, 3, 1000, 100, 0x0105, 4096, 1)
)
ATTR = fuse.Attr(
    ino=77,
    size=4097,
    blocks=16,
    atime=-1,
    mtime=1_600_000_000,
    ctime=1_700_000_000,
    atimensec=1,
    mtimensec=2,
    ctimensec=999_999_999,
    mode=0o100644,
    nlink=3,
    uid=1000,
    gid=100,
    rdev=0x0105,
    blksize=4096,
    flags=1,
)
ENTRY_BYTES = u64(5, 6, 7, 8) + u32(9, 10) + ATTR_BYTES
ENTRY = fuse.EntryOut(
    nodeid=5,
    generation=6,
    entry_valid=7,
    attr_valid=8,
    entry_valid_nsec=9,
    attr_valid_nsec=10,
    attr=ATTR,
)


# --- bytes built by hand -------------------------------------------------------------------------

HAND_MADE_REQUESTS: list[tuple[bytes, Any, tuple[bytes, ...], bytes]] = [
    (head(Opcode.LOOKUP, b"etc\0"), None, (b"etc",), b""),
    (head(Opcode.FORGET, u64(3)), fuse.ForgetIn(3), (), b""),
    (head(Opcode.GETATTR, u32(1, 0) + u64(9)), fuse.GetattrIn(1, 9), (), b""),
    (
        head(
            Opcode.SETATTR,
            u32(0x1F, 0)
            + u64(1, 2, 3)
            + (i64(-4) + i64(5) + i64(6))
            + u32(7, 8, 9, 0o600, 0, 11, 12, 0),
        ),
        fuse.SetattrIn(
            valid=0x1F,
            fh=1,
            size=2,
            lock_owner=3,
            atime=-4,
            mtime=5,
            ctime=6,
            atimensec=7,
            mtimensec=8,
            ctimensec=9,
            mode=0o600,
            uid=11,
            gid=12,
        ),
        (),
        b"",
    ),
    (head(Opcode.READLINK, b""), None, (), b""),
    (head(Opcode.SYMLINK, b"link\0/tar get\0"), None, (b"link", b"/tar get"), b""),
    (
        head(Opcode.MKNOD, u32(0o20600, 0x0105, 0o22, 0) + b"null\0"),
        fuse.MknodIn(0o20600, 0x0105, 0o22),
        (b"null",),
        b"",
    ),
    (head(Opcode.MKDIR, u32(0o755, 0o22) + b"d\0"), fuse.MkdirIn(0o755, 0o22), (b"d",), b""),
    (head(Opcode.RENAME, u64(4) + b"a\0b\0"), fuse.RenameIn(4), (b"a", b"b"), b""),
    (
        head(Opcode.RENAME2, u64(4) + u32(2, 0) + b"a\0\xff\xfe\0"),
        fuse.Rename2In(4, 2),
        (b"a", b"\xff\xfe"),
        b"",
    ),
    (head(Opcode.LINK, u64(8) + b"hard\0"), fuse.LinkIn(8), (b"hard",), b""),
    (head(Opcode.OPEN, u32(0o100002, 1)), fuse.OpenIn(0o100002, 1), (), b""),
    (
        head(Opcode.READ, u64(1, 1 << 33) + u32(4096, 2) + u64(5) + u32(0o100000, 0)),
        fuse.ReadIn(1, 1 << 33, 4096, 2, 5, 0o100000),
        (),
        b"",
    ),
    (
        head(Opcode.WRITE, u64(1, 10) + u32(3, 4) + u64(5) + u32(1, 0) + b"abc"),
        fuse.WriteIn(1, 10, 3, 4, 5, 1),
        (),
        b"abc",
    ),
    (
        head(Opcode.RELEASE, u64(1) + u32(2, 1) + u64(3)),
        fuse.ReleaseIn(1, 2, 1, 3),
        (),
        b"",
    ),
    (head(Opcode.FSYNC, u64(1) + u32(1, 0)), fuse.FsyncIn(1, 1), (), b""),
    (
        head(Opcode.SETXATTR, u32(5, 1, 1, 0) + b"user.x\0va\0ue"),
        fuse.SetxattrIn(5, 1, 1),
        (b"user.x",),
        b"va\0ue",
    ),
    (head(Opcode.GETXATTR, u32(64, 0) + b"user.x\0"), fuse.GetxattrIn(64), (b"user.x",), b""),
    (head(Opcode.LISTXATTR, u32(0, 0)), fuse.GetxattrIn(0), (), b""),
    (head(Opcode.FLUSH, u64(1) + u32(0, 0) + u64(2)), fuse.FlushIn(1, 2), (), b""),
    (
        head(Opcode.INIT, u32(7, 38, 131072, 0x73FFFFFB, 0x5FD) + bytes(44)),
        fuse.InitIn(7, 38, 131072, 0x73FFFFFB, 0x5FD),
        (),
        b"",
    ),
    (
        head(Opcode.INIT, u32(7, 31, 131072, 0x33FFFFFB)),
        fuse.InitIn(7, 31, 131072, 0x33FFFFFB, 0),
        (),
        b"",
    ),
    (
        head(Opcode.SETLK, u64(1, 2, 3, 4) + u32(1, 99, 1, 0)),
        fuse.LkIn(fh=1, owner=2, start=3, end=4, type=1, pid=99, lk_flags=1),
        (),
        b"",
    ),
    (head(Opcode.ACCESS, u32(4, 0)), fuse.AccessIn(4), (), b""),
    (
        head(Opcode.CREATE, u32(0o101, 0o644, 0o22, 1) + b"new\0"),
        fuse.CreateIn(0o101, 0o644, 0o22, 1),
        (b"new",),
        b"",
    ),
    (head(Opcode.INTERRUPT, u64(0x1122)), fuse.InterruptIn(0x1122), (), b""),
    (head(Opcode.DESTROY, b""), None, (), b""),
    (
        head(Opcode.IOCTL, u64(1) + u32(2, 3) + u64(4) + u32(2, 8) + b"in"),
        fuse.IoctlIn(1, 2, 3, 4, 2, 8),
        (),
        b"in",
    ),
    (
        head(Opcode.FALLOCATE, u64(1, 2, 3) + u32(1, 0)),
        fuse.FallocateIn(1, 2, 3, 1),
        (),
        b"",
    ),
    (head(Opcode.LSEEK, u64(1, 2) + u32(3, 0)), fuse.LseekIn(1, 2, 3), (), b""),
    (
        head(Opcode.COPY_FILE_RANGE, u64(1, 2, 3, 4, 5, 6, 0)),
        fuse.CopyFileRangeIn(1, 2, 3, 4, 5, 6, 0),
        (),
        b"",
    ),
    (
        head(Opcode.SETUPMAPPING, u64(1, 0x200000, 0x200000, 3, 0x400000)),
        fuse.SetupmappingIn(1, 0x200000, 0x200000, 3, 0x400000),
        (),
        b"",
    ),
    (
        head(Opcode.STATX, u32(1, 0) + u64(2) + u32(3, 0x7FF)),
        fuse.StatxIn(1, 2, 3, 0x7FF),
        (),
        b"",
    ),
]


@pytest.mark.parametrize(
    ("message", "args", "names", "data"),
    HAND_MADE_REQUESTS,
    ids=lambda value: Opcode(value[4]).name if isinstance(value, bytes) and value[40:] else "",
)
def test_request_built_by_hand(
    message: bytes, args: Any, names: tuple[bytes, ...], data: bytes
) -> None:
    request = fuse.decode_request(message)

    assert request.header == fuse.InHeader(len(message), message[4], 0x1122, 1, 1000, 100, 4711, 0)
    assert request.args == args
    assert type(request.args) is type(args)
    assert request.names == names
    assert request.data == data
    assert request.extensions == fuse.NO_EXTENSIONS


@pytest.mark.parametrize(("message", "args", "names", "data"), HAND_MADE_REQUESTS)
def test_request_built_by_hand_is_encoded_the_same(
    message: bytes, args: Any, names: tuple[bytes, ...], data: bytes
) -> None:
    packed = b"" if args is None else codec_of(message[4]).pack(args)
    if message[4] == Opcode.INIT:
        packed = packed[: len(message) - 40]
    body = packed + b"".join(name + b"\0" for name in names) + data

    assert fuse.encode_request(message[4], 0x1122, 1, body, uid=1000, gid=100, pid=4711) == message


def codec_of(opcode: int) -> Codec[Any]:
    """Return the codec of an opcode's in-struct."""
    codec = OPERATIONS[Opcode(opcode)].args
    assert codec is not None
    return codec


HAND_MADE_REPLIES: list[tuple[Opcode, bytes, tuple[Any, ...], bytes]] = [
    (Opcode.LOOKUP, ENTRY_BYTES, (ENTRY,), b""),
    (Opcode.GETATTR, u64(1) + u32(2, 0) + ATTR_BYTES, (fuse.AttrOut(1, 2, ATTR),), b""),
    (Opcode.READLINK, b"/usr/share", (), b"/usr/share"),
    (Opcode.OPEN, u64(3) + u32(9) + i32(-1), (fuse.OpenOut(3, 9, -1),), b""),
    (
        Opcode.CREATE,
        ENTRY_BYTES + u64(3) + u32(0, 0),
        (ENTRY, fuse.OpenOut(3, 0, 0)),
        b"",
    ),
    (Opcode.READ, b"data\0", (), b"data\0"),
    (Opcode.WRITE, u32(3, 0), (fuse.WriteOut(3),), b""),
    (
        Opcode.STATFS,
        u64(1, 2, 3, 4, 5) + u32(6, 255, 8, 0) + bytes(24),
        (fuse.Kstatfs(1, 2, 3, 4, 5, 6, 255, 8),),
        b"",
    ),
    (
        Opcode.INIT,
        u32(7, 38, 131072, 0x4844F829)
        + u16(65535, 49149)
        + u32(1 << 20, 1)
        + u16(256, 21)
        + u32(0x104, 1)
        + u16(30)
        + bytes(22),
        (fuse.InitOut(7, 38, 131072, 0x4844F829, 65535, 49149, 1 << 20, 1, 256, 21, 0x104, 1, 30),),
        b"",
    ),
    (Opcode.GETLK, u64(0, 9) + u32(2, 7), (fuse.LkOut(0, 9, 2, 7),), b""),
    (Opcode.BMAP, u64(12), (fuse.BmapOut(12),), b""),
    (Opcode.IOCTL, i32(-1) + u32(0, 0, 0) + b"out", (fuse.IoctlOut(-1, 0, 0, 0),), b"out"),
    (Opcode.POLL, u32(5, 0), (fuse.PollOut(5),), b""),
    (Opcode.LSEEK, u64(4096), (fuse.LseekOut(4096),), b""),
    (Opcode.COPY_FILE_RANGE_64, u64(1 << 33), (fuse.CopyFileRangeOut(1 << 33),), b""),
    (Opcode.UNLINK, b"", (), b""),
]


@pytest.mark.parametrize(("opcode", "body", "records", "data"), HAND_MADE_REPLIES)
def test_reply_built_by_hand(
    opcode: Opcode, body: bytes, records: tuple[Any, ...], data: bytes
) -> None:
    reply = fuse.decode_reply(opcode, answer(body))

    assert reply.header == fuse.OutHeader(16 + len(body), 0, 0x1122)
    assert reply.records == records
    assert reply.data == data
    packed = [
        codec.pack(record) for codec, record in zip(OPERATIONS[opcode].reply, records, strict=True)
    ]
    assert fuse.encode_reply(0x1122, b"".join(packed) + data) == answer(body)


def test_statx_reply_built_by_hand() -> None:
    stat = (
        u32(0x7FF, 4096)
        + u64(0)
        + u32(1, 1000, 100)
        + u16(0o100644, 0)
        + u64(77, 4097, 16, 0)
        + b"".join(i64(sec) + u32(nsec, 0) for sec, nsec in ((1, 2), (3, 4), (5, 6), (7, 8)))
        + u32(9, 10, 11, 12)
        + bytes(112)
    )
    reply = fuse.decode_reply(Opcode.STATX, answer(u64(1) + u32(2, 0) + bytes(16) + stat))

    (record,) = reply.records
    assert (record.attr_valid, record.attr_valid_nsec, record.flags) == (1, 2, 0)
    assert record.stat[:11] == (0x7FF, 4096, 0, 1, 1000, 100, 0o100644, 77, 4097, 16, 0)
    assert record.stat[11:] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def test_error_reply() -> None:
    reply = fuse.decode_reply(Opcode.LOOKUP, answer(b"", error=-2))

    assert reply.header == fuse.OutHeader(16, -2, 0x1122)
    assert reply.records == ()
    assert bytes(reply.data) == b""
    assert fuse.encode_reply(0x1122, b"dropped", error=2) == answer(b"", error=-2)


@pytest.mark.parametrize(
    ("opcode", "message"),
    [
        (Opcode.LOOKUP, answer(b"", error=1)),
        (Opcode.LOOKUP, answer(b"", error=-512)),
        (Opcode.LOOKUP, answer(b"x", error=-2)),
        (Opcode.LOOKUP, answer(ENTRY_BYTES[:-1])),
        (Opcode.LOOKUP, answer(ENTRY_BYTES + b"x")),
        (Opcode.LOOKUP, answer(ENTRY_BYTES)[:-1]),
        (Opcode.LOOKUP, u32(15) + answer(ENTRY_BYTES)[4:]),
        (Opcode.UNLINK, answer(b"x")),
        (Opcode.UNLINK, b""),
        (99, answer(b"")),
    ],
)
def test_bad_reply(opcode: int, message: bytes) -> None:
    with pytest.raises(WireError):
        fuse.decode_reply(opcode, message)


@pytest.mark.parametrize(
    "message",
    [
        head(Opcode.LOOKUP, b"no nul"),
        head(Opcode.SYMLINK, b"only one\0"),
        head(Opcode.LOOKUP, b"name\0more"),
        head(Opcode.GETATTR, bytes(15)),
        head(Opcode.GETATTR, bytes(17)),
        head(Opcode.GETATTR, bytes(16))[:-1],
        u32(39) + head(Opcode.DESTROY, b"")[4:],
        head(7, b""),
        head(0x1A000000, b""),
        head(Opcode.INIT, u32(7, 38, 0, 1 << 30)),
        head(Opcode.MKDIR, u32(0, 0) + b"d\0", extlen=9),
        b"",
    ],
)
def test_bad_request(message: bytes) -> None:
    with pytest.raises(WireError):
        fuse.decode_request(message)


def test_bytes_behind_the_message_are_ignored() -> None:
    assert fuse.decode_request(head(Opcode.LOOKUP, b"etc\0") + b"junk").names == (b"etc",)
    assert bytes(fuse.decode_reply(Opcode.READ, answer(b"data") + b"junk").data) == b"data"


def test_setxattr_is_shorter_without_setxattr_ext() -> None:
    message = head(Opcode.SETXATTR, u32(2, 1) + b"user.x\0vv")

    request = fuse.decode_request(message, setxattr_ext=False)

    assert request.args == fuse.SetxattrInCompat(2, 1)
    assert (request.names, bytes(request.data)) == ((b"user.x",), b"vv")


# --- extensions ----------------------------------------------------------------------------------

# 8 bytes of header and one context: 8 + 17 + 3 bytes, padded to 32.
SECURITY_BYTES = u32(8 + 32, 1) + u32(3, 0) + b"security.selinux\0" + b"abc" + bytes(4)
GROUP_BYTES = u32(16, 32) + u32(1, 27)


def test_extensions_built_by_hand() -> None:
    # They begin straight behind the NUL, unaligned.
    body = u32(0o755, 0) + b"abc\0" + SECURITY_BYTES + GROUP_BYTES

    request = fuse.decode_request(head(Opcode.MKDIR, body, extlen=(40 + 16) // 8))

    assert request.names == (b"abc",)
    assert request.extensions == Extensions((27,), ((b"security.selinux", b"abc"),))
    assert fuse.encode_extensions(request.extensions) == SECURITY_BYTES + GROUP_BYTES


def test_empty_security_context_differs_from_none() -> None:
    assert fuse.decode_extensions(u32(8, 0)) == Extensions(None, ())
    assert fuse.encode_extensions(Extensions(None, ())) == u32(8, 0)
    assert fuse.encode_extensions(fuse.NO_EXTENSIONS) == b""


@pytest.mark.parametrize(
    "data",
    [
        u32(16, 33) + bytes(8),
        u32(7, 32),
        u32(12, 32) + bytes(4),
        u32(0, 32),
        u32(24, 32) + bytes(8),
        u32(8, 32),
        u32(16, 32) + u32(2, 27),
        u32(16, 1) + u32(1, 0),
        GROUP_BYTES * 2,
        u32(8, 0) * 2,
        b"\0",
    ],
)
def test_bad_extensions(data: bytes) -> None:
    with pytest.raises(WireError):
        fuse.decode_extensions(data)


names = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)
extensions = st.builds(
    Extensions,
    st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple),
    st.none() | st.lists(st.tuples(names, st.binary(max_size=40)), max_size=31).map(tuple),
)


@given(extensions)
def test_extensions_round_trip(value: Extensions) -> None:
    encoded = fuse.encode_extensions(value)

    assert len(encoded) % 8 == 0
    assert fuse.decode_extensions(encoded) == value


# --- directories ---------------------------------------------------------------------------------

DIRENT_BYTES = u64(11, (1 << 63) - 1) + u32(3, 4) + b"abc" + bytes(5)


def test_dirents_built_by_hand() -> None:
    eight = u64(12, 2) + u32(8, 8) + b"12345678"

    found = list(fuse.iter_dirents(DIRENT_BYTES + eight))

    assert found == [(11, (1 << 63) - 1, 4, b"abc"), (12, 2, 8, b"12345678")]
    assert fuse.encode_dirent(11, (1 << 63) - 1, 4, b"abc") == DIRENT_BYTES


def test_direntplus_built_by_hand() -> None:
    found = list(fuse.iter_direntplus(ENTRY_BYTES + DIRENT_BYTES))

    assert found == [(ENTRY, 11, (1 << 63) - 1, 4, b"abc")]
    assert fuse.encode_direntplus(*found[0]) == ENTRY_BYTES + DIRENT_BYTES


@pytest.mark.parametrize(
    "record",
    [
        DIRENT_BYTES[:23],
        DIRENT_BYTES[:26],
        u64(1, 1) + u32(0, 4),
        u64(1, 1) + u32(3, 4) + b"a/b" + bytes(5),
        u64(1, 1) + u32(3, 4) + b"a\0b" + bytes(5),
        u64(1, 1) + u32(2**32 - 1, 4) + b"abc" + bytes(5),
    ],
)
def test_bad_dirent(record: bytes) -> None:
    with pytest.raises(WireError):
        list(fuse.iter_dirents(record))
    with pytest.raises(WireError):
        list(fuse.iter_direntplus(ENTRY_BYTES + record))


filenames = st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & set(b"\0/"))
words = st.integers(0, 2**64 - 1)
dirents = st.builds(fuse.DirEntry, words, words, st.integers(0, 15), filenames)


@given(st.lists(dirents, max_size=8))
def test_dirents_round_trip(entries: list[fuse.DirEntry]) -> None:
    plain = b"".join(fuse.encode_dirent(*entry) for entry in entries)
    plus = b"".join(fuse.encode_direntplus(ENTRY, *entry) for entry in entries)

    assert list(fuse.iter_dirents(plain)) == entries
    assert [entry[1:] for entry in fuse.iter_direntplus(plus)] == entries


# --- notifications -------------------------------------------------------------------------------

HAND_MADE_NOTIFICATIONS: list[tuple[NotifyCode, bytes, Any, bytes, bytes]] = [
    (NotifyCode.POLL, u64(5), fuse.NotifyPollOut(5), b"", b""),
    (
        NotifyCode.INVAL_INODE,
        u64(5) + i64(-1) + i64(0),
        fuse.NotifyInvalInodeOut(5, -1, 0),
        b"",
        b"",
    ),
    (
        NotifyCode.INVAL_ENTRY,
        u64(5) + u32(3, 1) + b"abc\0",
        fuse.NotifyInvalEntryOut(5, 3, 1),
        b"abc",
        b"",
    ),
    (NotifyCode.STORE, u64(5, 6) + u32(4, 0) + b"data", fuse.NotifyStoreOut(5, 6, 4), b"", b"data"),
    (
        NotifyCode.RETRIEVE,
        u64(9, 5, 6) + u32(4, 0),
        fuse.NotifyRetrieveOut(9, 5, 6, 4),
        b"",
        b"",
    ),
    (
        NotifyCode.DELETE,
        u64(5, 6) + u32(3, 0) + b"abc\0",
        fuse.NotifyDeleteOut(5, 6, 3),
        b"abc",
        b"",
    ),
    (NotifyCode.RESEND, b"", None, b"", b""),
    (NotifyCode.INC_EPOCH, b"", None, b"", b""),
    (NotifyCode.PRUNE, u32(2, 0) + u64(0, 7, 8), fuse.NotifyPruneOut(2), b"", u64(7, 8)),
]


@pytest.mark.parametrize(("code", "body", "args", "name", "data"), HAND_MADE_NOTIFICATIONS)
def test_notification_built_by_hand(
    code: NotifyCode, body: bytes, args: Any, name: bytes, data: bytes
) -> None:
    message = answer(body, error=code, unique=0)

    found = fuse.decode_notification(message)

    assert (found.code, found.args, found.name, bytes(found.data)) == (code, args, name, data)
    assert fuse.encode_notification(code, body) == message


@pytest.mark.parametrize(
    "message",
    [
        answer(u64(5), error=1, unique=2),
        answer(u64(5), error=0, unique=0),
        answer(u64(5), error=10, unique=0),
        answer(u64(5), error=-1, unique=0),
        answer(bytes(7), error=1, unique=0),
        answer(bytes(9), error=1, unique=0),
        answer(u64(5) + u32(3, 1) + b"abc", error=3, unique=0),
        answer(u64(5) + u32(2, 1) + b"abc\0", error=3, unique=0),
        answer(u64(5) + u32(3, 1) + b"abc\0x", error=3, unique=0),
        answer(u64(5, 6) + u32(5, 0) + b"data", error=4, unique=0),
        answer(u32(2, 0) + u64(0, 7), error=9, unique=0),
    ],
)
def test_bad_notification(message: bytes) -> None:
    with pytest.raises(WireError):
        fuse.decode_notification(message)


# --- forgets and mappings ------------------------------------------------------------------------


def test_forgets() -> None:
    single = fuse.decode_request(head(Opcode.FORGET, u64(3), nodeid=5))
    batch = fuse.decode_request(head(Opcode.BATCH_FORGET, u32(2, 0) + u64(5, 3, 6, 1)))

    assert fuse.decode_forgets(single) == [(5, 3)]
    assert fuse.decode_forgets(batch) == [(5, 3), (6, 1)]
    assert fuse.encode_batch_forget([(5, 3), (6, 1)]) == u32(2, 0) + u64(5, 3, 6, 1)


def test_removemappings_begin_unaligned() -> None:
    request = fuse.decode_request(head(Opcode.REMOVEMAPPING, u32(2) + u64(1, 2, 3, 4)))

    assert fuse.decode_removemappings(request) == [(1, 2), (3, 4)]


@pytest.mark.parametrize("count", [3, 2**32 - 1])
def test_counts_that_lie(count: int) -> None:
    forgets = fuse.decode_request(head(Opcode.BATCH_FORGET, u32(count, 0) + u64(5, 3, 6, 1)))
    mappings = fuse.decode_request(head(Opcode.REMOVEMAPPING, u32(count) + u64(1, 2, 3, 4)))

    with pytest.raises(WireError):
        fuse.decode_forgets(forgets)
    with pytest.raises(WireError):
        fuse.decode_removemappings(mappings)


# --- INIT flags ----------------------------------------------------------------------------------


def test_second_flag_word_counts_only_with_init_ext() -> None:
    both = fuse.InitFlag.INIT_EXT | fuse.InitFlag.ASYNC_READ | fuse.InitFlag.PASSTHROUGH

    assert fuse.split_flags(both) == (1 << 30 | 1, 1 << 5)
    assert fuse.join_flags(1 << 30 | 1, 1 << 5) == both
    assert fuse.join_flags(1, 1 << 5) == fuse.InitFlag.ASYNC_READ


def test_flag_names() -> None:
    assert fuse.flag_names(1 | 1 << 37 | 1 << 60) == ["ASYNC_READ", "PASSTHROUGH", "bit 60"]
    assert fuse.flag_names(0) == []


def test_opcode_names() -> None:
    assert fuse.opcode_name(1) == "LOOKUP"
    assert fuse.opcode_name(99) == "opcode 99"
    assert set(OPERATIONS) == set(Opcode)


# --- structs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@few
@given(data=st.data())
def test_struct_round_trip(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    raw = data.draw(st.binary(min_size=codec.size, max_size=codec.size))

    record = codec.unpack(b"skip" + raw + b"behind", 4)
    packed = codec.pack(record)

    assert len(packed) == codec.size
    assert codec.unpack(packed) == record
    assert name not in DENSE or packed == raw
    with pytest.raises(WireError):
        codec.unpack(raw[:-1])
    with pytest.raises(WireError):
        codec.unpack(raw, codec.size + 1)


# --- any bytes -----------------------------------------------------------------------------------

opcodes = st.sampled_from(list(Opcode)).map(int) | st.integers(0, 2**32 - 1)
#: Bodies that are likely to get past the first checks: structs, names, records and noise.
pieces = st.lists(
    st.binary(max_size=24)
    | names.map(lambda name: name + b"\0")
    | st.integers(0, 200).map(bytes)
    | extensions.map(fuse.encode_extensions)
    | dirents.map(lambda entry: fuse.encode_dirent(*entry)),
    max_size=5,
).map(b"".join)
#: What to lie about a length.
lies = st.just(0) | st.integers(-60, 60)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request whose header is right, or nearly."""
    body = draw(pieces)
    length = max(40 + len(body) + draw(lies), 0)
    header = u32(length, draw(opcodes)) + u64(2, draw(words)) + bytes(12)
    return header + u16(draw(st.just(0) | st.integers(0, 2**16 - 1)), 0) + body


@st.composite
def replies(draw: st.DrawFn) -> bytes:
    """A reply or notification whose header is right, or nearly."""
    body = draw(pieces)
    length = max(16 + len(body) + draw(lies), 0)
    error = draw(st.just(0) | st.integers(-600, 12) | st.integers(-(2**31), 2**31 - 1))
    return u32(length) + i32(error) + u64(draw(st.just(0) | words)) + body


def gives_record_or_wire_error(decode: Callable[[], object]) -> None:
    """Call a decoder; anything but WireError is a failure."""
    with contextlib.suppress(WireError):
        decode()


@pytest.mark.parametrize("setxattr_ext", [True, False])
@given(message=requests() | st.binary(max_size=300))
def test_any_request(setxattr_ext: bool, message: bytes) -> None:
    def decode() -> None:
        request = fuse.decode_request(message, setxattr_ext=setxattr_ext)
        assert len(request.names) == OPERATIONS[Opcode(request.header.opcode)].names
        if request.header.opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
            fuse.decode_forgets(request)
        if request.header.opcode == Opcode.REMOVEMAPPING:
            fuse.decode_removemappings(request)

    gives_record_or_wire_error(decode)


@pytest.mark.parametrize("opcode", list(Opcode), ids=lambda opcode: opcode.name)
@few
@given(message=replies() | st.binary(max_size=300))
def test_any_reply(opcode: Opcode, message: bytes) -> None:
    gives_record_or_wire_error(lambda: fuse.decode_reply(opcode, message))


@given(opcode=st.integers(), message=replies())
def test_any_reply_to_any_opcode(opcode: int, message: bytes) -> None:
    gives_record_or_wire_error(lambda: fuse.decode_reply(opcode, message))


@given(replies() | st.binary(max_size=300))
def test_any_notification(message: bytes) -> None:
    gives_record_or_wire_error(lambda: fuse.decode_notification(message))


@given(pieces | st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    gives_record_or_wire_error(lambda: fuse.decode_extensions(data))
    gives_record_or_wire_error(lambda: list(fuse.iter_dirents(data)))
    gives_record_or_wire_error(lambda: list(fuse.iter_direntplus(data)))
