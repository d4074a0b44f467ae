"""Payloads of vhost-user messages: records and codecs, knowing nothing of the messages they are in.

Source: QEMU docs, "Vhost-user Protocol", "Communication". All integers are in the byte order of the
host. A codec is given all bytes of a payload, from anybody, and returns its record or raises
``WireError``. Padding is sent as zero and ignored on receipt: C programs send theirs uninitialised.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

from vfsmount.errors import WireError
from vfsmount.wire._codec import Codec

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CONFIG",
    "CONFIG_REPLY",
    "DEVICE_STATE",
    "FD_WORD",
    "HOST_NOTIFIER",
    "INFLIGHT",
    "IOTLB",
    "LOG",
    "LOG_REPLY",
    "MAX_CONFIG_SIZE",
    "MAX_REGIONS",
    "MAX_SHMEM_REGIONS",
    "MEMORY_TABLE",
    "NOTHING",
    "OPAQUE",
    "SHMEM_CONFIG",
    "SHMEM_MAP",
    "SINGLE_REGION",
    "U64",
    "UUID",
    "VRING_ADDR",
    "VRING_STATE",
    "ConfigRange",
    "DeviceStateDirection",
    "DeviceStateTransfer",
    "FdWord",
    "HostNotifier",
    "InflightDescription",
    "Iotlb",
    "LogDescription",
    "MemoryRegion",
    "MemoryTable",
    "Payload",
    "PayloadCodec",
    "ShmemConfig",
    "ShmemFlag",
    "ShmemMap",
    "VringAddr",
    "VringState",
]

#: Regions in one memory table ("Memory regions description").
MAX_REGIONS = 8
#: Bytes of device config space ("Virtio device config space").
MAX_CONFIG_SIZE = 256
#: Ids of VIRTIO shared memory regions are 8 bits wide.
MAX_SHMEM_REGIONS = 256


class VringState(NamedTuple):
    """Ring index and a number: queue size, next avail index, or 0/1 (8 bytes)."""

    ring: int
    num: int


class VringAddr(NamedTuple):
    """Where the three parts of a ring lie (``vhost_vring_addr``, 40 bytes).

    The order on the wire is desc, *used*, avail. Addresses are the front-end's user addresses, or
    guest addresses when GPA_ADDRESSES is negotiated.

    Attributes:
        flags: Bit 0: log writes to the used ring.
        log_guest_addr: Guest address of the used ring for logging, else 0.
    """

    ring: int
    flags: int
    desc_user_addr: int
    used_user_addr: int
    avail_user_addr: int
    log_guest_addr: int


class FdWord(NamedTuple):
    """Which ring an eventfd belongs to; ``no_fd`` asks for polling instead (u64)."""

    ring: int
    no_fd: bool = False


class MemoryRegion(NamedTuple):
    """One range of a shared descriptor (32 bytes). Sizes and offsets in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


class MemoryTable(NamedTuple):
    """All of guest memory; one descriptor per region, in the same order."""

    regions: tuple[MemoryRegion, ...]


class ConfigRange(NamedTuple):
    """Part of the device config space (12 bytes and the data).

    Attributes:
        offset: First byte inside the config space.
        flags: 0, or 1 for a write as part of migration.
        data: The bytes; a GET_CONFIG request carries a dummy of the wanted length.
    """

    offset: int
    flags: int
    data: bytes


class Iotlb(NamedTuple):
    """IOTLB message (``vhost_iotlb_msg``, 32 bytes)."""

    iova: int
    size: int
    user_addr: int
    perm: int
    type: int


class InflightDescription(NamedTuple):
    """The shared in-flight region: bytes, offset in its descriptor, queues and entries of each."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class LogDescription(NamedTuple):
    """The dirty log: bytes and offset in its descriptor."""

    mmap_size: int
    mmap_offset: int


class DeviceStateDirection(IntEnum):
    """Which way a device's state travels."""

    SAVE = 0
    LOAD = 1


class DeviceStateTransfer(NamedTuple):
    """SET_DEVICE_STATE_FD: direction, and phase (0: all rings stopped)."""

    direction: int
    phase: int


class ShmemConfig(NamedTuple):
    """Sizes in bytes of the shared memory regions that exist, by shmid."""

    sizes: dict[int, int]


class ShmemFlag(IntFlag):
    """Flags of SHMEM_MAP."""

    WRITABLE = 1


class ShmemMap(NamedTuple):
    """SHMEM_MAP and SHMEM_UNMAP (40 bytes); for UNMAP ``fd_offset`` and ``flags`` are 0."""

    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int


class HostNotifier(NamedTuple):
    """VRING_HOST_NOTIFIER_MSG (24 bytes): a page through which the front-end may kick."""

    ring: int
    no_fd: bool
    size: int
    offset: int


#: Every payload: nothing, a u64, opaque bytes (UUIDs, crypto sessions) or one of the records.
Payload: TypeAlias = (
    int
    | bytes
    | VringState
    | VringAddr
    | FdWord
    | MemoryRegion
    | MemoryTable
    | ConfigRange
    | Iotlb
    | InflightDescription
    | LogDescription
    | DeviceStateTransfer
    | ShmemConfig
    | ShmemMap
    | HostNotifier
    | None
)


# --- payload codecs -----------------------------------------------------------------------------

P = TypeVar("P")
R = TypeVar("R", bound=tuple[object, ...])


class PayloadCodec(NamedTuple, Generic[P]):
    """How one kind of payload travels.

    Attributes:
        name: For messages.
        decode: All bytes of the payload to its record; raises WireError.
        encode: The reverse.
    """

    name: str
    decode: Callable[[bytes], P]
    encode: Callable[[P], bytes]


def _expect_size(name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise WireError(f"{name} payload of {len(data)} bytes, expected {size}")


def _struct(codec: Codec[R]) -> PayloadCodec[R]:
    """Payload that is exactly one C struct."""

    def decode(data: bytes) -> R:
        _expect_size(codec.name, data, codec.size)
        return codec.unpack(data)

    return PayloadCodec(codec.name, decode, codec.pack)


class U64Word(NamedTuple):
    value: int


class RegionCount(NamedTuple):
    num_regions: int


class ConfigHead(NamedTuple):
    offset: int
    size: int
    flags: int


class NotifierWords(NamedTuple):
    word: int
    size: int
    offset: int


_U64 = Codec(U64Word, "=Q")
_REGION = Codec(MemoryRegion, "=QQQQ")
_TABLE_HEAD = Codec(RegionCount, "=I4x")
_SINGLE_REGION = Codec(MemoryRegion, "=8xQQQQ")
_CONFIG_HEAD = Codec(ConfigHead, "=III")
_NOTIFIER = Codec(NotifierWords, "=QQQ")
#: 20 bytes of fields, but implementations send the C struct, padded to 24; some refuse 20.
_INFLIGHT = Codec(InflightDescription, "=QQHH4x")
_INFLIGHT_UNPADDED = Codec(InflightDescription, "=QQHH")
_SHMEM_HEAD = Codec(RegionCount, "=I4x")
_FD_WORD_INDEX = 0xFF
_FD_WORD_NO_FD = 0x100


def _decode_nothing(data: bytes) -> None:
    _expect_size("empty", data, 0)


def _decode_u64(data: bytes) -> int:
    _expect_size("u64", data, 8)
    return _U64.unpack(data).value


def _encode_u64(value: int) -> bytes:
    return _U64.values(value)


def _decode_log_reply(data: bytes) -> int | None:
    """The reply to SET_LOG_BASE is empty in the standard and a u64 in libvhost-user."""
    return _decode_u64(data) if data else None


def _split_fd_word(word: int) -> FdWord:
    if word & ~(_FD_WORD_INDEX | _FD_WORD_NO_FD):
        raise WireError(f"unknown bits in descriptor word {word:#x}")
    return FdWord(word & _FD_WORD_INDEX, bool(word & _FD_WORD_NO_FD))


def _join_fd_word(ring: int, no_fd: bool) -> int:
    assert 0 <= ring <= _FD_WORD_INDEX
    return ring | no_fd * _FD_WORD_NO_FD


def _decode_table(data: bytes) -> MemoryTable:
    count = _TABLE_HEAD.unpack(data).num_regions
    if not 1 <= count <= MAX_REGIONS:
        raise WireError(f"memory table of {count} regions, expected 1 to {MAX_REGIONS}")
    _expect_size("memory table", data, _TABLE_HEAD.size + count * _REGION.size)
    offsets = range(_TABLE_HEAD.size, len(data), _REGION.size)
    return MemoryTable(tuple(_REGION.unpack(data, offset) for offset in offsets))


def _encode_table(table: MemoryTable) -> bytes:
    head = _TABLE_HEAD.values(len(table.regions))
    return head + b"".join(map(_REGION.pack, table.regions))


def _decode_config(data: bytes) -> ConfigRange:
    head = _CONFIG_HEAD.unpack(data)
    if head.offset + head.size > MAX_CONFIG_SIZE:
        raise WireError(f"config range {head.offset}+{head.size} beyond {MAX_CONFIG_SIZE} bytes")
    _expect_size("config", data, _CONFIG_HEAD.size + head.size)
    return ConfigRange(head.offset, head.flags, data[_CONFIG_HEAD.size :])


def _encode_config(part: ConfigRange) -> bytes:
    return _CONFIG_HEAD.values(part.offset, len(part.data), part.flags) + part.data


def _decode_config_reply(data: bytes) -> ConfigRange | None:
    """An empty payload is how a back-end says that it has no config space."""
    return _decode_config(data) if data else None


def _encode_config_reply(part: ConfigRange | None) -> bytes:
    return b"" if part is None else _encode_config(part)


def _decode_inflight(data: bytes) -> InflightDescription:
    if len(data) == _INFLIGHT_UNPADDED.size:
        return _INFLIGHT_UNPADDED.unpack(data)
    _expect_size("inflight", data, _INFLIGHT.size)
    return _INFLIGHT.unpack(data)


def _decode_shmem_config(data: bytes) -> ShmemConfig:
    _expect_size("shmem config", data, _SHMEM_HEAD.size + 8 * MAX_SHMEM_REGIONS)
    values = (_U64.unpack(data, _SHMEM_HEAD.size + 8 * i).value for i in range(MAX_SHMEM_REGIONS))
    sizes = {shmid: size for shmid, size in enumerate(values) if size}
    count = _SHMEM_HEAD.unpack(data).num_regions
    if count != len(sizes):
        raise WireError(f"shmem config says {count} regions and has {len(sizes)}")
    return ShmemConfig(sizes)


def _encode_shmem_config(config: ShmemConfig) -> bytes:
    sizes = (config.sizes.get(shmid, 0) for shmid in range(MAX_SHMEM_REGIONS))
    count = sum(1 for size in config.sizes.values() if size)
    return _SHMEM_HEAD.values(count) + b"".join(map(_encode_u64, sizes))


def _decode_notifier(data: bytes) -> HostNotifier:
    _expect_size("host notifier", data, _NOTIFIER.size)
    words = _NOTIFIER.unpack(data)
    fd_word = _split_fd_word(words.word)
    return HostNotifier(fd_word.ring, fd_word.no_fd, words.size, words.offset)


def _encode_notifier(record: HostNotifier) -> bytes:
    word = _join_fd_word(record.ring, record.no_fd)
    return _NOTIFIER.values(word, record.size, record.offset)


def _decode_uuid(data: bytes) -> bytes:
    _expect_size("UUID", data, 16)
    return data


NOTHING: PayloadCodec[None] = PayloadCodec("empty", _decode_nothing, lambda _: b"")
U64 = PayloadCodec("u64", _decode_u64, _encode_u64)
LOG_REPLY: PayloadCodec[int | None] = PayloadCodec(
    "log reply", _decode_log_reply, lambda value: b"" if value is None else _encode_u64(value)
)
VRING_STATE = _struct(Codec(VringState, "=II"))
VRING_ADDR = _struct(Codec(VringAddr, "=IIQQQQ"))
FD_WORD = PayloadCodec(
    "descriptor word",
    lambda data: _split_fd_word(_decode_u64(data)),
    lambda record: _encode_u64(_join_fd_word(record.ring, record.no_fd)),
)
MEMORY_TABLE = PayloadCodec("memory table", _decode_table, _encode_table)
SINGLE_REGION = _struct(_SINGLE_REGION)
CONFIG = PayloadCodec("config", _decode_config, _encode_config)
CONFIG_REPLY = PayloadCodec("config", _decode_config_reply, _encode_config_reply)
IOTLB = _struct(Codec(Iotlb, "=QQQBB6x"))
INFLIGHT = PayloadCodec("inflight", _decode_inflight, _INFLIGHT.pack)
LOG = _struct(Codec(LogDescription, "=QQ"))
DEVICE_STATE = _struct(Codec(DeviceStateTransfer, "=II"))
SHMEM_CONFIG = PayloadCodec("shmem config", _decode_shmem_config, _encode_shmem_config)
SHMEM_MAP = _struct(Codec(ShmemMap, "=B7xQQQQ"))
HOST_NOTIFIER = PayloadCodec("host notifier", _decode_notifier, _encode_notifier)
UUID = PayloadCodec("UUID", _decode_uuid, bytes)
#: Crypto sessions: no device of ours has them, so the bytes are kept as they are.
OPAQUE: PayloadCodec[bytes] = PayloadCodec("opaque", bytes, bytes)
