"""The cached view of a session, on real daemons: messages, who sees what, what is given back."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

import vfsmount
from tests.litmus.rows import ROWS, Row, When, look_at
from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from vfsmount.client.cached import CachedSession
from vfsmount.client.session import setattr_in
from vfsmount.errors import RemoteErrno

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from vfsmount.wire import fuse
    from vfsmount.wire.fuse import AttrOut

pytestmark = pytest.mark.slow

MODES = ("none", "auto", "always")
MIB = 1 << 20
#: Seconds; longer than any test.
LONG = 600.0


@pytest.fixture
def host() -> Iterator[Path]:
    """A folder of the host, in memory where that is possible."""
    with quick_folders("cached", "host") as (path,):
        yield path


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class View:
    """A view under test, and what it has sent."""

    def __init__(self, guest: vfsmount.Session, mode: str, names: int, timeout: float) -> None:
        self.guest = guest
        self.clock = Clock()
        self.files = CachedSession(
            guest,
            vfsmount.CachePolicy.for_mode(mode, timeout),
            names=names,
            cache_size=8 * MIB,
            clock=self.clock,
        )

    def messages(self) -> Counter[str]:
        rows = self.guest.channel.statistics().requests
        return Counter({name: row.count for name, row in rows.items()})


@asynccontextmanager
async def viewing(
    host: Path, mode: str, kind: str = "bundled", names: int = 10_000, timeout: float = LONG
) -> AsyncIterator[View]:
    with start_daemon(kind, host) as daemon:
        async with vfsmount.connect(daemon.socket) as guest:
            view = View(guest, mode, names, timeout)
            with view.files:
                yield view
                view.files.check_invariants()


# --- messages ------------------------------------------------------------------------------------


async def stat_often(files: CachedSession) -> None:
    for _ in range(100):
        assert (await files.stat("d/file")).size == MIB


async def stat_absent_often(files: CachedSession) -> None:
    for _ in range(100):
        with pytest.raises(RemoteErrno):
            await files.stat("d/absent")


async def list_long(files: CachedSession) -> None:
    assert len(await files.scandir("d")) == 1001


async def list_names(files: CachedSession) -> None:
    assert len(await files.listdir("d")) == 1001


async def read_all(files: CachedSession) -> None:
    assert len(await files.read("d/file")) == MIB


ASKS = ("LOOKUP", "GETATTR")
LISTS = ("READDIR", "READDIRPLUS")
#: Action: what is counted, and by mode the least and most that the second time may cost.
PROOFS: list[tuple[Callable[[CachedSession], Awaitable[None]], tuple[str, ...], dict[str, range]]]
PROOFS = [
    (stat_often, ASKS, {"none": range(100, 1000), "auto": range(3), "always": range(1)}),
    (stat_absent_often, ASKS, {"none": range(100, 1000), "auto": range(2), "always": range(1)}),
    (list_long, (*ASKS, *LISTS), {"none": range(2, 41), "auto": range(1, 41), "always": range(1)}),
    (list_long, ASKS, {"none": range(1, 2), "auto": range(1), "always": range(1)}),
    (list_names, (*LISTS, "OPENDIR"), {"none": range(2, 41), "auto": range(2, 41),
                                       "always": range(1)}),
    (list_names, ("READDIRPLUS",), {"none": range(1), "auto": range(1), "always": range(1)}),
    (read_all, ("READ", "OPEN"), {"none": range(2, 4), "auto": range(1), "always": range(1)}),
    (read_all, ("GETATTR",), {"none": range(1), "auto": range(1, 2), "always": range(1)}),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
async def test_messages(host: Path, mode: str, daemon_kind: str) -> None:
    (host / "d").mkdir()
    (host / "d" / "file").write_bytes(os.urandom(MIB))
    for number in range(1000):
        (host / "d" / f"entry-{number:04}").touch()
    async with viewing(host, mode, daemon_kind) as view:
        for act, opcodes, allowed in PROOFS:
            await act(view.files)
            before = view.messages()
            await act(view.files)
            counted = view.messages() - before
            assert sum(counted[name] for name in opcodes) in allowed[mode], (act, counted)


async def test_16_mib_in_20_messages(host: Path) -> None:
    content = os.urandom(16 * MIB)
    (host / "file").write_bytes(content)
    async with viewing(host, "auto") as view:
        assert await view.files.read("file") == content
        assert view.messages()["READ"] <= 20


async def test_little_is_read_where_little_is_wanted(host: Path) -> None:
    (host / "file").write_bytes(os.urandom(16 * MIB))
    async with viewing(host, "auto") as view:
        for _ in range(4):
            await view.files.read("file", 100, 5 * MIB + 7)
        assert view.messages()["READ"] == 1


async def test_a_listing_goes_on_after_names_that_were_removed(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As virtiofsd (C) fails for them, when attributes are asked for, too."""
    monkeypatch.setattr("vfsmount.client.cached._LISTING", 4096)
    for number in range(300):
        (host / f"name-{number:03}").touch()
    async with viewing(host, "auto", "c") as view:
        ask = view.guest.readdirplus

        async def readdirplus(*args: Any) -> list[fuse.DirEntryPlus]:
            entries = await ask(*args)
            for number in range(0, 300, 5):
                (host / f"name-{number:03}").unlink(missing_ok=True)
            return entries

        monkeypatch.setattr(view.guest, "readdirplus", readdirplus)
        found = {name for name, _ in await view.files.scandir()}
        assert view.guest.channel.statistics().requests["READDIRPLUS"].errors
    assert {one.name.encode() for one in host.iterdir()} <= found


# --- who sees what, and when ---------------------------------------------------------------------


async def exists(files: CachedSession) -> bool:
    try:
        await files.stat("x")
    except RemoteErrno as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


async def size(files: CachedSession) -> int:
    return (await files.stat("x")).size


async def mode_bits(files: CachedSession) -> int:
    return (await files.stat("x")).mode


async def mtime(files: CachedSession) -> int:
    attr = await files.stat("x")
    return attr.mtime * 10**9 + attr.mtimensec


async def links(files: CachedSession) -> int:
    return (await files.stat("x")).nlink


async def listing(files: CachedSession) -> list[str]:
    return sorted(map(os.fsdecode, await files.listdir()))


async def content(files: CachedSession) -> bytes:
    return await files.read("x")


async def target(files: CachedSession) -> str:
    return os.fsdecode(await files.readlink("x"))


LOOKS = {
    "exists": exists,
    "size": size,
    "mode": mode_bits,
    "mtime": mtime,
    "number of links": links,
    "listing": listing,
    "open and read": content,
    "its target": target,
}
#: Rows that say something about a view, which has no handles; "exists" of links is about another.
SEEN = [row for row in ROWS if row.look in LOOKS and row.name != "hard link: exists"]


async def look(row: Row, files: CachedSession) -> object:
    try:
        return await LOOKS[row.look](files)
    except RemoteErrno as error:
        return errno.errorcode[error.errno]


@pytest.mark.parametrize("mode", MODES)
async def test_changed_elsewhere(host: Path, mode: str) -> None:
    async with viewing(host, mode) as view:
        for row in SEEN:
            for path in host.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            view.files.close()
            row.prepare(host)
            old = await look(row, view.files)
            assert old == look_at(row, host, -1), row.name
            row.act(host)
            new = look_at(row, host, -1)
            found = await look(row, view.files)
            if row.when(mode) in (When.AT_ONCE, When.NEXT_OPEN):
                assert found == new, row.name
            assert found in (old, new), row.name
            view.clock.now += LONG
            if mode == "auto":
                assert await look(row, view.files) == new, row.name
            elif mode == "always" and row.look not in ("its target", "open and read"):
                assert await look(row, view.files) == found, row.name


@pytest.mark.parametrize("mode", MODES)
async def test_own_changes_are_seen_at_once(host: Path, mode: str) -> None:
    async with viewing(host, mode) as view:
        files = view.files

        async def compare() -> None:
            """Everything that can be looked at is as it is at the host."""
            waiting = [b""]
            while waiting:
                folder = waiting.pop()
                path = host / os.fsdecode(folder)
                names = dict(await files.scandir(folder))
                assert sorted(names) == sorted(await files.listdir(folder))
                assert sorted(map(os.fsdecode, names)) == sorted(os.listdir(path))
                for name, attr in names.items():
                    inside, found = (
                        b"/".join(filter(None, (folder, name))),
                        (path / os.fsdecode(name)).stat(),
                    )
                    assert await files.stat(inside) == attr
                    assert (attr.size, attr.mode) == (found.st_size, found.st_mode)
                    assert (attr.nlink, attr.mtimensec) == (
                        found.st_nlink,
                        found.st_mtime_ns % 10**9,
                    )
                    if (path / os.fsdecode(name)).is_dir():
                        waiting.append(inside)
                    else:
                        expected = (path / os.fsdecode(name)).read_bytes()
                        assert await files.read(inside) == expected

        await compare()
        for step in (
            lambda: files.mkdir("d"),
            lambda: files.create("d/x", b"first"),
            lambda: files.write("d/x", b"longer than it was", 3),
            lambda: files.write("d/x", b"far away", 300_000),
            lambda: files.setattr("d/x", setattr_in(size=200_000)),
            lambda: files.setattr("d/x", setattr_in(mode=0o600)),
            lambda: files.create("d/y", b"second"),
            lambda: files.rename("d/y", "d/x"),
            lambda: files.create("d/x", b"anew"),
            lambda: files.mkdir("e"),
            lambda: files.rename("d", "e/d"),
            lambda: files.unlink("e/d/x"),
            lambda: files.rmdir("e/d"),
        ):
            await step()
            await compare()


async def test_random_operations(host: Path) -> None:
    """Two files, reads of all kinds and sizes, in mode always: only own changes are to be seen."""
    dice = random.Random(5)
    model = {"a": bytearray(), "b": bytearray()}
    async with viewing(host, "always", names=50) as view:
        files = view.files
        for name in model:
            await files.create(name)
        for _ in range(400):
            name = dice.choice("ab")
            place, length = dice.randrange(400_000), dice.choice((1, 5000, 300_000))
            action = dice.choice(("read", "read", "write", "truncate", "rename", "stat"))
            if action == "read":
                found = await files.read(name, length, place)
                assert found == model[name][place : place + length]
            elif action == "write":
                data = dice.randbytes(length)
                await files.write(name, data, place)
                model[name].extend(bytes(max(0, place - len(model[name]))))
                model[name][place : place + length] = data
            elif action == "truncate":
                await files.setattr(name, setattr_in(size=place))
                del model[name][place:]
                model[name].extend(bytes(place - len(model[name])))
            elif action == "rename":
                other = "ab".replace(name, "")
                await files.rename(name, other)
                await files.create(name, b"new")
                model[other], model[name] = model[name], bytearray(b"new")
            assert (await files.stat(name)).size == len(model[name])
            files.check_invariants()
        for name, expected in model.items():
            assert await files.read(name) == expected == (host / name).read_bytes()


async def test_a_write_goes_to_the_file_that_has_the_name_now(host: Path) -> None:
    (host / "file").write_bytes(b"before")
    async with viewing(host, "auto") as view:
        await view.files.read("file")
        (host / "new").write_bytes(b"after.")
        (host / "new").replace(host / "file")
        await view.files.write("file", b"A")
        assert (host / "file").read_bytes() == b"After."
        (host / "file").unlink()
        with pytest.raises(RemoteErrno, match="ENOENT"):
            await view.files.write("file", b"lost")


@pytest.mark.parametrize("change", ["unlink", "create", "rename"])
async def test_a_change_by_a_name_unknown_here_is_seen_by_the_others(
    host: Path, change: str
) -> None:
    (host / "one").write_bytes(b"contents")
    (host / "one").chmod(0o666)
    (host / "two").hardlink_to(host / "one")
    (host / "other").touch()
    async with viewing(host, "always") as view:
        assert (await view.files.stat("one")).nlink == 2
        if change == "unlink":
            await view.files.unlink("two")
        elif change == "create":
            await view.files.create("two")
        else:
            await view.files.rename("other", "two")
        attr, info = await view.files.stat("one"), (host / "one").stat()
        assert (attr.nlink, attr.size) == (info.st_nlink, info.st_size)


async def test_an_answer_that_a_change_overtook_is_not_believed(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "x").write_bytes(b"content")
    async with viewing(host, "always") as view:
        files, ask, read = view.files, view.guest.getattr, view.guest.read

        async def slow_getattr(nodeid: int) -> AttrOut:
            answer = await ask(nodeid)
            await files.setattr("x", setattr_in(size=100))
            return answer

        async def slow_read(nodeid: int, fh: int, start: int, size: int) -> bytes:
            answer = await read(nodeid, fh, start, size)
            await files.write("x", b"CON")
            return answer

        async with files.node("x") as nodeid:
            await files.setattr(nodeid, setattr_in(mode=0o640))  # so that it has to be asked
            with monkeypatch.context() as patch:
                patch.setattr(view.guest, "getattr", slow_getattr)
                patch.setattr(view.guest, "read", slow_read)
                assert (await files.stat(nodeid)).size == 7
                assert await files.read(nodeid, 3) == b"con"
            assert (await files.stat(nodeid)).size == 100
            assert await files.read(nodeid, 7) == b"CONtent"


async def test_contents_of_an_unchanged_file_outlive_its_name(host: Path) -> None:
    (host / "x").write_bytes(b"content")
    async with viewing(host, "auto") as view:
        for _ in range(3):
            assert await view.files.read("x") == b"content"
            view.clock.now += LONG
        assert view.messages()["LOOKUP"] == 3
        assert view.messages()["READ"] == 1


# --- what is given back --------------------------------------------------------------------------


async def test_nodes_are_given_back_beyond_the_budget(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        (host / f"{number}").touch()
    async with viewing(host, "always", names=100) as view:
        given: list[int] = []
        forget = view.guest.forget

        def counted(nodeid: int, nlookup: int = 1) -> None:
            given.append(nlookup)
            forget(nodeid, nlookup)

        monkeypatch.setattr(view.guest, "forget", counted)
        for number in range(300):
            await view.files.stat(f"{number}")
        assert 200 <= sum(given) <= 210
        view.files.close()
        assert sum(given) == 300


async def test_nothing_is_believed_of_nodes_that_were_given_back(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "d").mkdir()
    for number in range(30):
        (host / "d" / str(number)).touch()
    async with viewing(host, "always", names=20) as view:
        given: list[int] = []
        monkeypatch.setattr(view.guest, "forget", lambda nodeid, _=1: given.append(nodeid))
        await view.files.scandir("d")
        assert len(given) >= 20
        now = view.clock()
        assert not [one for one in given if view.files._attributes.get(one, now) is not None]


async def test_a_node_in_use_is_given_back_when_it_is_not(host: Path) -> None:
    (host / "x").write_bytes(b"content")
    async with viewing(host, "always") as view:
        async with view.files.node("x") as nodeid:
            await view.files.unlink("x")
            assert (await view.files.stat(nodeid)).nlink == 0
            assert await view.files.read(nodeid) == b"content"
        with pytest.raises(RemoteErrno):
            await view.files.stat("x")


async def test_many_tasks_share_a_view(host: Path) -> None:
    for number in range(20):
        (host / f"{number}").write_bytes(b"%d" % number * 1000)
    async with viewing(host, "auto", names=10) as view:

        async def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(50):
                number = dice.randrange(20)
                assert await view.files.read(f"{number}") == b"%d" % number * 1000
                await view.files.scandir()

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(work, seed)


async def test_mode_host_heeds_the_daemon(host: Path) -> None:
    (host / "x").write_bytes(b"content")
    with start_daemon("bundled", host, cache="always") as daemon:
        async with vfsmount.connect(daemon.socket) as guest:
            with guest.cached(vfsmount.CachePolicy.for_mode("host")) as files:
                await files.stat("x")
                before = guest.channel.statistics().requests["LOOKUP"].count
                await files.stat("x")
                assert guest.channel.statistics().requests["LOOKUP"].count == before


async def test_paths_stay_within_the_share(host: Path) -> None:
    async with viewing(host, "auto") as view:
        with pytest.raises(ValueError, match=r"no '\.\.'"):
            await view.files.stat("../etc/passwd")
