"""DAX in the relay: files that the kernel reads, writes and maps by itself (FUSE passthrough).

The daemon gives out a file's descriptor when a part of the file is set up in the DAX window. The
relay has no use for the window: it registers the descriptor as the kernel's backing file of the
inode (``backing``), and no READ or WRITE comes any more. Data are the host's page cache.

    OPEN      of a file that has its backing file already: nothing more. Else, where that is asked
              for, a SETUPMAPPING goes along in the same kick. By default a GETATTR does, and the
              SETUPMAPPING follows if the file is large enough to pay for it (``PASS_FROM``)
    CREATE    where every file is to be passed through, a SETUPMAPPING follows the reply, which
              waits for it. By default new and truncated files go by message
    grant     the descriptor comes on the back-end request channel, before the daemon says done. The
              relay's thread serves that channel as well, and waits for neither: both are things
              that happen while it looks for something to do

The rules of the kernel, and ours:

* All opens of an inode are of one kind at a time: passthrough with one id, or by message. While
  there is one of either kind, the others follow it (else: EIO). Opens are counted from the moment
  that they are answered until their RELEASE, which is never sooner than the kernel's own count.
* An open is passed through only if a descriptor has been granted that allows what it wants. If the
  daemon does not grant it while others are passed through, the open fails with its errno.
* An id is kept for a while after the last RELEASE (``_KEPT``), and never longer than the kernel
  knows the inode. The daemon keeps the inode that long in any case.
* A file with set-id bits is written to by message, unless it is passed through already: whose
  writes take the bits off cannot be said to the kernel (``backing``).
* What was refused for good is not asked for again; after a series of refusals and no success,
  nothing is.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from vfsmount.channel.inflight import Pending
from vfsmount.client.relay.backing import drop_capabilities
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, OpenOutFlag, SetupmappingFlag

if TYPE_CHECKING:
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.backing import BackingFiles
    from vfsmount.client.relay.opens import OpenCheck
    from vfsmount.client.relay.slots import Slot
    from vfsmount.dax_shm.window import Window

__all__ = ["CREATES", "PASS_FROM", "Passthrough"]

log = logging.getLogger(__name__)

#: Bytes that a file has by default when it is opened to be passed through. To have it set up costs
#: 180 us, a READ of 128 KiB 40: read once from end to end, a file of 256 KiB takes 1.15 times as
#: long as by message, one of 512 KiB 0.9 times, one of 1 MiB 0.7 times.
PASS_FROM: Final = 512 << 10
#: What ``status`` says of it.
_POLICY: Final = f"files of {PASS_FROM >> 10} KiB and more, as no --dax=SIZE was given"
_POLICY_ALL: Final = "every file, as --dax=SIZE was given"
#: Opcodes that open what they make.
CREATES: Final = frozenset((int(Opcode.CREATE), int(Opcode.TMPFILE)))
#: Ids that are kept of files that nobody has open.
_KEPT: Final = 1024
#: Refusals without one success after which nothing is asked for any more.
_PATIENCE: Final = 16
#: Descriptors that are asked for at a time, and files that stay mapped until there is time.
_RANGES: Final = 32
#: Nanoseconds that the daemon may have a file open for writing for us when we are done with it: as
#: long, nobody can execute it at the host. The next file to be set up comes in its place, which
#: saves a message.
_LINGER_NS: Final = 1_000_000
#: What says nothing about the file.
_PASSING: Final = frozenset(
    (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EINTR,
        errno.EIO,
        errno.ENOSPC,
        errno.ETXTBSY,
        errno.EBUSY,
    )
)

_IN: Final = fuse.IN_HEADER.size
_ENTRY: Final = fuse.ENTRY_OUT.size
_OPEN_OUT: Final = struct.Struct("<QIi")  # fh, open_flags, backing_id
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
_NO_FH: Final = (1 << 64) - 1
#: Open flags of the daemon with which the kernel takes no backing file.
_FOREIGN: Final = OpenOutFlag.NONSEEKABLE | OpenOutFlag.STREAM
#: Of fuse_attr_out: 16 bytes, then fuse_attr, in which it is at 8.
_SIZE_AT: Final = 24
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_READ: Final = 1
_WRITE: Final = 2


class _Node:
    """What is known of one inode.

    Attributes:
        backing_id: 0 for none.
        file: Device and inode number of the backing file.
        granted: What it was granted for, ``_READ | _WRITE``.
        refused: What the daemon or the kernel will not do.
        error: The errno of the last refusal.
        forgotten: The kernel has given references back while it was in use: it goes when it can.
        opens: Opens that are passed through.
        messages: Opens that are served by message.
        passed: It has been passed through before: pages that the kernel has cached may be old.
        asking: What a SETUPMAPPING on its way asks for.
        waiting: Opens that wait for it.
    """

    __slots__ = (
        "asking", "backing_id", "error", "file", "forgotten", "granted", "messages", "nodeid",
        "opens", "passed", "refused", "waiting",
    )  # fmt: skip

    def __init__(self, nodeid: int) -> None:
        self.nodeid = nodeid
        self.backing_id = self.granted = self.refused = self.error = 0
        self.opens = self.messages = self.asking = 0
        self.file = (0, 0)
        self.passed = self.forgotten = False
        self.waiting: list[Slot] = []

    def is_used(self) -> bool:
        """Whether it is open, or about to be."""
        return bool(self.opens or self.messages or self.asking or self.waiting)


class Passthrough:
    """All backing files of a mount, and who uses them; the relay's thread alone.

    ``check_invariants`` says what holds.

    Args:
        loan: Where SETUPMAPPINGs go.
        window: Where the daemon maps.
        files: Registers.
        pass_from: Bytes that a file has to have at least; 0 for any.

    Attributes:
        why: Why nothing is asked for any more; empty while it is.
        lingering: Free ranges in which a file is still mapped for writing, and until when it may
            be, ``perf_counter_ns``.
    """

    def __init__(self, loan: Loan, window: Window, files: BackingFiles, pass_from: int) -> None:
        self.why = ""
        self._pass_from = pass_from
        self._queue = loan.requests
        self._map = loan.memory.map
        self._window = window
        self._files = files
        self.lingering: dict[int, int] = {}
        self._ranges = [at for at in (window.reserve() for _ in range(_RANGES)) if at is not None]
        if not self._ranges:
            self.why = "the window has no range to spare"
        self._nodes: dict[int, _Node] = {}
        #: Nodes with an id that nobody has open, longest first.
        self._kept: dict[int, _Node] = {}
        #: Nodes that wait for a range.
        self._queued: list[_Node] = []
        self._set_ups: dict[Pending, tuple[_Node, int, int]] = {}
        self._removals: dict[Pending, int] = {}
        #: Free ranges in which a file is still mapped.
        self._untidy: set[int] = set()
        #: Handles, and whether each is passed through.
        self._handles: dict[int, tuple[_Node, bool]] = {}
        self._writers: set[int] = set()
        self._registered = self._passed = self._refusals = self._by_message = 0
        self._in_vain = 0

    def prepare_thread(self) -> None:
        """To be called by the thread that will register files, before it serves."""
        try:
            drop_capabilities()
        except OSError as error:  # nobody knows how: then set-id bits would survive writes
            self.why = f"capabilities cannot be dropped: {error.strerror}"

    def facts(self) -> dict[str, Any]:
        """Return what ``status`` shows; any thread."""
        return {
            "active": not self.why,
            "why": self.why,
            "pass_from_bytes": self._pass_from,
            "policy": _POLICY if self._pass_from else _POLICY_ALL,
            "backing_files": self._registered,
            "kept": len(self._kept),
            "opens": self._passed,
            "opens_by_message": self._by_message,
            "refusals": self._refusals,
        }

    # --- an open, from request to answer ---------------------------------------------------------

    def begin(self, slot: Slot) -> bool:
        """An OPEN is about to be handed over: have its backing file set up, if need be.

        Returns:
            Whether that depends on the attributes.
        """
        check = slot.check
        assert check is not None
        flags: int = _U32(self._map, slot.at + _IN)[0]
        check.wants = _READ if flags & os.O_ACCMODE == os.O_RDONLY else _READ | _WRITE
        check.nodeid = slot.nodeid
        node = self._nodes.get(slot.nodeid)
        if not self._pass_from or (node is not None and node.opens):
            self._wait_for(slot, node or self._node(slot.nodeid))
            return False
        if flags & os.O_TRUNC or self.why or (node is not None and node.messages):
            return False
        return node is None or bool(check.wants & ~(node.granted | node.refused))

    def begin_create(self, slot: Slot) -> None:
        """A CREATE is about to be handed over: take note of what it wants."""
        assert slot.check is not None
        flags: int = _U32(self._map, slot.at + _IN)[0]
        slot.check.wants = _READ if flags & os.O_ACCMODE == os.O_RDONLY else _READ | _WRITE

    def created(self, slot: Slot) -> None:
        """The reply to a CREATE is there: now the inode is known."""
        assert slot.check is not None
        if not slot.errno and slot.length >= _ENTRY + _OPEN_OUT.size:
            slot.check.nodeid = _U64(self._map, slot.data_at)[0]

    def settle(self, slot: Slot) -> bool:
        """All else that an answer needs is there: return whether it need not wait for more."""
        check = slot.check
        assert check is not None
        if check.asked or slot.errno or not check.nodeid:
            return True
        node = self._nodes.get(check.nodeid)
        if (node is not None and node.opens) or self._pays(check):
            self._wait_for(slot, node or self._node(check.nodeid))
            if check.waits:
                self._queue.kick()
        return not check.waits

    def _pays(self, check: OpenCheck) -> bool:
        """Whether passing a file through is worth a set-up."""
        if not self._pass_from:
            return True
        return check.body is not None and _U64(check.body, _SIZE_AT)[0] >= self._pass_from

    def is_untidy(self) -> bool:
        """Whether there is something for ``tidy``."""
        return bool(self._untidy)

    def is_asking(self) -> bool:
        """Whether the daemon may have something to ask, on the back-end request channel."""
        return bool(self._set_ups or self._removals)

    def waiting(self) -> list[Slot]:
        """Opens that the daemon has answered, and that wait for a backing file."""
        return [
            slot
            for node in self._nodes.values()
            for slot in node.waiting
            if slot.check is not None and slot.check.replied
        ]

    def _node(self, nodeid: int) -> _Node:
        node = self._nodes.get(nodeid)
        if node is None:
            node = self._nodes[nodeid] = _Node(nodeid)
        return node

    def _wait_for(self, slot: Slot, node: _Node) -> None:
        """Have a slot wait until its node has what it wants, unless that is so or never will be."""
        check = slot.check
        assert check is not None
        missing = check.wants & ~node.granted
        if not missing or missing & node.refused or node.messages or self.why:
            return
        check.waits = check.asked = True
        node.waiting.append(slot)
        if not node.asking:
            self._ask(node, check.wants)

    def _ask(self, node: _Node, wants: int) -> None:
        node.asking = wants
        if not self._ranges or not self._send(node, self._ranges[0]):
            self._queued.append(node)

    def _send(self, node: _Node, moffset: int) -> bool:
        flags = SetupmappingFlag.READ
        if node.asking & _WRITE:
            flags |= SetupmappingFlag.WRITE
        size = self._window.range_size
        body = fuse.SETUPMAPPING_IN.values(_NO_FH, 0, size, int(flags), moffset)
        pending = Pending(Opcode.SETUPMAPPING, node.nodeid, body, None, 0, 0, 0, 0, 0, None)
        if not self._queue.submit(pending, kick=False):
            return False
        self._ranges.remove(moffset)
        self.lingering.pop(moffset, None)
        self._set_ups[pending] = node, node.asking, moffset
        return True

    # --- what the daemon says --------------------------------------------------------------------

    def learned(self, pending: Pending) -> list[Slot]:
        """A request of the relay's own is through; return the opens that need not wait any more."""
        found = self._set_ups.pop(pending, None)
        ready: list[Slot] = []
        if found is not None:
            node, wants, moffset = found
            node.asking = 0
            error = pending.errno or self._register(node, wants, moffset)
            if error:
                self._refused(node, wants, error, by_daemon=bool(pending.errno))
            # After an error something else may still be mapped there.
            self._end_use(moffset, writable=bool(wants & _WRITE or error))
            ready = self._go_on(node, granted=not error)
        elif pending in self._removals:
            self._ranges.append(self._removals.pop(pending))
        if self._queued:
            self._send_queued()
        return ready

    def _register(self, node: _Node, wants: int, moffset: int) -> int:
        """Make the granted descriptor the node's backing file; return 0 or an errno."""
        try:
            fd = self._window.descriptor(moffset, write=bool(wants & _WRITE))
            if fd is None:
                return errno.EACCES
            try:
                return self._grant(node, wants, fd)
            finally:
                os.close(fd)
        except OSError as error:
            return error.errno or errno.EIO

    def _grant(self, node: _Node, wants: int, fd: int) -> int:
        info = os.fstat(fd)
        file = info.st_dev, info.st_ino
        if wants & _WRITE and info.st_mode & _SET_ID and not node.opens:
            return errno.EBUSY  # for now: the daemon knows whose writes take the bits off
        if not node.backing_id:
            node.file = file
            node.backing_id = self._open_backing(fd, wants)
            node.granted = 0
            self._registered += 1
            self._keep(node)
        elif node.file != file:
            return errno.EIO  # another file than before, for the same inode
        node.granted |= wants
        return 0

    def _open_backing(self, fd: int, wants: int) -> int:
        if not wants & _WRITE:
            return self._files.open(fd)
        try:
            reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc, or a file that may only be written to
            return self._files.open(fd)
        try:
            return self._files.open(reading)
        finally:
            os.close(reading)

    def _refused(self, node: _Node, wants: int, error: int, *, by_daemon: bool) -> None:
        node.error = error
        if error == errno.EBUSY:
            return  # our own choice
        self._refusals += 1
        if error not in _PASSING:
            self._in_vain += 1
            node.refused |= _WRITE if wants & _WRITE else _READ
        who = "the daemon" if by_daemon else "the kernel"
        reason = f"{who} gives no backing file: {os.strerror(error)}"
        if error == errno.ENOSYS or (self._in_vain >= _PATIENCE and not self._registered):
            self.why = reason
        if self._refusals == 1:
            log.info("a file goes by message, %s", reason)

    def _end_use(self, moffset: int, *, writable: bool) -> None:
        """The range is free; what is mapped there now gives way to the next file, or to ``tidy``.

        What was opened for writing does so first, and soon (``let_go``).
        """
        self._untidy.add(moffset)
        if writable:
            self._ranges.insert(0, moffset)
            self.lingering[moffset] = perf_counter_ns() + _LINGER_NS
        else:
            self._ranges.append(moffset)

    def let_go(self, now: int) -> None:
        """Have the daemon let go of files that it has open for writing, if it is time."""
        for moffset in [one for one, until in self.lingering.items() if until <= now]:
            if not self._clear(moffset):
                return
            self._ranges.remove(moffset)
            del self.lingering[moffset]

    def _clear(self, moffset: int) -> bool:
        """Have the daemon let go of a file; the range is ours again when it has."""
        one = fuse.REMOVEMAPPING_ONE.values(moffset, self._window.range_size)
        body = fuse.REMOVEMAPPING_IN.values(1) + one
        pending = Pending(Opcode.REMOVEMAPPING, fuse.ROOT_ID, body, None, 0, 0, 0, 0, 0, None)
        if not self._queue.submit(pending):
            return False
        self._removals[pending] = moffset
        self._untidy.discard(moffset)
        return True

    def tidy(self) -> None:
        """Have the daemon let go of all files; when there is nothing else to do."""
        for moffset in self._untidy.intersection(self._ranges):
            if not self._clear(moffset):
                return
            self._ranges.remove(moffset)
            self.lingering.pop(moffset, None)

    def _go_on(self, node: _Node, *, granted: bool) -> list[Slot]:
        """Return the opens of a node that are ready; more is asked for where that may help."""
        waiting, node.waiting = node.waiting, []
        ready = []
        for slot in waiting:
            check = slot.check
            assert check is not None
            check.waits = False
            if granted:
                self._wait_for(slot, node)
            if check.is_ready():
                ready.append(slot)
        if node.asking:
            self._queue.kick()
        self._drop_idle(node)
        return ready

    def _send_queued(self) -> None:
        while self._queued and self._ranges and self._send(self._queued[0], self._ranges[0]):
            del self._queued[0]
        self._queue.kick()

    # --- the answer ------------------------------------------------------------------------------

    def decide(self, slot: Slot) -> int:
        """Put into the answer to an open what kind it is; return 0, or the errno to fail with."""
        at, check = slot.data_at, slot.check
        assert check is not None
        if slot.opcode in CREATES:
            at += _ENTRY
        if slot.data_at + slot.length < at + _OPEN_OUT.size:
            return 0  # the kernel will not take it
        node = self._node(check.nodeid)
        fh, flags, _ = _OPEN_OUT.unpack_from(self._map, at)
        allowed = node.backing_id and not check.wants & ~node.granted
        if node.messages or not allowed or flags & _FOREIGN:
            if node.opens:
                return node.error or errno.EIO
            return self._by_messages(node, at, fh, flags)
        node.opens += 1
        node.passed = True
        self._kept.pop(node.nodeid, None)
        self._handles[fh] = node, True
        if check.wants & _WRITE:
            self._writers.add(fh)
        flags = (flags & OpenOutFlag.NOFLUSH) | OpenOutFlag.PASSTHROUGH
        _OPEN_OUT.pack_into(self._map, at, fh, flags, node.backing_id)
        self._passed += 1
        return 0

    def _by_messages(self, node: _Node, at: int, fh: int, flags: int) -> int:
        node.messages += 1
        self._by_message += 1
        self._handles[fh] = node, False
        if node.passed and flags & OpenOutFlag.KEEP_CACHE:
            _OPEN_OUT.pack_into(self._map, at, fh, flags & ~OpenOutFlag.KEEP_CACHE, 0)
        return 0

    def is_passed(self, nodeid: int) -> bool:
        """Whether an inode changes without our seeing it."""
        node = self._nodes.get(nodeid)
        return node is not None and node.opens > 0

    def is_writer(self, fh: int) -> bool:
        """Whether a handle may have written, without our seeing it."""
        return fh in self._writers

    # --- the end of handles and inodes -----------------------------------------------------------

    def released(self, fh: int) -> None:
        """A handle is closed; unknown ones are none of ours."""
        node, passed = self._handles.pop(fh, (None, False))
        if node is None:
            return
        self._writers.discard(fh)
        if not passed:
            node.messages -= 1
        else:
            node.opens -= 1
            if not node.opens:
                self._keep(node)
        self._drop_idle(node)

    def taken_back(self, slot: Slot) -> None:
        """The kernel has not taken the answer to an open."""
        at = slot.data_at + (_ENTRY if slot.opcode in CREATES else 0)
        self.released(_U64(self._map, at)[0])

    def has_set_id(self, nodeid: int) -> None:
        """A file gets set-id bits: whoever writes to it next has to be looked at."""
        node = self._nodes.get(nodeid)
        if node is not None and not node.opens:
            node.granted &= ~_WRITE

    def forget(self, nodeid: int) -> None:
        """The kernel gives references to an inode back, usually all."""
        node = self._nodes.get(nodeid)
        if node is not None:
            node.forgotten = True
            self._drop_idle(node)

    def _drop_idle(self, node: _Node) -> None:
        """Forget a node that nobody uses, if the kernel has, or if nothing is known of it."""
        if node.is_used():
            return
        if node.forgotten or not (node.backing_id or node.passed or node.refused):
            if node.backing_id:
                self._close(node)
            self._nodes.pop(node.nodeid, None)

    def _keep(self, node: _Node) -> None:
        self._kept[node.nodeid] = node
        if len(self._kept) > _KEPT:
            self._close(self._kept[next(iter(self._kept))])

    def _close(self, node: _Node) -> None:
        del self._kept[node.nodeid]
        backing_id, node.backing_id, node.granted = node.backing_id, 0, 0
        self._files.close(backing_id)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the tables agree."""
        for nodeid, node in self._nodes.items():
            assert node.nodeid == nodeid
            assert not (node.opens and node.messages)
            assert (nodeid in self._kept) == bool(node.backing_id and not node.opens)
            assert not node.opens or node.backing_id
            assert not node.waiting or node.asking
        kinds = list(self._handles.values())
        for node in self._nodes.values():
            assert node.opens == kinds.count((node, True))
            assert node.messages == kinds.count((node, False))
        assert len(self._kept) <= _KEPT
        assert self.lingering.keys() <= self._untidy & set(self._ranges)
