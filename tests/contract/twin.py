"""Run an operation on the tree under test and on a host directory, and compare.

At the end of each test both trees are compared as a whole, and what the tree under test says about
each file is compared with what the host says about the same file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tests.contract.deviations import known_deviation
from tests.contract.trees import PathTree, Stat
from tests.support.errors import error_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.contract.trees import Tree

__all__ = ["Snapshot", "Twin", "snapshot"]

T = TypeVar("T")

#: Bytes of content that are compared; a file of many GiB of holes is compared by size alone.
MOST_CONTENT = 8 << 20


class Twin:
    """A tree under test, and a host directory with the same history.

    Attributes:
        kind: The daemon's.
        way: How the tree is reached: ``session``, or a mount's engine and cache mode.
        tree: The tree under test.
        host: The directory that it is compared with.
        shared: The host directory that the daemon shares: the tree under test from behind.
    """

    def __init__(self, kind: str, way: str, tree: Tree, shared: Path, host: Path) -> None:
        self.kind = kind
        self.way = way
        self.tree = tree
        self.shared = PathTree(os.fsencode(shared))
        self.host = PathTree(os.fsencode(host))

    def both(self) -> Iterator[Tree]:
        """Yield the host's tree, then the one under test, for set-up."""
        yield self.host
        yield self.tree

    def same(self, call: Callable[[Tree], T]) -> T:
        """Do something on both; it must succeed and return the same.

        Returns:
            What it returned.
        """
        expected = call(self.host)
        found = call(self.tree)
        assert _comparable(found) == _comparable(expected), _difference(found, expected)
        return found

    def fails(self, error: str, call: Callable[[Tree], object], case: str = "") -> None:
        """Do something on both; it must fail with ``error`` on both.

        Args:
            error: Symbolic name: "ENOENT".
            call: What to do.
            case: Name of the case in the table of known deviations, where it has one.
        """
        expected = error_of(lambda: call(self.host))
        assert expected == error, f"the host directory says {expected!r}, not {error}"
        deviation = known_deviation(case, self.kind, self.way)
        if deviation is not None:
            error = deviation.error
        found = error_of(lambda: call(self.tree))
        assert found == error, f"{found!r} instead of {error!r}; {deviation=}"

    def same_unless_known(self, call: Callable[[Tree], object], case: str) -> None:
        """As ``same``, where the case may be in the table of known deviations."""
        deviation = known_deviation(case, self.kind, self.way)
        if deviation is None:
            self.same(call)
        else:
            found = error_of(lambda: call(self.tree))
            assert found == deviation.error, f"{found!r} instead of {deviation=}"

    def check(self) -> None:
        """Compare both trees, and both views of the one under test."""
        ours, theirs = snapshot(self.shared.root), snapshot(self.host.root)
        for name in ours.keys() | theirs.keys():
            one, two = ours.get(name), theirs.get(name)
            assert one == two, f"{name!r}: {_difference(one, two)}"
            self.check_view(name)

    def check_view(self, name: bytes) -> None:
        """Compare what the tree under test says about a file with what the host says."""
        found, expected = self.tree.stat(name), self.shared.stat(name)
        if self.way.endswith("auto"):
            # Reading pages that are cached moves no atime, and one that moved is known later.
            found = found._replace(atime_ns=expected.atime_ns)
        if found.ino >= 1 << 63:
            # Made up by the mount, because it remembers an older file with this number.
            found = found._replace(ino=expected.ino)
        # Blocks are allocated when the host's file system likes to.
        found, expected = found._replace(blocks=0), expected._replace(blocks=0)
        assert found == expected, f"{name!r}: {_difference(found, expected)}"


def _difference(found: object, expected: object) -> str:
    """What was found and what the host has, for people; long contents are cut."""
    texts = [
        text if len(text) < 400 else f"{text[:400]}... ({len(text)} characters)"
        for text in (repr(found), repr(expected))
    ]
    return f"here {texts[0]}, at the host {texts[1]}"


def _comparable(value: object) -> object:
    """Reduce what is compared to what two trees can agree on."""
    if isinstance(value, Stat):
        return value.plain
    if isinstance(value, tuple | list):
        return [_comparable(item) for item in value]
    return value


class Snapshot(NamedTuple):
    """One file, as far as two trees with the same history agree."""

    plain: tuple[int, ...]
    content: bytes
    attributes: tuple[tuple[str, bytes], ...]


def snapshot(root: bytes) -> dict[bytes, Snapshot]:
    """Return everything below a folder, by relative name; itself is ``.``."""
    found = {b".": _look(root)}
    for folder, subfolders, files in os.walk(root):
        for name in subfolders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = _look(path)
    return found


def _look(path: bytes) -> Snapshot:
    status = Stat.of(os.lstat(path))
    content = b""
    if stat.S_ISLNK(status.mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.mode) and status.size <= MOST_CONTENT:
        content = Path(os.fsdecode(path)).read_bytes()
    names = sorted(os.listxattr(path, follow_symlinks=False))
    values = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    return Snapshot(status.plain, content, values)
