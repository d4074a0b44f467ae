"""What fsstress does, from a guest's side: random operations on a folder, checked with a model.

Each guest has a folder of its own, where the model knows what every operation must give, and shares
one with the others, where anything may fail because somebody else was there first. The same seed
gives the same steps in the guest's own folder.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from typing import TYPE_CHECKING

from tests.hostd.guest import ROOT
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, SetattrValid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hostd.guest import Guest

__all__ = ["SHARED", "Load"]

SHARED = "shared"
#: Names in a folder, so few that most operations meet something.
NAMES = [b"n%d" % number for number in range(16)]
FOLDERS = 4
LENGTH = 12_000
#: What guests get from each other.
RACES = frozenset(
    (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EBADF,
     errno.EINVAL, errno.ESTALE, errno.EPERM, errno.ELOOP)
)  # fmt: skip


class Node:
    """A file or a link as it must be; a hard link is the same object in two places."""

    def __init__(self, nodeid: int, target: bytes | None = None) -> None:
        self.nodeid = nodeid
        self.target = target
        self.content = bytearray()
        self.attribute: bytes | None = None
        self.nlookup = 1
        self.nlink = 1
        self.fh: int | None = None


class Folder:
    def __init__(self, name: bytes, nodeid: int) -> None:
        self.name = name
        self.nodeid = nodeid
        self.entries: dict[bytes, Node] = {}


class Load:
    """One guest at work.

    Args:
        guest: After INIT.
        number: Which of several.
        seed: Decides what is done.
    """

    def __init__(self, guest: Guest, number: int, seed: int) -> None:
        self.guest = guest
        self.name = f"guest{number}"
        self.steps = 0
        self._random = random.Random(seed)
        own = guest.mkdir(ROOT, self.name.encode()).nodeid
        self._shared = guest.walk(SHARED)
        self._folders = [
            Folder(b"%d" % at, guest.mkdir(own, b"%d" % at).nodeid) for at in range(FOLDERS)
        ]
        self._operations: list[Callable[[], None]] = [
            step
            for weight, step in (
                (6, self._create), (8, self._write), (8, self._read), (3, self._truncate),
                (5, self._rename), (3, self._link), (4, self._unlink), (2, self._symlink),
                (5, self._look_up), (2, self._list), (2, self._attribute), (2, self._mode),
                (1, self._allocate), (1, self._sync), (3, self._release), (8, self._meet),
            )
            for _ in range(weight)
        ]  # fmt: skip

    def run(self, deadline: float) -> None:
        """Work until ``time.monotonic()`` says so."""
        while time.monotonic() < deadline:
            self._random.choice(self._operations)()
            self.steps += 1

    # --- choosing --------------------------------------------------------------------------------

    def _folder(self) -> Folder:
        return self._random.choice(self._folders)

    def _place(self) -> tuple[Folder, bytes, Node | None]:
        folder, name = self._folder(), self._random.choice(NAMES)
        return folder, name, folder.entries.get(name)

    def _file(self) -> Node | None:
        """A file, opened if it was not."""
        _, _, node = self._place()
        if node is None or node.target is not None:
            return None
        if node.fh is None:
            node.fh = self.guest.open(node.nodeid, os.O_RDWR)
        return node

    # --- files -----------------------------------------------------------------------------------

    def _create(self) -> None:
        folder, name, node = self._place()
        if node is not None and node.target is not None:
            return
        entry, fh = self.guest.create(folder.nodeid, name)
        if node is None:
            node = folder.entries[name] = Node(entry.nodeid)
        else:
            node.nlookup += 1
            assert entry.nodeid == node.nodeid
            assert entry.attr.size == len(node.content)
        if node.fh is not None:
            self.guest.release(node.fh)
        node.fh = fh

    def _write(self) -> None:
        if (node := self._file()) is not None:
            offset = self._random.randrange(LENGTH)
            data = self._random.randbytes(self._random.randrange(1, LENGTH))
            assert node.fh is not None
            assert self.guest.write(node.fh, offset, data) == len(data)
            node.content.extend(bytes(max(0, offset - len(node.content))))
            node.content[offset : offset + len(data)] = data

    def _read(self) -> None:
        if (node := self._file()) is not None:
            offset, size = self._random.randrange(LENGTH), self._random.randrange(1, 2 * LENGTH)
            assert node.fh is not None
            assert self.guest.read(node.fh, offset, size) == node.content[offset : offset + size]

    def _truncate(self) -> None:
        if (node := self._file()) is not None:
            size = self._random.randrange(LENGTH)
            attr = self.guest.setattr(node.nodeid, int(SetattrValid.SIZE), size=size)
            assert attr.size == size
            node.content.extend(bytes(max(0, size - len(node.content))))
            del node.content[size:]

    def _allocate(self) -> None:
        if (node := self._file()) is not None:
            assert node.fh is not None
            body = fuse.FALLOCATE_IN.values(node.fh, 0, LENGTH, 1)  # keeps the size
            self.guest.call(Opcode.FALLOCATE, node.nodeid, body)

    def _sync(self) -> None:
        if (node := self._file()) is not None:
            assert node.fh is not None
            self.guest.call(Opcode.FSYNC, node.nodeid, fuse.FSYNC_IN.values(node.fh, 1))

    def _release(self) -> None:
        if (node := self._file()) is not None:
            assert node.fh is not None
            self.guest.release(node.fh)
            node.fh = None

    # --- names -----------------------------------------------------------------------------------

    def _gone(self, node: Node) -> None:
        """One name less; after the last, all that is owed goes back."""
        node.nlink -= 1
        if not node.nlink:
            if node.fh is not None:
                self.guest.release(node.fh)
            self.guest.forget(node.nodeid, node.nlookup)

    def _rename(self) -> None:
        old_folder, old, node = self._place()
        new_folder, new, replaced = self._place()
        if node is None or node is replaced:
            return
        self.guest.rename(old_folder.nodeid, old, new_folder.nodeid, new)
        del old_folder.entries[old]
        new_folder.entries[new] = node
        if replaced is not None:
            self._gone(replaced)

    def _link(self) -> None:
        _, _, node = self._place()
        folder, name, there = self._place()
        if node is not None and there is None:
            entry = self.guest.link(node.nodeid, folder.nodeid, name)
            node.nlookup += 1
            node.nlink += 1
            assert (entry.nodeid, entry.attr.nlink) == (node.nodeid, node.nlink)
            folder.entries[name] = node

    def _unlink(self) -> None:
        folder, name, node = self._place()
        if node is not None:
            self.guest.unlink(folder.nodeid, name)
            del folder.entries[name]
            self._gone(node)

    def _symlink(self) -> None:
        folder, name, node = self._place()
        if node is None:
            target = b"t" * self._random.randrange(1, 200)
            folder.entries[name] = Node(
                self.guest.symlink(folder.nodeid, name, target).nodeid, target
            )
        elif node.target is not None:
            assert self.guest.readlink(node.nodeid) == node.target

    def _look_up(self) -> None:
        folder, name, node = self._place()
        try:
            entry = self.guest.lookup(folder.nodeid, name)
        except FileNotFoundError:
            assert node is None
            return
        assert node is not None
        node.nlookup += 1
        assert entry.nodeid == node.nodeid
        if self._random.random() < 0.5:
            self.guest.forget(node.nodeid, 1)
            node.nlookup -= 1

    def _list(self) -> None:
        folder = self._folder()
        fh = self.guest.opendir(folder.nodeid)
        seen, offset = set(), 0
        while entries := self.guest.readdirplus(fh, offset, 1500):
            offset = entries[-1].off
            for entry in entries:
                if entry.entry.nodeid:
                    seen.add(entry.name)
                    node = folder.entries[entry.name]
                    assert entry.entry.nodeid == node.nodeid
                    node.nlookup += 1
        self.guest.releasedir(fh)
        assert seen == folder.entries.keys()

    def _attribute(self) -> None:
        _, _, node = self._place()
        if node is None or node.target is not None:
            return
        if node.attribute is None or self._random.random() < 0.5:
            node.attribute = self._random.randbytes(self._random.randrange(100))
            self.guest.setxattr(node.nodeid, b"user.load", node.attribute)
        assert self.guest.getxattr(node.nodeid, b"user.load") == node.attribute

    def _mode(self) -> None:
        _, _, node = self._place()
        if node is not None and node.target is None:
            mode = stat.S_IFREG | self._random.randrange(0o600, 0o777)
            attr = self.guest.setattr(node.nodeid, int(SetattrValid.MODE), mode=mode)
            assert attr.mode == mode

    # --- among others ----------------------------------------------------------------------------

    def _meet(self) -> None:
        """Something in the folder of all: it works, or somebody was faster."""
        try:
            self._meddle()
        except OSError as error:
            if error.errno not in RACES:
                raise

    def _meddle(self) -> None:
        guest, shared = self.guest, self._shared
        name, other = self._random.choice(NAMES), self._random.choice(NAMES)
        what = self._random.randrange(8)
        if what == 0:
            entry, fh = guest.create(shared, name)
            guest.write(fh, self._random.randrange(100), b"anybody's")
            guest.release(fh)
            guest.forget(entry.nodeid)
        elif what == 1:
            guest.forget(guest.mkdir(shared, name).nodeid)
        elif what == 2:
            guest.unlink(shared, name)
        elif what == 3:
            guest.rmdir(shared, name)
        elif what == 4:
            guest.rename2(shared, name, shared, other, self._random.choice((0, 1, 2)))
        elif what == 5:
            entry = guest.lookup(shared, name)
            try:
                guest.forget(guest.link(entry.nodeid, shared, other).nodeid)
            finally:
                guest.forget(entry.nodeid)
        elif what == 6:
            entry = guest.lookup(shared, name)
            try:
                guest.release(guest.open(entry.nodeid, os.O_RDWR | os.O_TRUNC))
            finally:
                guest.forget(entry.nodeid)
        else:
            fh = guest.opendir(shared)
            found = guest.readdirplus(fh, 0, 8000)
            guest.releasedir(fh)
            guest.batch_forget(*((e.entry.nodeid, 1) for e in found if e.entry.nodeid))

    # --- afterwards ------------------------------------------------------------------------------

    def compare(self, share: Path) -> None:
        """The host's tree is the model's."""
        for folder in self._folders:
            place = share / self.name / folder.name.decode()
            assert {os.fsencode(path.name) for path in place.iterdir()} == folder.entries.keys()
            for name, node in folder.entries.items():
                path = place / name.decode()
                assert path.lstat().st_nlink == node.nlink
                if node.target is not None:
                    assert os.fsencode(os.readlink(path)) == node.target
                else:
                    assert path.read_bytes() == node.content

    def leave(self) -> None:
        """Give everything back, as an unmount does."""
        nodes = {node.nodeid: node for folder in self._folders for node in folder.entries.values()}
        for node in nodes.values():
            if node.fh is not None:
                self.guest.release(node.fh)
            self.guest.forget(node.nodeid, node.nlookup)
        self.guest.destroy()
