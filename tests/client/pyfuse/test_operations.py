"""The pyfuse3 handlers, called directly on a session that only records."""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import TYPE_CHECKING, Any, cast

import pyfuse3
import pytest

from tests.client.pyfuse.fake_session import FakeSession, attributes, entry
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.pyfuse.handlers import decode_dev, encode_dev
from vfsmount.client.pyfuse.operations import VirtioFsOperations
from vfsmount.errors import (
    ChannelBroken,
    ChannelClosed,
    ProtocolViolation,
    RemoteErrno,
    RequestTimeout,
    WireError,
)
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, OpenInFlag, SetattrValid, WriteFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfsmount.client.session import Session

SUID_FILE = stat.S_IFREG | stat.S_ISUID | 0o755


class Context:
    """A ``pyfuse3.RequestContext``, which cannot be made in Python."""

    def __init__(self, uid: int = 0, gid: int = 0) -> None:
        self.uid, self.gid, self.pid, self.umask = uid, gid, os.getpid(), 0o022


ROOT = cast("pyfuse3.RequestContext", Context())
USER = cast("pyfuse3.RequestContext", Context(uid=1000, gid=1000))


def operations(session: FakeSession, mode: str = "auto") -> VirtioFsOperations:
    return VirtioFsOperations(cast("Session", session), CachePolicy.for_mode(mode))


def inode(number: int) -> pyfuse3.InodeT:
    return pyfuse3.InodeT(number)


async def look_up(
    ops: VirtioFsOperations, session: FakeSession, nodeid: int, attr: fuse.Attr | None = None
) -> pyfuse3.InodeT:
    session.answers["lookup"] = entry(nodeid, attr)
    found = await ops.lookup(inode(1), b"name", ROOT)
    return found.st_ino


async def opened(
    ops: VirtioFsOperations,
    session: FakeSession,
    node: pyfuse3.InodeT,
    context: pyfuse3.RequestContext = ROOT,
    flags: int = os.O_RDWR,
) -> pyfuse3.FileHandleT:
    session.answers["open"] = fuse.OpenOut(7, 0, 0)
    info = await ops.open(node, flags, context)
    return info.fh


async def test_lookup_hands_on_the_hosts_numbers() -> None:
    session = FakeSession()
    ops = operations(session)
    attr = attributes(ino=4711, size=5, mtime=7, mtimensec=9)
    session.answers["lookup"] = entry(2, attr)
    found = await ops.lookup(inode(1), b"name", ROOT)
    assert (found.st_ino, found.st_size, found.st_mtime_ns) == (4711, 5, 7_000_000_009)
    assert (found.entry_timeout, found.attr_timeout) == (1.0, 1.0)


async def test_nothing_is_believed_while_a_late_change_may_come() -> None:
    """Its caller has been told ETIMEDOUT; the daemon may carry it out all the same."""
    session = FakeSession()
    ops = operations(session)
    session.channel.orphans = 1
    session.answers["lookup"] = entry(5)
    found = await ops.lookup(inode(1), b"name", ROOT)
    assert (found.entry_timeout, found.attr_timeout) == (0.0, 0.0)
    session.answers["lookup"] = RemoteErrno(1, 1, errno.ENOENT)
    assert (await ops.lookup(inode(1), b"absent", ROOT)).entry_timeout == 0.0


@pytest.mark.parametrize("answer", [RemoteErrno(1, 1, errno.ENOENT), entry(0)])
async def test_absence_is_a_negative_entry(answer: object) -> None:
    session = FakeSession()
    session.answers["lookup"] = answer
    found = await operations(session).lookup(inode(1), b"name", ROOT)
    assert (found.st_ino, found.entry_timeout) == (0, 1.0)


async def test_absence_is_not_remembered_uncached() -> None:
    session = FakeSession()
    session.answers["lookup"] = RemoteErrno(1, 1, errno.ENOENT)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations(session, "none").lookup(inode(1), b"name", ROOT)
    assert caught.value.errno == errno.ENOENT


async def test_forget_gives_back_what_was_counted() -> None:
    session = FakeSession()
    ops = operations(session)
    node = await look_up(ops, session, 5)
    await look_up(ops, session, 5)
    await ops.forget([(node, 2)])
    assert session.arguments("forget") == [(5, 2)]
    ops.nodes.check_invariants()


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RemoteErrno(3, 1, errno.EDQUOT), errno.EDQUOT),
        (RequestTimeout("late"), errno.ETIMEDOUT),
        (ProtocolViolation("lies"), errno.EIO),
        (ChannelBroken("gone"), errno.ENOTCONN),
        (ChannelClosed("closed"), errno.ENOTCONN),
        (WireError("bytes"), errno.EIO),
        (ZeroDivisionError("a bug"), errno.EIO),
    ],
)
async def test_every_error_is_an_errno(
    error: Exception, number: int, expect_log: Callable[[str], None]
) -> None:
    if not isinstance(error, RemoteErrno | ChannelBroken | ChannelClosed):
        expect_log(".*")
    session = FakeSession()
    session.answers["getattr"] = error
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations(session).getattr(inode(1), ROOT)
    assert caught.value.errno == number


async def test_requests_above_the_daemons_limit_become_several() -> None:
    session = FakeSession(limit=4096)
    ops = operations(session)
    fh = await opened(ops, session, await look_up(ops, session, 5))
    session.answers["write"] = lambda _node, _fh, _off, data, *_: len(data)
    assert await ops.write(fh, 100, bytes(10000)) == 10000
    assert [(args[2], len(args[3])) for args in session.arguments("write")] == [
        (100, 4096),
        (4196, 4096),
        (8292, 1808),
    ]
    content = bytes(range(256)) * 30
    session.answers["read"] = lambda _node, _fh, off, size: content[off : off + size]
    assert await ops.read(fh, 0, 10000) == content
    assert [args[2:] for args in session.arguments("read")] == [(0, 4096), (4096, 4096)]


async def test_a_short_write_ends_the_call() -> None:
    session = FakeSession(limit=4096)
    ops = operations(session)
    fh = await opened(ops, session, await look_up(ops, session, 5))
    session.answers["write"] = 1000
    assert await ops.write(fh, 0, bytes(8192)) == 1000


async def test_only_a_handle_that_wrote_is_flushed() -> None:
    session = FakeSession()
    ops = operations(session)
    fh = await opened(ops, session, await look_up(ops, session, 5))
    session.answers["write"] = 1
    await ops.flush(fh)
    assert "flush" not in session.names()
    await ops.write(fh, 0, b"x")
    await ops.flush(fh)
    await ops.flush(fh)
    assert session.names().count("flush") == 1


async def test_daemon_is_told_to_clear_set_id_bits() -> None:
    session = FakeSession(InitFlag.HANDLE_KILLPRIV_V2)
    ops = operations(session)
    node = await look_up(ops, session, 5, attributes(mode=SUID_FILE))
    session.answers["write"] = 1
    fh = await opened(ops, session, node, USER, os.O_WRONLY | os.O_TRUNC)
    await ops.write(fh, 0, b"x")
    assert session.arguments("open")[0][2] == OpenInFlag.KILL_SUIDGID
    assert session.arguments("write")[0][4] == WriteFlag.KILL_SUIDGID
    fh = await opened(ops, session, node, ROOT)
    await ops.write(fh, 0, b"x")
    assert session.arguments("write")[1][4] == 0


async def test_we_clear_set_id_bits_where_the_daemon_does_not() -> None:
    session = FakeSession()
    ops = operations(session)
    node = await look_up(ops, session, 5, attributes(mode=SUID_FILE | stat.S_ISGID))
    fh = await opened(ops, session, node, USER)
    session.answers["write"] = 1
    session.answers["setattr"] = fuse.AttrOut(0, 0, attributes(mode=stat.S_IFREG | 0o755))
    await ops.write(fh, 0, b"x")
    await ops.write(fh, 1, b"y")
    changes = [args[1] for args in session.arguments("setattr")]
    assert [(one.valid, one.mode) for one in changes] == [(SetattrValid.MODE, stat.S_IFREG | 0o755)]
    assert session.names().index("setattr") < session.names().index("write")


async def test_sgid_without_group_execute_is_a_lock_mark_and_stays() -> None:
    session = FakeSession()
    ops = operations(session)
    node = await look_up(ops, session, 5, attributes(mode=stat.S_IFREG | stat.S_ISGID | 0o644))
    fh = await opened(ops, session, node, USER)
    session.answers["write"] = 1
    await ops.write(fh, 0, b"x")
    assert "setattr" not in session.names()


async def test_absent_capability_is_remembered() -> None:
    session = FakeSession()
    ops = operations(session)
    node = await look_up(ops, session, 5)
    session.answers["getxattr"] = RemoteErrno(22, 5, errno.ENODATA)
    for _ in range(3):
        with pytest.raises(pyfuse3.FUSEError):
            await ops.getxattr(node, b"security.capability", ROOT)
    assert session.names().count("getxattr") == 1
    await ops.setxattr(node, b"security.capability", b"x", ROOT)
    session.answers["getxattr"] = b"x"
    assert await ops.getxattr(node, b"security.capability", ROOT) == b"x"


async def test_an_open_whose_comparison_times_out_keeps_its_handle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda *_, **__: None)
    session = FakeSession()
    ops = operations(session)
    node = await look_up(ops, session, 5)
    session.answers["getattr"] = RequestTimeout("late")
    fh = await opened(ops, session, node)
    await ops.release(fh)
    assert session.names().count("release") == 1


class Listing:
    """A daemon's directory and a kernel that takes ``room`` entries a call."""

    def __init__(self, session: FakeSession, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[bytes, int]] = []
        self.attributes: list[pyfuse3.EntryAttributes] = []
        self.room = self._left = room
        session.answers["opendir"] = fuse.OpenOut(9, 0, 0)
        session.answers["readdirplus"] = self.readdirplus
        monkeypatch.setattr(pyfuse3, "readdir_reply", self.reply)
        names = [b".", b"..", *(b"file%d" % number for number in range(5))]
        self.entries = [
            fuse.DirEntryPlus(
                entry(0 if name in (b".", b"..") else 100 + at), 100 + at, at + 1, 8, name
            )
            for at, name in enumerate(names)
        ]

    def readdirplus(self, _nodeid: int, _fh: int, offset: int, _size: int) -> Any:
        return self.entries[offset:]

    def reply(self, _token: object, name: bytes, attr: Any, next_id: int) -> bool:
        if not self._left:
            return False
        self._left -= 1
        self.taken.append((name, next_id))
        self.attributes.append(attr)
        return True

    async def call(self, ops: VirtioFsOperations, fh: pyfuse3.FileHandleT, start: int) -> None:
        self._left = self.room
        await ops.readdir(fh, start, cast("pyfuse3.ReaddirToken", None))


async def test_a_listing_is_fetched_once_and_handed_on_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 3, monkeypatch)
    fh = await ops.opendir(inode(1), ROOT)
    for start in (0, 3, 6, 7):
        await listing.call(ops, fh, start)
    assert [name for name, _ in listing.taken] == [one.name for one in listing.entries]
    assert session.names().count("readdirplus") == 2  # the second finds the end
    assert len(ops.nodes) == 1 + 5
    ops.nodes.check_invariants()
    await ops.releasedir(fh)
    assert "forget" not in session.names()


async def test_what_the_kernel_did_not_take_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 4, monkeypatch)
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    await ops.releasedir(fh)
    assert session.arguments("forget") == [(104, 1), (105, 1), (106, 1)]
    assert len(ops.nodes) == 1 + 2


async def test_what_the_kernel_did_not_take_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An open must tell it of the new size, although a listing would have."""
    told: list[int] = []
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda node, **_: told.append(node))
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 4, monkeypatch)
    node = await look_up(ops, session, 104)
    longer = attributes(ino=1040, size=5)
    listing.entries[4] = listing.entries[4]._replace(entry=entry(104, longer))
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    await ops.releasedir(fh)
    session.answers["getattr"] = fuse.AttrOut(1, 0, longer)
    await opened(ops, session, node)
    assert told == [node]


async def test_rewinding_fetches_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 4, monkeypatch)
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    await listing.call(ops, fh, 0)
    assert [name for name, _ in listing.taken[4:]] == [one.name for one in listing.entries[:4]]
    assert session.names().count("readdirplus") == 2


async def test_a_listed_name_without_node_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 9, monkeypatch)
    listing.entries[3] = listing.entries[3]._replace(entry=entry(0))
    listing.entries[4] = listing.entries[4]._replace(entry=entry(0))
    session.answers["lookup"] = lambda _at, name, _: entry(200) if name == b"file1" else entry(0)
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    assert [name for name, _ in listing.taken][2:] == [b"file0", b"file1", b"file3", b"file4"]


async def test_what_a_change_has_overtaken_is_fetched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 4, monkeypatch)
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    await ops.unlink(inode(1), b"file3", ROOT)
    session.calls.clear()
    await listing.call(ops, fh, 4)
    assert session.arguments("forget") == [(104, 1), (105, 1), (106, 1)]
    assert [args[2] for args in session.arguments("readdirplus")] == [4]


async def test_what_has_waited_is_valid_for_that_much_less(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 3, monkeypatch)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    fh = await ops.opendir(inode(1), ROOT)
    for start, now in ((0, 100.0), (3, 100.25), (6, 107.0)):
        clock.append(now)
        await listing.call(ops, fh, start)
    times = [(attr.entry_timeout, attr.attr_timeout) for attr in listing.attributes[2:]]
    assert times == [(1.0, 1.0), *[(0.75, 0.75)] * 3, (0.0, 0.0)]


async def test_a_message_of_vanished_names_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 9, monkeypatch)
    entries, batch = listing.entries, 3
    entries[3:6] = [one._replace(entry=entry(0)) for one in entries[3:6]]
    session.answers["readdirplus"] = lambda _n, _fh, at, _size: entries[at : at + batch]
    session.answers["lookup"] = RemoteErrno(1, 1, errno.ENOENT)
    assert await read_whole(ops, listing) == [b".", b"..", b"file0", b"file4"]


@pytest.mark.parametrize(
    ("error", "number"),
    [(RemoteErrno(1, 1, errno.EMFILE), errno.EMFILE), (RequestTimeout("late"), errno.ETIMEDOUT)],
)
async def test_a_failure_after_some_names_is_told_at_the_next_call(
    error: Exception,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[[str], None],
) -> None:
    if number == errno.ETIMEDOUT:
        expect_log("readdir failed: late")
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 9, monkeypatch)
    listing.entries[4] = listing.entries[4]._replace(entry=entry(0))
    session.answers["lookup"] = error
    fh = await ops.opendir(inode(1), ROOT)
    await listing.call(ops, fh, 0)
    assert [name for name, _ in listing.taken] == [b".", b"..", b"file0", b"file1"]
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await listing.call(ops, fh, 4)
    assert caught.value.errno == number


async def test_a_listing_that_fails_for_a_removed_name_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As virtiofsd (C) fails: the C library takes ENOENT for the end of a directory."""
    session = FakeSession()
    ops = operations(session)
    listing = Listing(session, 9, monkeypatch)
    removed = 3

    def readdirplus(_nodeid: int, _fh: int, offset: int, _size: int) -> Any:
        if offset == removed:
            return RemoteErrno(44, 1, errno.ENOENT)
        return listing.entries[offset : removed if offset < removed else None]

    session.answers["readdirplus"] = readdirplus
    session.answers["readdir"] = lambda _nodeid, _fh, offset, _size: [
        fuse.DirEntry(*one[1:]) for one in listing.entries[offset : offset + 1]
    ]
    session.answers["lookup"] = RemoteErrno(1, 1, errno.ENOENT)
    names = [one.name for one in listing.entries]
    assert await read_whole(ops, listing) == names[:removed] + names[removed + 1 :]


async def read_whole(ops: VirtioFsOperations, listing: Listing) -> list[bytes]:
    """Read a directory to its end, and return the names."""
    fh, start = await ops.opendir(inode(1), ROOT), 0
    listing.taken.clear()
    while True:
        before = len(listing.taken)
        await listing.call(ops, fh, start)
        if len(listing.taken) == before:
            break
        start = listing.taken[-1][1]
    await ops.releasedir(fh)
    return [name for name, _ in listing.taken]


async def test_a_kept_listing_holds_its_nodes_and_gives_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = FakeSession()
    ops = operations(session, "always")
    listing = Listing(session, 3, monkeypatch)
    names = await read_whole(ops, listing)
    assert await read_whole(ops, listing) == names
    assert session.names().count("readdirplus") == 2  # the second finds the end
    for node in list(ops.nodes.nodes()):
        await ops.forget([(inode(node.inode), 2)])  # of both listings
    assert not session.arguments("forget")
    assert await read_whole(ops, listing) == names
    await ops.unlink(inode(1), b"file1", ROOT)  # the first that did not fit at once
    await ops.forget([(inode(node.inode), 1) for node in list(ops.nodes.nodes())])
    assert session.arguments("forget") == [(103, 1)]
    ops.nodes.check_invariants()


async def test_with_its_directory_a_kept_listing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may come back as another directory's."""
    session = FakeSession()
    ops = operations(session, "always")
    listing = Listing(session, 9, monkeypatch)
    session.answers["lookup"] = entry(50, attributes(500, stat.S_IFDIR | 0o755))
    folder = await ops.lookup(inode(1), b"folder", ROOT)
    for _ in range(2):
        fh = await ops.opendir(folder.st_ino, ROOT)
        await listing.call(ops, fh, 0)
        await listing.call(ops, fh, 7)
        await ops.releasedir(fh)
    held = [(inode(node.inode), 2) for node in ops.nodes.nodes() if node.nodeid > 100]
    await ops.forget([*held, (folder.st_ino, 1)])
    assert sorted(session.arguments("forget")) == [(50, 1), *((102 + at, 1) for at in range(5))]
    assert len(ops.nodes) == 1


@pytest.mark.parametrize(("major", "minor"), [(0, 0), (1, 3), (8, 1), (259, 300), (4095, 0xFFFFF)])
def test_device_numbers_survive(major: int, minor: int) -> None:
    device = os.makedev(major, minor)
    assert decode_dev(encode_dev(device)) == device
