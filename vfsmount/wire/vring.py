"""The split virtqueue in memory: sizes, offsets, structs and the notification test.

Source: VIRTIO specification, "Split Virtqueues". Everything is little-endian. Q is the queue size,
a power of two. The driver writes descriptor table and available ring, the device the used ring.

* descriptor table, 16 * Q bytes, aligned to 16
* available ring, 6 + 2 * Q bytes, aligned to 2: flags, idx, Q heads, used_event
* used ring, 6 + 8 * Q bytes, aligned to 4: flags, idx, Q elements, avail_event

The event words are part of the layout even when EVENT_IDX is not negotiated, because C libraries
size the rings with them.
"""

from __future__ import annotations

from typing import NamedTuple

from vfsmount.wire._codec import Codec

__all__ = [
    "AVAIL_ALIGN",
    "AVAIL_FLAGS_OFFSET",
    "AVAIL_F_NO_INTERRUPT",
    "AVAIL_IDX_OFFSET",
    "AVAIL_RING_OFFSET",
    "DESC",
    "DESC_ALIGN",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "INDEX_MASK",
    "MAX_QUEUE_SIZE",
    "USED_ALIGN",
    "USED_ELEM",
    "USED_FLAGS_OFFSET",
    "USED_F_NO_NOTIFY",
    "USED_IDX_OFFSET",
    "USED_RING_OFFSET",
    "Desc",
    "UsedElem",
    "VringLayout",
    "avail_event_offset",
    "avail_ring_size",
    "desc_table_size",
    "is_queue_size",
    "need_event",
    "used_event_offset",
    "used_ring_size",
    "vring_layout",
]

#: Largest queue size that the 16 bit indices allow.
MAX_QUEUE_SIZE = 32768
#: Ring indices run freely modulo 65536.
INDEX_MASK = 0xFFFF

#: The chain goes on at ``next``.
DESC_F_NEXT = 1
#: Device-writable, else device-readable.
DESC_F_WRITE = 2
#: The buffer is a table of descriptors.
DESC_F_INDIRECT = 4
#: Hint to the device not to call; 0 with EVENT_IDX.
AVAIL_F_NO_INTERRUPT = 1
#: Hint to the driver not to kick; 0 with EVENT_IDX.
USED_F_NO_NOTIFY = 1

#: Alignment in bytes of the three parts.
DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4

#: Offsets in bytes inside the available ring.
AVAIL_FLAGS_OFFSET = 0
AVAIL_IDX_OFFSET = 2
AVAIL_RING_OFFSET = 4
#: Offsets in bytes inside the used ring.
USED_FLAGS_OFFSET = 0
USED_IDX_OFFSET = 2
USED_RING_OFFSET = 4

_CACHE_LINE = 64


class Desc(NamedTuple):
    """``struct virtq_desc``, 16 bytes.

    Attributes:
        guest_addr: First byte of the buffer.
        length: Bytes.
        flags: DESC_F_* bits.
        next: Index of the next descriptor; means something only with DESC_F_NEXT.
    """

    guest_addr: int
    length: int
    flags: int
    next: int


class UsedElem(NamedTuple):
    """``struct virtq_used_elem``, 8 bytes.

    Attributes:
        id: Head of the chain that was used.
        length: Bytes that the device wrote into its writable part.
    """

    id: int
    length: int


DESC = Codec(Desc, "<QIHH")
USED_ELEM = Codec(UsedElem, "<II")


def is_queue_size(size: int) -> bool:
    """A power of two from 1 to 32768."""
    return 1 <= size <= MAX_QUEUE_SIZE and size & (size - 1) == 0


def desc_table_size(queue_size: int) -> int:
    """Bytes of the descriptor table."""
    return DESC.size * queue_size


def used_event_offset(queue_size: int) -> int:
    """Offset in bytes of ``used_event`` inside the available ring."""
    return AVAIL_RING_OFFSET + 2 * queue_size


def avail_ring_size(queue_size: int) -> int:
    """Bytes of the available ring, ``used_event`` included."""
    return used_event_offset(queue_size) + 2


def avail_event_offset(queue_size: int) -> int:
    """Offset in bytes of ``avail_event`` inside the used ring."""
    return USED_RING_OFFSET + USED_ELEM.size * queue_size


def used_ring_size(queue_size: int) -> int:
    """Bytes of the used ring, ``avail_event`` included."""
    return avail_event_offset(queue_size) + 2


class VringLayout(NamedTuple):
    """One ring in one block of memory; offsets in bytes from wherever ``base`` counts.

    Attributes:
        queue_size: Entries.
        desc: Offset of the descriptor table.
        avail: Offset of the available ring.
        used: Offset of the used ring, on a cache line of its own because the device writes it.
        end: Offset behind the last byte.
    """

    queue_size: int
    desc: int
    avail: int
    used: int
    end: int


def vring_layout(queue_size: int, base: int = 0) -> VringLayout:
    """Lay one ring out from ``base`` on, which must be a multiple of 64.

    Raises:
        ValueError: Not a queue size, or a base that is not aligned.
    """
    if not is_queue_size(queue_size):
        raise ValueError(
            f"queue size {queue_size} is not a power of two from 1 to {MAX_QUEUE_SIZE}"
        )
    if base % _CACHE_LINE:
        raise ValueError(f"ring at {base} is not aligned to {_CACHE_LINE}")
    avail = base + desc_table_size(queue_size)
    used = -(-(avail + avail_ring_size(queue_size)) // _CACHE_LINE) * _CACHE_LINE
    return VringLayout(queue_size, base, avail, used, used + used_ring_size(queue_size))


def need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from ``old`` to ``new`` passes ``event`` (``vring_need_event``).

    The meaning of ``event`` is "tell me when entry number ``event`` gets filled". The kick test has
    ``avail_event`` and the avail index, the call test ``used_event`` and the used index.
    """
    return (new - event - 1) & INDEX_MASK < (new - old) & INDEX_MASK
