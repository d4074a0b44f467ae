"""Attributes: reading them, and changing them in every combination."""

from __future__ import annotations

import os
import stat
import time
from itertools import product
from typing import TYPE_CHECKING

import pytest

from tests.contract.session_tree import SessionTree, stat_of
from tests.contract.steps import get, put
from tests.contract.trees import NOW, OMIT
from tests.support.wait import wait_until
from vfsmount.client.session import setattr_in

if TYPE_CHECKING:
    from collections.abc import Callable

    import vfsmount
    from tests.contract.trees import Stat, Tree
    from tests.contract.twin import Twin

SECOND = 10**9
#: File systems read a clock that ticks every 1 to 10 ms.
TICK = SECOND // 50
#: Before 1970, in the far future (beyond 32 bits of seconds), and with every nanosecond digit.
TIMES = [0, 1, 1_234_567_890_123_456_789, 5_000_000_000 * SECOND + 999_999_999]


def test_stat_of_the_folder_itself(twin: Twin) -> None:
    twin.same(lambda tree: tree.stat(b"."))


@pytest.mark.parametrize("mode", [0, 0o400, 0o755, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777], ids=oct)
def test_chmod(twin: Twin, mode: int) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.mkdir(b"d"))

    twin.same(lambda tree: tree.chmod(b"file", mode))
    twin.same(lambda tree: tree.chmod(b"d", mode))
    assert stat.S_IMODE(twin.same(lambda tree: tree.stat(b"file")).mode) == mode
    assert stat.S_IMODE(twin.same(lambda tree: tree.stat(b"d")).mode) == mode
    # Whoever is not root could not compare or remove them otherwise.
    twin.same(lambda tree: tree.chmod(b"file", 0o600))
    twin.same(lambda tree: tree.chmod(b"d", 0o700))


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("uid", "gid"), [(1000, 1001), (1000, -1), (-1, 1001), (-1, -1)])
def test_chown(twin: Twin, uid: int, gid: int) -> None:
    for tree in twin.both():
        put(tree, b"file", mode=0o644)
        tree.mkdir(b"d")
        tree.symlink(b"file", b"link")

    for name in (b"file", b"d", b"link"):
        twin.same(lambda tree, name=name: tree.chown(name, uid, gid))  # type: ignore[misc]
        twin.same(lambda tree, name=name: tree.stat(name))  # type: ignore[misc]


@pytest.mark.usefixtures("as_root")
def test_chown_clears_set_id_bits(twin: Twin) -> None:
    for tree in twin.both():
        put(tree, b"file")
        tree.chmod(b"file", 0o6755)

    twin.same(lambda tree: tree.chown(b"file", 1000, 1000))
    assert stat.S_IMODE(twin.same(lambda tree: tree.stat(b"file")).mode) == 0o755


@pytest.mark.usefixtures("as_root")
def test_largest_ids(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file"))
    twin.same(lambda tree: tree.chown(b"file", 2**32 - 2, 2**32 - 2))
    assert twin.same(lambda tree: tree.stat(b"file")).uid == 2**32 - 2


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5, 10, 4096, 10_000, 1 << 20, (1 << 32) + 5])
def test_truncate(twin: Twin, size: int) -> None:
    twin.same(lambda tree: put(tree, b"file", b"0123456789"))

    twin.same(lambda tree: tree.truncate(b"file", size))

    assert twin.same(lambda tree: tree.stat(b"file")).size == size
    assert twin.same(lambda tree: get(tree, b"file", 20)) == b"0123456789"[:size].ljust(
        min(size, 20), b"\0"
    )


def test_truncate_down_and_up_reads_zeros(twin: Twin) -> None:
    twin.same(lambda tree: put(tree, b"file", b"x" * 10_000))

    twin.same(lambda tree: tree.truncate(b"file", 5000))
    twin.same(lambda tree: tree.truncate(b"file", 10_000))
    assert twin.same(lambda tree: get(tree, b"file")) == b"x" * 5000 + bytes(5000)


def test_truncate_of_an_open_file(twin: Twin) -> None:
    def cut(tree: Tree) -> list[object]:
        put(tree, b"file", b"0123456789")
        with tree.open(b"file", os.O_RDWR) as handle:
            tree.truncate(b"file", 5)
            first = handle.stat().size, handle.pread(20, 0)
            handle.truncate(3)
            second = handle.stat().size, tree.stat(b"file").size, handle.pread(20, 0)
            handle.pwrite(b"end", 8)
            return [first, second, handle.pread(20, 0)]

    assert twin.same(cut) == [(5, b"01234"), (3, 3, b"012"), b"012" + bytes(5) + b"end"]


def test_truncate_errors(twin: Twin) -> None:
    twin.same(lambda tree: tree.mkdir(b"d"))

    twin.fails("EISDIR", lambda tree: tree.truncate(b"d", 0), "truncate a directory")
    twin.fails("ENOENT", lambda tree: tree.truncate(b"nothing", 0))


# --- times ---------------------------------------------------------------------------------------


def since(found: Stat, start_ns: int) -> tuple[bool, bool]:
    """Whether each time is at or after the start."""
    earliest = start_ns - TICK
    return found.atime_ns >= earliest, found.mtime_ns >= earliest


@pytest.mark.parametrize("value", TIMES)
def test_times(twin: Twin, value: int) -> None:
    def change(tree: Tree) -> tuple[int, int]:
        put(tree, b"file")
        tree.utime(b"file", value, value + 7)
        found = tree.stat(b"file")
        return found.atime_ns, found.mtime_ns

    assert twin.same(change) == (value, value + 7)


def test_times_before_1970(twin: Twin) -> None:
    def change(tree: Tree) -> tuple[int, int]:
        put(tree, b"file")
        tree.utime(b"file", -1_500_000_000, -1)
        found = tree.stat(b"file")
        return found.atime_ns, found.mtime_ns

    assert twin.same(change) == (-1_500_000_000, -1)


@pytest.mark.parametrize(("atime", "mtime"), list(product([NOW, OMIT, SECOND], repeat=2)))
@pytest.mark.parametrize("on_handle", [False, True], ids=["name", "handle"])
def test_times_now_and_omitted(twin: Twin, atime: int, mtime: int, on_handle: bool) -> None:
    def change(tree: Tree) -> list[object]:
        put(tree, b"file")
        tree.utime(b"file", 5 * SECOND, 6 * SECOND)
        start = time.time_ns()
        if on_handle:
            with tree.open(b"file", os.O_RDWR) as handle:
                handle.utime(atime, mtime)
        else:
            tree.utime(b"file", atime, mtime)
        found = tree.stat(b"file")
        times = found.atime_ns, found.mtime_ns
        return [
            fresh if wanted == NOW else value
            for wanted, fresh, value in zip((atime, mtime), since(found, start), times, strict=True)
        ]

    expected = [
        {NOW: True, OMIT: before, SECOND: SECOND}[wanted]
        for wanted, before in ((atime, 5 * SECOND), (mtime, 6 * SECOND))
    ]
    assert twin.same(change) == expected


def test_times_of_symlink_and_directory(twin: Twin) -> None:
    def change(tree: Tree) -> list[int]:
        tree.symlink(b"nowhere", b"link")
        tree.mkdir(b"d")
        for name in (b"link", b"d"):
            tree.utime(name, SECOND, 2 * SECOND)
        return [tree.stat(name).mtime_ns for name in (b"link", b"d")]

    assert twin.same(change) == [2 * SECOND, 2 * SECOND]


def test_what_moves_mtime_and_ctime(twin: Twin) -> None:
    """Each operation moves the times that it moves at the host."""

    def moved(tree: Tree, name: bytes, before: Stat) -> tuple[bool, bool]:
        after = tree.stat(name)
        return after.mtime_ns != before.mtime_ns, after.ctime_ns != before.ctime_ns

    def watch(tree: Tree) -> list[tuple[bool, bool]]:
        put(tree, b"file", b"content")
        tree.mkdir(b"d")
        results = []
        changes: list[tuple[bytes, Callable[[], None]]] = [
            (b"file", lambda: tree.chmod(b"file", 0o600)),
            (b"file", lambda: tree.truncate(b"file", 2)),
            (b"file", lambda: tree.link(b"file", b"d/link")),
            (b"d", lambda: tree.rename(b"d/link", b"d/other")),
            (b"d", lambda: tree.unlink(b"d/other")),
        ]
        for name, change in changes:
            tree.utime(name, OMIT, 7 * SECOND)
            before = tree.stat(name)
            wait_for_tick(before.ctime_ns)
            change()
            results.append(moved(tree, name, before))
        return results

    assert twin.same(watch) == [
        (False, True),
        (True, True),
        (False, True),
        (True, True),
        (True, True),
    ]


def wait_for_tick(before_ns: int) -> None:
    """Wait until the file system's clock shows another time."""
    wait_until(lambda: time.time_ns() > before_ns + TICK, 1.0, "the clock to tick")


# --- on an open handle ---------------------------------------------------------------------------


def test_all_changes_on_an_open_handle(twin: Twin) -> None:
    def change(tree: Tree) -> list[object]:
        put(tree, b"file", b"0123456789")
        with tree.open(b"file", os.O_RDWR) as handle:
            handle.chmod(0o640)
            handle.truncate(4)
            handle.utime(SECOND, 2 * SECOND)
            found = handle.stat()
        return [found, found.atime_ns, found.mtime_ns]

    assert twin.same(change)[1:] == [SECOND, 2 * SECOND]


def test_changes_on_a_handle_without_a_name(twin: Twin) -> None:
    def change(tree: Tree) -> list[object]:
        put(tree, b"file", b"0123456789")
        with tree.open(b"file", os.O_RDWR) as handle:
            tree.unlink(b"file")
            handle.chmod(0o600)
            handle.truncate(4)
            handle.utime(SECOND, 2 * SECOND)
            handle.pwrite(b"XY", 1)
            return [handle.stat(), handle.pread(20, 0)]

    found = twin.same(change)
    assert found[1] == b"0XY3"


@pytest.mark.only("session")
@pytest.mark.usefixtures("as_root")
def test_everything_at_once(twin: Twin) -> None:
    """One SETATTR may change all that there is; the reply shows it."""
    for each in twin.both():
        put(each, b"file", b"0123456789")
    tree = twin.tree
    assert isinstance(tree, SessionTree)
    twin.host.truncate(b"file", 5)
    twin.host.chown(b"file", 1000, 1001)
    twin.host.chmod(b"file", 0o640)
    twin.host.utime(b"file", SECOND, 2 * SECOND)

    async def change(session: vfsmount.Session) -> Stat:
        everything = setattr_in(
            mode=0o640, uid=1000, gid=1001, size=5, atime_ns=SECOND, mtime_ns=2 * SECOND
        )
        async with tree.node(b"file") as entry:
            return stat_of((await session.setattr(entry.nodeid, everything)).attr)

    found, expected = tree.run(change), twin.host.stat(b"file")
    assert found.plain == expected.plain
    assert (found.atime_ns, found.mtime_ns) == (SECOND, 2 * SECOND)
    assert twin.same(lambda each: each.stat(b"file")) == found


# --- the file system -----------------------------------------------------------------------------


def test_statfs(twin: Twin) -> None:
    found = twin.same(lambda tree: tree.statfs())
    assert found.namemax == 255
