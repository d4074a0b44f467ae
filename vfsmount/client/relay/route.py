"""What happens to the requests of one opcode. ``routes`` fills them in, the loop follows them.

Three functions of a route may see a request, and each returns whether that is all:

    local      first of all: answers it here, changes it in place, or takes a note of it
    special    when the slot is ready to go: hands it over in another way than the rest
    failed     the error with which it ends, before the kernel does; may have it sent again

Most opcodes have none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from vfsmount.channel.statistics import OpcodeCounter
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.slots import Slot

    #: Slot, offset of the request, its bytes, its nodeid; whether it has been dealt with.
    Handler: TypeAlias = Callable[[Slot, int, int, int], bool]
    #: Slot, errno; whether it has been dealt with.
    FailedHandler: TypeAlias = Callable[[Slot, int], bool]

__all__ = ["Route", "SendAgain"]


class SendAgain(Exception):
    """Raised by ``failed``: the slot goes to the device once more, with the request as it is now.

    Its length and the room for its reply are those that they were.
    """


class Route:
    """What happens to the requests of one opcode, and to their replies.

    Attributes:
        local: Sees a request first; None for most.
        special: Sees a slot that is ready to go; None for most.
        failed: Sees the errno with which a slot ends; None for most.
        room: Bytes of the reply, header included, where that is always the same and little; 0
            where it has to be found out.
        size_at: Offset in the request of the bytes that the reply may have besides its header; 0
            where that is not all.
        changes: It may change attributes.
        is_known: It is the route of this opcode alone.
        rewrite: Puts the cache policy's values into the reply; None for most.
        counter: Counts replies, from the first one on.
        names_alone: The reply has names where the kernel has asked for more.
    """

    __slots__ = (
        "changes",
        "counter",
        "failed",
        "is_known",
        "local",
        "names_alone",
        "rewrite",
        "room",
        "size_at",
        "special",
    )

    def __init__(self, *, is_known: bool) -> None:
        self.is_known = is_known
        self.local: Handler | None = None
        self.special: Handler | None = None
        self.failed: FailedHandler | None = None
        self.room = 0
        self.size_at = 0
        self.changes = False
        self.rewrite: Rewriter | None = None
        self.counter: OpcodeCounter | None = None
        self.names_alone = False
