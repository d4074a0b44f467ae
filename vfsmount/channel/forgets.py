"""FORGETs, gathered: references to nodes go back in batches, on the hiprio queue.

Uncached, every lookup causes one, and each would cost a kick. So counts are summed per node and
sent as BATCH_FORGET, or as FORGET when there is a single one. They have no reply; the device
returns the bare buffer. Nobody waits for that: the queue is reaped before the next batch, and calls
stay off.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from vfsmount.channel.inflight import POSTED, Pending
from vfsmount.wire.fuse import FORGET_IN, Opcode, encode_batch_forget

if TYPE_CHECKING:
    from vfsmount.channel.rings import DriverQueue

__all__ = ["BATCH", "ForgetGatherer"]

#: Nodes in one message; reaching it is the time to send.
BATCH: Final = 32


class ForgetGatherer:
    """What is to be forgotten, and how it is sent.

    Args:
        queue: The hiprio queue.

    Attributes:
        sent: Messages submitted, by opcode.
    """

    __slots__ = ("_counts", "_queue", "sent")

    def __init__(self, queue: DriverQueue) -> None:
        self._queue = queue
        self._counts: dict[int, int] = {}
        self.sent = {int(Opcode.FORGET): 0, int(Opcode.BATCH_FORGET): 0}

    def __len__(self) -> int:
        """Nodes that wait to be forgotten."""
        return len(self._counts)

    def add(self, nodeid: int, nlookup: int) -> None:
        """Note ``nlookup`` references to give back."""
        counts = self._counts
        counts[nodeid] = counts.get(nodeid, 0) + nlookup

    def flush(self) -> None:
        """Submit everything, as far as the queue has room; the rest waits for the next time."""
        while self._counts:
            batch = list(islice(self._counts.items(), BATCH))
            if len(batch) == 1:
                nodeid, opcode, body = batch[0][0], Opcode.FORGET, FORGET_IN.values(batch[0][1])
            else:
                nodeid, opcode, body = 0, Opcode.BATCH_FORGET, encode_batch_forget(batch)
            pending = Pending(opcode, nodeid, body, None, -1, 0, 0, 0, 0, None)
            if not self._queue.submit(pending):
                return
            pending.state = POSTED  # whoever reaps it frees the block
            self.sent[opcode] += 1
            for node, _ in batch:
                del self._counts[node]
