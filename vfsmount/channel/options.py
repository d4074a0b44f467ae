"""How a channel is to be opened."""

from __future__ import annotations

from dataclasses import dataclass

from vfsmount.errors import UsageError
from vfsmount.wire.vring import MAX_QUEUE_SIZE, is_queue_size

__all__ = ["ChannelOptions"]


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """Options of a channel; the defaults are right for everything but tests and experiments.

    Attributes:
        queue_size: Entries of the request queue, a power of two from 2 to 32768.
        shm_file: Path of a file to create for the shared memory; None for an anonymous memfd.
        connect_timeout: Seconds to wait for the connection, and for each answer in the handshake.
        request_timeout: Seconds after which a request without a reply fails; 0 for never. Its
            buffers stay with the device until that returns them or the channel ends.
        mute_after: Seconds after which a request without a reply is reported, once.
        poll_us: Upper bound in microseconds of looking for a reply before the task is parked.
        event_idx: Take RING_EVENT_IDX when it is offered.
        indirect: Take RING_INDIRECT_DESC when it is offered.
    """

    queue_size: int = 1024
    shm_file: str | None = None
    connect_timeout: float = 10.0
    request_timeout: float = 0.0
    mute_after: float = 10.0
    poll_us: int = 50
    event_idx: bool = True
    indirect: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: One that cannot be.
        """
        if not is_queue_size(self.queue_size) or self.queue_size < 2:
            # Queues of one entry: the real daemons fail or die.
            raise UsageError(
                f"queue size {self.queue_size} is not a power of two from 2 to {MAX_QUEUE_SIZE}"
            )
        if self.connect_timeout <= 0 or self.mute_after <= 0:
            raise UsageError("connect_timeout and mute_after must be above 0 seconds")
        if self.request_timeout < 0 or self.poll_us < 0:
            raise UsageError("request_timeout and poll_us cannot be negative")
