"""What each cache mode promises, counted in messages that reach the daemon.

One row of ``PROOFS`` is an action of a program and, for each mode, how many messages it may cost.
The numbers come from the mount's own ``status``; they do not depend on how fast the machine is,
because mode ``auto`` gets a timeout that no test reaches.
"""

from __future__ import annotations

import itertools
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemons import DAEMON_KINDS, daemon_marks, require_daemon
from tests.support.namespace import small_readahead
from tests.support.pages import while_pages_stay
from tests.support.shares import Shared, messages, open_shared
from vfsmount.cache.policy import IO_SIZE
from vfsmount.client.mount.status import read_status

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

ENGINES = ("relay", "pyfuse3")
MODES = ("none", "auto", "always")

KIB = 1 << 10
MIB = 1 << 20
#: Seconds; longer than any test.
LONG = "600"
MANY = 1 << 30

ASKS = ("LOOKUP", "GETATTR", "STATX")
LISTS = ("READDIR", "READDIRPLUS")
#: What opens and closes of a file or directory send, and what comes with them.
HANDLES = ("OPEN", "OPENDIR", "RELEASE", "RELEASEDIR", "FLUSH", "IOCTL", "GETXATTR")


@dataclass(frozen=True)
class Bound:
    """At least ``least`` and at most ``most`` messages of these opcodes."""

    opcodes: tuple[str, ...]
    least: int
    most: int

    def check(self, counted: Counter[str]) -> None:
        total = sum(counted[opcode] for opcode in self.opcodes)
        assert self.least <= total <= self.most, f"{self}, but there were {dict(counted)}"


def at_most(most: int, *opcodes: str) -> Bound:
    return Bound(opcodes, 0, most)


def at_least(least: int, *opcodes: str) -> Bound:
    return Bound(opcodes, least, MANY)


@dataclass(frozen=True)
class Proof:
    """A row of the table.

    Attributes:
        name: What it is about.
        prepare: Makes what is needed, in a folder of the host.
        act: What is counted, in the same folder, mounted. The folder itself is looked up before,
            so that the count does not depend on how deep it is.
        bounds: By mode, what it may cost; a mode that is absent promises nothing.
        again: The action is done once before it is counted: in all modes, or in ``always``.
        writeback: On a mount with ``--writeback``.
        kernel: Where the kernel reads far ahead, as it may for root.
        ahead: Also where the kernel may not read far ahead and the pyfuse3 engine does instead.
        engines: That can promise it.
    """

    name: str
    prepare: Callable[[Path], object]
    act: Callable[[int], object]
    bounds: dict[str, list[Bound]]
    again: tuple[str, ...] = field(default=("always",))
    writeback: bool = False
    kernel: bool = True
    ahead: bool = False
    engines: tuple[str, ...] = ENGINES


# --- actions, in the folder of a descriptor ------------------------------------------------------


def make_file(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_bytes(os.urandom(size))


def make_entries(folder: Path) -> None:
    (folder / "d").mkdir()
    for number in range(1000):
        (folder / "d" / f"entry-{number:04}").touch()


def stat_often(folder: int) -> None:
    for _ in range(100):
        os.stat("file", dir_fd=folder)


def stat_absent_often(folder: int) -> None:
    for _ in range(100):
        with pytest.raises(FileNotFoundError):
            os.stat("absent", dir_fd=folder)


def make_link(folder: Path) -> None:
    (folder / "link").symlink_to("target")


def read_link_often(folder: int) -> None:
    for _ in range(100):
        assert os.readlink("link", dir_fd=folder) == "target"


def list_long(folder: int) -> None:
    """Do what ``ls -l`` does, except that ls asks for extended attributes as well."""
    fd = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        with os.scandir(fd) as entries:
            assert sum(entry.stat(follow_symlinks=False).st_nlink for entry in entries) == 1000
    finally:
        os.close(fd)


def list_acls(folder: int) -> None:
    """What ``ls -l`` does, with what it asks for: ACLs and labels that are not there."""
    list_long(folder)
    for number in range(100):
        for name in ("user.acl", "security.other"):
            with pytest.raises(OSError, match="No data available"):
                os.getxattr(f"/proc/self/fd/{folder}/d/entry-{number:04}", name)


def read_all(folder: int) -> None:
    fd = os.open("file", os.O_RDONLY, dir_fd=folder)
    try:
        while os.read(fd, 128 * KIB):
            pass
    finally:
        os.close(fd)


def read_and_drop(folder: int) -> None:
    """Read, and have the kernel give up what it keeps of that."""
    read_all(folder)
    fd = os.open("file", os.O_RDONLY, dir_fd=folder)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def write_pieces(folder: int) -> None:
    fd = os.open("new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
    try:
        for number in range(256):
            os.pwrite(fd, b"%4d" % number * KIB, number * 4 * KIB)
    finally:
        os.close(fd)


def write_as_told(folder: int) -> None:
    """Write 16 MiB as cp and cat do: in pieces of st_blksize."""
    fd = os.open("new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
    try:
        piece = os.fstat(fd).st_blksize
        assert piece == os.stat("file", dir_fd=folder).st_blksize == IO_SIZE
        assert os.fstat(folder).st_blksize < IO_SIZE
        data = b"." * piece  # memory that is there: the kernel sends what it can copy at once
        for offset in range(0, 16 * MIB, piece):
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


# fmt: off
PROOFS = [
    Proof("stat-100", make_file(1), stat_often, {
        "none": [at_least(100, *ASKS)],
        "auto": [at_most(2, *ASKS)],
        "always": [at_most(0, *ASKS)],
    }),
    Proof("absent-100", make_file(1), stat_absent_often, {
        "none": [at_least(100, *ASKS)],
        "auto": [at_most(1, *ASKS)],
        "always": [at_most(0, *ASKS)],
    }),
    Proof("readlink-100", make_link, read_link_often, {
        "none": [at_least(100, "READLINK")],
        "auto": [at_most(1, "READLINK"), at_most(2, *ASKS)],
        "always": [at_most(0, "READLINK", *ASKS)],
    }, engines=("relay",)),
    Proof("list-1000", make_entries, list_long, {
        # The directory itself is looked up, and its attributes asked for when it was read; and
        # those of one file, where 50 ms go by before anybody looks at it (``cache.walkers``).
        "auto": [at_most(40, *ASKS, *LISTS, *HANDLES), at_most(3, *ASKS), at_most(0, "READDIR")],
        "always": [at_most(0, *LISTS), at_most(1, *ASKS)],
    }),
    Proof("list-1000-acls", make_entries, list_acls, {
        "auto": [at_most(3, *ASKS), at_most(1, "GETXATTR")],
        "always": [at_most(0, *LISTS, "GETXATTR"), at_most(1, *ASKS)],
    }, again=MODES),
    Proof("read-again", make_file(MIB), read_all, {
        "none": [at_least(1, "READ")],
        "auto": [at_most(0, "READ")],
        "always": [at_most(0, "READ")],
    }, again=MODES, ahead=True),
    Proof("read-16-MiB", make_file(16 * MIB), read_all, {
        "auto": [at_least(1, "READ"), at_most(20, "READ")],
    }, ahead=True),
    Proof("read-dropped", make_file(16 * MIB), read_and_drop, {
        "auto": [at_most(0, "READ")],
        "always": [at_most(0, "READ")],
    }, again=MODES, kernel=False, ahead=True),
    Proof("write-pieces", make_file(1), write_pieces, {
        "auto": [at_least(1, "WRITE"), at_most(2, "WRITE")],
        "always": [at_least(1, "WRITE"), at_most(2, "WRITE")],
    }, again=(), writeback=True),
    Proof("write-through", make_file(1), write_pieces, {
        "none": [Bound(("WRITE",), 256, 256)],
        "auto": [Bound(("WRITE",), 256, 256)],
        "always": [Bound(("WRITE",), 256, 256)],
    }, again=()),
    Proof("write-as-told", make_file(1), write_as_told, {
        "none": [at_most(32, "WRITE")],
        "auto": [at_most(32, "WRITE")],
        "always": [at_most(32, "WRITE")],
    }, again=()),
]
# fmt: on


SITES = [
    pytest.param(
        site,
        marks=daemon_marks(site[0]),
        id="-".join(site[:3]) + "-writeback" * site[3] + "-ahead" * site[4],
    )
    for site in (
        *itertools.product(DAEMON_KINDS, ENGINES, MODES, (False, True), (False,)),
        *itertools.product(DAEMON_KINDS, ("pyfuse3",), MODES[1:], (False,), (True,)),
    )
]


def is_case(params: dict[str, Any]) -> bool:
    """Whether a row says something about a mount."""
    _, engine, mode, writeback, ahead = params["shared"]
    proof = params["proof"]
    there = engine in proof.engines and (proof.ahead if ahead else proof.kernel)
    return mode in proof.bounds and proof.writeback == writeback and there


@pytest.fixture(scope="module", params=SITES)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """A mount for all rows."""
    kind, engine, mode, writeback, ahead = request.param
    require_daemon(kind)
    # What the caches alone are good for: mapped files need no READ or WRITE in any mode.
    options = ["--dax=off", "--timeout", LONG]
    with (
        small_readahead() if ahead else nullcontext(),
        open_shared(kind, engine, mode, options=options, writeback=writeback) as shared,
    ):
        keeper = read_status(str(shared.mounts[0].path))["cache"]["pages_by"]
        assert keeper == ("vfsmount" if ahead else "kernel")
        yield shared


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_messages(shared: Shared, proof: Proof) -> None:
    shared.check_alive()
    counted = while_pages_stay(lambda: count(shared, proof))
    for bound in proof.bounds[shared.cache]:
        bound.check(counted)


def count(shared: Shared, proof: Proof) -> Counter[str]:
    """Do what is counted in a folder of its own; return the messages."""
    (mount,) = shared.mounts
    host, path = shared.folder()
    proof.prepare(host)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if shared.cache in proof.again:
            proof.act(folder)
        os.fstat(folder)
        # Some messages are counted when nobody waits for them any more, one after the other: with
        # the reply to a STATFS, which nobody keeps, all that came before is counted.
        os.fstatvfs(folder)
        before = messages(mount)
        proof.act(folder)
        os.fstatvfs(folder)
        return messages(mount) - before
    finally:
        os.close(folder)
