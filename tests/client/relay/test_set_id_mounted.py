"""Who clears set-id bits, and capabilities of files: each change, compared with a plain folder.

The kernel is told HANDLE_KILLPRIV_V2 with every daemon, and clears none by itself. Some of the
daemons do when they are told; for the others it is on us.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import stat
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.support.daemons import daemon_marks, start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import start_mount
from tests.support.other_user import NOBODY
from tests.support.shares import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from tests.support.mounts import Mount

pytestmark = [
    pytest.mark.needs_fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="set-id bits of others need root"),
]

KEEP_SIZE, PUNCH_HOLE = 1, 2
CAPABILITY = "security.capability"
#: VFS_CAP_REVISION_2, cap_net_raw permitted.
NET_RAW = bytes.fromhex("0000000200200000000000000000000000000000")

libc = ctypes.CDLL(None, use_errno=True)


# --- changes of a file, each made in the working directory ---------------------------------------


def write(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.write(fd, b"changed")
    os.close(fd)


def write_beyond(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.pwrite(fd, b"changed", 100_000)
    os.close(fd)


def append(name: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"changed")
    os.close(fd)


def write_direct(name: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, 3 << 20) as data:  # several messages at once
        os.write(fd, data)
    os.close(fd)


def cut_by_open(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))


def make_over(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))


def cut(name: str) -> None:
    os.truncate(name, 3)


def cut_open(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    os.ftruncate(fd, 3)
    os.close(fd)


def grow(name: str) -> None:
    os.truncate(name, 100_000)


def allocate(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    os.posix_fallocate(fd, 0, 20_000)
    os.close(fd)


def punch(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    mode = KEEP_SIZE | PUNCH_HOLE
    done = libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096))
    assert not done, os.strerror(ctypes.get_errno())
    os.close(fd)


def copy_into(name: str) -> None:
    source, fd = os.open("source", os.O_RDONLY), os.open(name, os.O_RDWR)
    assert os.copy_file_range(source, fd, 4096) == 4096
    os.close(source)
    os.close(fd)


def send_into(name: str) -> None:
    source, fd = os.open("source", os.O_RDONLY), os.open(name, os.O_RDWR)
    assert os.sendfile(fd, source, 0, 4096) == 4096
    os.close(source)
    os.close(fd)


def store(name: str) -> None:
    fd = os.open(name, os.O_RDWR)
    with mmap.mmap(fd, 4096) as data:
        data[0] = 1
        data.flush()
    os.close(fd)


def give_away(name: str) -> None:
    os.chown(name, NOBODY, NOBODY)


def give_group(name: str) -> None:
    os.chown(name, -1, NOBODY)


def write_twice(name: str) -> None:
    """The bits come back in between."""
    write(name)
    os.chmod(name, 0o6777)
    write(name)


def write_after_chmod(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.write(fd, b"c")
    os.chmod(name, 0o6777)
    os.write(fd, b"hanged")
    os.close(fd)


WRITES = (
    write, write_beyond, append, write_direct, cut_by_open, make_over, cut, cut_open, grow,
    allocate, punch, copy_into, send_into, store,
)  # fmt: skip
ROOTS = (*WRITES, give_away, give_group, write_twice)
OWNERS = (write, cut, write_twice, write_after_chmod, allocate, copy_into)

MODES = (0o6777, 0o4777, 0o2777, 0o6767, 0o755)


def prepare(folder: Path, owner: int) -> None:
    """Make a folder with a file for each change and mode."""
    folder.mkdir()
    (folder / "source").write_bytes(b"s" * 4096)
    for change in (*ROOTS, write_after_chmod):
        for mode in MODES:
            path = folder / f"{change.__name__}-{mode:o}"
            path.write_bytes(b"x" * 4096)
            os.chown(path, owner, owner)
            path.chmod(mode | 0o666)


def as_user(uid: int, folder: Path, act: Callable[[], Any]) -> Any:
    """Run something as a user and in a folder, in a process of its own; return what it returns."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.chdir(folder)
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(write_end, json.dumps(act()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "see what it has printed"
    return json.loads(found)


def modes_after(changes: tuple[Callable[[str], None], ...]) -> dict[str, str]:
    """Do all changes; return the mode that each leaves, as seen at once."""
    found = {}
    for change in changes:
        for mode in MODES:
            name = f"{change.__name__}-{mode:o}"
            os.stat(name)
            change(name)
            found[name] = oct(stat.S_IMODE(os.stat(name).st_mode))
    return found


def modes_of(names: Iterable[str]) -> dict[str, str]:
    return {name: oct(stat.S_IMODE(os.stat(name).st_mode)) for name in names}


class Place(NamedTuple):
    """A mounted share.

    Attributes:
        daemon: Of ``DAEMONS``.
        host: The folder at the host.
        path: The same, mounted.
        other: A host folder that nobody shares.
        mount: The mount.
    """

    daemon: str
    host: Path
    path: Path
    other: Path
    mount: Mount


#: Daemons, and the words that make them do, or not do, what they do not by themselves.
DAEMONS: dict[str, tuple[str, ...]] = {
    "rust": (),
    "c": (),
    "bundled": (),
    "rust+v2": ("--killpriv-v2",),
    "c+v2": ("-o", "killpriv_v2"),
    "bundled-v2": ("--no-killpriv-v2",),
}
#: With the flag, virtiofsd lets the bits be where no request says that they go.
DEVIATION = (("rust+v2", "c+v2"), (allocate, punch, copy_into))


def daemon_kind(name: str) -> str:
    return name.replace("+", "-").partition("-")[0]


@contextmanager
def place(
    name: str, cache: str, *words: str, writeback: bool = False, xattr: bool = True
) -> Iterator[Place]:
    with quick_folders("set-id", "host", "other", "mnt") as folders, ExitStack() as stack:
        host, other, path = folders
        daemon = stack.enter_context(
            start_daemon(
                daemon_kind(name), host, xattr=xattr, writeback=writeback, extra=DAEMONS[name]
            )
        )
        options = (*words, *(("--writeback",) if writeback else ()))
        mount = stack.enter_context(
            start_mount(path, daemon.socket, cache=cache, engine="relay", options=options)
        )
        yield Place(name, host, path, other, mount)


PLACES = [
    "rust none", "rust auto", "rust always", "rust host", "rust auto writeback",
    "c none", "c auto", "c auto writeback", "bundled none", "bundled auto",
    "rust+v2 auto", "c+v2 auto", "bundled-v2 none", "bundled-v2 auto",
]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, marks=daemon_marks(daemon_kind(one.split()[0]))) for one in PLACES],
)
def here(request: pytest.FixtureRequest) -> Iterator[Place]:
    name, cache, *rest = request.param.split()
    with place(name, cache, writeback=bool(rest)) as one:
        yield one


def bits(mode: str, *, sgid: bool) -> str:
    """A mode, with sgid or without."""
    return mode if sgid else oct(int(mode, 8) & ~stat.S_ISGID)


@pytest.mark.parametrize("who", ["root", "other", "owner"])
def test_a_change_leaves_the_bits_that_it_leaves_in_a_plain_folder(here: Place, who: str) -> None:
    changes = {"root": ROOTS, "other": WRITES, "owner": OWNERS}[who]
    uid, owner = (0 if who == "root" else NOBODY), (NOBODY if who == "owner" else 0)
    names = (here.other / who, here.path / who, here.host / who)
    for folder in (here.other, here.host):
        prepare(folder / who, owner)
    if here.daemon in DEVIATION[0] and uid:
        changes = tuple(change for change in changes if change not in DEVIATION[1])

    expected, found = (as_user(uid, folder, lambda: modes_after(changes)) for folder in names[:2])
    at_the_host = as_user(0, names[2], lambda: modes_of(found))

    assert found == at_the_host
    # Of a file that its group may not execute the host takes sgid when a stranger writes, and the
    # kernel's FUSE does not. Daemons with the flag differ.
    sgid = {name for name in found if not name.endswith("67")}
    alike = {name: bits(mode, sgid=name in sgid) for name, mode in found.items()}
    assert alike == {name: bits(mode, sgid=name in sgid) for name, mode in expected.items()}
    if here.daemon == "rust" and who != "owner":
        kept = {name for name in set(found) - sgid if int(found[name], 8) & stat.S_ISGID}
        assert kept == set(found) - sgid


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize("change", [write, append, cut_by_open, cut, allocate, copy_into])
def test_a_change_removes_the_capabilities_of_a_file(
    here: Place, change: Callable[[str], None], uid: int
) -> None:
    folder = f"capable-{change.__name__}-{uid}"
    (here.host / folder).mkdir()
    (here.host / folder / "source").write_bytes(b"s" * 4096)
    file = here.host / folder / "file"
    file.write_bytes(b"x" * 4096)
    file.chmod(0o777)
    os.setxattr(file, CAPABILITY, NET_RAW)
    as_user(uid, here.path / folder, lambda: change("file"))
    assert CAPABILITY not in os.listxattr(file)

    # The kernel may believe now that there are none.
    os.setxattr(file, CAPABILITY, NET_RAW)
    as_user(uid, here.path / folder, lambda: change("file"))
    assert CAPABILITY not in os.listxattr(file)


def test_chown_removes_the_capabilities_of_a_file(here: Place) -> None:
    file = here.host / "capable-chown"
    file.write_bytes(b"x")
    os.setxattr(file, CAPABILITY, NET_RAW)
    os.chown(here.path / "capable-chown", NOBODY, NOBODY)
    assert CAPABILITY not in os.listxattr(file)


# --- messages ------------------------------------------------------------------------------------

DAEMON_PARAMS = [pytest.param(one, marks=daemon_marks(daemon_kind(one))) for one in DAEMONS]


@pytest.mark.parametrize("name", DAEMON_PARAMS)
def test_chown_asks_for_no_attributes(name: str) -> None:
    # The kernel asks for attributes of the folder when they are old, not for a chown.
    with place(name, "auto", "--timeout", "600", xattr=False) as here:
        files = [here.path / f"file{number}" for number in range(20)]
        for file in files:
            file.write_bytes(b"content")
        here.path.stat()
        before = messages(here.mount)
        for file in files:
            os.chown(file, NOBODY, NOBODY)
        sent = messages(here.mount) - before
    assert sent["SETATTR"] == len(files)
    assert sent["GETATTR"] == 0, sent


@pytest.mark.parametrize("name", DAEMON_PARAMS)
def test_new_files_are_not_asked_about(name: str) -> None:
    with place(name, "auto", "--timeout", "600") as here:
        (here.path / "first").write_bytes(b"content")  # tells that attributes are served
        before = messages(here.mount)
        for number in range(20):
            with (here.path / f"file{number}").open("xb") as file:
                file.write(b"content")
        sent = messages(here.mount) - before
    assert sent["WRITE"] == 20
    assert sent["GETXATTR"] == 0, sent


@pytest.mark.parametrize("name", DAEMON_PARAMS)
def test_writes_ask_for_capabilities_at_most_once(name: str) -> None:
    """Without validity nothing is answered from memory: what the kernel asks is what is sent."""
    with (
        place(name, "auto", "--timeout", "0") as here,
        (here.path / "file").open("wb", buffering=0) as file,
    ):
        before = messages(here.mount)
        for _ in range(100):
            file.write(b"content")
        sent = messages(here.mount) - before
    assert sent["WRITE"] == 100
    assert sent["GETXATTR"] <= 1, sent
