"""Whole commands that go through a tree, counted in messages: each gets what it looks at.

Mode ``auto``, whose listings have attributes for who looks at them, and names for who does not.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.shares import Shared, messages, open_shared
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

FOLDERS = 20
FILES = 50
#: Listings that are full before a program counts as one that looks at nothing, and the tree's own.
FULL = 3
#: Longer than a change may hide another of the same time.
SETTLED_NS = 60_000_000


@pytest.fixture
def shared(daemon_kind: str) -> Iterator[Shared]:
    with open_shared(daemon_kind, "relay", "auto", options=["--timeout", "600"]) as shared:
        yield shared


def make_tree(shared: Shared) -> Path:
    """Return a tree that the kernel has never seen, mounted, its last change a moment ago."""
    folder, path = shared.folder()
    for number in range(FOLDERS):
        (folder / f"folder-{number:02}").mkdir()
        for file in range(FILES):
            (folder / f"folder-{number:02}" / f"file-{file:02}").write_bytes(b"x")
    changed = time.time_ns()
    wait_until(lambda: time.time_ns() > changed + SETTLED_NS, 5.0, "the clock")
    return path


def counted(shared: Shared, path: Path, *words: str, lines: int = 0) -> Counter[str]:
    """Run a command on a tree; count messages."""
    (mount,) = shared.mounts
    before = messages(mount)
    done = subprocess.run([*words, path], check=True, capture_output=True, timeout=60)
    os.statvfs(path.parent)  # by now all replies are counted: see test_messages
    assert len(done.stdout.splitlines()) == lines
    return messages(mount) - before


def test_find_gets_names(shared: Shared) -> None:
    path = make_tree(shared)
    found = counted(shared, path, "find", lines=1 + FOLDERS * (1 + FILES))

    assert found["READDIRPLUS"] <= FULL
    assert found["LOOKUP"] <= 2
    assert found["GETATTR"] <= 2 + FOLDERS  # of directories, when they have been read

    again = counted(shared, path, "find", lines=1 + FOLDERS * (1 + FILES))
    assert again["READDIRPLUS"] <= FULL
    assert again["READDIR"] <= 2 * FULL, "it can have had the names of the first"


def test_ls_gets_all(shared: Shared) -> None:
    found = counted(shared, make_tree(shared), "ls", "-lR", lines=2 + FOLDERS * (4 + FILES))

    assert found["READDIRPLUS"] >= 1 + FOLDERS
    assert found["LOOKUP"] <= 2
    assert found["GETATTR"] <= 2 + 2 * FOLDERS  # and of one file in each, where that comes late


def test_rm_gets_all_but_once(shared: Shared) -> None:
    found = counted(shared, make_tree(shared), "rm", "-r")

    assert found["UNLINK"] == FOLDERS * FILES
    assert found["READDIRPLUS"] >= FOLDERS - 1
    assert 1 <= found["LOOKUP"] <= 2 + FILES
