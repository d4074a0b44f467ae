"""Listings that are kept in mode ``always``: own changes are seen in them, by both engines."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.pages import while_pages_stay
from tests.support.shares import Shared, messages, open_shared

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]


@pytest.fixture(scope="module", params=["relay", "pyfuse3"])
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    with open_shared("bundled", request.param, "always") as shared:
        yield shared


DROP_CACHES = Path("/proc/sys/vm/drop_caches")

Line = tuple[str, int, int, int, int, int]


def look(folder: Path) -> list[Line]:
    """What ``ls -lai`` shows, and more, in order of names."""
    with os.scandir(folder) as entries:
        found = []
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            at = status.st_mtime_ns
            found.append(
                (entry.name, entry.inode(), status.st_size, status.st_mode, status.st_nlink, at)
            )
    return sorted(found)


def write(path: Path, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(data)


STEPS: dict[str, Callable[[Path], object]] = {
    "create": lambda here: (here / "new").write_bytes(b"content"),
    "write": lambda here: write(here / "b", b"much more than before"),
    "truncate": lambda here: os.truncate(here / "c", 1),
    "truncate by open": lambda here: os.close(os.open(here / "c", os.O_WRONLY | os.O_TRUNC)),
    "chmod": lambda here: (here / "d").chmod(0o751),
    "utimens": lambda here: os.utime(here / "a", (1, 2)),
    "link": lambda here: os.link(here / "a", here / "again"),
    "link from elsewhere": lambda here: os.link(here / "a", here / "sub" / "a"),
    "unlink one of two": lambda here: (here / "linked").unlink(),
    "unlink": lambda here: (here / "b").unlink(),
    "mkdir": lambda here: (here / "folder").mkdir(),
    "mkdir below": lambda here: (here / "sub" / "folder").mkdir(),
    "rmdir": lambda here: (here / "empty").rmdir(),
    "rename": lambda here: (here / "a").rename(here / "z"),
    "rename over": lambda here: (here / "a").rename(here / "b"),
    "rename away": lambda here: (here / "a").rename(here / "sub" / "a"),
    "symlink": lambda here: (here / "link").symlink_to("a"),
    "setxattr": lambda here: os.setxattr(here / "a", "user.new", b"value"),
}


def prepare(folder: Path) -> None:
    for name in "abcd":
        (folder / name).write_bytes(name.encode() * 5)
    (folder / "sub").mkdir()
    (folder / "empty").mkdir()
    os.link(folder / "c", folder / "linked")


@pytest.mark.parametrize("step", STEPS)
def test_own_change_is_in_a_kept_listing(shared: Shared, step: str) -> None:
    host, here = shared.folder()
    prepare(host)
    for _ in range(2):
        assert look(here) == look(host)
        look(here / "sub")
    STEPS[step](here)
    for folder in (here, here / "sub"):
        assert look(folder) == look(host / folder.relative_to(here))


def test_a_name_that_is_removed_unseen(shared: Shared) -> None:
    """A kept listing is right about a file that lost a name in a folder that was never listed."""
    host, here = shared.folder()
    (host / "seen").mkdir()
    (host / "unseen").mkdir()
    (host / "seen" / "x").touch()
    os.link(host / "seen" / "x", host / "unseen" / "y")
    for _ in range(2):
        assert look(here / "seen") == look(host / "seen")
    (here / "unseen" / "y").unlink()
    assert look(here / "seen") == look(host / "seen")


def test_listing_is_served_by_pieces(shared: Shared) -> None:
    """A program may stop in the middle, go back, and go on from a place that it noted."""
    code = """if 1:
        import ctypes, os, sys
        libc = ctypes.CDLL(None)
        libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
        libc.telldir.restype = ctypes.c_long
        for call in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir):
            call.argtypes = [ctypes.c_void_p]
        libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
        def name(entry):
            return ctypes.string_at(entry + 19)
        stream = libc.opendir(os.fsencode(sys.argv[1]))
        first = [name(libc.readdir(stream)) for _ in range(700)]
        place = libc.telldir(stream)
        then = [name(libc.readdir(stream)) for _ in range(900)]
        libc.seekdir(stream, place)
        assert [name(libc.readdir(stream)) for _ in range(900)] == then
        rest = []
        while entry := libc.readdir(stream):
            rest.append(name(entry))
        libc.rewinddir(stream)
        assert [name(libc.readdir(stream)) for _ in range(700)] == first
        libc.closedir(stream)
        names = [b".", b"..", *os.listdir(os.fsencode(sys.argv[1]))]
        assert sorted(first + then + rest) == sorted(names)
    """

    def list_pieces() -> Counter[str]:
        (mount,) = shared.mounts
        host, here = shared.folder()
        for number in range(2000):
            (host / f"some-longer-name-{number:04}").touch()
        os.listdir(here)
        before = messages(mount)
        subprocess.run([sys.executable, "-c", code, here], check=True, timeout=60)
        return messages(mount) - before

    counted = while_pages_stay(list_pieces)
    assert not counted["READDIRPLUS"] + counted["READDIR"] + counted["LOOKUP"]


def test_kept_nodes_survive_what_the_kernel_forgets(shared: Shared) -> None:
    """Whatever the kernel gives up, a kept listing leads to the right files."""
    host, here = shared.folder()
    dice = random.Random(3)
    for number in range(200):
        (host / f"{number}").write_bytes(b"%d" % number)
    for _ in range(5):
        assert {name: (here / name).read_text() for name in os.listdir(here)} == {
            f"{number}": f"{number}" for number in range(200)
        }
        assert look(here) == look(host)
        if os.access(DROP_CACHES, os.W_OK):
            DROP_CACHES.write_text("2\n")
        number = dice.randrange(200)
        (here / f"{number}").unlink()
        (here / f"{number}").write_bytes(b"%d" % number)
