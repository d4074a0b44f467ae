"""FORGET is balanced: what the guest has forgotten, the daemon has closed."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contract.conftest import FORGET_DEADLINE
from tests.contract.steps import put
from tests.support.environment import unavailable
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from tests.contract.conftest import Site
    from tests.contract.trees import Tree
    from tests.contract.twin import Twin

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def make_forest(tree: Tree) -> int:
    """Make some hundred files in folders, with links; return how many names there are."""
    made = 0
    for number in range(20):
        folder = b"folder-%02d" % number
        tree.mkdir(folder)
        for at in range(10):
            put(tree, folder + b"/file-%d" % at, b"content")
        tree.symlink(b"file-0", folder + b"/symlink")
        tree.link(folder + b"/file-0", folder + b"/hard")
        made += 13
    return made


@pytest.mark.only("session")
def test_session_gives_back_what_it_got(site: Site, twin: Twin) -> None:
    """Every reference and handle is given back: the end of each test looks at the daemon."""
    twin.same(make_forest)
    twin.same(lambda tree: len(tree.listdir(b"folder-03")))
    site.check_forgotten()


@pytest.mark.usefixtures("as_root")
@pytest.mark.slow
@pytest.mark.only("none", "auto")
def test_find_and_drop_caches(site: Site, twin: Twin) -> None:
    """After a find and a drop of the kernel's caches the daemon holds what it did before."""
    assert site.mount is not None
    if not os.access(DROP_CACHES, os.W_OK):
        unavailable(f"{DROP_CACHES} is not writable")
    made = twin.same(make_forest)

    find = ["find", str(site.mount.path), "-printf", "%p %s %l %i\n"]
    listed = subprocess.run(find, capture_output=True, check=True).stdout.splitlines()

    assert len(listed) >= made
    held = site.daemon.fd_count()
    wait_until(
        lambda: _drop_caches() and site.daemon.fd_count() <= site.idle_fds,
        2 * FORGET_DEADLINE,
        f"the daemon to hold {site.idle_fds} files again, not {held}",
    )


def _drop_caches() -> bool:
    DROP_CACHES.write_text("2\n")
    return True


def test_nodes_that_are_replaced(twin: Twin) -> None:
    """Names that come to mean other nodes, again and again, while the kernel remembers old ones."""

    def replace(tree: Tree) -> list[tuple[int, bytes]]:
        seen = []
        for number in range(50):
            put(tree, b"new", b"%d" % number)
            tree.rename(b"new", b"name")
            with tree.open(b"name", os.O_RDONLY) as handle:
                seen.append((tree.stat(b"name").nlink, handle.pread(10, 0)))
        tree.unlink(b"name")
        tree.mkdir(b"name")
        assert stat.S_ISDIR(tree.stat(b"name").mode)
        return seen

    assert twin.same(replace) == [(1, b"%d" % number) for number in range(50)]
