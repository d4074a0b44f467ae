"""Requests of a guest that wants out of the share, or the daemon down.

One row an attack: what it sends, raw, over a real socket and a real ring, and how that may end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.hostd.guest import ROOT
from tests.hostd.prey import make_tree, outcome, prey_in
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.hostd.frontend import Frontend
    from tests.hostd.prey import Prey

pytestmark = pytest.mark.slow

U32, U63, U64 = 2**32 - 1, 2**63 - 1, 2**64 - 1
RENAMES = (0, 1, 2, 4)


class Attack(NamedTuple):
    """``answer``: errnos, ``served`` or ``closed``; any of several."""

    what: str
    act: Callable[[Frontend], object]
    answer: str


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prey]:
    with prey_in(tmp_path_factory.mktemp("attacked")) as prey:
        yield prey


# --- names that lead elsewhere --------------------------------------------------------------------

BAD_NAMES = (
    b".", b"..", b"/", b"../canary", b"/etc/passwd", b"dir/../../canary", b"dir/", b"",
    b"up/canary", b"n" * 256, b"n" * 5000,
)  # fmt: skip


def _naming(name: bytes) -> dict[str, Callable[[Frontend], object]]:
    """Every operation that carries a name, with this one."""
    both = {
        f"RENAME2 {flags} to": lambda g, flags=flags: g.rename2(ROOT, b"file", ROOT, name, flags)
        for flags in RENAMES
    } | {
        f"RENAME2 {flags} from": lambda g, flags=flags: g.rename2(ROOT, name, ROOT, b"x", flags)
        for flags in RENAMES
    }
    return {
        "LOOKUP": lambda g: g.lookup(ROOT, name),
        "MKDIR": lambda g: g.mkdir(ROOT, name),
        "MKNOD": lambda g: g.mknod(ROOT, name, stat.S_IFREG | 0o600),
        "SYMLINK": lambda g: g.symlink(ROOT, name, b"target"),
        "LINK": lambda g: g.link(g.walk("file"), ROOT, name),
        "CREATE": lambda g: g.create(ROOT, name, os.O_RDWR | os.O_TRUNC),
        "UNLINK": lambda g: g.unlink(ROOT, name),
        "RMDIR": lambda g: g.rmdir(ROOT, name),
        "RENAME to": lambda g: g.rename(ROOT, b"file", ROOT, name),
        "RENAME from": lambda g: g.rename(ROOT, name, ROOT, b"x"),
        **both,
    }


NAMES = [
    Attack(f"{operation} {name[:20]!r}", act, "ENAMETOOLONG" if len(name) > 255 else "EINVAL")
    for name in BAD_NAMES
    for operation, act in _naming(name).items()
]

XATTRS = [
    Attack(f"{operation} {what}", act, answer)
    for what, name, answer in (
        ("no name", b"", "ERANGE EINVAL"),
        ("a name of 256 bytes", b"user." + b"n" * 251, "ERANGE"),
        ("no namespace", b"../../canary", "EOPNOTSUPP"),
    )
    for operation, act in {
        "SETXATTR": lambda g, name=name: g.setxattr(g.walk("file"), name, b"v"),
        "GETXATTR": lambda g, name=name: g.getxattr(g.walk("file"), name),
        "REMOVEXATTR": lambda g, name=name: g.removexattr(g.walk("file"), name),
    }.items()
]

# --- links, devices, FIFOs ------------------------------------------------------------------------


def truncate(guest: Frontend, path: str) -> None:
    guest.setattr(guest.walk(path), int(SetattrValid.SIZE), size=0)


def _through(path: str, refused: str, kind: str) -> list[Attack]:
    """Every way to open what is no file."""
    name = path.encode()
    return [
        Attack(f"OPEN of {kind}", lambda g: g.open(g.walk(path), os.O_RDWR), refused),
        Attack(f"OPEN to read {kind}", lambda g: g.open(g.walk(path)), refused),
        Attack(f"OPEN O_TRUNC {kind}", lambda g: g.open(g.walk(path), os.O_TRUNC | 1), refused),
        Attack(f"CREATE on {kind}", lambda g: g.create(ROOT, name, os.O_TRUNC | 1), refused),
        Attack(f"truncate {kind}", lambda g: truncate(g, path), refused),
        Attack(f"OPENDIR of {kind}", lambda g: g.opendir(g.walk(path)), "ENOTDIR"),
        Attack(f"LOOKUP in {kind}", lambda g: g.lookup(g.walk(path), b"canary"), "ENOTDIR"),
        Attack(f"CREATE in {kind}", lambda g: g.create(g.walk(path), b"x"), "ENOTDIR"),
        Attack(
            f"RENAME into {kind}",
            lambda g: g.rename(ROOT, b"file", g.walk(path), b"canary"),
            "ENOTDIR",
        ),
        Attack(f"UNLINK in {kind}", lambda g: g.unlink(g.walk(path), b"canary"), "ENOTDIR"),
        Attack(
            f"SYNCFS through {kind}",
            lambda g: g.call(Opcode.SYNCFS, g.walk(path), bytes(8)),
            refused,
        ),
        Attack(f"RENAME over {kind}", lambda g: g.rename(ROOT, b"file", ROOT, name), "served"),
        Attack(f"LINK of {kind}", lambda g: g.link(g.walk(path), ROOT, b"again"), "served"),
        Attack(
            f"SETXATTR through {kind}",
            lambda g: g.setxattr(g.walk(path), b"user.x", b"v"),
            "EPERM EOPNOTSUPP",
        ),
    ]


def owned(path: str) -> Callable[[Frontend], object]:
    valid = int(SetattrValid.UID | SetattrValid.ATIME | SetattrValid.MTIME)
    return lambda g: g.setattr(g.walk(path), valid, uid=os.geteuid(), mtime=1, atime=1)


SPECIAL = [
    *_through("out", "EBADF ELOOP", "a link out"),
    *_through("up", "EBADF ELOOP", "a link up"),
    *_through("loop", "EBADF ELOOP", "a looping link"),
    *_through("fifo", "EBADF", "a FIFO"),
    *_through("socket", "EBADF", "a socket"),
    *(_through("device", "EBADF", "a device") if os.geteuid() == 0 else ()),
    Attack("owner and times of a link", owned("out"), "served"),
    Attack(
        "mode of a link",
        lambda g: g.setattr(g.walk("out"), int(SetattrValid.MODE), mode=0),
        "served EOPNOTSUPP",
    ),
    Attack("link to the canary", lambda g: g.symlink(ROOT, b"l", b"../canary"), "served"),
    Attack("a target of 1 MiB", lambda g: g.symlink(ROOT, b"l", b"t" * (1 << 20)), "ENAMETOOLONG"),
    Attack("a target of nothing", lambda g: g.symlink(ROOT, b"l", b""), "ENOENT"),
    Attack(
        "MKNOD of a type that is none",
        lambda g: g.mknod(ROOT, b"x", 0o170600),
        "EINVAL",
    ),
    Attack("MKNOD of a directory", lambda g: g.mknod(ROOT, b"x", 0o40600), "EPERM EINVAL"),
]

# --- forged nodeids, handles and counts -----------------------------------------------------------


def call(opcode: Opcode, body: bytes, nodeid: int = ROOT) -> Callable[[Frontend], object]:
    return lambda g: g.call(opcode, nodeid, body)


def _by_handle(fh: int) -> dict[str, Callable[[Frontend], object]]:
    """Every operation that carries a handle."""
    return {
        "READ": lambda g: g.read(fh, 0, 10),
        "WRITE": lambda g: g.write(fh, 0, b"x"),
        "RELEASE": lambda g: g.release(fh),
        "RELEASEDIR": lambda g: g.releasedir(fh),
        "READDIR": lambda g: g.readdir(fh),
        "READDIRPLUS": lambda g: g.readdirplus(fh),
        "FLUSH": call(Opcode.FLUSH, fuse.FLUSH_IN.values(fh, 0)),
        "FSYNC": call(Opcode.FSYNC, fuse.FSYNC_IN.values(fh, 0)),
        "FSYNCDIR": call(Opcode.FSYNCDIR, fuse.FSYNC_IN.values(fh, 0)),
        "FALLOCATE": call(Opcode.FALLOCATE, fuse.FALLOCATE_IN.values(fh, 0, 1, 0)),
        "LSEEK": call(Opcode.LSEEK, fuse.LSEEK_IN.values(fh, 0, 0)),
        "COPY_FILE_RANGE": call(
            Opcode.COPY_FILE_RANGE, fuse.COPY_FILE_RANGE_IN.values(fh, 0, ROOT, fh, 0, 1, 0)
        ),
        "SETATTR": lambda g: g.setattr(ROOT, int(SetattrValid.FH | SetattrValid.SIZE), fh=fh),
    }


def _by_node(nodeid: int) -> dict[str, Callable[[Frontend], object]]:
    return {
        "LOOKUP": lambda g: g.lookup(nodeid, b"x"),
        "GETATTR": lambda g: g.getattr(nodeid),
        "OPEN": lambda g: g.open(nodeid),
        "OPENDIR": lambda g: g.opendir(nodeid),
        "CREATE": lambda g: g.create(nodeid, b"x"),
        "LINK": lambda g: g.link(nodeid, ROOT, b"x"),
        "RENAME": lambda g: g.rename(ROOT, b"file", nodeid, b"x"),
        "READLINK": lambda g: g.readlink(nodeid),
        "SETXATTR": lambda g: g.setxattr(nodeid, b"user.x", b"v"),
        "STATX": call(Opcode.STATX, fuse.STATX_IN.values(0, 0, 0, 0xFFF), nodeid),
    }


def used_as_file(guest: Frontend) -> None:
    guest.read(guest.opendir(), 0, 10)


def used_as_directory(guest: Frontend) -> None:
    fh = guest.open(guest.walk("file"))
    guest.readdirplus(fh)


def forget_too_much(guest: Frontend) -> None:
    node = guest.walk("file")
    guest.forget(node, U64)
    guest.forget(node, U64)
    guest.batch_forget((node, 1), (ROOT, U64), (U64, U64), (0, 0))
    guest.getattr(ROOT)
    guest.getattr(node)


FORGED = [
    *(
        Attack(f"{operation} of handle {fh:#x}", act, "EBADF")
        for fh in (0, 1, 999, 2**31, U63, U64)
        for operation, act in _by_handle(fh).items()
    ),
    *(
        Attack(f"{operation} of node {nodeid:#x}", act, "EBADF")
        for nodeid in (0, 2, 999, 2**32 + 1, U63, U64)
        for operation, act in _by_node(nodeid).items()
    ),
    Attack("a directory's handle as a file's", used_as_file, "EBADF"),
    Attack("a file's handle as a directory's", used_as_directory, "EBADF"),
    Attack("FORGET of more than was given", forget_too_much, "EBADF"),
]

# --- sizes and offsets ----------------------------------------------------------------------------


def opened(guest: Frontend, flags: int = os.O_RDWR) -> int:
    return guest.open(guest.walk("file"), flags)


def lying_write(size: int, offset: int = 0) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        body = fuse.WRITE_IN.values(opened(guest), offset, size, 0, 0, 0) + b"data"
        guest.call(Opcode.WRITE, 0, body)

    return act


def read_at(offset: int, size: int = 100) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        body = fuse.READ_IN.values(opened(guest), offset, size, 0, 0, 0)
        assert len(guest.call(Opcode.READ, 0, body, room=1000).data) <= 4

    return act


def list_all(opcode: Opcode, offset: int, size: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        body = fuse.READ_IN.values(guest.opendir(), offset, size, 0, 0, 0)
        guest.call(opcode, ROOT, body, room=3000)

    return act


def lying_setxattr(size: int) -> Callable[[Frontend], object]:
    body = fuse.SETXATTR_IN.values(size, 0, 0) + b"user.x\0" + b"value"
    return lambda g: g.call(Opcode.SETXATTR, g.walk("file"), body)


def getxattr_into(size: int, room: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        node = guest.walk("file")
        guest.setxattr(node, b"user.x", b"v" * 1000)
        body = fuse.GETXATTR_IN.values(size) + b"user.x\0"
        guest.call(Opcode.GETXATTR, node, body, room=room)

    return act


def listxattr_into(size: int, room: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        node = guest.walk("file")
        guest.setxattr(node, b"user." + b"n" * 200, b"")
        guest.call(Opcode.LISTXATTR, node, fuse.GETXATTR_IN.values(size), room=room)

    return act


def allocate(offset: int, length: int, mode: int = 0) -> Callable[[Frontend], object]:
    return lambda g: g.call(
        Opcode.FALLOCATE, 0, fuse.FALLOCATE_IN.values(opened(g), offset, length, mode)
    )


def copy(off_in: int, off_out: int, length: int, flags: int = 0) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        source, target = opened(guest), opened(guest)
        body = fuse.COPY_FILE_RANGE_IN.values(source, off_in, 0, target, off_out, length, flags)
        guest.call(Opcode.COPY_FILE_RANGE, 0, body)

    return act


def lying_length(length: int, extlen: int = 0) -> Callable[[Frontend], object]:
    message = fuse.IN_HEADER.values(length, Opcode.LOOKUP, 2, ROOT, 0, 0, 0, extlen) + b"file\0"

    def act(guest: Frontend) -> None:
        reply = fuse.OUT_HEADER.unpack(guest.exchange(message, 4096))
        if reply.error:
            raise OSError(-reply.error, "")

    return act


def resize(size: int) -> Callable[[Frontend], object]:
    return lambda g: g.setattr(g.walk("file"), int(SetattrValid.SIZE), size=size)


SIZES = [
    *(
        Attack(f"WRITE of 4 bytes that says {size:#x}", lying_write(size), "EINVAL")
        for size in (5, 1 << 20, (1 << 20) + 1, 2**31, U32)
    ),
    *(
        Attack(f"WRITE at {offset:#x}", lying_write(4, offset), "EINVAL EFBIG")
        for offset in (U63 - 1, U63, U63 + 1, U64)
    ),
    *(
        Attack(f"READ at {offset:#x}", read_at(offset), answer)
        for offset, answer in ((U63 - 100, "served"), (U63, "EINVAL"), (2**63, "EINVAL"),
                               (U64, "EINVAL"))
    ),
    Attack("READ of 4 GiB", read_at(0, U32), "served"),
    *(
        Attack(f"{opcode.name} of 4 GiB from {offset:#x}", list_all(opcode, offset, U32), answer)
        for opcode in (Opcode.READDIR, Opcode.READDIRPLUS)
        for offset, answer in ((0, "served"), (U63, "served EINVAL"), (2**63, "EINVAL"),
                               (U64, "EINVAL"))
    ),
    *(Attack(f"SETXATTR that says {n:#x}", lying_setxattr(n), "EINVAL") for n in (4, 6, U32)),
    Attack("SETXATTR of 65537 bytes", lambda g: g.setxattr(g.walk("file"), b"user.x", b"v" * 65537),
           "E2BIG"),
    Attack("GETXATTR of 4 GiB, room for less", getxattr_into(U32, 100), "ERANGE"),
    Attack("GETXATTR of 999 of 1000", getxattr_into(999, 4096), "ERANGE"),
    Attack("GETXATTR of 4 GiB, room for it", getxattr_into(U32, 4096), "served"),
    Attack("LISTXATTR of 4 GiB, room for less", listxattr_into(U32, 100), "ERANGE"),
    *(
        Attack(f"FALLOCATE {offset:#x}+{length:#x}", allocate(offset, length), "EINVAL EFBIG")
        for offset, length in ((2**63, 1), (0, 2**63), (U63, U63), (U64, U64), (0, 0), (U63, 1))
    ),
    Attack("FALLOCATE of every mode", allocate(0, 4096, U32), "EINVAL EOPNOTSUPP"),
    *(
        Attack(f"size {size:#x}", resize(size), "EINVAL EFBIG")
        for size in (U63, 2**63, U64)
    ),
    *(
        Attack(f"COPY_FILE_RANGE {a:#x} to {b:#x}, {n:#x}", copy(a, b, n), answer)
        for a, b, n, answer in (
            (0, 0, U64, "EINVAL"), (U64, 0, 1, "EINVAL"), (0, U64, 1, "EINVAL"),
            (2**63, 2**63, 2**63, "EINVAL"), (0, U63, 10, "EFBIG EINVAL EOVERFLOW"),
            (U63, 0, U64, "served EINVAL EOVERFLOW"),
        )
    ),
    Attack("COPY_FILE_RANGE with flags", copy(0, 100, 1, 1), "EINVAL"),
    *(Attack(f"a length of {n:#x}", lying_length(n), "EINVAL") for n in (0, 39, 46, 2**31, U32)),
    Attack("extensions of more than there is", lying_length(45, 0xFFFF), "EINVAL served"),
    Attack(
        "BATCH_FORGET of 4 Gi nodes",
        lambda g: g.exchange(
            fuse.encode_request(Opcode.BATCH_FORGET, 2, 0, fuse.BATCH_FORGET_IN.values(U32)), 0
        ),
        "served",
    ),
]  # fmt: skip

# --- other words ----------------------------------------------------------------------------------


def as_user(uid: int, gid: int) -> Callable[[Frontend], object]:
    def act(guest: Frontend) -> None:
        guest.uid, guest.gid = uid, gid
        guest.mkdir(ROOT, b"x")

    return act


def after_destroy(guest: Frontend) -> None:
    guest.destroy()
    guest.getattr(ROOT)


GROUPS = fuse.EXT_HEADER.values(16, 32) + (U32).to_bytes(4, "little") + bytes(4)

WORDS = [
    Attack("nobody's user", as_user(U32, 0), "EINVAL served"),
    Attack("nobody's group", as_user(0, U32), "EINVAL served"),
    Attack(
        "4 Gi groups",
        lambda g: g.mkdir(ROOT, b"x", ext=GROUPS),
        "EINVAL",
    ),
    Attack("INIT twice", lambda g: (g.walk("dir"), g.init(), g.getattr(ROOT)), "served"),
    Attack("requests after DESTROY", after_destroy, "EIO"),
    Attack("INIT of version 0", lambda g: g.init(minor=0), "EPROTO"),
    Attack("rename flags that are none", lambda g: g.rename2(ROOT, b"file", ROOT, b"x", 8),
           "EINVAL"),
    Attack("NOREPLACE and EXCHANGE", lambda g: g.rename2(ROOT, b"file", ROOT, b"up", 3), "EINVAL"),
    Attack(
        "a directory into itself",
        lambda g: g.rename(ROOT, b"dir", g.walk("dir"), b"x"),
        "EINVAL",
    ),
    Attack("an open flag of every kind", lambda g: g.open(g.walk("file"), U32), "EINVAL served"),
    Attack("O_PATH", lambda g: g.read(g.open(g.walk("file"), os.O_PATH), 0, 4), "served"),
    Attack("O_CREAT at OPEN", lambda g: g.open(g.walk("dir"), os.O_CREAT), "EISDIR"),
    Attack("O_TMPFILE at OPEN", lambda g: g.open(g.walk("dir"), os.O_TMPFILE | 2), "EISDIR"),
    Attack("STATX with every mask", call(Opcode.STATX, fuse.STATX_IN.values(U32, 0, U32, U32)),
           "served EINVAL"),
    *(
        Attack(f"{opcode.name} of nonsense", call(opcode, b"\xff" * 64),
               "EBADF EINVAL ENOSYS ENOTTY EOPNOTSUPP")
        for opcode in (Opcode.IOCTL, Opcode.POLL, Opcode.BMAP, Opcode.GETLK, Opcode.SETLK,
                       Opcode.SETLKW, Opcode.SETUPMAPPING, Opcode.REMOVEMAPPING)
    ),
]  # fmt: skip

ALL = [*NAMES, *XATTRS, *SPECIAL, *FORGED, *SIZES, *WORDS]


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: attack.what)
def test_attack(prey: Prey, attack: Attack) -> None:
    make_tree(prey.share, prey.canary)
    with prey.guest() as guest:
        end = outcome(lambda: attack.act(guest))
    assert end in attack.answer.split()
    prey.check()


def test_nothing_is_opened_that_could_block(prey: Prey) -> None:
    """A device or FIFO that was opened would be among the daemon's descriptors."""
    make_tree(prey.share, prey.canary)
    with prey.guest() as guest:
        for attack in SPECIAL:
            outcome(lambda attack=attack: attack.act(guest))  # type: ignore[misc]
        process = Path(f"/proc/{prey.daemon.pid}")
        for info in (process / "fdinfo").iterdir():
            try:
                target = os.readlink(process / "fd" / info.name)
                flags = info.read_text().split("flags:")[1].split()[0]
            except FileNotFoundError:
                continue  # of a guest that has left, closed between the two looks
            only_named = int(flags, 8) & os.O_PATH
            assert only_named or not target.endswith(("/fifo", "/device", "/again"))


def test_before_init(prey: Prey) -> None:
    with prey.guest(init=False) as guest:
        assert outcome(lambda: guest.lookup(ROOT, b"file")) == "EIO"
        assert outcome(lambda: guest.create(ROOT, b"x")) == "EIO"
    prey.check()
