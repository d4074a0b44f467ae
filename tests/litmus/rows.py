"""The litmus table: what one party changes, how another looks at it, and when it must see it.

Every row is an action on a file or folder that the observer knows well: all that can be cached of
it is cached. ``docs/semantics.md`` shows the same table; ``tests/test_semantics_doc.py`` compares.

A look gives a value, and an error of the system is one, too. Whatever a mode promises, a look must
never give anything but what was there before or what is there now: a name that leads nowhere any
more may be stale for a while, but ESTALE or EBADF where walking the path anew succeeds is a fault.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support.errors import outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["MODES", "ROWS", "Row", "When", "look_at"]

MODES = ("none", "auto", "always")


class When(enum.Enum):
    """When a change must be seen; the value is the word in the documents."""

    AT_ONCE = "at once"
    NEXT_OPEN = "next open"
    WITHIN_TIMEOUT = "within the timeout"
    NOT_PROMISED = "not promised"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        change: What is done, in the words of the documents.
        look: How it is looked at, likewise.
        prepare: Makes what is changed, in a folder at the host.
        act: Changes it; the folder is at the host or in a mount.
        see: Looks, in a folder of the observer, with a descriptor of ``held`` there.
        none: When it is seen in mode ``none``.
        auto: When it is seen in mode ``auto``.
        always: When it is seen in mode ``always``.
        held: Name of a file that the observer has open all the time.
    """

    change: str
    look: str
    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    see: Callable[[Path, int], object]
    none: When
    auto: When
    always: When
    held: str = ""

    @property
    def name(self) -> str:
        """Identifier of the row."""
        return f"{self.change}: {self.look}"

    def when(self, mode: str) -> When:
        """When it is seen in a mode."""
        return {"none": self.none, "auto": self.auto, "always": self.always}[mode]


def look_at(row: Row, folder: Path, fd: int) -> object:
    """Look, and return what is seen: a value, or the name of an error."""
    return outcome(row.see, folder, fd)


# --- preparations --------------------------------------------------------------------------------

OLD = b"old content"
SAME_LENGTH = b"new content"


def nothing(folder: Path) -> None:
    del folder


def a_file(folder: Path) -> None:
    (folder / "x").write_bytes(OLD)
    (folder / "x").chmod(0o600)
    os.utime(folder / "x", ns=(10**18, 10**18))
    os.setxattr(folder / "x", "user.mark", b"old")


def two_files(folder: Path) -> None:
    a_file(folder)
    (folder / "y").write_bytes(b"the other file")


def a_folder(folder: Path) -> None:
    (folder / "x").mkdir()


def a_symlink(folder: Path) -> None:
    (folder / "x").symlink_to("old")


# --- changes -------------------------------------------------------------------------------------


def write(folder: Path, data: bytes, flags: int, position: int = 0) -> None:
    fd = os.open(folder / "x", os.O_WRONLY | flags)
    try:
        os.pwrite(fd, data, position)
    finally:
        os.close(fd)


def create(folder: Path) -> None:
    (folder / "x").write_bytes(OLD)


def overwrite(folder: Path) -> None:
    write(folder, SAME_LENGTH, 0)


def append(folder: Path) -> None:
    write(folder, b" and more", os.O_APPEND)


def truncate(folder: Path) -> None:
    os.truncate(folder / "x", 3)


def rename_over(folder: Path) -> None:
    (folder / "y").rename(folder / "x")


def unlink(folder: Path) -> None:
    (folder / "x").unlink()


def create_again(folder: Path) -> None:
    (folder / "x").unlink()
    (folder / "x").write_bytes(b"born again")


def replace_symlink(folder: Path) -> None:
    (folder / "x").unlink()
    (folder / "x").symlink_to("new")


# --- looks ---------------------------------------------------------------------------------------


def exists(folder: Path, _: int) -> bool:
    try:
        os.stat(folder / "x", follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def listing(folder: Path, _: int) -> list[str]:
    return sorted(os.listdir(folder))


def content(folder: Path, _: int) -> bytes:
    return (folder / "x").read_bytes()


def size_when_open(folder: Path, _: int) -> tuple[int, int]:
    fd = os.open(folder / "x", os.O_RDONLY)
    try:
        return os.lseek(fd, 0, os.SEEK_END), os.fstat(fd).st_size
    finally:
        os.close(fd)


def size(folder: Path, _: int) -> int:
    return os.stat(folder / "x").st_size


def mode(folder: Path, _: int) -> int:
    return os.stat(folder / "x").st_mode


def mtime(folder: Path, _: int) -> int:
    return os.stat(folder / "x").st_mtime_ns


def links(folder: Path, _: int) -> int:
    return os.stat(folder / "x").st_nlink


def xattr(folder: Path, _: int) -> bytes:
    return os.getxattr(folder / "x", "user.mark")


def new_xattr(folder: Path, _: int) -> bytes:
    return os.getxattr(folder / "x", "user.new")


def target(folder: Path, _: int) -> str:
    return os.readlink(folder / "x")


def held_content(_: Path, fd: int) -> bytes:
    return os.pread(fd, 100, 0)


def held_size(_: Path, fd: int) -> int:
    return os.fstat(fd).st_size


# --- the table -----------------------------------------------------------------------------------

NOW, OPEN, SOON, NEVER = When.AT_ONCE, When.NEXT_OPEN, When.WITHIN_TIMEOUT, When.NOT_PROMISED
KEPT = (NOW, SOON, NEVER)  # names and attributes
DATA = (NOW, OPEN, NEVER)  # contents

# fmt: off
ROWS = [
    Row("create", "exists", nothing, create, exists, *KEPT),
    Row("create", "listing", nothing, create, listing, NOW, NOW, NEVER),
    Row("create", "open and read", nothing, create, content, *KEPT),
    Row("overwrite in place", "open and read", a_file, overwrite, content, *DATA),
    Row("overwrite in place", "mtime", a_file, overwrite, mtime, *KEPT),
    Row("overwrite in place", "read, open before", a_file, overwrite, held_content, *KEPT, "x"),
    Row("append", "open and read", a_file, append, content, *DATA),
    Row("append", "open and fstat", a_file, append, size_when_open, *DATA),
    Row("append", "size", a_file, append, size, *KEPT),
    Row("append", "read, open before", a_file, append, held_content, *KEPT, "x"),
    Row("truncate", "open and read", a_file, truncate, content, *DATA),
    Row("truncate", "open and fstat", a_file, truncate, size_when_open, *DATA),
    Row("truncate", "size", a_file, truncate, size, *KEPT),
    Row("truncate", "fstat, open before", a_file, truncate, held_size, *KEPT, "x"),
    Row("rename over", "open and read", two_files, rename_over, content, *DATA),
    Row("rename over", "size", two_files, rename_over, size, *KEPT),
    Row("rename over", "listing", two_files, rename_over, listing, NOW, NOW, NEVER),
    Row("rename over", "read, open before", two_files, rename_over, held_content,
        NOW, NOW, NOW, "x"),
    Row("unlink", "exists", a_file, unlink, exists, *KEPT),
    Row("unlink", "open and read", a_file, unlink, content, *DATA),
    Row("unlink", "listing", a_file, unlink, listing, NOW, NOW, NEVER),
    Row("unlink", "read, open before", a_file, unlink, held_content, NOW, NOW, NOW, "x"),
    Row("unlink and create again", "open and read", a_file, create_again, content, *DATA),
    Row("unlink and create again", "size", a_file, create_again, size, *KEPT),
    Row("chmod", "mode", a_file, lambda folder: (folder / "x").chmod(0o640), mode, *KEPT),
    Row("utimens", "mtime", a_file, lambda folder: os.utime(folder / "x", (1, 2)), mtime, *KEPT),
    Row("set an extended attribute", "its value", a_file,
        lambda folder: os.setxattr(folder / "x", "user.mark", b"new"), xattr, NOW, NOW, NOW),
    Row("set a new extended attribute", "its value", a_file,
        lambda folder: os.setxattr(folder / "x", "user.new", b"new"), new_xattr, *KEPT),
    Row("mkdir", "exists", nothing, a_folder, exists, *KEPT),
    Row("rmdir", "exists", a_folder, lambda folder: (folder / "x").rmdir(), exists, *KEPT),
    Row("replace a symbolic link", "its target", a_symlink, replace_symlink, target, *KEPT),
    Row("hard link", "exists", two_files, lambda folder: os.link(folder / "x", folder / "z"),
        lambda folder, _: (folder / "z").exists(), *KEPT),
    Row("hard link", "number of links", a_file,
        lambda folder: os.link(folder / "x", folder / "z"), links, *KEPT),
]
# fmt: on
