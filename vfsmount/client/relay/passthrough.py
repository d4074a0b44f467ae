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

* While there is an open of one kind, passed through or by message, others of the inode follow it
  (else: EIO). ``passed_nodes`` knows, and how long an id is kept.
* An open is passed through only if a descriptor has been granted that allows what it wants. If the
  daemon does not grant it while others are passed through, the open fails with its errno.
* A file with set-id bits is written to by message, unless it is passed through already: whose
  writes take the bits off cannot be said to the kernel (``backing``).
* What was refused for good is not asked for again; after a series of refusals and no success,
  nothing is.

This file decides; ``set_ups`` has the messages, ``backing`` what is said to the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

from vfsmount.client.relay.backing import drop_capabilities
from vfsmount.client.relay.passed_nodes import READ, WRITE, PassedNodes
from vfsmount.client.relay.set_ups import SetUps
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode, OpenOutFlag

if TYPE_CHECKING:
    from vfsmount.channel.inflight import Pending
    from vfsmount.channel.loan import Loan
    from vfsmount.client.relay.backing import BackingFiles
    from vfsmount.client.relay.opens import OpenCheck
    from vfsmount.client.relay.passed_nodes import PassedNode
    from vfsmount.client.relay.set_ups import SetUp
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
#: Refusals without one success after which nothing is asked for any more.
_PATIENCE: Final = 16
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
_OPEN_FLAGS_AT: Final = 8
_U32: Final = struct.Struct("<I").unpack_from
_U64: Final = struct.Struct("<Q").unpack_from
#: Open flags of the daemon with which the kernel takes no backing file.
_FOREIGN: Final = OpenOutFlag.NONSEEKABLE | OpenOutFlag.STREAM
#: Of fuse_attr_out: 16 bytes, then fuse_attr, in which it is at 8.
_SIZE_AT: Final = 24
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID


class Passthrough:
    """Which opens of a mount the kernel serves by itself; the relay's thread alone.

    Args:
        loan: Where SETUPMAPPINGs go.
        window: Where the daemon maps.
        files: Registers.
        pass_from: Bytes that a file has to have at least; 0 for any.

    Attributes:
        nodes: Who is passed through.
        set_ups: What the daemon is asked for.
        why: Why nothing is asked for any more; empty while it is.
    """

    def __init__(self, loan: Loan, window: Window, files: BackingFiles, pass_from: int) -> None:
        self.nodes = PassedNodes(files.close)
        self.set_ups = SetUps(loan.requests, window)
        self.why = "" if self.set_ups.ranges else "the window has no range to spare"
        self._pass_from = pass_from
        self._queue = loan.requests
        self._map = loan.memory.map
        self._files = files
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
            "kept": self.nodes.kept,
            "opens": self._passed,
            "opens_by_message": self._by_message,
            "refusals": self._refusals,
        }

    # --- an open: what has to be asked for -------------------------------------------------------

    def begin(self, slot: Slot) -> bool:
        """An OPEN is about to be handed over: have its backing file set up, if need be.

        Returns:
            Whether that depends on the attributes.
        """
        check = slot.check
        assert check is not None
        flags: int = _U32(self._map, slot.at + _IN)[0]
        check.wants = _wants(flags)
        check.nodeid = slot.nodeid
        node = self.nodes.get(slot.nodeid)
        if not self._pass_from or (node is not None and node.opens):
            self._wait_for(slot, node or self.nodes.make(slot.nodeid))
            return False
        if flags & os.O_TRUNC or self.why or (node is not None and node.messages):
            return False
        return node is None or bool(check.wants & ~(node.granted | node.refused))

    def begin_create(self, slot: Slot) -> None:
        """A CREATE is about to be handed over: take note of what it wants."""
        assert slot.check is not None
        slot.check.wants = _wants(_U32(self._map, slot.at + _IN)[0])

    def created(self, check: OpenCheck) -> None:
        """The reply to a CREATE is there: now the inode is known."""
        if len(check.reply) >= _ENTRY + _OPEN_OUT.size:
            check.nodeid = _U64(check.reply)[0]

    def settle(self, slot: Slot) -> bool:
        """All else that an answer needs is there: return whether it need not wait for more."""
        check = slot.check
        assert check is not None
        if check.asked or slot.errno or not check.nodeid:
            return True
        if self.nodes.is_passed(check.nodeid) or self._pays(check):
            self._wait_for(slot, self.nodes.make(check.nodeid))
            if check.waits:
                self._queue.kick()
        return not check.waits

    def _pays(self, check: OpenCheck) -> bool:
        """Whether passing a file through is worth a set-up."""
        if not self._pass_from:
            return True
        return check.body is not None and _U64(check.body, _SIZE_AT)[0] >= self._pass_from

    def _wait_for(self, slot: Slot, node: PassedNode) -> None:
        """Have a slot wait until its node has what it wants, unless that is so or never will be."""
        check = slot.check
        assert check is not None
        missing = check.wants & ~node.granted
        if not missing or missing & node.refused or node.messages or self.why:
            return
        check.waits = check.asked = True
        node.waiting.append(slot)
        if not node.asking:
            node.asking = check.wants
            self.set_ups.ask(node.nodeid, check.wants)

    def waiting(self) -> list[Slot]:
        """Opens that the daemon has answered, and that wait for a backing file."""
        return [
            slot
            for node in self.nodes
            for slot in node.waiting
            if slot.check is not None and slot.check.replied
        ]

    # --- what came of it -------------------------------------------------------------------------

    def learned(self, pending: Pending) -> list[Slot]:
        """A request of the relay's own is through; return the opens that need not wait any more."""
        set_up = self.set_ups.finished(pending)
        ready: list[Slot] = []
        if set_up is not None:
            node = self.nodes.make(set_up.nodeid)
            node.asking = 0
            error = pending.errno or self._register(node, set_up)
            if error:
                self._refused(node, set_up.wants, error, by_daemon=bool(pending.errno))
            # After an error something else may still be mapped there.
            self.set_ups.release(set_up.moffset, writable=bool(set_up.wants & WRITE or error))
            ready = self._go_on(node, granted=not error)
        self.set_ups.ask_queued()
        return ready

    def _register(self, node: PassedNode, set_up: SetUp) -> int:
        """Make the granted descriptor the node's backing file; return 0 or an errno."""
        try:
            fd = self.set_ups.descriptor(set_up)
            if fd is None:
                return errno.EACCES
            try:
                return self._grant(node, set_up.wants, fd)
            finally:
                os.close(fd)
        except OSError as error:
            return error.errno or errno.EIO

    def _grant(self, node: PassedNode, wants: int, fd: int) -> int:
        info = os.fstat(fd)  # the window has no files of file systems that may not answer
        file = info.st_dev, info.st_ino
        if wants & WRITE and info.st_mode & _SET_ID and not node.opens:
            return errno.EBUSY  # for now: the daemon knows whose writes take the bits off
        if not node.backing_id:
            self.nodes.backed(node, self._files.open(fd, writable=bool(wants & WRITE)), file)
            self._registered += 1
        elif node.file != file:
            return errno.EIO  # another file than before, for the same inode
        node.granted |= wants
        return 0

    def _refused(self, node: PassedNode, wants: int, error: int, *, by_daemon: bool) -> None:
        node.error = error
        if error == errno.EBUSY:
            return  # our own choice
        self._refusals += 1
        if error not in _PASSING:
            self._in_vain += 1
            node.refused |= WRITE if wants & WRITE else READ
        who = "the daemon" if by_daemon else "the kernel"
        reason = f"{who} gives no backing file: {os.strerror(error)}"
        if error == errno.ENOSYS or (self._in_vain >= _PATIENCE and not self._registered):
            self.why = reason
        if self._refusals == 1:
            log.info("a file goes by message, %s", reason)

    def _go_on(self, node: PassedNode, *, granted: bool) -> list[Slot]:
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
        self.nodes.drop_idle(node)
        return ready

    # --- the answer ------------------------------------------------------------------------------

    def decide(self, slot: Slot) -> int:
        """Put into the answer to an open what kind it is; return 0, or the errno to fail with."""
        check = slot.check
        assert check is not None
        start = _ENTRY if slot.opcode in CREATES else 0
        if len(check.reply) < start + _OPEN_OUT.size:
            return 0  # the kernel will not take it
        node, at = self.nodes.make(check.nodeid), slot.data_at + start
        fh: int = _U64(check.reply, start)[0]
        flags: int = _U32(self._map, at + _OPEN_FLAGS_AT)[0]
        allowed = node.backing_id and not check.wants & ~node.granted
        if node.messages or not allowed or flags & _FOREIGN:
            if node.opens:
                return node.error or errno.EIO
            self._by_message += 1
            self.nodes.opened_by_message(node, fh)
            if node.passed:
                flags &= ~OpenOutFlag.KEEP_CACHE
            backing_id = 0
        else:
            self._passed += 1
            self.nodes.opened(node, fh, check.wants)
            flags = (flags & OpenOutFlag.NOFLUSH) | OpenOutFlag.PASSTHROUGH
            backing_id = node.backing_id
        _OPEN_OUT.pack_into(self._map, at, fh, flags, backing_id)
        check.fh = fh
        return 0

    def backing_again(self, nodeid: int) -> int | None:
        """Return the backing file for reading an unchanged file that was opened before (``reuse``).

        0 is for by message; None means that it has to be asked for, or that it is not certain.
        """
        node = self.nodes.get(nodeid)
        if node is None:  # too small, and so it is still
            return 0 if self._pass_from else None
        if node.messages:
            return None if node.passed else 0
        return node.backing_id if node.granted & READ else None

    def opened_again(self, nodeid: int, fh: int, backing_id: int) -> None:
        """An open is answered so."""
        node = self.nodes.make(nodeid)
        if backing_id:
            self._passed += 1
            self.nodes.opened(node, fh, READ)
        else:
            self._by_message += 1
            self.nodes.opened_by_message(node, fh)

    def taken_back(self, check: OpenCheck) -> None:
        """The kernel has not taken the answer to an open."""
        if check.fh is not None:
            self.nodes.released(check.fh)


def _wants(flags: int) -> int:
    """What an open with these flags wants of its backing file."""
    return READ if flags & os.O_ACCMODE == os.O_RDONLY else READ | WRITE
