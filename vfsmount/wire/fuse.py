"""FUSE messages: what each opcode carries, and how a whole message is taken apart.

``OPERATIONS`` is the one table of the protocol's requests: in-struct, number of NUL-terminated
names, trailing data, and the layout of the reply. Everything that must know "what does opcode N
look like" reads it: both ends of the wire, the tests and the statistics.

    request:  fuse_in_header | in-struct | name NUL ... | data | extensions
    reply:    fuse_out_header | out-structs | data
    notify:   fuse_out_header (unique 0, error = code) | struct | name NUL or data

A decoder takes any bytes and returns a record or raises WireError. What comes from the other
side must be copied out of shared memory before it is decoded: some bytes are read twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfsmount.errors import WireError
from vfsmount.wire import fuse_structs
from vfsmount.wire.fuse_flags import *  # noqa: F403  # one namespace for users of the protocol
from vfsmount.wire.fuse_flags import HEEDS_INTERRUPT, InitFlag, NotifyCode, Opcode
from vfsmount.wire.fuse_structs import *  # noqa: F403
from vfsmount.wire.fuse_structs import (
    BATCH_FORGET_IN,
    DIRENT,
    ENTRY_OUT,
    EXT_HEADER,
    FORGET_ONE,
    IN_HEADER,
    INIT_IN,
    INIT_IN_COMPAT,
    OUT_HEADER,
    REMOVEMAPPING_ONE,
    Dirent,
    EntryOut,
    ForgetOne,
    InHeader,
    InitIn,
    OutHeader,
    RemovemappingOne,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from typing_extensions import Buffer

    from vfsmount.wire._codec import Codec

#: Longest name of one directory entry (NAME_MAX) and largest xattr name and value (XATTR_*_MAX).
NAME_MAX: Final = 255
XATTR_NAME_MAX: Final = 255
XATTR_SIZE_MAX: Final = 65536
#: Longest symlink target: PATH_MAX less the NUL.
PATH_MAX: Final = 4096

#: SECURITY_CTX extension headers hold a count of contexts (0 to 31) where others hold a type.
EXT_MAX_NR_SECCTX: Final = 31
#: FUSE_EXT_GROUPS: extension type of a list of supplementary groups.
EXT_GROUPS: Final = 32


class Operation(NamedTuple):
    """One row of the protocol: what a request and its reply consist of.

    Attributes:
        args: Codec of the in-struct, or None.
        names: How many NUL-terminated byte strings follow it.
        data: Whether bytes of any length come last.
        reply: Codecs of the out-structs, in order.
        reply_data: Whether the reply ends in bytes of any length.
        has_reply: False for the forgets and NOTIFY_REPLY, which are never answered.
        creates: Whether extensions (security context, groups) may follow.
    """

    args: Codec[Any] | None = None
    names: int = 0
    data: bool = False
    reply: tuple[Codec[Any], ...] = ()
    reply_data: bool = False
    has_reply: bool = True
    creates: bool = False


def _operations() -> dict[Opcode, Operation]:
    s, row, op = fuse_structs, Operation, Opcode
    entry, opened = (s.ENTRY_OUT,), (s.ENTRY_OUT, s.OPEN_OUT)
    return {
        op.LOOKUP: row(names=1, reply=entry),
        op.FORGET: row(s.FORGET_IN, has_reply=False),
        op.GETATTR: row(s.GETATTR_IN, reply=(s.ATTR_OUT,)),
        op.SETATTR: row(s.SETATTR_IN, reply=(s.ATTR_OUT,)),
        op.READLINK: row(reply_data=True),
        op.SYMLINK: row(names=2, reply=entry, creates=True),
        op.MKNOD: row(s.MKNOD_IN, names=1, reply=entry, creates=True),
        op.MKDIR: row(s.MKDIR_IN, names=1, reply=entry, creates=True),
        op.UNLINK: row(names=1),
        op.RMDIR: row(names=1),
        op.RENAME: row(s.RENAME_IN, names=2),
        op.LINK: row(s.LINK_IN, names=1, reply=entry),
        op.OPEN: row(s.OPEN_IN, reply=(s.OPEN_OUT,)),
        op.READ: row(s.READ_IN, reply_data=True),
        op.WRITE: row(s.WRITE_IN, data=True, reply=(s.WRITE_OUT,)),
        op.STATFS: row(reply=(s.KSTATFS,)),
        op.RELEASE: row(s.RELEASE_IN),
        op.FSYNC: row(s.FSYNC_IN),
        op.SETXATTR: row(s.SETXATTR_IN, names=1, data=True),
        op.GETXATTR: row(s.GETXATTR_IN, names=1, reply_data=True),
        op.LISTXATTR: row(s.GETXATTR_IN, reply_data=True),
        op.REMOVEXATTR: row(names=1),
        op.FLUSH: row(s.FLUSH_IN),
        op.INIT: row(s.INIT_IN, reply=(s.INIT_OUT,)),
        op.OPENDIR: row(s.OPEN_IN, reply=(s.OPEN_OUT,)),
        op.READDIR: row(s.READ_IN, reply_data=True),
        op.RELEASEDIR: row(s.RELEASE_IN),
        op.FSYNCDIR: row(s.FSYNC_IN),
        op.GETLK: row(s.LK_IN, reply=(s.LK_OUT,)),
        op.SETLK: row(s.LK_IN),
        op.SETLKW: row(s.LK_IN),
        op.ACCESS: row(s.ACCESS_IN),
        op.CREATE: row(s.CREATE_IN, names=1, reply=opened, creates=True),
        op.INTERRUPT: row(s.INTERRUPT_IN),
        op.BMAP: row(s.BMAP_IN, reply=(s.BMAP_OUT,)),
        op.DESTROY: row(),
        op.IOCTL: row(s.IOCTL_IN, data=True, reply=(s.IOCTL_OUT,), reply_data=True),
        op.POLL: row(s.POLL_IN, reply=(s.POLL_OUT,)),
        op.NOTIFY_REPLY: row(s.NOTIFY_RETRIEVE_IN, data=True, has_reply=False),
        op.BATCH_FORGET: row(s.BATCH_FORGET_IN, data=True, has_reply=False),
        op.FALLOCATE: row(s.FALLOCATE_IN),
        op.READDIRPLUS: row(s.READ_IN, reply_data=True),
        op.RENAME2: row(s.RENAME2_IN, names=2),
        op.LSEEK: row(s.LSEEK_IN, reply=(s.LSEEK_OUT,)),
        op.COPY_FILE_RANGE: row(s.COPY_FILE_RANGE_IN, reply=(s.WRITE_OUT,)),
        op.SETUPMAPPING: row(s.SETUPMAPPING_IN),
        op.REMOVEMAPPING: row(s.REMOVEMAPPING_IN, data=True),
        op.SYNCFS: row(s.SYNCFS_IN),
        op.TMPFILE: row(s.CREATE_IN, names=1, reply=opened, creates=True),
        op.STATX: row(s.STATX_IN, reply=(s.STATX_OUT,)),
        op.COPY_FILE_RANGE_64: row(s.COPY_FILE_RANGE_IN, reply=(s.COPY_FILE_RANGE_OUT,)),
    }


#: The row of each opcode.
OPERATIONS: Final[Mapping[Opcode, Operation]] = _operations()

#: As plain numbers: a member of an enum takes as long to find as a record to make.
_INIT, _SETXATTR = int(Opcode.INIT), int(Opcode.SETXATTR)

#: Name of each opcode for logs and tables, without the cost of an enum look-up.
OPCODE_NAMES: Final[Mapping[int, str]] = {int(opcode): opcode.name for opcode in Opcode}


def opcode_name(opcode: int) -> str:
    """Return ``LOOKUP`` for 1, and ``opcode 99`` for what we do not know."""
    return OPCODE_NAMES.get(opcode) or f"opcode {opcode}"


# --- requests ------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A request taken apart.

    Attributes:
        header: Its ``fuse_in_header``.
        args: Record of the in-struct, or None where the opcode has none.
        names: The names without their NUL.
        data: Bytes behind the names; a view into what was decoded.
        extensions: Decoded extensions of a creating request.
    """

    header: InHeader
    args: Any
    names: tuple[bytes, ...]
    data: memoryview
    extensions: Extensions


class Extensions(NamedTuple):
    """What may follow the names of a creating request.

    Attributes:
        groups: Supplementary groups (CREATE_SUPP_GROUP), or None when not sent.
        security: Contexts as (xattr name, value) (SECURITY_CTX), or None when not sent.
    """

    groups: tuple[int, ...] | None = None
    security: tuple[tuple[bytes, bytes], ...] | None = None


NO_EXTENSIONS: Final = Extensions()


def decode_request(message: Buffer, *, setxattr_ext: bool = True) -> Request:
    """Take one request apart.

    Args:
        message: The device-readable bytes, at least ``header.len`` of them; more are ignored.
        setxattr_ext: Whether SETXATTR_EXT was negotiated (16-byte setxattr_in; else 8).

    Raises:
        WireError: Unknown opcode, a length that lies, a struct cut short, a name without its NUL,
            or extensions that do not add up.
    """
    view = memoryview(message).cast("B")
    header = IN_HEADER.unpack(view)
    length, opcode = header.len, header.opcode
    if not IN_HEADER.size <= length <= view.nbytes:
        raise WireError(f"header says {length} bytes, {view.nbytes} are there")
    operation = OPERATIONS.get(opcode)  # type: ignore[call-overload]  # an int is fine
    if operation is None:
        raise WireError(f"unknown opcode {opcode}")
    body, extensions = view[IN_HEADER.size : length], NO_EXTENSIONS
    if header.total_extlen:
        body, extensions = _split_extensions(body, header.total_extlen * 8)
    codec: Codec[Any] | None = operation.args
    if opcode == _SETXATTR and not setxattr_ext:
        codec = fuse_structs.SETXATTR_IN_COMPAT
    args = None
    names: tuple[bytes, ...] = ()
    if opcode == _INIT:
        args, body = _decode_init_in(body)
    elif codec is not None:
        args = codec.unpack(body)
        body = body[codec.size :]
    if operation.names:
        names, body = _split_names(body, operation.names)
    if body.nbytes and not operation.data:
        raise WireError(f"{body.nbytes} bytes too many in {opcode_name(opcode)}")
    return Request(header, args, names, body, extensions)


def _decode_init_in(body: memoryview) -> tuple[InitIn, memoryview]:
    """INIT is 64 bytes with INIT_EXT (7.36); before that 16, or 8 below 7.6."""
    if body.nbytes >= INIT_IN.size:
        return INIT_IN.unpack(body), body[body.nbytes :]
    old = INIT_IN_COMPAT.unpack(body)
    if old.flags & InitFlag.INIT_EXT:
        raise WireError("INIT_EXT is set in an init_in without its second word")
    return InitIn(*old, flags2=0), body[body.nbytes :]


def _split_names(body: memoryview, count: int) -> tuple[tuple[bytes, ...], memoryview]:
    parts = bytes(body).split(b"\0", count)
    if len(parts) <= count:
        raise WireError("a name has no NUL")
    rest = len(parts[count])
    return tuple(parts[:count]), body[body.nbytes - rest :]


def _split_extensions(body: memoryview, length: int) -> tuple[memoryview, Extensions]:
    if length > body.nbytes:
        raise WireError(f"extensions of {length} bytes in a body of {body.nbytes}")
    start = body.nbytes - length
    return body[:start], decode_extensions(body[start:])


def decode_extensions(data: Buffer) -> Extensions:
    """Decode the extensions of a creating request (``fuse_ext_header``, 7.38).

    Raises:
        WireError: A size that is cut short, not a multiple of 8 or zero; an unknown type; one kind
            twice; contents that do not fit.
    """
    view = memoryview(data).cast("B")
    groups: tuple[int, ...] | None = None
    security: tuple[tuple[bytes, bytes], ...] | None = None
    while view.nbytes:
        header = EXT_HEADER.unpack(view)
        if header.size % 8 or not EXT_HEADER.size <= header.size <= view.nbytes:
            raise WireError(f"extension of {header.size} bytes, {view.nbytes} are left")
        payload = view[EXT_HEADER.size : header.size]
        if header.type <= EXT_MAX_NR_SECCTX and security is None:
            security = _decode_security(payload, header.type)
        elif header.type == EXT_GROUPS and groups is None:
            groups = _decode_groups(payload)
        else:
            raise WireError(f"extension of type {header.type} is unknown or there twice")
        view = view[header.size :]
    return Extensions(groups, security)


def _decode_groups(payload: memoryview) -> tuple[int, ...]:
    """``fuse_supp_groups``: a count and that many gids of 4 bytes, padded to 8."""
    if payload.nbytes < 4:
        raise WireError("group extension without a count")
    count = int.from_bytes(payload[:4], "little")
    if 4 * (count + 1) > payload.nbytes:
        raise WireError(f"{count} groups in {payload.nbytes} bytes")
    return tuple(
        int.from_bytes(payload[at : at + 4], "little") for at in range(4, 4 * (count + 1), 4)
    )


def _decode_security(payload: memoryview, count: int) -> tuple[tuple[bytes, bytes], ...]:
    """``fuse_secctx`` times ``count``: size u32, padding u32, name NUL, value, padded to 8."""
    contexts = []
    for _ in range(count):
        if payload.nbytes < 8:
            raise WireError("security context cut short")
        size = int.from_bytes(payload[:4], "little")
        (name,), rest = _split_names(payload[8:], 1)
        used = 8 + len(name) + 1 + size
        if size > rest.nbytes:
            raise WireError(f"security context of {size} bytes, {rest.nbytes} are left")
        contexts.append((name, bytes(rest[:size])))
        payload = payload[min((used + 7) & ~7, payload.nbytes) :]
    return tuple(contexts)


def encode_extensions(extensions: Extensions) -> bytes:
    """Encode the extensions of a creating request; a multiple of 8 bytes."""
    parts = []
    if extensions.security is not None:
        body = b"".join(
            _pad8(len(value).to_bytes(4, "little") + bytes(4) + name + b"\0" + value)
            for name, value in extensions.security
        )
        parts.append(
            EXT_HEADER.values(EXT_HEADER.size + len(body), len(extensions.security)) + body
        )
    if extensions.groups is not None:
        words = (len(extensions.groups), *extensions.groups)
        body = _pad8(b"".join(word.to_bytes(4, "little") for word in words))
        parts.append(EXT_HEADER.values(EXT_HEADER.size + len(body), EXT_GROUPS) + body)
    return b"".join(parts)


def _pad8(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def encode_request(  # the whole header is its arguments
    opcode: int,
    unique: int,
    nodeid: int,
    body: bytes = b"",
    *,
    uid: int = 0,
    gid: int = 0,
    pid: int = 0,
    extensions: bytes = b"",
) -> bytes:
    """Build one request: header, ``body`` (struct, names with NUL, data), extensions."""
    length = IN_HEADER.size + len(body) + len(extensions)
    header = IN_HEADER.values(length, opcode, unique, nodeid, uid, gid, pid, len(extensions) // 8)
    return header + body + extensions


def decode_forgets(request: Request) -> list[ForgetOne]:
    """Return what a FORGET or BATCH_FORGET forgets.

    Raises:
        WireError: ``count`` entries of 16 bytes are not there.
    """
    if request.header.opcode == Opcode.FORGET:
        return [ForgetOne(request.header.nodeid, request.args.nlookup)]
    count = request.args.count
    if count * FORGET_ONE.size > request.data.nbytes:
        raise WireError(f"{count} forgets in {request.data.nbytes} bytes")
    return [FORGET_ONE.unpack(request.data, at * FORGET_ONE.size) for at in range(count)]


def encode_batch_forget(forgets: Iterable[tuple[int, int]]) -> bytes:
    """Return the body of a BATCH_FORGET of (nodeid, nlookup) pairs."""
    items = [FORGET_ONE.values(nodeid, nlookup) for nodeid, nlookup in forgets]
    return BATCH_FORGET_IN.values(len(items)) + b"".join(items)


def decode_removemappings(request: Request) -> list[RemovemappingOne]:
    """Return the ranges of a REMOVEMAPPING.

    Raises:
        WireError: ``count`` entries of 16 bytes are not there.
    """
    count, size = request.args.count, REMOVEMAPPING_ONE.size
    if count * size > request.data.nbytes:
        raise WireError(f"{count} mappings in {request.data.nbytes} bytes")
    return [REMOVEMAPPING_ONE.unpack(request.data, at * size) for at in range(count)]


# --- replies -------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """A reply taken apart: the out-structs as records, and the data behind them."""

    header: OutHeader
    records: tuple[Any, ...]
    data: memoryview


def decode_reply(opcode: int, message: Buffer) -> Reply:
    """Take the reply to an ``opcode`` apart. An error reply has neither records nor data.

    Raises:
        WireError: The length lies, a struct is cut short, bytes are left over, or the error is
            outside -511 to 0 (what the kernel takes).
    """
    view = memoryview(message).cast("B")
    header = OUT_HEADER.unpack(view)
    if not OUT_HEADER.size <= header.len <= view.nbytes:
        raise WireError(f"header says {header.len} bytes, {view.nbytes} are there")
    if not -512 < header.error <= 0:
        raise WireError(f"error {header.error} is not a negated errno")
    operation = OPERATIONS.get(opcode)  # type: ignore[call-overload]  # an int is fine
    if operation is None:
        raise WireError(f"unknown opcode {opcode}")
    body = view[OUT_HEADER.size : header.len]
    if header.error:
        if body.nbytes:
            raise WireError(f"an error reply with {body.nbytes} bytes of body")
        return Reply(header, (), body)
    records = []
    for codec in operation.reply:
        records.append(codec.unpack(body))
        body = body[codec.size :]
    if body.nbytes and not operation.reply_data:
        raise WireError(f"{body.nbytes} bytes too many in the reply to {opcode_name(opcode)}")
    return Reply(header, tuple(records), body)


def encode_reply(unique: int, body: bytes = b"", *, error: int = 0) -> bytes:
    """Build one reply; ``error`` is a positive errno and drops the body."""
    if error:
        return OUT_HEADER.values(OUT_HEADER.size, -error, unique)
    return OUT_HEADER.values(OUT_HEADER.size + len(body), 0, unique) + body


# --- directories ---------------------------------------------------------------------------------


class DirEntry(NamedTuple):
    """One name of a READDIR reply. ``off`` is the cookie to go on *after* it."""

    ino: int
    off: int
    type: int
    name: bytes


class DirEntryPlus(NamedTuple):
    """One name of a READDIRPLUS reply; ``entry.nodeid`` 0 means it was not looked up."""

    entry: EntryOut
    ino: int
    off: int
    type: int
    name: bytes


#: As numbers: to look for bytes in bytes takes ten times as long (0.3 us a name).
_SLASH, _NUL = b"/\0"


def iter_dirents(data: Buffer) -> Iterator[DirEntry]:
    """Iterate over the records of a READDIR reply.

    Raises:
        WireError: A record is cut short or its name is empty or holds ``/`` or NUL.
    """
    view = memoryview(data).cast("B")
    at = 0
    while at < view.nbytes:
        dirent, name, at = _dirent(view, at)
        yield DirEntry(dirent.ino, dirent.off, dirent.type, name)


def iter_direntplus(data: Buffer) -> Iterator[DirEntryPlus]:
    """Iterate over the records of a READDIRPLUS reply.

    Raises:
        WireError: As iter_dirents.
    """
    view = memoryview(data).cast("B")
    at = 0
    while at < view.nbytes:
        entry = ENTRY_OUT.unpack(view, at)
        dirent, name, at = _dirent(view, at + ENTRY_OUT.size)
        yield DirEntryPlus(entry, dirent.ino, dirent.off, dirent.type, name)


def _dirent(view: memoryview, at: int) -> tuple[Dirent, bytes, int]:
    dirent = DIRENT.unpack(view, at)
    start = at + DIRENT.size
    name = bytes(view[start : start + dirent.namelen])
    if len(name) != dirent.namelen or not name or _SLASH in name or _NUL in name:
        raise WireError(f"directory record with a bad name of {dirent.namelen} bytes")
    return dirent, name, start + ((dirent.namelen + 7) & ~7)


def encode_dirent(ino: int, off: int, kind: int, name: bytes) -> bytes:
    """Build one ``fuse_dirent``, padded to a multiple of 8 bytes."""
    return DIRENT.values(ino, off, len(name), kind) + _pad8(name)


def encode_direntplus(entry: EntryOut, ino: int, off: int, kind: int, name: bytes) -> bytes:
    """Build one ``fuse_direntplus``, padded to a multiple of 8 bytes."""
    return ENTRY_OUT.pack(entry) + encode_dirent(ino, off, kind, name)


# --- notifications -------------------------------------------------------------------------------


class Notification(NamedTuple):
    """A message from server to client that answers nothing.

    Attributes:
        code: What it says.
        args: Record of its struct; None for RESEND and INC_EPOCH.
        name: Name without NUL (INVAL_ENTRY, DELETE), else empty.
        data: Bytes behind the struct (STORE: contents; PRUNE: nodeids of 8 bytes).
    """

    code: NotifyCode
    args: Any
    name: bytes
    data: memoryview


_NOTIFY_ARGS: Final[Mapping[NotifyCode, Codec[Any] | None]] = {
    NotifyCode.POLL: fuse_structs.NOTIFY_POLL_OUT,
    NotifyCode.INVAL_INODE: fuse_structs.NOTIFY_INVAL_INODE_OUT,
    NotifyCode.INVAL_ENTRY: fuse_structs.NOTIFY_INVAL_ENTRY_OUT,
    NotifyCode.STORE: fuse_structs.NOTIFY_STORE_OUT,
    NotifyCode.RETRIEVE: fuse_structs.NOTIFY_RETRIEVE_OUT,
    NotifyCode.DELETE: fuse_structs.NOTIFY_DELETE_OUT,
    NotifyCode.RESEND: None,
    NotifyCode.INC_EPOCH: None,
    NotifyCode.PRUNE: fuse_structs.NOTIFY_PRUNE_OUT,
}


def decode_notification(message: Buffer) -> Notification:
    """Take a notification apart.

    Raises:
        WireError: It is a reply, its code is unknown, or its parts do not add up.
    """
    view = memoryview(message).cast("B")
    header = OUT_HEADER.unpack(view)
    if header.unique or not OUT_HEADER.size <= header.len <= view.nbytes:
        raise WireError(f"not a notification: unique {header.unique}, {header.len} bytes")
    try:
        code = NotifyCode(header.error)
    except ValueError:
        raise WireError(f"unknown notification {header.error}") from None
    body, codec = view[OUT_HEADER.size : header.len], _NOTIFY_ARGS[code]
    args: Any = None
    if codec is not None:
        args = codec.unpack(body)
        body = body[codec.size :]
    name = b""
    if code in (NotifyCode.INVAL_ENTRY, NotifyCode.DELETE):
        (name,), body = _split_names(body, 1)
        if len(name) != args.namelen:
            raise WireError(f"name of {len(name)} bytes, {args.namelen} announced")
    wanted = {NotifyCode.STORE: lambda: args.size, NotifyCode.PRUNE: lambda: 8 * args.count}
    if body.nbytes != wanted.get(code, lambda: 0)():
        raise WireError(f"{body.nbytes} bytes of data behind {code.name}")
    return Notification(code, args, name, body)


def encode_notification(code: NotifyCode, args: bytes = b"", data: bytes = b"") -> bytes:
    """Build a notification from its packed struct and what follows it."""
    length = OUT_HEADER.size + len(args) + len(data)
    return OUT_HEADER.values(length, code, 0) + args + data


# --- INIT ----------------------------------------------------------------------------------------


def join_flags(flags: int, flags2: int) -> InitFlag:
    """Join both words of INIT; the second counts only if the first has INIT_EXT."""
    return InitFlag(flags | (flags2 << 32 if flags & InitFlag.INIT_EXT else 0))


def split_flags(flags: InitFlag) -> tuple[int, int]:
    """Return INIT's (flags, flags2)."""
    return int(flags) & 0xFFFFFFFF, int(flags) >> 32


def flag_names(flags: int, kind: type[InitFlag] = InitFlag) -> list[str]:
    """Return the names of the set bits, lowest first; ``bit 43`` for one that has none."""
    known = {int(flag): flag.name or "" for flag in kind}
    known[int(HEEDS_INTERRUPT)] = "HEEDS_INTERRUPT"
    bits = [1 << at for at in range(flags.bit_length()) if flags >> at & 1]
    return [known.get(bit) or f"bit {bit.bit_length() - 1}" for bit in bits]
