"""Counting: what was asked, how long the answers took, how the notifications went.

The counters of the request path are plain attributes and lists, cheap enough to be always on (0.4
us a request); ``snapshot`` methods turn them into immutable records for people and for JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ChannelStatistics",
    "InFlightRequest",
    "LatencyHistogram",
    "NotificationStatistics",
    "OpcodeCounter",
    "OpcodeStatistics",
]

# A bucket is 1/8 of a power of two wide: at most 12 % off, 6 % on average. Values are counted in
# units of 256 ns; 256 buckets reach 2^31 of them, which is nine minutes.
_UNIT_BITS = 8
_SUB_BITS = 3
_BUCKETS = 256


def _bucket(value: int) -> int:
    shift = value.bit_length() - _SUB_BITS - 1
    bucket = (shift << _SUB_BITS) + (value >> shift) if shift > 0 else value
    return min(bucket, _BUCKETS - 1)


#: The buckets of durations below half a millisecond: looking one up takes a third of the time.
_SMALL = 2048
_BUCKET_OF = [_bucket(value) for value in range(_SMALL)]


class LatencyHistogram:
    """Durations in log-linear buckets.

    Attributes:
        counts: How many fell into each.
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS

    def add(self, nanoseconds: int) -> None:
        """Count one duration."""
        value = nanoseconds >> _UNIT_BITS
        self.counts[_BUCKET_OF[value] if value < _SMALL else _bucket(value)] += 1

    def percentile(self, fraction: float) -> float:
        """Return the duration in nanoseconds below which ``fraction`` of them lie; 0 for none."""
        wanted = fraction * sum(self.counts)
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return self._middle(bucket)
        return 0.0

    @staticmethod
    def _middle(bucket: int) -> float:
        shift = max((bucket >> _SUB_BITS) - 1, 0)
        low = bucket - (shift << _SUB_BITS)
        return (low + 0.5) * (1 << shift + _UNIT_BITS)


@dataclass(frozen=True, slots=True)
class OpcodeStatistics:
    """What became of the requests of one opcode. Times are from submission to reply, in us."""

    count: int
    errors: int
    mean_us: float
    p50_us: float
    p99_us: float


class OpcodeCounter:
    """The running form of ``OpcodeStatistics``."""

    __slots__ = ("_counts", "count", "errors", "histogram", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.errors = 0
        self.total_ns = 0
        self.histogram = LatencyHistogram()
        self._counts = self.histogram.counts

    def add(self, nanoseconds: int) -> None:
        """Count one reply."""
        self.count += 1
        self.total_ns += nanoseconds
        # LatencyHistogram.add, written out: the call costs as much as its work.
        value = nanoseconds >> _UNIT_BITS
        self._counts[_BUCKET_OF[value] if value < _SMALL else _bucket(value)] += 1

    def snapshot(self) -> OpcodeStatistics:
        """Return the immutable form."""
        mean = self.total_ns / self.count if self.count else 0.0
        p50, p99 = self.histogram.percentile(0.5), self.histogram.percentile(0.99)
        return OpcodeStatistics(self.count, self.errors, mean / 1e3, p50 / 1e3, p99 / 1e3)


@dataclass(frozen=True, slots=True)
class InFlightRequest:
    """A request that the device has.

    Attributes:
        opcode: FUSE opcode.
        nodeid: Node that it names.
        unique: Its identifier.
        age: Seconds since it was submitted.
        abandoned: Its caller was cancelled or timed out; the buffers stay with the device.
    """

    opcode: int
    nodeid: int
    unique: int
    age: float
    abandoned: bool


@dataclass(frozen=True, slots=True)
class NotificationStatistics:
    """How the two sides told each other.

    Attributes:
        kicks: Times the device was kicked.
        kicks_saved: Times it did not have to be, because it was looking anyway.
        calls: Times that it called us.
        polls_hit: Requests whose reply came while we looked for it.
        polls_missed: Requests whose task had to be parked.
    """

    kicks: int
    kicks_saved: int
    calls: int
    polls_hit: int
    polls_missed: int


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """The channel at one moment.

    Attributes:
        requests: Per opcode name, in order of first use.
        in_flight: What the device has, oldest first.
        mute: Those of them that had no reply for ``mute_after`` seconds.
        waiting: Requests that wait for room in the ring or in the arena.
        abandoned: Requests so far whose caller was cancelled or timed out.
        forgets_waiting: Nodes whose FORGET has not been submitted yet.
        notifications: Kicks, calls and polls.
        arena_used: Bytes of blocks handed out.
        memory_resident: Bytes of shared memory that exist.
    """

    requests: dict[str, OpcodeStatistics]
    in_flight: tuple[InFlightRequest, ...]
    mute: tuple[InFlightRequest, ...]
    waiting: int
    abandoned: int
    forgets_waiting: int
    notifications: NotificationStatistics
    arena_used: int
    memory_resident: int
