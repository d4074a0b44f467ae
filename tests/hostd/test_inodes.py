"""Nodes without descriptors: found again where that can be, and never mistaken for another."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.hostd.guest import ROOT, DirectGuest, expect_errno
from vfsmount.hostd import syscalls
from vfsmount.hostd.fs.inodes import InodeTable
from vfsmount.hostd.fs.keeping import NodeKeeper
from vfsmount.hostd.fs.share import Share, ShareOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 3
FEW = 20


def use_paths(share: Share) -> None:
    """Keep nodes as a daemon without CAP_DAC_READ_SEARCH does."""
    share.keeper = NodeKeeper(share.root_fd, share.proc_fd)


@pytest.fixture(params=["handles", "paths", "paths without handles"])
def share(share: Share, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Share:
    """The share of conftest.py, with each way to keep nodes."""
    if request.param != "handles":
        use_paths(share)
    elif not share.keeper.by_handle:
        pytest.skip("file handles take CAP_DAC_READ_SEARCH and a filesystem that has them")
    if request.param == "paths without handles":

        def unsupported(_fd: int, _name: bytes = b"") -> tuple[bytes, int]:
            raise OSError(errno.EOPNOTSUPP, "no handles")

        monkeypatch.setattr(syscalls, "name_to_handle_at", unsupported)
    return share


@pytest.fixture
def table(share: Share) -> Iterator[InodeTable]:
    table = InodeTable(share.root_fd, share.keeper, LIMIT)
    yield table
    table.check_invariants()
    table.close()


def look_up(table: InodeTable, *names: str) -> list[int]:
    """Look names up in the root; returns their nodeids."""
    root = table.get(ROOT)
    return [table.look_up(root.fd, name.encode())[0] for name in names]


def make(folder: Path, *names: str) -> list[int]:
    """Make files; returns their inode numbers."""
    for name in names:
        (folder / name).write_text(name)
    return [(folder / name).stat().st_ino for name in names]


def held(table: InodeTable) -> int:
    return len(table.open_nodes()) - 1  # the root does not count


def is_held(table: InodeTable, nodeid: int) -> bool:
    return nodeid in [inode.nodeid for inode in table.open_nodes()]


def look_up_in(table: InodeTable, directory: str, *names: str) -> list[int]:
    """The same in a directory below the root."""
    [nodeid] = look_up(table, directory)
    fd = table.get(nodeid).fd
    return [table.look_up(fd, name.encode())[0] for name in names]


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


def test_the_root_stays_whoever_has_listed_it(table: InodeTable, folder: Path) -> None:
    names = [str(number) for number in range(2 * LIMIT)]
    make(folder, *names)
    root = table.get(ROOT)
    table.pin(root)
    table.unpin(root)
    look_up(table, *names)
    root.recent = False
    table.trim()
    table.check_invariants()
    assert is_held(table, ROOT)
    table.clear()
    assert [inode.nodeid for inode in table.open_nodes()] == [ROOT]
    look_up(table, *names)


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

    assert is_held(table, nodeids[0])


def test_found_again_after_a_move(table: InodeTable, share: Share, folder: Path) -> None:
    make(folder, "a", "b", "c", "d", "e")
    nodeids = look_up(table, "a", "b", "c", "d", "e")
    table.trim()
    (folder / "dir").mkdir()
    for name in "abcde":
        (folder / name).rename(folder / "dir" / f"{name}2")

    if not share.keeper.by_handle:
        with expect_errno("ESTALE"):
            table.get(nodeids[0])
        found = look_up_in(table, "dir", "a2", "b2", "c2", "d2", "e2")
        assert found == nodeids, "the guest learns no new number"
        table.trim()

    for nodeid, name in zip(nodeids, "abcde", strict=True):
        path = f"/proc/self/fd/{table.get(nodeid).fd}"
        assert os.readlink(path).endswith(f"/dir/{name}2")
        table.trim()


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
    assert not is_held(table, old)
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


def test_lookups_of_closed_nodes_count(table: InodeTable, folder: Path) -> None:
    names = [str(number) for number in range(20)]
    make(folder, *names)
    nodeids = look_up(table, *names)
    for _ in range(2):
        table.trim()
        assert look_up(table, *names) == nodeids
    table.trim()
    for nodeid in nodeids:
        table.forget(nodeid, 1)
        table.forget(nodeid, 1)
        assert nodeid in table
        table.forget(nodeid, 1)
        assert nodeid not in table
    assert held(table) == 0


def test_a_name_that_means_another_file_meanwhile(table: InodeTable, folder: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    make(folder, *names)
    nodeids = look_up(table, *names)
    table.trim()
    (folder / "a").rename(folder / "old")
    (folder / "b").rename(folder / "a")

    assert look_up(table, "a", "old") == [nodeids[1], nodeids[0]]


def test_open_files_do_not_slow_down_the_others(guest: DirectGuest, folder: Path) -> None:
    """The clock's hand does not come by nodes that it may not close."""
    names = [str(number) for number in range(20)]
    make(folder, *names)
    guest.session.inodes._limit = LIMIT
    handles = [guest.open(guest.walk(name)) for name in names]
    guest.getattr(ROOT)
    assert len(guest.session.inodes._clock) <= LIMIT
    assert held(guest.session.inodes) == 20
    for fh in handles:
        guest.release(fh)
    assert held(guest.session.inodes) == LIMIT


def test_a_path_is_never_followed_out(share: Share, folder: Path, tmp_path: Path) -> None:
    """What a directory on the way is replaced by does not matter: the file is not found."""
    if share.keeper.by_handle:
        pytest.skip("about paths")
    (folder / "dir").mkdir()
    make(folder / "dir", "canary")
    table = InodeTable(share.root_fd, share.keeper, 0)
    [directory] = look_up(table, "dir")
    [node] = look_up_in(table, "dir", "canary")
    table.trim()
    table.trim()
    assert not is_held(table, node)
    (folder / "dir").rename(folder / "moved")
    (folder / "dir").symlink_to(tmp_path)
    for nodeid in (directory, node):
        with expect_errno("ESTALE"):
            table.get(nodeid)
    table.close()


def test_another_file_in_the_same_place_is_another_node(share: Share, folder: Path) -> None:
    make(folder, "a")
    table = InodeTable(share.root_fd, share.keeper, 0)
    [old] = look_up(table, "a")
    table.trim()
    (folder / "b").write_text("a")
    (folder / "b").rename(folder / "a")
    with expect_errno("ESTALE"):
        table.get(old)
    assert look_up(table, "a") != [old]
    table.close()


@pytest.mark.slow
def test_bytes_of_a_closed_node(table: InodeTable, folder: Path) -> None:
    """Just below the next size of the tables it is least, just above it most."""
    names = [f"{number:06}" for number in range(1_200)]
    make(folder, *names)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for name in names:
        look_up(table, name)
        table.trim()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held(table) == LIMIT
    assert (after - before) / len(names) < 300, (after - before) / len(names)


@pytest.fixture
def few(guest: DirectGuest) -> DirectGuest:
    """A guest whose nodes may hold few descriptors."""
    guest.session.inodes._limit = FEW
    return guest


def test_an_open_file_stays_open_when_it_is_removed(few: DirectGuest, folder: Path) -> None:
    """fstat(2) on an open file reaches us without its handle."""
    names = [str(number) for number in range(2 * FEW)]
    make(folder, "kept", *names)
    nodeid = few.walk("kept")
    fh = few.open(nodeid)
    few.unlink(ROOT, b"kept")
    others = [few.walk(name) for name in names]
    for other in others:
        few.getattr(other)

    assert held(few.session.inodes) <= FEW + 1
    assert few.getattr(nodeid).size == 4
    assert few.read(fh, 0, 10) == b"kept"


def test_a_large_listing_holds_few(few: DirectGuest, folder: Path) -> None:
    make(folder, *[str(number) for number in range(4 * FEW)])
    fh = few.opendir()
    entries = few.readdirplus(fh, size=1 << 20)

    assert len(entries) == 4 * FEW + 2
    assert held(few.session.inodes) == FEW
    for entry in entries:
        if entry.entry.nodeid:
            assert few.getattr(entry.entry.nodeid).ino == entry.ino
    assert held(few.session.inodes) == FEW


def test_operations_on_nodes_that_were_closed(few: DirectGuest, folder: Path) -> None:
    """Two nodes in one request, both to be opened again."""
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    one, two = few.walk("one"), few.walk("two")
    make(folder / "one", "file")
    file = few.walk("one/file")
    names = [str(number) for number in range(2 * FEW)]
    make(folder, *names)
    for _ in range(2):
        for name in names:
            few.walk(name)
        few.rename(one, b"file", two, b"moved")
        few.link(file, one, b"file")
        with expect_errno("ENOENT"):
            few.lookup(two, b"file")
        few.unlink(two, b"moved")
        assert few.walk("one/file") == file
    assert sorted(path.name for path in folder.glob("*/*")) == ["file"]


class AnyOrder(RuleBasedStateMachine):
    """Files come and go on the host while a guest looks up, forgets and uses what it knows.

    Whatever the order, a nodeid means the file that it was given for, or is stale; two files never
    have one nodeid, and one file never has two unless the first was stale.
    """

    names = st.sampled_from("abcdefgh")
    by_path = False

    @initialize()
    def start(self) -> None:
        # Not pytest's tmp_path: one test makes many machines.
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.share = Share(self.folder, ShareOptions())
        if self.by_path:
            use_paths(self.share)
        self.table = InodeTable(self.share.root_fd, self.share.keeper, 2)
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
            nodeid, found, _ = self.table.look_up(self.table.get(ROOT).fd, name.encode())
        except FileNotFoundError:
            assert not path.exists()
            return
        assert found.st_ino == path.stat().st_ino
        content, owed = self.known.get(nodeid, (path.read_text(), 0))
        assert content == path.read_text()
        self.known[nodeid] = content, owed + 1

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
            # Only for a file that is gone, or may have moved while it was kept by path.
            assert error.errno == errno.ESTALE  # noqa: PT017
            gone = all(path.read_text() != content for path in self.folder.iterdir())
            assert gone or self.by_path
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
            assert set(self.known) | {ROOT} == set(self.table)


class AnyOrderByPath(AnyOrder):
    """The same where nodes are kept by path."""

    by_path = True


AnyOrder.TestCase.settings = AnyOrderByPath.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
TestAnyOrderByPath = pytest.mark.slow(AnyOrderByPath.TestCase)
