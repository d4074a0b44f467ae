"""Files written anew, O_TRUNC, that the host has replaced: the write goes to what has the name now.

The daemon keeps a removed file for who knows its node, and would truncate and write that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import DAEMON_KINDS, daemon_marks
from tests.support.shares import Shared, open_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs_fuse

#: With HANDLE_KILLPRIV_V2 the kernel leaves O_TRUNC to the open; the bundled daemon has it anyway.
OPTIONS = {"bundled": (), "rust": ("--killpriv-v2",), "c": ("-o", "killpriv_v2")}
OLD, NEW = b"old and long", b"new"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((kind, engine, leaves), marks=daemon_marks(kind))
        for kind in DAEMON_KINDS
        for engine in ("relay", "pyfuse3")
        for leaves in ((True, False) if kind != "bundled" else (True,))
    ],
    ids=lambda one: f"{one[0]}-{one[1]}{'-killpriv' if one[2] else ''}",
)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    kind, engine, leaves = request.param
    options = OPTIONS[kind] if leaves else ()
    with open_shared(
        kind, engine, "auto", options=("--timeout", "600"), daemon_options=options
    ) as shared:
        yield shared


def unlink(path: Path) -> None:
    path.unlink()


def make_again(path: Path) -> None:
    path.unlink()
    path.write_bytes(OLD)


def rename_over(path: Path) -> None:
    path.with_name("other").write_bytes(OLD)
    path.with_name("other").rename(path)


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize("change", [unlink, make_again, rename_over, nothing])
def test_it_is_not_lost(shared: Shared, change: Callable[[Path], None]) -> None:
    host, mounted = (folder / "file" for folder in shared.folder())
    mounted.write_bytes(OLD)
    for _ in range(2):
        change(host)
        mounted.write_bytes(NEW)
        assert host.read_bytes() == NEW
        assert mounted.read_bytes() == NEW
        assert mounted.stat().st_size == len(NEW)


def test_a_file_without_a_name_can_be_emptied(shared: Shared) -> None:
    host, mounted = (folder / "file" for folder in shared.folder())
    mounted.write_bytes(OLD)
    with mounted.open("rb") as held:
        host.unlink()
        again = f"/proc/self/fd/{held.fileno()}"
        for _ in range(2):
            fd = os.open(again, os.O_WRONLY | os.O_TRUNC)
            os.write(fd, NEW)
            os.close(fd)
        assert os.fstat(held.fileno()).st_size == len(NEW)
