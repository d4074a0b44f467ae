"""Files that are opened again get the handle that was closed: which do; what the daemon hears."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import pytest
import trio

from tests.client.pyfuse.fake_session import attributes
from tests.client.relay.fake_kernel import Stage, on_stage
from tests.support.shares import Shared, messages, open_shared
from tests.support.wait import wait_until, wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.client.mount.status import read_status
from vfsmount.client.relay.passthrough import PASS_FROM
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, OpenOutFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path
    from typing import Any

    from vfsmount.testing.fake_device import DeviceRequest

NODE = 7
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC
LONG = CachePolicy.for_mode("auto", 600.0)
#: Seconds for which a handle is kept, and until it has been given back, at the latest.
KEPT, DUE = 1.0, 10.0

T = TypeVar("T")


@pytest.fixture
def _for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles are kept however long a test takes."""
    monkeypatch.setattr("vfsmount.cache.kept_handles._SECONDS", 600.0)


class Host:
    """A device with one file, that numbers its handles."""

    def __init__(self) -> None:
        self.attr = attributes(size=5, ctime=1)
        self.handles = 0
        self.seen: list[int] = []
        self.released: list[int] = []
        self.released_at = 0.0
        self.errors: dict[int, int] = {}
        self.open_flags = 0
        self.holds: set[int] = set()
        self.held: list[DeviceRequest] = []

    def __call__(self, request: DeviceRequest) -> None:
        if request.header.opcode in self.holds:
            self.held.append(request)
        else:
            self.answer(request)

    def answer(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        self.seen.append(opcode)
        if opcode in self.errors:
            request.reply(error=-self.errors[opcode])
        elif opcode == Opcode.OPEN:
            self.handles += 1
            request.reply(fuse.OPEN_OUT.values(self.handles, self.open_flags, 0))
        elif opcode == Opcode.GETATTR:
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, self.attr)))
        elif opcode == Opcode.RELEASE:
            self.released_at = time.monotonic()
            self.released.append(fuse.RELEASE_IN.unpack(request.body).fh)
            request.reply()
        elif request.room:
            request.reply()
        else:
            request.use()

    def change(self) -> None:
        self.attr = self.attr._replace(ctime=self.attr.ctime + 1)


async def opened(stage: Stage, flags: int = READ_ONLY, uid: int = 0) -> int:
    """Open the file; return the handle."""
    stage.send(Opcode.OPEN, NODE, fuse.OPEN_IN.values(flags, 0), uid=uid)
    reply = await stage.receive()
    if reply.unique == 0:  # attributes are invalidated
        reply = await stage.receive()
    assert reply.errno == 0
    return fuse.OPEN_OUT.unpack(reply.body).fh


async def close(stage: Stage, fh: int, flags: int = READ_ONLY, release_flags: int = 0) -> None:
    """Close a handle."""
    body = fuse.RELEASE_IN.values(fh, flags, release_flags, 0)
    assert (await stage.call(Opcode.RELEASE, NODE, body)).errno == 0


@asynccontextmanager
async def with_one_closed(uid: int = 0) -> AsyncIterator[tuple[Host, Stage]]:
    """A relay, and a handle that a program has closed."""
    host = Host()
    async with on_stage(host, LONG) as stage:
        await close(stage, await opened(stage, uid=uid))
        yield host, stage


async def reopened(stage: Stage) -> int:
    """Open, close, and open again; return the second handle."""
    await close(stage, await opened(stage))
    return await opened(stage)


@pytest.mark.usefixtures("_for_long")
async def test_the_next_open_gets_the_handle() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        assert await reopened(stage) == 1
        assert host.seen.count(Opcode.OPEN) == 1
        assert host.released == []
        await close(stage, 1)
        stage.send(Opcode.OPEN, NODE, fuse.OPEN_IN.values(READ_ONLY, 0))
        reply = fuse.OPEN_OUT.unpack((await stage.receive()).body)
        assert (reply.fh, reply.open_flags) == (1, OpenOutFlag.KEEP_CACHE)
        counted = stage.channel.statistics().requests
        assert counted["OPEN"].count == 1
        assert "RELEASE" not in counted


@pytest.mark.usefixtures("_for_long")
async def test_a_changed_file_is_opened_anew() -> None:
    async with with_one_closed() as (host, stage):
        host.change()
        assert await opened(stage) == 2
        await wait_until_async(lambda: host.released == [1], DUE, "the old handle to be released")
        await wait_until_async(
            lambda: stage.channel.statistics().requests["RELEASE"].count == 1, DUE, "it to count"
        )


@pytest.mark.usefixtures("_for_long")
async def test_a_question_without_an_answer_is_no_answer() -> None:
    async with with_one_closed() as (host, stage):
        host.errors[Opcode.GETATTR] = errno.ESTALE
        assert await opened(stage) == 2


@pytest.mark.usefixtures("_for_long")
async def test_attributes_that_the_kernel_has_otherwise_are_invalidated() -> None:
    """The file has changed, was changed back here, and the kernel knows the state in between."""
    async with with_one_closed() as (host, stage):
        before = host.attr
        host.change()
        await stage.call(Opcode.GETATTR, NODE, bytes(16))  # parked from the open
        await stage.call(Opcode.GETATTR, NODE, bytes(16))
        host.attr = before
        stage.send(Opcode.OPEN, NODE, fuse.OPEN_IN.values(READ_ONLY, 0))
        assert (await stage.receive()).unique == 0
        assert fuse.OPEN_OUT.unpack((await stage.receive()).body).fh == 1


@pytest.mark.usefixtures("_for_long")
@pytest.mark.parametrize(
    ("flags", "uid"),
    [(os.O_RDWR, 0), (os.O_WRONLY, 0), (READ_ONLY | os.O_NOATIME, 0), (READ_ONLY, 1000)],
)
async def test_another_open_gets_another_handle(flags: int, uid: int) -> None:
    async with with_one_closed() as (host, stage):
        assert await opened(stage, flags, uid) == 2
        assert host.released == []  # who opens as before still gets that
        assert await opened(stage) == 1


@pytest.mark.usefixtures("_for_long")
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_DIRECT])
async def test_such_handles_are_not_kept(flags: int) -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        await close(stage, await opened(stage, flags), flags)
        assert await opened(stage, flags) == 2
        assert host.released == [1]


@pytest.mark.usefixtures("_for_long")
async def test_nor_are_those_of_which_the_daemon_says_something() -> None:
    host = Host()
    host.open_flags = int(OpenOutFlag.NONSEEKABLE)
    async with on_stage(host, LONG) as stage:
        assert await reopened(stage) == 2


@pytest.mark.usefixtures("_for_long")
async def test_nor_those_that_had_locks() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        fh = await opened(stage)
        await close(stage, fh, release_flags=int(fuse.ReleaseFlag.FLOCK_UNLOCK))
        fh = await opened(stage)
        assert fh == 2
        lock = fuse.LK_IN.values(fh, 1, 0, 0, fuse.LockType.READ, 1, 0)
        await stage.call(Opcode.SETLK, NODE, lock)
        await close(stage, fh)
        assert await opened(stage) == 3
        await wait_until_async(lambda: host.released == [1, 2], DUE, "both to be released")


@pytest.mark.usefixtures("_for_long")
async def test_two_users_at_once_have_two_handles() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        first, second = await opened(stage), await opened(stage)
        assert first != second
        await close(stage, first)
        await close(stage, second)
        await wait_until_async(lambda: host.released == [first], DUE, "one to be released")
        assert await opened(stage) == second


@pytest.mark.usefixtures("_for_long")
async def test_a_change_that_another_open_has_seen_counts() -> None:
    """Permissions may have changed, and who opens again is not who has looked."""
    async with with_one_closed(uid=1000) as (host, stage):
        host.change()
        await opened(stage, os.O_RDWR)
        assert await opened(stage, uid=1000) == 3
        await wait_until_async(lambda: host.released == [1], DUE, "the old handle to be released")


@pytest.mark.usefixtures("_for_long")
async def test_a_file_without_a_name_is_looked_up_anew() -> None:
    """Also where the host does not say that anything else has changed."""
    async with with_one_closed() as (host, stage):
        host.attr = host.attr._replace(nlink=0)
        reply = await stage.call(Opcode.OPEN, NODE, fuse.OPEN_IN.values(READ_ONLY, 0))
        assert reply.errno == errno.ESTALE
        await wait_until_async(lambda: sorted(host.released) == [1, 2], DUE, "both handles")


async def test_a_handle_is_used_for_a_second_and_no_longer() -> None:
    """The daemon hears of an open each second, however often the file is opened."""
    host = Host()
    async with on_stage(host, LONG) as stage:
        end = trio.current_time() + DUE
        while await reopened(stage) == 1:
            await close(stage, 1)
            assert trio.current_time() < end


@pytest.mark.usefixtures("_for_long")
async def test_all_who_lacked_descriptors_are_served(expect_log: Callable[[str], None]) -> None:
    expect_log("the daemon has run out of descriptors")
    async with with_one_closed() as (host, stage):
        host.holds.add(Opcode.LOOKUP)
        uniques = {stage.send(Opcode.LOOKUP, 1, b"name\0") for _ in range(3)}
        await wait_until_async(lambda: len(host.held) == 3, DUE, "the lookups")
        host.holds.clear()
        for request in host.held:
            request.reply(error=-errno.EMFILE)
        replies = [await stage.receive() for _ in uniques]
        assert {reply.unique for reply in replies} == uniques
        assert {reply.errno for reply in replies} == {0}


@pytest.mark.usefixtures("_for_long")
async def test_a_forgotten_file_is_released() -> None:
    async with with_one_closed() as (host, stage):
        stage.send(Opcode.FORGET, NODE, fuse.FORGET_IN.values(1))
        await wait_until_async(lambda: host.released == [1], DUE, "the handle to be released")


async def test_nobody_comes_for_a_second() -> None:
    host = Host()
    async with on_stage(host, LONG) as stage:
        began = time.monotonic()
        await close(stage, await opened(stage))
        await wait_until_async(lambda: host.released == [1], DUE, "the handle to be released")
        assert host.released_at - began >= KEPT


@pytest.mark.usefixtures("_for_long")
@pytest.mark.parametrize("mode", ["none", "always", "host"])
async def test_other_modes_do_not_ask_and_do_not_keep(mode: str) -> None:
    host = Host()
    async with on_stage(host, CachePolicy.for_mode(mode)) as stage:
        assert await reopened(stage) == 2


@pytest.mark.usefixtures("_for_long")
async def test_who_has_been_killed_meanwhile_leaves_no_handle() -> None:
    async with with_one_closed() as (host, stage):
        host.holds.add(Opcode.GETATTR)
        unique = stage.send(Opcode.OPEN, NODE, fuse.OPEN_IN.values(READ_ONLY, 0))
        await wait_until_async(lambda: len(host.held) == 1, DUE, "the question")
        slot = next(iter(stage.relay._parts.device.in_flight()))
        assert slot.answers == unique
        # What the caretaker does for a caller that is being killed; nothing else runs now.
        stage.relay._parts.late.give_up(slot, errno.EINTR)
        assert (await stage.receive()).errno == errno.EINTR
        host.holds.clear()
        host.answer(host.held.pop())
        await wait_until_async(lambda: host.released == [1], DUE, "the handle to be released")


@pytest.mark.usefixtures("_for_long")
async def test_a_lost_daemon_is_told_of(expect_log: Callable[[str], None]) -> None:
    expect_log("the channel to the daemon has ended")
    async with with_one_closed() as (host, stage):
        host.holds.add(Opcode.GETATTR)
        stage.send(Opcode.OPEN, NODE, fuse.OPEN_IN.values(READ_ONLY, 0))
        await wait_until_async(lambda: len(host.held) == 1, DUE, "the question")
        stage.device.hang_up()
        assert (await stage.receive()).errno == errno.ENOTCONN


@pytest.mark.usefixtures("_for_long")
@pytest.mark.parametrize(
    ("opcode", "body"),
    [
        (Opcode.LOOKUP, b"name\0"),
        (Opcode.OPEN, fuse.OPEN_IN.values(os.O_RDWR, 0)),
        (Opcode.OPENDIR, fuse.OPEN_IN.values(0, 0)),
        (Opcode.READDIRPLUS, fuse.READ_IN.values(1, 0, 4096, 0, 0, 0)),
    ],
)
async def test_a_daemon_without_descriptors_gets_them_back(
    opcode: Opcode, body: bytes, expect_log: Callable[[str], None]
) -> None:
    expect_log("the daemon has run out of descriptors")
    async with with_one_closed() as (host, stage):
        host.errors[opcode] = errno.EMFILE
        seen = host.seen.count(opcode)
        stage.send(opcode, NODE, body)
        while (reply := await stage.receive()).unique == 0:
            pass
        assert reply.errno == errno.EMFILE  # of the second try
        assert host.seen.count(opcode) == seen + 2
        assert host.released == [1]
        host.errors.clear()
        await close(stage, await opened(stage))
        await wait_until_async(lambda: len(host.released) == 2, DUE, "nothing to be kept")


# --- real mounts ---


def opens(shared: Shared) -> int:
    """OPENs that the daemon has had."""
    return messages(shared.mounts[0])["OPEN"]


def while_kept(case: Callable[[], T]) -> T:
    """Do what needs a handle that is kept, of a new file; anew where it was slower than that."""
    for _ in range(10):
        began = time.monotonic()
        result = case()
        if time.monotonic() - began < KEPT:
            return result
    raise AssertionError(f"never done within {KEPT:g} s")


@pytest.mark.needs_fuse
def test_reading_a_file_again(shared: Shared) -> None:
    def read_again() -> tuple[Path, Path, int]:
        host, mounted = shared.folder()
        (host / "file").write_text("one")
        assert (mounted / "file").read_text() == "one"
        before = opens(shared)
        for _ in range(5):
            assert (mounted / "file").read_text() == "one"
        return host, mounted, opens(shared) - before

    host, mounted, sent = while_kept(read_again)
    assert sent == 0
    before = opens(shared)
    (host / "file").write_text("three")
    assert (mounted / "file").read_text() == "three"
    assert opens(shared) == before + 1


@pytest.mark.needs_fuse
def test_permissions_that_the_host_has_changed_count(shared: Shared) -> None:
    host, mounted = shared.folder()
    (host / "file").write_text("one")
    (mounted / "file").read_text()
    before = opens(shared)
    (host / "file").chmod(0o600)
    (mounted / "file").read_text()
    assert opens(shared) == before + 1


@pytest.mark.needs_fuse
def test_a_file_that_is_gone_is_gone(shared: Shared) -> None:
    host, mounted = shared.folder()
    (host / "file").write_text("one")
    (mounted / "file").read_text()
    (host / "file").unlink()
    with pytest.raises(FileNotFoundError):
        (mounted / "file").read_text()


@pytest.mark.needs_fuse
def test_a_file_that_was_replaced_is_another(shared: Shared) -> None:
    host, mounted = shared.folder()
    (host / "file").write_text("one")
    (mounted / "file").read_text()
    (host / "other").write_text("two")
    (host / "other").rename(host / "file")
    assert (mounted / "file").read_text() == "two"


@pytest.mark.needs_fuse
def test_flock_is_given_up_with_its_handle(shared: Shared) -> None:
    host, mounted = shared.folder()
    (host / "file").write_text("one")
    for _ in range(2):
        with (mounted / "file").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (mounted / "file").open() as one, (mounted / "file").open() as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.needs_fuse
def test_the_daemon_has_all_handles_back_in_time(shared: Shared) -> None:
    host, mounted = shared.folder()
    for number in range(300):
        (host / f"file-{number}").write_text("one")
    daemon = shared.daemons[0]

    def readable() -> int:
        return sum(
            "/" in target and f"/{host.name}/file-" in target for target in daemon.open_files()
        )

    paths = [path for path in mounted.iterdir() if path.is_file()]
    nodes = readable()
    for path in paths:
        path.read_text()
    wait_until(lambda: readable() <= nodes, DUE, "all handles to be given back")


@pytest.mark.needs_fuse
@pytest.mark.needs_daemon
def test_a_daemon_with_few_descriptors_serves_more_files_than_it_could_keep() -> None:
    options = ("--rlimit-nofile=700", "--inode-file-handles=prefer")
    told = "warning: the daemon has run out of descriptors"
    with open_shared(
        "rust", "relay", "auto", daemon_options=options, expected_complaint=told
    ) as shared:
        host, mounted = shared.folder()
        for number in range(1000):
            (host / f"file-{number:03}").write_text(str(number))
        for number in range(1000):
            assert (mounted / f"file-{number:03}").read_text() == str(number)
        assert shared.mounts[0].log.count(told) == 1


# --- files that the kernel reads and writes by itself ---


@pytest.fixture(scope="module")
def windowed() -> Iterator[Shared]:
    """Over the bundled daemon, whose files from `PASS_FROM` bytes on are passed through."""
    with open_shared("bundled", "relay", "auto", options=("--timeout", "600")) as shared:
        if not facts(shared)["active"]:
            pytest.skip("no FUSE passthrough here")
        yield shared


def facts(shared: Shared) -> dict[str, Any]:
    found: dict[str, Any] = read_status(str(shared.mounts[0].path))["dax"]
    return found


@pytest.mark.needs_fuse
def test_a_file_that_has_grown_is_passed_through(windowed: Shared) -> None:
    def read_small() -> tuple[Path, Path, int]:
        host, mounted = windowed.folder()
        (host / "file").write_bytes(b"small")
        before = opens(windowed)
        for _ in range(3):
            assert (mounted / "file").read_bytes() == b"small"
        return host, mounted, opens(windowed) - before

    host, mounted, sent = while_kept(read_small)
    assert sent == 1
    passed = facts(windowed)["opens"]
    (host / "file").write_bytes(bytes(PASS_FROM))
    for number in range(1, 4):
        assert (mounted / "file").read_bytes() == bytes(PASS_FROM)
        assert facts(windowed)["opens"] == passed + number
    (host / "file").write_bytes(b"small")
    for _ in range(3):
        assert (mounted / "file").read_bytes() == b"small"


@pytest.mark.needs_fuse
def test_a_file_that_is_passed_through_is_opened_again(windowed: Shared) -> None:
    def read_large() -> tuple[Path, Path, int]:
        host, mounted = windowed.folder()
        (host / "file").write_bytes(bytes(PASS_FROM))
        sent, passed = opens(windowed), facts(windowed)["opens"]
        for number in range(1, 6):
            assert (mounted / "file").read_bytes() == bytes(PASS_FROM)
            assert facts(windowed)["opens"] == passed + number
        return host, mounted, opens(windowed) - sent

    host, mounted, sent = while_kept(read_large)
    assert sent == 1
    with (mounted / "file").open("r+b", buffering=0) as writer:
        assert len((mounted / "file").read_bytes()) == PASS_FROM
        writer.write(b"changed")
        assert (mounted / "file").read_bytes()[:7] == b"changed"
    (host / "file").write_bytes(b"small")
    assert (mounted / "file").read_bytes() == b"small"


@pytest.mark.needs_fuse
def test_all_opens_of_a_file_are_of_one_kind(windowed: Shared) -> None:
    """While a kept handle that went by message waits, the file is passed through."""
    host, mounted = windowed.folder()
    (host / "file").write_bytes(b"small")
    (mounted / "file").read_bytes()  # its handle is kept
    with (mounted / "file").open("r+b", buffering=0) as writer:
        writer.truncate(PASS_FROM)
        assert len((mounted / "file").read_bytes()) == PASS_FROM
        with (mounted / "file").open("rb") as reader:
            writer.write(b"large")
            assert reader.read(5) == b"large"
    (mounted / "file").read_bytes()
    with (mounted / "file").open("r+b", buffering=0) as passed:
        assert (mounted / "file").read_bytes()[:5] == b"large"
        passed.write(b"again")
        assert (host / "file").read_bytes()[:5] == b"again"
        assert (mounted / "file").read_bytes()[:5] == b"again"


@pytest.mark.needs_fuse
@pytest.mark.parametrize("options", [(), ("--dax", "1G")], ids=["default", "all"])
def test_many_opens_at_once(options: tuple[str, ...]) -> None:
    """Threads that open and close a few files of all sizes; what they read is what is there."""
    with open_shared("bundled", "relay", "auto", options=options) as shared:
        host, mounted = shared.folder()
        sizes = (10, 5000, PASS_FROM - 1, PASS_FROM, PASS_FROM + 1)
        for size in sizes:
            (host / str(size)).write_bytes(b"%d" % size * (size // len(str(size))))

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(100):
                size = dice.choice(sizes)
                mode = dice.choice(("rb", "rb", "r+b"))
                with (mounted / str(size)).open(mode) as file:
                    assert file.read(3 * len(str(size))) == b"%d" % size * 3

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
