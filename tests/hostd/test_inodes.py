"""Nodes without descriptors: found again wherever they went, and never mistaken for another."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd.fs.inodes import MAX_NODE_FDS, InodeTable
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.wire import fuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.hostd.fs.filehandles import FileHandles

LIMIT = 3


@pytest.fixture
def handles(share: Share) -> FileHandles:
    if share.handles is None:
        pytest.skip("file handles take CAP_DAC_READ_SEARCH and a filesystem that has them")
    return share.handles


@pytest.fixture
def table(share: Share, handles: FileHandles) -> Iterator[InodeTable]:
    table = InodeTable(share.root_fd, handles, LIMIT)
    yield table
    table.check_invariants()
    table.close()


def look_up(table: InodeTable, *names: str) -> list[int]:
    """Look names up in the root; returns their nodeids."""
    root = table.get(ROOT)
    return [table.look_up(root.fd, name.encode())[0].nodeid for name in names]


def make(folder: Path, *names: str) -> list[int]:
    """Make files; returns their inode numbers."""
    for name in names:
        (folder / name).write_text(name)
    return [(folder / name).stat().st_ino for name in names]


def held(table: InodeTable) -> int:
    return sum(inode.fd >= 0 for inode in table) - 1  # the root does not count


def test_only_so_many_stay_open(table: InodeTable, folder: Path) -> None:
    names = [str(number) for number in range(20)]
    numbers = make(folder, *names)
    nodeids = look_up(table, *names)
    assert held(table) == 20, "none is closed while a request may use it"
    table.trim()
    assert held(table) == LIMIT

    for nodeid, number in zip(nodeids, numbers, strict=True):
        assert os.fstat(table.get(nodeid).fd).st_ino == number
        table.trim()
    assert held(table) == LIMIT


def test_the_most_recent_stay(table: InodeTable, folder: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    make(folder, *names)
    nodeids = look_up(table, *names)
    table.trim()
    table.get(nodeids[0])
    table.trim()
    table.get(nodeids[0])
    look_up(table, "b")
    table.trim()

    assert next(inode for inode in table if inode.nodeid == nodeids[0]).fd >= 0


def test_found_again_after_a_move(table: InodeTable, folder: Path) -> None:
    make(folder, "a", "b", "c", "d", "e")
    nodeids = look_up(table, "a", "b", "c", "d", "e")
    table.trim()
    (folder / "dir").mkdir()
    for name in "abcde":
        (folder / name).rename(folder / "dir" / f"{name}2")

    for nodeid, name in zip(nodeids, "abcde", strict=True):
        path = f"/proc/self/fd/{table.get(nodeid).fd}"
        assert os.readlink(path).endswith(f"/dir/{name}2")


def test_a_second_lookup_finds_the_same_node(table: InodeTable, folder: Path) -> None:
    make(folder, "a", "b", "c", "d", "e")
    first = look_up(table, "a", "b", "c", "d", "e")
    table.trim()

    assert look_up(table, "a", "b", "c", "d", "e") == first


def test_every_kind_can_be_kept_closed(table: InodeTable, folder: Path) -> None:
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "dir").mkdir()
    make(folder, "a", "b", "c", "d", "e")
    nodeids = look_up(table, "link", "fifo", "dir", "a", "b", "c", "d", "e")
    table.trim()
    table.trim()

    for nodeid, name in zip(nodeids, ("link", "fifo", "dir"), strict=False):
        assert os.fstat(table.get(nodeid).fd).st_ino == (folder / name).lstat().st_ino


def test_a_removed_file_is_stale_and_its_number_means_the_next_one(
    table: InodeTable, folder: Path
) -> None:
    """The host gives a freed inode number to the next file, sooner or later."""
    make(folder, "old", "a", "b", "c", "d")
    [old, *_] = look_up(table, "old", "a", "b", "c", "d")
    table.trim()
    assert next(inode for inode in table if inode.nodeid == old).fd < 0
    number = (folder / "old").stat().st_ino
    (folder / "old").unlink()
    for attempt in range(200):
        make(folder, f"new{attempt}")
        if (folder / f"new{attempt}").stat().st_ino == number:
            break

    with expect_errno("ESTALE"):
        table.get(old)
    [new] = look_up(table, f"new{attempt}")
    assert new != old
    assert look_up(table, f"new{attempt}") == [new]
    table.forget(old, 1)
    assert look_up(table, f"new{attempt}") == [new], "the old one has no hold on the new one's key"


def test_the_dead_do_not_count(table: InodeTable, folder: Path) -> None:
    names = [str(number) for number in range(50)]
    make(folder, *names)
    for _ in range(3):
        for nodeid in look_up(table, *names):
            table.forget(nodeid, 1)
        table.trim()

    assert (len(table), held(table)) == (1, 0)


def test_without_handles_all_stay_open(share: Share, folder: Path) -> None:
    make(folder, "a", "b", "c", "d", "e")
    table = InodeTable(share.root_fd, None, LIMIT)
    look_up(table, "a", "b", "c", "d", "e")
    table.trim()

    assert held(table) == 5
    table.close()


@pytest.mark.slow
def test_an_open_file_stays_open_when_it_is_removed(
    guest: DirectGuest, handles: FileHandles, folder: Path
) -> None:
    """fstat(2) on an open file reaches us without its handle."""
    names = [str(number) for number in range(MAX_NODE_FDS + 100)]
    make(folder, "kept", *names)
    nodeid = guest.walk("kept")
    fh = guest.open(nodeid)
    guest.unlink(ROOT, b"kept")
    others = [guest.walk(name) for name in names]
    for other in others:
        guest.getattr(other)

    assert held(guest.session.inodes) <= MAX_NODE_FDS + 1
    assert guest.getattr(nodeid).size == 4
    assert guest.read(fh, 0, 10) == b"kept"


@pytest.mark.slow
def test_a_large_listing_holds_few(guest: DirectGuest, handles: FileHandles, folder: Path) -> None:
    make(folder, *[str(number) for number in range(2 * MAX_NODE_FDS)])
    fh = guest.opendir()
    body = fuse.READ_IN.values(fh, 0, 1 << 20, 0, 0, 0)
    reply = guest.call(fuse.Opcode.READDIRPLUS, ROOT, body, room=16 + (1 << 20))
    entries = list(fuse.iter_direntplus(bytes(reply.data)))

    assert len(entries) == 2 * MAX_NODE_FDS + 2
    assert held(guest.session.inodes) == MAX_NODE_FDS
    for entry in entries:
        if entry.entry.nodeid:
            assert guest.getattr(entry.entry.nodeid).ino == entry.ino
    assert held(guest.session.inodes) == MAX_NODE_FDS


@pytest.mark.slow
def test_operations_on_nodes_that_were_closed(
    guest: DirectGuest, handles: FileHandles, folder: Path
) -> None:
    """Two nodes in one request, both to be opened again."""
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    one, two = guest.walk("one"), guest.walk("two")
    make(folder / "one", "file")
    file = guest.walk("one/file")
    names = [str(number) for number in range(MAX_NODE_FDS)]
    make(folder, *names)
    for _ in range(2):
        for name in names:
            guest.walk(name)
        guest.rename(one, b"file", two, b"moved")
        guest.link(file, one, b"file")
        with expect_errno("ENOENT"):
            guest.lookup(two, b"file")
        guest.unlink(two, b"moved")
    assert sorted(path.name for path in folder.glob("*/*")) == ["file"]


class AnyOrder(RuleBasedStateMachine):
    """Files come and go on the host while a guest looks up, forgets and uses what it knows.

    Whatever the order, a nodeid means the file that it was given for, or is stale; two files never
    have one nodeid, and one file never has two unless the first was stale.
    """

    names = st.sampled_from("abcdefgh")

    @initialize()
    def start(self) -> None:
        # Not pytest's tmp_path: one test makes many machines.
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.share = Share(self.folder, ShareOptions())
        self.table = InodeTable(self.share.root_fd, self.share.handles, 2)
        self.serial = 0
        #: nodeid -> (content of the file that it was given for, lookups owed)
        self.known: dict[int, tuple[str, int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.close()
            self.share.close()
            self.temporary.cleanup()

    @rule(name=names)
    def create(self, name: str) -> None:
        self.serial += 1
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_text(str(self.serial))

    @rule(old=names, new=names)
    def rename(self, old: str, new: str) -> None:
        if (self.folder / old).exists():
            (self.folder / old).rename(self.folder / new)

    @rule(name=names)
    def look_up(self, name: str) -> None:
        path = self.folder / name
        try:
            inode, found = self.table.look_up(self.table.get(ROOT).fd, name.encode())
        except FileNotFoundError:
            assert not path.exists()
            return
        assert found.st_ino == path.stat().st_ino
        content, owed = self.known.get(inode.nodeid, (path.read_text(), 0))
        assert content == path.read_text()
        self.known[inode.nodeid] = content, owed + 1

    @precondition(lambda self: self.known)
    @rule(data=st.data(), count=st.integers(1, 2))
    def forget(self, data: st.DataObject, count: int) -> None:
        nodeid = data.draw(st.sampled_from(sorted(self.known)))
        content, owed = self.known.pop(nodeid)
        self.table.forget(nodeid, count)
        if owed > count:
            self.known[nodeid] = content, owed - count

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        nodeid = data.draw(st.sampled_from(sorted(self.known)))
        content, _ = self.known[nodeid]
        try:
            fd = self.table.get(nodeid).fd
        except OSError as error:
            # Only for a file that is gone.
            assert error.errno == errno.ESTALE  # noqa: PT017
            assert all(path.read_text() != content for path in self.folder.iterdir())
            return
        with open(f"/proc/self/fd/{fd}") as file:
            assert file.read() == content

    @rule()
    def trim(self) -> None:
        self.table.trim()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "table"):
            self.table.check_invariants()
            assert set(self.known) | {ROOT} == {inode.nodeid for inode in self.table}


AnyOrder.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
