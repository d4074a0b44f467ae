"""The daemon's DAX window against a model, with a front-end that keeps vhost-user's rules."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.hostd.guest import DirectGuest, expect_errno
from vfsmount.hostd import window as window_module
from vfsmount.hostd.faults import Refused
from vfsmount.hostd.fs.share import Share, ShareOptions
from vfsmount.hostd.messages import close_all, receive, send_reply
from vfsmount.hostd.requests import RequestChannel
from vfsmount.hostd.window import ALIGNMENT, MAX_MAPPINGS, DaxWindow
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode, SetupmappingFlag
from vfsmount.wire.vhost_user import (
    BackendRequest,
    Payload,
    ShmemMap,
    decode_payload,
    encode_ack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PAGES = 12
SIZE = PAGES * ALIGNMENT
READ, WRITE = SetupmappingFlag.READ, SetupmappingFlag.WRITE
NO_FH = (1 << 64) - 1


class Front(RequestChannel):
    """A front-end's window: (inode number, page of the file, writable) for each of its pages."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pages: list[tuple[int, int, bool] | None] = [None] * pages
        self.whole: dict[tuple[int, int], None] = {}
        self.refuses = 0

    def ask(
        self,
        request: BackendRequest,
        record: Payload,
        fds: Sequence[int] = (),
        *,
        wait: bool = True,
    ) -> None:
        assert isinstance(record, ShmemMap)
        first, count = record.shm_offset // ALIGNMENT, record.length // ALIGNMENT
        place = slice(first, first + count)
        if request == BackendRequest.SHMEM_UNMAP:
            del self.whole[first, count]
            self.pages[place] = [None] * count
            return
        assert not any(self.pages[place]), "mapped over something"
        assert 0 < count <= len(self.pages) - first
        if self.refuses:
            self.refuses -= 1
            raise OSError(errno.ENOMEM, "full")
        number = os.fstat(fds[0]).st_ino
        page = record.fd_offset // ALIGNMENT
        self.pages[place] = [(number, page + at, bool(record.flags)) for at in range(count)]
        self.whole[first, count] = None

    def close(self) -> None:
        pass


def errno_of(action: Callable[[], None]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


class Windows(RuleBasedStateMachine):
    """The model: what each page of the window should show."""

    def __init__(self) -> None:
        super().__init__()
        self.front = Front()
        self.window = DaxWindow(SIZE)
        self.window.channel = self.front
        self.fds = [os.memfd_create("file") for _ in range(3)]
        self.numbers = [os.fstat(fd).st_ino for fd in self.fds]
        self.model: list[tuple[int, int, bool] | None] = [None] * PAGES

    @rule(
        file=st.integers(0, 2),
        write=st.booleans(),
        page=st.integers(0, 5),
        at=st.integers(0, PAGES),
        count=st.integers(0, PAGES),
    )
    def set_up(self, file: int, write: bool, page: int, at: int, count: int) -> None:
        error = errno_of(
            lambda: self.window.set_up(
                (file, write),
                page * ALIGNMENT,
                count * ALIGNMENT,
                at * ALIGNMENT,
                lambda: os.dup(self.fds[file]),
            )
        )
        assert error == (0 if 0 < count <= PAGES - at else errno.EINVAL)
        if not error:
            number = self.numbers[file]
            self.model[at : at + count] = [(number, page + i, write) for i in range(count)]

    @rule(at=st.integers(0, PAGES), count=st.integers(0, PAGES))
    def remove(self, at: int, count: int) -> None:
        error = errno_of(lambda: self.window.remove(at * ALIGNMENT, count * ALIGNMENT))
        assert error == (0 if 0 < count <= PAGES - at else errno.EINVAL)
        if not error:
            self.model[at : at + count] = [None] * count

    @rule(at=st.integers(0, PAGES - 1), count=st.integers(1, PAGES), refused=st.integers(1, 3))
    def refuse(self, at: int, count: int, refused: int) -> None:
        """Afterwards less may be mapped than should be, but nothing else than both know."""
        self.front.refuses = refused
        count = min(count, PAGES - at)
        place = count * ALIGNMENT, at * ALIGNMENT
        error = errno_of(
            lambda: self.window.set_up((0, False), 0, *place, lambda: os.dup(self.fds[0]))
        )
        assert error == errno.ENOMEM
        assert not any(self.front.pages[at : at + count])
        self.front.refuses = 0
        pairs = zip(self.front.pages, self.model, strict=True)
        assert all(shown in (None, wanted) for shown, wanted in pairs)
        self.model = [*self.front.pages]

    @rule()
    def clear(self) -> None:
        self.window.clear()
        self.model = [None] * PAGES

    @invariant()
    def same(self) -> None:
        self.window.check_invariants()
        assert self.front.pages == self.model

    def teardown(self) -> None:
        self.window.forget()
        self.window.check_invariants()
        for fd in self.fds:
            os.close(fd)


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_bounded_number_of_mappings() -> None:
    window = DaxWindow((MAX_MAPPINGS + 1) * ALIGNMENT)
    window.channel = Front(MAX_MAPPINGS + 1)
    fd = os.memfd_create("file")
    for at in range(MAX_MAPPINGS):
        window.set_up((1, False), 0, ALIGNMENT, at * ALIGNMENT, lambda: fd)
    with expect_errno("ENOSPC"):
        window.set_up((1, False), 0, ALIGNMENT, MAX_MAPPINGS * ALIGNMENT, lambda: fd)
    window.set_up((1, False), 0, ALIGNMENT, 0, lambda: fd)  # in place of another
    window.forget()


@pytest.mark.parametrize("how", ["remove", "set_up"])
def test_holes_do_not_make_more_of_them(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(window_module, "MAX_MAPPINGS", 3)
    window, front = DaxWindow(SIZE), Front()
    window.channel = front
    fd = os.memfd_create("file")
    window.set_up((1, False), 0, SIZE, 0, lambda: fd)
    window.remove(ALIGNMENT, ALIGNMENT)
    window.remove(3 * ALIGNMENT, ALIGNMENT)
    before = list(front.pages)
    with expect_errno("ENOSPC"):
        if how == "remove":
            window.remove(5 * ALIGNMENT, ALIGNMENT)
        else:
            window.set_up((1, False), 0, ALIGNMENT, 5 * ALIGNMENT, lambda: fd)
    window.check_invariants()
    assert front.pages == before
    window.remove(4 * ALIGNMENT, ALIGNMENT)
    window.clear()
    assert not any(front.pages)


# --- the channel ----------------------------------------------------------------------------------

RECORD = ShmemMap(0, 0, 0, ALIGNMENT, 0)


@contextmanager
def answering(react: Callable[[socket.socket], None]) -> Iterator[RequestChannel]:
    """A channel whose other end does something once."""
    ours, theirs = socket.socketpair()
    channel = RequestChannel(ours.detach())
    thread = threading.Thread(target=react, args=(theirs,))
    thread.start()
    try:
        yield channel
    finally:
        thread.join(10)
        channel.close()
        theirs.close()


def acks(value: int) -> Callable[[socket.socket], None]:
    def react(sock: socket.socket) -> None:
        message = receive(sock)
        assert message is not None
        assert message.header.needs_reply
        assert len(message.fds) == 1
        assert decode_payload(BackendRequest.SHMEM_MAP, message.payload) == RECORD
        close_all(message.fds)
        send_reply(sock, message.header.request, encode_ack(value))

    return react


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, None),
        ((1 << 64) - errno.EEXIST, "EEXIST"),
        (1, "EIO"),
        (1 << 63, "EIO"),
        ((1 << 64) - 4096, "EIO"),
    ],
)
def test_answers(value: int, name: str | None) -> None:
    with answering(acks(value)) as channel:
        if name is None:
            channel.ask(BackendRequest.SHMEM_MAP, RECORD, [0])
        else:
            with expect_errno(name):
                channel.ask(BackendRequest.SHMEM_MAP, RECORD, [0])


def test_what_nobody_waits_for_comes_first() -> None:
    asked = []

    def react(sock: socket.socket) -> None:
        for _ in range(2):
            message = receive(sock)
            assert message is not None
            asked.append((message.header.request, message.header.needs_reply))
        send_reply(sock, asked[-1][0], encode_ack(0))

    with answering(react) as channel:
        channel.ask(BackendRequest.SHMEM_UNMAP, RECORD, wait=False)
        channel.ask(BackendRequest.SHMEM_UNMAP, RECORD)
    assert asked == [(BackendRequest.SHMEM_UNMAP, False), (BackendRequest.SHMEM_UNMAP, True)]


@pytest.mark.parametrize("data", [b"", b"\0" * 12, b"\x09\0\0\0\x01\0\0\0\x08\0\0\0" + bytes(8)])
def test_no_answer_ends_the_channel(data: bytes, expect_log: Callable[[str], None]) -> None:
    expect_log("did not answer SHMEM_MAP")

    def react(sock: socket.socket) -> None:
        message = receive(sock)
        assert message is not None
        close_all(message.fds)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    with answering(react) as channel:
        for _ in range(2):
            with expect_errno("EIO"):
                channel.ask(BackendRequest.SHMEM_MAP, RECORD, [0])


def test_no_channel_but_a_stream_socket() -> None:
    fd = os.eventfd(0)
    with pytest.raises(Refused):
        RequestChannel(fd)
    os.close(fd)
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pytest.raises(Refused):
        RequestChannel(datagrams[0].fileno())
    for sock in datagrams:
        sock.close()


# --- what a guest asks ----------------------------------------------------------------------------


@pytest.fixture
def options() -> ShareOptions:
    return ShareOptions(dax=SIZE)


@pytest.fixture
def front(guest: DirectGuest) -> Front:
    """Give the guest's session somebody to ask, and begin again with what it can do now."""
    front = Front()
    assert guest.session.window is not None
    guest.session.window.channel = front
    reply = guest.init(InitFlag.MAP_ALIGNMENT | InitFlag.HAS_INODE_DAX | InitFlag.INIT_EXT)
    assert reply.map_alignment == 12
    return front


def setup(
    guest: DirectGuest,
    nodeid: int,
    *,
    fh: int = NO_FH,
    foffset: int = 0,
    length: int = ALIGNMENT,
    flags: int = int(READ),
    moffset: int = 0,
) -> None:
    body = fuse.SETUPMAPPING_IN.values(fh, foffset, length, flags, moffset)
    guest.call(Opcode.SETUPMAPPING, nodeid, body)


def remove(guest: DirectGuest, *ranges: tuple[int, int]) -> None:
    body = fuse.REMOVEMAPPING_IN.values(len(ranges))
    body += b"".join(fuse.REMOVEMAPPING_ONE.values(*one) for one in ranges)
    guest.call(Opcode.REMOVEMAPPING, 1, body)


def test_mapped_by_node_and_by_handle(guest: DirectGuest, front: Front, folder: Path) -> None:
    (folder / "file").write_bytes(bytes(3 * ALIGNMENT))
    number = (folder / "file").stat().st_ino
    nodeid = guest.walk("file")
    assert guest.getattr(nodeid).flags == 2
    fh = guest.open(nodeid, os.O_RDWR)

    setup(guest, nodeid, foffset=ALIGNMENT, length=2 * ALIGNMENT, moffset=ALIGNMENT)
    assert front.pages[:4] == [None, (number, 1, False), (number, 2, False), None]
    setup(guest, nodeid, fh=fh, flags=int(READ | WRITE), moffset=2 * ALIGNMENT)
    assert front.pages[:4] == [None, (number, 1, False), (number, 0, True), None]
    remove(guest, (0, 2 * ALIGNMENT), (5 * ALIGNMENT, ALIGNMENT))
    assert front.pages[:4] == [None, None, (number, 0, True), None]
    guest.destroy()
    assert not any(front.pages)


def test_mappings_outlive_handles_and_nodes(guest: DirectGuest, front: Front, folder: Path) -> None:
    (folder / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    nodeid = guest.walk("file")
    setup(guest, nodeid, length=3 * ALIGNMENT)
    (folder / "file").unlink()
    guest.forget(nodeid)
    remove(guest, (ALIGNMENT, ALIGNMENT))
    assert [bool(page) for page in front.pages[:3]] == [True, False, True]
    remove(guest, (0, SIZE))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EBADF", {"fh": 77}),
        ("EBADF", {"fh": 0}),
        ("EINVAL", {"moffset": SIZE}),
        ("EINVAL", {"moffset": SIZE - ALIGNMENT, "length": 2 * ALIGNMENT}),
        ("EINVAL", {"moffset": (1 << 64) - ALIGNMENT}),
        ("EINVAL", {"moffset": (1 << 64) - ALIGNMENT, "length": 2 * ALIGNMENT}),
        ("EINVAL", {"length": 0}),
        ("EINVAL", {"length": (1 << 64) - ALIGNMENT}),
        ("EINVAL", {"length": 1}),
        ("EINVAL", {"moffset": 1}),
        ("EINVAL", {"foffset": 1}),
        ("EINVAL", {"foffset": (1 << 64) - ALIGNMENT}),
        ("EINVAL", {"foffset": (1 << 63) - ALIGNMENT}),
        ("EINVAL", {"flags": 0}),
        ("EINVAL", {"flags": 7}),
    ],
)
def test_what_a_guest_may_not_ask(
    guest: DirectGuest, front: Front, folder: Path, name: str, change: dict[str, int]
) -> None:
    (folder / "file").touch()
    nodeid = guest.walk("file")
    setup(guest, nodeid, length=SIZE)
    before = [*front.pages]
    with expect_errno(name):
        setup(guest, nodeid, **change)
    assert front.pages == before


def test_only_regular_files_are_mapped(guest: DirectGuest, front: Front, folder: Path) -> None:
    (folder / "link").symlink_to("file")
    os.mkfifo(folder / "fifo")
    for nodeid in (1, guest.walk("link"), guest.walk("fifo")):
        with expect_errno("ENODEV"):
            setup(guest, nodeid)
    with expect_errno("EBADF"):
        setup(guest, 4711)
    assert not any(front.pages)


def test_a_handle_gives_its_own_rights(guest: DirectGuest, front: Front, folder: Path) -> None:
    (folder / "file").touch()
    (folder / "other").touch()
    nodeid, other = guest.walk("file"), guest.walk("other")
    fh = guest.open(nodeid, os.O_RDONLY)
    setup(guest, nodeid, fh=fh)
    with expect_errno("EACCES"):
        setup(guest, nodeid, fh=fh, flags=int(WRITE))
    with expect_errno("EBADF"):
        setup(guest, other, fh=fh)


@pytest.mark.parametrize("ranges", [[(1, ALIGNMENT)], [(0, 0)], [(0, 2 * SIZE)], [(SIZE, 4096)]])
def test_what_cannot_be_removed(
    guest: DirectGuest, front: Front, ranges: list[tuple[int, int]]
) -> None:
    with expect_errno("EINVAL"):
        remove(guest, *ranges)


def test_read_only_shares_are_mapped_read_only(folder: Path) -> None:
    (folder / "file").touch()
    with Share(folder, ShareOptions(dax=SIZE, readonly=True)) as share, DirectGuest(share) as guest:
        assert guest.session.window is not None
        guest.session.window.channel = Front()
        guest.init()
        nodeid = guest.walk("file")
        setup(guest, nodeid)
        with expect_errno("EROFS"):
            setup(guest, nodeid, flags=int(READ | WRITE))


def test_without_anybody_to_ask(guest: DirectGuest, folder: Path) -> None:
    (folder / "file").touch()
    nodeid = guest.walk("file")
    with expect_errno("ENOSYS"):
        setup(guest, nodeid)
    with expect_errno("ENOSYS"):
        remove(guest, (0, ALIGNMENT))


def test_a_bounded_number_of_mapped_files(
    guest: DirectGuest, front: Front, share: Share, folder: Path
) -> None:
    share.open_limit = 2
    nodes = []
    for name in ("one", "two", "three"):
        (folder / name).write_bytes(bytes(ALIGNMENT))
        nodes.append(guest.walk(name))
    for at, nodeid in enumerate(nodes[:2]):
        setup(guest, nodeid, moffset=at * ALIGNMENT)
    with expect_errno("ENFILE"):
        setup(guest, nodes[2], moffset=2 * ALIGNMENT)
    setup(guest, nodes[0], moffset=2 * ALIGNMENT)
    remove(guest, (ALIGNMENT, ALIGNMENT))
    setup(guest, nodes[2], moffset=ALIGNMENT)
    assert all(front.pages[:3])
