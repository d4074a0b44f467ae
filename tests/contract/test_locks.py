"""Locks: between handles of one tree, and between it and the host's processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.contract.steps import put
from tests.contract.trees import OFFSET_MAX
from tests.support.errors import error_name
from tests.support.wait import wait_until
from vfsmount.wire.fuse import LockType

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.trees import Handle, Tree
    from tests.contract.twin import Twin

READ, WRITE, UNLOCK = int(LockType.READ), int(LockType.WRITE), int(LockType.UNLOCK)

#: Who (of two handles), what, and its arguments.
Step = tuple[int, str, *tuple[int, ...]]

HISTORIES: dict[str, list[Step]] = {
    "ranges": [
        (0, "lock", WRITE, 10, 19),
        (1, "lock", WRITE, 0, 9),
        (1, "lock", READ, 19, 19),
        (1, "find_lock", WRITE, 5, 100),
        (0, "lock", UNLOCK, 15, 19),
        (1, "lock", READ, 15, OFFSET_MAX),
        (0, "find_lock", READ, 0, OFFSET_MAX),
        (0, "find_lock", WRITE, 12, OFFSET_MAX),
        (0, "lock", READ, 18, 30),
        (1, "lock", WRITE, 15, OFFSET_MAX),
        (1, "lock", UNLOCK, 0, OFFSET_MAX),
        (0, "lock", WRITE, 0, OFFSET_MAX),
    ],
    "split and joined": [
        (0, "lock", WRITE, 0, 29),
        (0, "lock", READ, 10, 19),
        (1, "lock", READ, 10, 19),
        (1, "lock", READ, 9, 10),
        (1, "find_lock", READ, 0, OFFSET_MAX),
        (0, "lock", WRITE, 10, 19),
        (1, "lock", UNLOCK, 10, 19),
        (0, "lock", WRITE, 10, 19),
        (1, "find_lock", READ, 15, 15),
    ],
    "flock": [
        (0, "flock", READ),
        (1, "flock", READ),
        (1, "flock", WRITE),
        (0, "flock", UNLOCK),
        (1, "flock", WRITE),
        (0, "flock", READ),
        (1, "lock", WRITE, 0, OFFSET_MAX),
        (1, "flock", READ),
        (0, "flock", READ),
    ],
    "what cannot be": [
        (0, "lock", WRITE, OFFSET_MAX, OFFSET_MAX),
        (1, "lock", WRITE, OFFSET_MAX - 1, OFFSET_MAX - 1),
        (1, "lock", READ, 0, OFFSET_MAX),
        (1, "find_lock", READ, 7, OFFSET_MAX),
    ],
}


def play(tree: Tree, steps: list[Step]) -> list[object]:
    """Return what each step returned, or its errno."""
    with tree.open(b"file", os.O_RDWR) as one, tree.open(b"file", os.O_RDWR) as two:
        return [_step((one, two)[who], what, arguments) for who, what, *arguments in steps]


def _step(handle: Handle, what: str, arguments: list[int]) -> object:
    call: Callable[..., object] = getattr(handle, what)
    try:
        return call(*arguments)
    except OSError as error:
        if error_name(error) == "ENOSYS":  # no locks at all
            raise
        return error_name(error)


@pytest.mark.parametrize("name", HISTORIES)
def test_between_two_handles(twin: Twin, name: str) -> None:
    for each in twin.both():
        put(each, b"file", b"content")

    twin.same_unless_known(lambda each: play(each, HISTORIES[name]), "locks")


@pytest.mark.parametrize(("kind", "case"), [("lock", "locks"), ("flock", "flock locks")])
def test_closing_gives_up(twin: Twin, kind: str, case: str) -> None:
    def close_and_lock(tree: Tree) -> None:
        with tree.open(b"file", os.O_RDWR) as one:
            getattr(one, kind)(WRITE)
        with tree.open(b"file", os.O_RDWR) as two:  # RELEASE may come after close(2) is through
            wait_until(lambda: _step(two, kind, [WRITE]) is None, 5, "the lock to be free")

    for each in twin.both():
        put(each, b"file")
    twin.same_unless_known(close_and_lock, case)


@pytest.mark.only("session", "relay-none", "relay-auto")
def test_the_host_takes_part(twin: Twin) -> None:
    """A daemon that has locks has them with everybody on its host."""
    if twin.kind != "bundled":
        pytest.skip("locks stay with the guest")
    for each in twin.both():
        put(each, b"file")
    with twin.tree.open(b"file", os.O_RDWR) as ours, twin.shared.open(b"file", os.O_RDWR) as host:
        ours.lock(WRITE, 0, 9)
        host.lock(WRITE, 10, 19)
        ours.flock(READ)
        for handle, start, end in ((host, 9, 9), (ours, 10, 10)):
            with pytest.raises(BlockingIOError):
                handle.lock(READ, start, end)
        with pytest.raises(BlockingIOError):
            host.flock(WRITE)
        host.flock(READ)
        assert host.find_lock(WRITE, 0, 5) == (WRITE, 0, 9)
        assert ours.find_lock(READ) == (WRITE, 10, 19)


def test_a_file_without_a_name_gets_one(twin: Twin) -> None:
    def make(tree: Tree) -> list[object]:
        with tree.tmpfile(os.O_RDWR, 0o640) as handle:
            handle.pwrite(b"content", 0)
            before = [handle.stat().nlink, tree.listdir()]
            handle.give_name(b"named")
            return [*before, handle.stat().nlink, tree.stat(b"named").size]

    twin.same_unless_known(make, "a file without a name")
