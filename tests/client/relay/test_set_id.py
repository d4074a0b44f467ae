"""Set-id bits with a daemon that leaves them to us: what is sent ahead of which request."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.client.relay.fake_kernel import AUTO, on_stage
from tests.support.wait import wait_until_async
from vfsmount.cache.policy import CachePolicy
from vfsmount.channel import ChannelOptions
from vfsmount.client.relay import memory as memory_module
from vfsmount.client.relay.memory import SetIdMemory, mode_left
from vfsmount.wire import fuse
from vfsmount.wire.fuse import NotifyCode, Opcode, SetattrValid, WriteFlag

if TYPE_CHECKING:
    from tests.client.relay.fake_kernel import Reply, Stage
    from vfsmount.testing.fake_device import DeviceRequest

NONE = CachePolicy.for_mode("none")
LONG = CachePolicy.for_mode("auto", 600.0)
#: Seconds that a request may take: longer than what is answered at once on a busy machine.
SHORT = 2.0
ATTR = fuse.Attr(7, 100, 8, 1, 2, 3, 4, 5, 6, 0o100644, 1, 0, 0, 0, 4096, 0)
BLANK = fuse.SETATTR_IN.unpack(bytes(fuse.SETATTR_IN.size))
ENTRY = fuse.EntryOut(9, 0, 0, 0, 0, 0, ATTR)
USER = 4001
FILE, SOURCE = 9, 8


def write(flags: int) -> bytes:
    return fuse.WRITE_IN.values(1, 0, 4, flags, 0, 0) + b"data"


def setattr_body(valid: int) -> bytes:
    return fuse.SETATTR_IN.pack(BLANK._replace(valid=valid, size=3))


WRITE_BY_SOMEBODY, WRITE_BY_ROOT = write(WriteFlag.KILL_SUIDGID), write(0)
KILL = SetattrValid.KILL_SUIDGID
COPY = fuse.COPY_FILE_RANGE_IN.values(2, 0, FILE, 1, 0, 4, 0)


class Host:
    """A device with one file.

    Attributes:
        mode: Of the file.
        size: The same.
        seen: All requests.
        errors: By opcode, what goes wrong.
        kept: GETATTRs that wait, where they are to.
    """

    def __init__(self, mode: int = 0o106755) -> None:
        self.mode = mode
        self.size = 100
        self.seen: list[DeviceRequest] = []
        self.errors: dict[int, int] = {}
        self.kept: list[DeviceRequest] | None = None

    def __call__(self, request: DeviceRequest) -> None:
        self.seen.append(request)
        opcode = request.header.opcode
        if opcode == Opcode.GETATTR and self.kept is not None:
            self.kept.append(request)
        elif opcode in self.errors:
            request.reply(error=-self.errors[opcode])
        else:
            self.answer(request)

    def answer(self, request: DeviceRequest) -> None:
        opcode = request.header.opcode
        attr = ATTR._replace(mode=self.mode, size=self.size)
        if opcode == Opcode.LOOKUP:
            request.reply(fuse.ENTRY_OUT.pack(ENTRY._replace(attr=attr)))
        elif opcode in (Opcode.GETATTR, Opcode.SETATTR):
            args = fuse.decode_request(request.data).args
            if opcode == Opcode.SETATTR and args.valid & SetattrValid.MODE:
                self.mode = 0o100000 | args.mode
            attr = attr._replace(mode=self.mode)
            request.reply(fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr)))
        elif opcode in (Opcode.OPEN, Opcode.WRITE):
            request.reply(bytes(request.room - fuse.OUT_HEADER.size))
        elif request.room:
            request.reply()
        else:
            request.use()

    def since(self, count: int) -> list[tuple[int, int]]:
        """Opcodes and nodes of what came after the first few."""
        return [(one.header.opcode, one.header.nodeid) for one in self.seen[count:]]


AHEAD = [(Opcode.GETATTR, FILE), (Opcode.SETATTR, FILE)]


async def change(
    stage: Stage, opcode: int, nodeid: int, body: bytes, uid: int = USER
) -> tuple[Reply, list[Reply]]:
    """Send a request; return its reply, and what else came before that."""
    unique = stage.send(opcode, nodeid, body, uid=uid)
    notes = []
    while (reply := await stage.receive()).unique != unique:
        notes.append(reply)
    return reply, notes


@pytest.fixture
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an open has found may answer the kernel's question however late that comes."""
    monkeypatch.setattr("vfsmount.client.relay.opens._PARKED_NS", 10**12)


CHANGES = [
    (Opcode.WRITE, FILE, WRITE_BY_SOMEBODY, USER, True),
    (Opcode.WRITE, FILE, WRITE_BY_ROOT, 0, False),
    (Opcode.SETATTR, FILE, setattr_body(SetattrValid.SIZE | KILL), USER, True),
    (Opcode.SETATTR, FILE, setattr_body(SetattrValid.UID | KILL), 0, True),
    (Opcode.SETATTR, FILE, setattr_body(SetattrValid.SIZE), USER, False),
    (Opcode.SETATTR, FILE, setattr_body(SetattrValid.MTIME | SetattrValid.FH), USER, False),
    (Opcode.SETATTR, FILE, setattr_body(0), 0, True),
    (Opcode.SETATTR, FILE, setattr_body(SetattrValid.FH), USER, True),
    (Opcode.FALLOCATE, FILE, bytes(32), USER, True),
    (Opcode.FALLOCATE, FILE, bytes(32), 0, False),
    (Opcode.COPY_FILE_RANGE, SOURCE, COPY, USER, True),
    (Opcode.COPY_FILE_RANGE_64, SOURCE, COPY, USER, True),
    (Opcode.COPY_FILE_RANGE, SOURCE, COPY, 0, False),
]


@pytest.mark.parametrize(
    ("opcode", "nodeid", "body", "uid", "clears"),
    CHANGES,
    ids=[f"{one[0].name}-{number}" for number, one in enumerate(CHANGES)],
)
@pytest.mark.parametrize("policy", [NONE, AUTO], ids=["none", "auto"])
async def test_bits_go_before_what_must_clear_them(
    policy: CachePolicy, opcode: int, nodeid: int, body: bytes, uid: int, clears: bool
) -> None:
    host = Host()
    async with on_stage(host, policy, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        for ahead in (AHEAD if clears else [], []):
            before = len(host.seen)
            reply, notes = await change(stage, opcode, nodeid, body, uid)
            assert reply.errno == 0
            assert host.since(before) == [*ahead, (opcode, nodeid)]
            # The kernel is told that the file's attributes are old, before the change is through.
            assert [(one.unique, -one.errno) for one in notes] == [
                (0, NotifyCode.INVAL_INODE)
            ] * bool(ahead)
    assert host.mode == (0o100755 if clears else 0o106755)


async def test_the_flag_of_a_setattr_stays_here() -> None:
    host = Host(0o100644)
    async with on_stage(host, AUTO, clears_set_id=False) as stage:
        await stage.call(Opcode.SETATTR, FILE, setattr_body(SetattrValid.SIZE | KILL))
    assert [fuse.decode_request(one.data).args.valid for one in host.seen] == [SetattrValid.SIZE]


async def test_a_daemon_that_clears_them_is_told_and_nothing_else() -> None:
    host = Host()
    valid = SetattrValid.SIZE | KILL
    async with on_stage(host, AUTO, clears_set_id=True) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        await stage.call(Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        await stage.call(Opcode.SETATTR, FILE, setattr_body(valid))
    assert host.since(1) == [(Opcode.WRITE, FILE), (Opcode.SETATTR, FILE)]
    assert fuse.decode_request(host.seen[-1].data).args.valid == valid


async def test_what_has_changed_at_the_host_is_not_undone() -> None:
    """The mode is asked for, not remembered: since it was seen the file has become private."""
    host = Host(0o104777)
    async with on_stage(host, NONE, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.mode = 0o104700
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
    assert host.mode == 0o100700


async def test_a_reply_without_bits_proves_nothing() -> None:
    """It may be older than the one with bits."""
    host = Host(0o104755)
    async with on_stage(host, NONE, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.mode = 0o100755
        await stage.call(Opcode.GETATTR, FILE, bytes(16))
        host.mode = 0o104755
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        assert host.mode == 0o100755
        # The kernel knows it still, whatever it gives back: not all references, perhaps.
        host.mode = 0o104755
        await stage.call(Opcode.GETATTR, FILE, bytes(16))
        stage.send(Opcode.FORGET, FILE, fuse.FORGET_IN.values(1))
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        assert host.mode == 0o100755


@pytest.mark.usefixtures("_no_hurry")
async def test_bits_that_an_open_has_found_are_seen() -> None:
    """Its check answers the kernel's GETATTR."""
    host = Host(0o100777)
    async with on_stage(host, LONG, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.mode, host.size = 0o104777, 200
        await change(stage, Opcode.OPEN, FILE, fuse.OPEN_IN.values(os.O_WRONLY, 0))
        host.seen.clear()
        await change(stage, Opcode.GETATTR, FILE, bytes(16))
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
    assert host.since(0) == [*AHEAD, (Opcode.WRITE, FILE)]
    assert host.mode == 0o100777


async def test_a_request_that_waits_is_given_up_like_any_other() -> None:
    host = Host()
    options = ChannelOptions(request_timeout=SHORT)
    async with on_stage(host, NONE, clears_set_id=False, options=options) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.kept = []
        reply, _ = await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        assert reply.errno == errno.ETIMEDOUT
        kept, host.kept = host.kept, None
        host.answer(kept[0])
        assert not (await stage.receive()).unique
        await stage.nothing_comes()
        assert host.since(1) == AHEAD
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)


@pytest.mark.usefixtures("_no_hurry")
@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.SETATTR])
async def test_what_cannot_be_cleared_is_not_written_to(opcode: int) -> None:
    host = Host()
    async with on_stage(host, LONG, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.errors[opcode] = errno.EPERM
        for _ in range(2):
            reply, _ = await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
            assert reply.errno == errno.EPERM
        assert Opcode.WRITE not in [one.header.opcode for one in host.seen]
        host.errors.clear()
        reply, _ = await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        assert reply.errno == 0
        # Nothing counts as under way that is not: what an open finds may answer the kernel.
        host.size = 200
        reply, _ = await change(stage, Opcode.OPEN, FILE, fuse.OPEN_IN.values(os.O_RDONLY, 0))
        assert reply.errno == 0
        host.seen.clear()
        await change(stage, Opcode.GETATTR, FILE, bytes(16))
        assert not host.seen


async def test_all_that_comes_meanwhile_waits_as_well() -> None:
    host = Host()
    async with on_stage(host, NONE, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.kept = []
        sent = [stage.send(Opcode.WRITE, FILE, WRITE_BY_SOMEBODY) for _ in range(3)]
        await wait_until_async(lambda: bool(host.kept), 5, "a GETATTR")
        await stage.nothing_comes()
        assert host.since(1) == [(Opcode.GETATTR, FILE)]
        host.answer(host.kept[0])
        got = [(await stage.receive()).unique for _ in range(4)]
    assert sorted(got) == [0, *sent]
    assert host.since(1) == [*AHEAD, *[(Opcode.WRITE, FILE)] * 3]


async def test_bits_that_come_back_while_they_go_are_looked_for_again() -> None:
    host = Host()
    async with on_stage(host, NONE, clears_set_id=False) as stage:
        await stage.call(Opcode.LOOKUP, 1, b"file\0")
        host.kept = []
        stage.send(Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
        await wait_until_async(lambda: bool(host.kept), 5, "a GETATTR")
        await stage.call(Opcode.LOOKUP, 1, b"file\0")  # of before, or of after: who knows
        kept, host.kept = host.kept, None
        host.answer(kept[0])
        assert not (await stage.receive()).unique
        assert (await stage.receive()).errno == 0
        host.mode = 0o104755
        await change(stage, Opcode.WRITE, FILE, WRITE_BY_SOMEBODY)
    assert host.mode == 0o100755


# --- what is remembered ---


@pytest.mark.parametrize(
    ("mode", "left"),
    [
        (0o104755, 0o755),
        (0o106777, 0o777),
        (0o102711, 0o711),
        (0o102701, None),  # sgid without group execute is mandatory locking
        (0o100755, None),
        (0o042755, None),  # a folder's sgid is something else
        (0o120777, None),
    ],
)
def test_what_a_write_leaves_of_a_mode(mode: int, left: int | None) -> None:
    assert mode_left(mode) == left


def test_files_that_the_kernel_has_forgotten_are_forgotten_once_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "_FEW", 10)
    now = [1000.0]
    monkeypatch.setattr(memory_module, "monotonic", lambda: now[0])
    memory = SetIdMemory()
    known = {1, 2, 11}
    for nodeid in range(1, 11):
        memory.see(nodeid, 0o104755)
    now[0] += 100
    memory.tidy(known.__contains__)
    assert len(memory.suspects) == 10  # few

    memory.see(11, 0o104755)
    memory.see(12, 0o104755)  # the kernel may not have come to it yet
    memory.tidy(known.__contains__)

    assert set(memory.suspects) == {1, 2, 11, 12}
