"""Requests on their way: what is remembered of each, where it lies, what its reply may be.

One request is one block of the arena:

* 64 bytes for an indirect table of two descriptors, which fills the 32 right before ``readable_at``
* from ``readable_at``: ``fuse_in_header``, body, payload (device-readable)
* from ``writable_at``: ``fuse_out_header``, reply body (device-writable)

The table touches the header so that one ``struct`` call writes both. Payloads and replies of a page
and more start on a page: blocks of that size are whole pages, so this costs nothing, and copying
1 MiB to the start of a page takes 33 us, to anywhere else 46.

A reply is hostile until ``check_reply`` has passed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfsmount.errors import ProtocolViolation
from vfsmount.wire.fuse import IN_HEADER, OUT_HEADER, Opcode, opcode_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from typing_extensions import Buffer

__all__ = [
    "ABANDONED",
    "DONE",
    "NEW",
    "POSTED",
    "SENT",
    "Pending",
    "check_reply",
    "place",
]

_IN: Final = IN_HEADER.size
_OUT: Final = OUT_HEADER.size
_PAGE: Final = 4096
_CACHE_LINE: Final = 64
#: Bytes before ``readable_at`` at least.
TABLE_ROOM: Final = 64
#: The largest errno that the kernel's FUSE accepts in a reply.
_MAX_ERRNO: Final = 511

#: States of a request. NEW: not submitted. SENT: the device has it. DONE: the reply has been
#: checked and lies in the block, or the request has failed. ABANDONED: the device has it and nobody
#: waits any more. POSTED: it was sent, or waits for the next kick, and nobody ever waited.
NEW: Final = 0
SENT: Final = 1
DONE: Final = 2
ABANDONED: Final = 3
POSTED: Final = 4

#: Replied to with no bytes at all by some daemons.
_DESTROY: Final = int(Opcode.DESTROY)


class Pending:
    """One request, from the call to the reply.

    Attributes:
        opcode: FUSE opcode; -1 for raw chains.
        nodeid: Node that it names.
        body: Bytes behind the header.
        payload: More of them, copied from wherever they are; or None.
        reply_size: Most bytes of reply body; -1 when there is no reply at all, not even a header.
        uid: Caller's user id; ``gid`` and ``pid`` likewise.
        total_extlen: Extensions at the end of ``body``, in units of 8 bytes.
        on_abandoned: Told the reply's body when nobody else wants it.
        state: NEW, SENT, DONE, ABANDONED or POSTED.
        unique: Identifier, even.
        block: Offset of its block in shared memory.
        data_at: Offset of the reply body there.
        writable: Bytes that the device may write.
        length: Bytes of reply body; for raw chains, bytes written.
        errno: Positive errno of the reply, or 0.
        started_ns: ``perf_counter_ns`` at submission.
        waiter: Whatever the owner of the queue parks on, or None.
        reported: The log has been told that there is no reply.
    """

    __slots__ = (
        "block",
        "body",
        "data_at",
        "errno",
        "gid",
        "length",
        "nodeid",
        "on_abandoned",
        "opcode",
        "payload",
        "pid",
        "reply_size",
        "reported",
        "started_ns",
        "state",
        "total_extlen",
        "uid",
        "unique",
        "waiter",
        "writable",
    )

    def __init__(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        payload: Buffer | None,
        reply_size: int,
        uid: int,
        gid: int,
        pid: int,
        total_extlen: int,
        on_abandoned: Callable[[bytes], None] | None,
    ) -> None:
        self.opcode = opcode
        self.nodeid = nodeid
        self.body = body
        self.payload = payload
        self.reply_size = reply_size
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.total_extlen = total_extlen
        self.on_abandoned = on_abandoned
        self.state = NEW
        self.errno = 0
        self.length = 0
        self.waiter: Any = None
        self.reported = False
        # What submission fills in.
        self.unique: int
        self.block: int
        self.data_at: int
        self.writable: int
        self.started_ns: int

    def __str__(self) -> str:
        if self.opcode < 0:
            return "raw request"
        return f"{opcode_name(self.opcode)} of node {self.nodeid}"


def place(body_size: int, payload_size: int, reply_size: int) -> tuple[int, int, int]:
    """Lay a request out in its block.

    Args:
        body_size: Bytes between header and payload.
        payload_size: Bytes of payload.
        reply_size: Bytes of reply body, -1 for no reply.

    Returns:
        ``readable_at``, ``writable_at``, and the bytes needed in all.
    """
    readable_at = TABLE_ROOM
    if payload_size >= _PAGE:
        readable_at = max(_PAGE - _IN - body_size, TABLE_ROOM)
    end = readable_at + _IN + body_size + payload_size
    if reply_size >= _PAGE:
        writable_at = (end + _OUT + _PAGE - 1 & -_PAGE) - _OUT
    elif reply_size >= 0:
        writable_at = end + _CACHE_LINE - 1 & -_CACHE_LINE
    else:
        return readable_at, end, end
    return readable_at, writable_at, writable_at + _OUT + reply_size


def check_reply(pending: Pending, written: int, size: int, error: int, unique: int) -> None:
    """Check the header of a reply and note what it says in ``pending``.

    A reply of no bytes is what real daemons give when theirs did not fit; it counts as EIO.

    Args:
        pending: The request.
        written: Bytes that the device says it wrote, already checked against the room.
        size: ``len`` of the header; with ``error`` and ``unique`` read once, hence copies.
        error: ``error`` of the header.
        unique: ``unique`` of the header.

    Raises:
        ProtocolViolation: The header contradicts the request, the used length, or the protocol.
    """
    if size == written and unique == pending.unique and written >= _OUT:
        if error == 0:
            pending.length = size - _OUT
            return
        if -_MAX_ERRNO <= error < 0 and size == _OUT:
            pending.errno = -error
            return
    elif written == 0:
        pending.errno = 0 if pending.opcode == _DESTROY else 5  # EIO
        return
    raise ProtocolViolation(_complaint(pending, written, size, error, unique))


def _complaint(pending: Pending, written: int, size: int, error: int, unique: int) -> str:
    if written < _OUT:
        return f"reply to {pending} of {written} bytes is shorter than its header"
    if size != written:
        return f"reply to {pending} says {size} bytes, {written} were written"
    if unique != pending.unique:
        return f"reply to {pending} carries unique {unique}"
    if error < 0 and size != _OUT and error >= -_MAX_ERRNO:
        return f"reply to {pending} has error {error} and {size - _OUT} bytes of body"
    return f"reply to {pending} has error {error}, which is not a negated errno"
