"""Who is passed through with which id: the table alone, with a daemon and a kernel made up."""

from __future__ import annotations

import errno
import os
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsmount.client.relay import passed_nodes, passthrough
from vfsmount.client.relay.opens import OpenCheck
from vfsmount.client.relay.passthrough import Passthrough
from vfsmount.wire.fuse import Opcode, OpenOutFlag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vfsmount.channel.inflight import Pending
    from vfsmount.client.relay.slots import Slot

REQUEST, REPLY = 0, 256
PASSED = int(OpenOutFlag.PASSTHROUGH)
RANGE = 2 << 20


class Stage:
    """A table with its surroundings.

    Attributes:
        files: What the daemon gives out, by node.
        readonly: It gives no descriptor for writing.
        opened: Ids that are registered.
        sent: Requests on their way to the daemon.
    """

    def __init__(self) -> None:
        self.memory = bytearray(512)
        self.files: dict[int, Path] = {}
        self.readonly = False
        self.refusal = 0
        self.opened: set[int] = set()
        self.last_id = 0
        self.sent: list[Pending] = []
        self.mapped: dict[int, tuple[int, bool]] = {}
        self.free = iter(range(0, 4 * RANGE, RANGE))
        queue = SimpleNamespace(submit=self.submit, kick=lambda: None)
        loan = SimpleNamespace(requests=queue, memory=SimpleNamespace(map=self.memory))
        window = SimpleNamespace(
            reserve=lambda: next(self.free, None), range_size=RANGE, descriptor=self.descriptor
        )
        files = SimpleNamespace(open=self.register, close=self.opened.remove)
        self.table = Passthrough(cast("Any", loan), cast("Any", window), cast("Any", files), 0)
        self.nodes, self.set_ups = self.table.nodes, self.table.set_ups
        self.handle = 0

    def submit(self, pending: Pending, *, kick: bool = True) -> bool:
        self.sent.append(pending)
        return True

    def descriptor(self, moffset: int, *, write: bool) -> int | None:
        nodeid, writable = self.mapped[moffset]
        if write and not writable:
            return None
        return os.open(self.files[nodeid], os.O_RDWR if writable else os.O_RDONLY)

    def check_invariants(self) -> None:
        self.nodes.check_invariants()
        self.set_ups.check_invariants()

    def register(self, fd: int, *, writable: bool) -> int:
        assert os.get_inheritable(fd) is False
        if self.refusal:
            raise OSError(self.refusal, "refused")
        self.last_id += 1
        self.opened.add(self.last_id)
        return self.last_id

    def serve(self) -> list[Slot]:
        """Let the daemon do all that it was asked; return the opens that are ready."""
        ready: list[Slot] = []
        while self.sent:
            pending = self.sent.pop(0)
            if pending.opcode == Opcode.SETUPMAPPING:
                _, _, _, flags, moffset = struct.unpack("<QQQQQ", pending.body)
                pending.errno = errno.EROFS if self.readonly and flags & 1 else 0
                self.mapped[moffset] = (pending.nodeid, bool(flags & 1))
            ready += self.table.learned(pending)
            self.check_invariants()
        return ready

    def begin(self, nodeid: int, flags: int) -> Slot:
        struct.pack_into("<I", self.memory, REQUEST + 40, flags)
        slot = SimpleNamespace(
            check=OpenCheck(), at=REQUEST, data_at=REPLY, length=16, opcode=Opcode.OPEN,
            nodeid=nodeid, errno=0,
        )  # fmt: skip
        self.table.begin(cast("Slot", slot))
        slot.check.replied = True
        return cast("Slot", slot)

    def answer(self, slot: Slot) -> tuple[int, int, int, int]:
        """Return errno, handle, flags and id."""
        self.handle += 1
        struct.pack_into("<QIi", self.memory, REPLY, self.handle, OpenOutFlag.KEEP_CACHE, 0)
        assert slot.check is not None
        slot.check.reply = bytes(self.memory[REPLY : REPLY + 16])
        error = self.table.decide(slot)
        self.check_invariants()
        return (error, *struct.unpack_from("<QIi", self.memory, REPLY))

    def open(self, nodeid: int, flags: int = os.O_RDONLY) -> tuple[int, int, int, int]:
        slot = self.begin(nodeid, flags)
        self.serve()
        return self.answer(slot)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage()
    for nodeid in range(2, 9):
        stage.files[nodeid] = tmp_path / f"{nodeid}"
        stage.files[nodeid].write_bytes(b"content")
    yield stage
    stage.serve()
    stage.check_invariants()


def test_all_opens_of_a_file_share_one_id(stage: Stage) -> None:
    first, second = stage.open(2), stage.open(2)
    assert (first[2:], second[2:]) == ((PASSED, 1), (PASSED, 1))
    assert stage.open(3)[2:] == (PASSED, 2)


def test_the_id_outlives_the_last_handle_but_not_the_node(stage: Stage) -> None:
    _, handle, _, number = stage.open(2)
    stage.nodes.released(handle)
    _, handle, _, again = stage.open(2)
    assert again == number
    stage.nodes.forget(2)
    assert stage.opened == {number}  # still open
    stage.nodes.released(handle)
    assert stage.opened == set()
    assert stage.open(2)[3] == number + 1


def test_opens_that_come_together_wait_for_one_descriptor(stage: Stage) -> None:
    slots = [stage.begin(2, os.O_RDONLY), stage.begin(2, os.O_RDONLY)]
    assert len(stage.sent) == 1
    assert stage.table.waiting() == slots
    assert stage.serve() == slots
    assert [stage.answer(slot)[3] for slot in slots] == [1, 1]


def test_a_reader_s_descriptor_does_not_let_anybody_write(stage: Stage) -> None:
    stage.readonly = True
    assert stage.open(2)[2] == PASSED
    error, *_ = stage.open(2, os.O_RDWR)
    assert error == errno.EROFS
    stage.readonly = False


def test_a_writer_alone_goes_by_message_where_none_is_given(stage: Stage) -> None:
    stage.readonly = True
    error, handle, flags, _ = stage.open(2, os.O_WRONLY)
    assert (error, flags & PASSED) == (0, 0)
    assert stage.open(2)[2] & PASSED == 0  # and so do all others meanwhile
    stage.nodes.released(handle)
    stage.nodes.released(handle + 1)
    assert stage.open(2)[2] == PASSED


def test_more_rights_are_asked_for_and_the_id_stays(stage: Stage) -> None:
    _, _, _, number = stage.open(2)
    assert stage.open(2, os.O_RDWR) == (0, 2, PASSED, number)
    assert stage.nodes.is_writer(2)
    assert not stage.nodes.is_writer(1)
    assert stage.opened == {number}


def test_the_daemon_lets_go_of_files_for_writing_soon(stage: Stage) -> None:
    """Of others when there is time: they keep nobody from executing the file."""
    reader, writer = stage.begin(2, os.O_RDONLY), stage.begin(3, os.O_RDWR)
    for pending in stage.sent[:]:
        stage.sent.remove(pending)
        moffset = struct.unpack_from("<Q", pending.body, 32)[0]
        stage.mapped[moffset] = (pending.nodeid, pending.nodeid == 3)
        stage.table.learned(pending)
    assert stage.sent == []
    (until,) = stage.set_ups.lingering.values()
    stage.set_ups.let_go(until - 1)
    assert stage.sent == []
    stage.set_ups.let_go(until)
    (removal,) = stage.sent
    assert removal.opcode == Opcode.REMOVEMAPPING
    gone = struct.unpack_from("<Q", removal.body, 4)[0]
    assert stage.mapped[gone] == (3, True)
    assert stage.set_ups.untidy
    stage.serve()
    stage.set_ups.tidy()
    assert [one.opcode for one in stage.sent] == [Opcode.REMOVEMAPPING]
    stage.serve()
    assert not stage.set_ups.untidy
    assert [stage.answer(slot)[2] for slot in (reader, writer)] == [PASSED, PASSED]


def test_the_next_file_takes_the_place_of_one_for_writing(stage: Stage) -> None:
    """And so the daemon lets go of it without a message; not if it refuses the next."""
    stage.open(2, os.O_RDWR)
    stage.open(3)
    assert not stage.set_ups.lingering
    stage.open(4, os.O_RDWR)
    stage.readonly = True
    stage.open(5, os.O_RDWR)
    assert stage.set_ups.lingering
    stage.set_ups.let_go(1 << 63)
    assert [one.opcode for one in stage.sent] == [Opcode.REMOVEMAPPING]
    stage.serve()
    assert not stage.set_ups.lingering


def test_another_file_for_the_same_node_is_refused(stage: Stage) -> None:
    stage.open(2)
    stage.files[2] = stage.files[3]
    assert stage.open(2, os.O_RDWR)[0] == errno.EIO


def test_pages_of_a_file_that_was_passed_through_are_not_kept(stage: Stage) -> None:
    _, handle, _, _ = stage.open(2)
    stage.nodes.released(handle)
    stage.nodes.forget(3)
    stage.readonly = True
    assert stage.open(2, os.O_WRONLY)[2] == 0
    assert stage.open(4, os.O_WRONLY)[2] == OpenOutFlag.KEEP_CACHE


def test_a_file_opened_again_gets_the_backing_file_that_is_there(stage: Stage) -> None:
    assert stage.table.backing_again(2) is None  # every file is passed through, so is this one
    _, handle, _, number = stage.open(2)
    stage.nodes.released(handle)
    assert stage.table.backing_again(2) == number
    stage.table.opened_again(2, handle, number)
    assert stage.nodes.is_passed(2)
    assert not stage.nodes.is_writer(handle)
    stage.check_invariants()
    stage.nodes.released(handle)
    assert stage.opened == {number}


def test_a_small_file_opened_again_goes_by_message_again(stage: Stage) -> None:
    stage.table._pass_from = 1000
    assert stage.table.backing_again(2) == 0
    stage.table.opened_again(2, 7, 0)
    stage.check_invariants()
    assert stage.table.backing_again(2) == 0
    assert stage.table.facts()["opens_by_message"] == 1


def test_what_is_not_certain_is_asked_for_again(stage: Stage) -> None:
    _, handle, _, _ = stage.open(2)
    stage.nodes.released(handle)
    stage.readonly = True
    _, handle, _, _ = stage.open(2, os.O_WRONLY)
    assert stage.table.backing_again(2) is None  # pages may be from before it was passed through
    stage.nodes.released(handle)
    assert stage.table.backing_again(2) == 1


def test_set_id_bits_are_the_daemon_s_business(stage: Stage) -> None:
    stage.files[2].chmod(0o6755)
    assert stage.open(2, os.O_WRONLY)[2] & PASSED == 0
    _, handle, flags, _ = stage.open(3, os.O_WRONLY)
    assert flags == PASSED
    stage.nodes.released(handle)
    stage.files[3].chmod(0o6755)
    stage.nodes.has_set_id(3)
    assert stage.open(3, os.O_WRONLY)[2] & PASSED == 0
    assert stage.table.facts()["refusals"] == 0


def test_it_gives_up_where_nothing_can_be_had(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passthrough, "_PATIENCE", 3)
    stage.refusal = errno.ELOOP
    for nodeid in (2, 3, 3, 4):
        assert stage.open(nodeid)[2] & PASSED == 0
    assert not stage.table.facts()["active"]
    assert stage.table.facts()["refusals"] == 3
    stage.begin(5, os.O_RDONLY)
    assert stage.sent == []


def test_no_more_ids_are_kept_than_agreed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed_nodes, "_KEPT", 3)
    for nodeid in range(2, 8):
        stage.nodes.released(stage.open(nodeid)[1])
    assert len(stage.opened) == 3
    assert stage.open(7)[3] in stage.opened
    assert stage.open(2)[2] == PASSED


def test_what_the_daemon_changes_later_is_not_read(stage: Stage) -> None:
    """It can write to the reply as long as it likes; the handle was read before."""
    _, other, _, _ = stage.open(3)
    slot = stage.begin(2, os.O_RDONLY)
    stage.serve()
    stage.handle += 1
    struct.pack_into("<QIi", stage.memory, REPLY, stage.handle, 0, 0)
    assert slot.check is not None
    slot.check.reply = bytes(stage.memory[REPLY : REPLY + 16])
    struct.pack_into("<Q", stage.memory, REPLY, other)
    assert stage.table.decide(slot) == 0
    assert struct.unpack_from("<Q", stage.memory, REPLY) == (stage.handle,)
    struct.pack_into("<Q", stage.memory, REPLY, other)
    stage.table.taken_back(slot.check)
    stage.check_invariants()
    assert not stage.nodes.is_passed(2)
    assert stage.nodes.is_passed(3)


STEPS = st.lists(
    st.tuples(st.sampled_from("oorrawwsfdx"), st.integers(2, 5), st.booleans()), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order(steps: list[tuple[str, int, bool]]) -> None:
    """Opens, also again, answers, RELEASEs, FORGETs as they come: the table agrees with itself."""
    stage = Stage()
    stage.files = dict.fromkeys(range(2, 6), _any_file())
    begun: list[Slot] = []
    handles: list[tuple[int, int]] = []
    for what, nodeid, choice in steps:
        if what in "ow":
            begun.append(stage.begin(nodeid, os.O_RDWR if what == "w" else os.O_RDONLY))
        elif what == "s":
            stage.serve()
        elif what == "d":
            stage.readonly = choice
        elif what == "r" and handles:
            stage.nodes.released(handles.pop(0 if choice else -1)[0])
        elif what == "a" and (number := stage.table.backing_again(nodeid)) is not None:
            stage.handle += 1
            stage.table.opened_again(nodeid, stage.handle, number)
            handles.append((stage.handle, nodeid))
            assert (number in stage.opened) == stage.nodes.is_passed(nodeid)
        elif what == "f" and all(one != nodeid for _, one in handles):
            stage.nodes.forget(nodeid)
        for slot in [one for one in begun if one.check is not None and one.check.is_ready()]:
            begun.remove(slot)
            error, handle, flags, number = stage.answer(slot)
            if not error:
                handles.append((handle, slot.nodeid))
                assert (number in stage.opened) == bool(flags & PASSED)
        stage.check_invariants()
    stage.serve()
    assert all(
        one.check is not None and one.check.is_ready() for one in begun
    )  # nobody is forgotten


def _any_file() -> Path:
    from pathlib import Path

    return Path(__file__)
