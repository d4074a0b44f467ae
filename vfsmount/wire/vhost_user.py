"""vhost-user messages, both directions: the header and one table that says what goes with what.

Source: QEMU docs, "Vhost-user Protocol". All integers are in the byte order of the host. A message
is a 12 byte header and ``size`` bytes of payload; descriptors travel beside it. The front-end's
requests and the back-end's requests are two number spaces on two sockets.

* ``FRONTEND_MESSAGES`` and ``BACKEND_MESSAGES`` hold one row per request: payload, reply, how many
  descriptors go each way, and which feature has to be negotiated first.
* Decoders are given untrusted bytes and return a record or raise ``WireError``. They check syntax:
  sizes, counts, flags. Whether an address or a queue index makes sense is the receiver's business.
* Payload records and their codecs are in ``vhost_user_payloads`` and can be had from here too.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from vfsmount.errors import WireError
from vfsmount.wire._codec import Codec
from vfsmount.wire.vhost_user_payloads import (
    CONFIG,
    CONFIG_REPLY,
    DEVICE_STATE,
    FD_WORD,
    HOST_NOTIFIER,
    INFLIGHT,
    IOTLB,
    LOG,
    LOG_REPLY,
    MAX_CONFIG_SIZE,
    MAX_REGIONS,
    MAX_SHMEM_REGIONS,
    MEMORY_TABLE,
    NOTHING,
    OPAQUE,
    SHMEM_CONFIG,
    SHMEM_MAP,
    SINGLE_REGION,
    U64,
    UUID,
    VRING_ADDR,
    VRING_STATE,
    ConfigRange,
    DeviceStateDirection,
    DeviceStateTransfer,
    FdWord,
    HostNotifier,
    InflightDescription,
    Iotlb,
    LogDescription,
    MemoryRegion,
    MemoryTable,
    Payload,
    PayloadCodec,
    ShmemConfig,
    ShmemFlag,
    ShmemMap,
    VringAddr,
    VringState,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ACK_OK",
    "BACKEND_MESSAGES",
    "FRONTEND_MESSAGES",
    "HEADER",
    "MAX_CONFIG_SIZE",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "MAX_REGIONS",
    "MAX_SHMEM_REGIONS",
    "BackendRequest",
    "ConfigRange",
    "DeviceStateDirection",
    "DeviceStateTransfer",
    "FdWord",
    "FrontendRequest",
    "Header",
    "HeaderFlag",
    "HostNotifier",
    "InflightDescription",
    "Iotlb",
    "LogDescription",
    "MemoryRegion",
    "MemoryTable",
    "MessageKind",
    "Payload",
    "PayloadCodec",
    "ProtocolFeature",
    "Request",
    "ShmemConfig",
    "ShmemFlag",
    "ShmemMap",
    "VirtioFeature",
    "VirtioStatus",
    "VringAddr",
    "VringState",
    "check_fds",
    "decode_ack",
    "decode_header",
    "decode_payload",
    "decode_reply",
    "encode_ack",
    "encode_header",
    "encode_message",
    "encode_payload",
    "encode_reply",
    "feature_names",
    "kind_of",
    "missing_features",
]

#: Bytes of payload accepted in one message. The largest that is defined is the reply to
#: GET_SHMEM_CONFIG (2056); the rust-vmm daemons drop a connection above the same 4096.
MAX_PAYLOAD = 4096
#: Descriptors to have room for when receiving: 8 is the standard's limit, rust-vmm's is 32.
MAX_FDS = 32
#: Payload of an acknowledgement that reports success; every other number is a failure.
ACK_OK = 0


class FrontendRequest(IntEnum):
    """Requests that the front-end sends ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """Requests that the back-end sends on its own channel ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


Request: TypeAlias = FrontendRequest | BackendRequest


class ProtocolFeature(IntFlag):
    """Bits of GET/SET_PROTOCOL_FEATURES ("Protocol features").

    SHMEM is 22. Its drafts used 20 and 21, which mean something else now: do not read them so.
    """

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class VirtioFeature(IntFlag):
    """Bits of GET/SET_FEATURES: virtio-fs (0), transport and ring (24-43), vhost (26, 30)."""

    FS_NOTIFICATION = 1 << 0
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43


class VirtioStatus(IntFlag):
    """Bits of the device status byte (VIRTIO, "Device Status Field")."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


def feature_names(kind: type[IntFlag], bits: int) -> list[str]:
    """Return the names of the bits that are set, lowest first; unknown ones as ``bit_N``."""
    names = {member.value: member.name or "" for member in kind}
    set_bits = [n for n in range(bits.bit_length()) if bits >> n & 1]
    return [names.get(1 << n, f"bit_{n}") for n in set_bits]


# --- header -------------------------------------------------------------------------------------


class HeaderFlag(IntFlag):
    """Flags of a message header; the low two bits hold the protocol version."""

    VERSION = 0x1
    REPLY = 0x4
    NEED_REPLY = 0x8


_VERSION_MASK = 0x3
_KNOWN_FLAGS = int(_VERSION_MASK | HeaderFlag.REPLY | HeaderFlag.NEED_REPLY)
_REPLY = int(HeaderFlag.REPLY)
_NEED_REPLY = int(HeaderFlag.NEED_REPLY)


class Header(NamedTuple):
    """Message header, 12 bytes.

    Attributes:
        request: Request number, as yet unchecked: see ``kind_of``.
        flags: ``HeaderFlag`` bits.
        size: Bytes of payload that follow.
    """

    request: int
    flags: int
    size: int

    @property
    def is_reply(self) -> bool:
        """This answers a request."""
        return bool(self.flags & _REPLY)

    @property
    def needs_reply(self) -> bool:
        """The sender waits for an acknowledgement (only with REPLY_ACK)."""
        return bool(self.flags & _NEED_REPLY)


#: Header: request u32, flags u32, payload size u32.
HEADER = Codec(Header, "=III")


def decode_header(data: Buffer) -> Header:
    """Decode and check the header of one message.

    Raises:
        WireError: Too short, a version other than 1, unknown flags, or an oversized payload.
    """
    header = HEADER.unpack(data)
    if header.flags & _VERSION_MASK != HeaderFlag.VERSION:
        raise WireError(f"vhost-user version {header.flags & _VERSION_MASK}, expected 1")
    if header.flags & ~_KNOWN_FLAGS:
        raise WireError(f"unknown vhost-user header flags {header.flags:#x}")
    if header.size > MAX_PAYLOAD:
        raise WireError(f"payload of {header.size} bytes, the limit is {MAX_PAYLOAD}")
    return header


def encode_header(
    request: int, size: int, *, reply: bool = False, need_reply: bool = False
) -> bytes:
    """Return the 12 byte header for a payload of ``size`` bytes."""
    flags = int(HeaderFlag.VERSION) | reply * _REPLY | need_reply * _NEED_REPLY
    return HEADER.values(request, flags, size)


# --- the tables ---------------------------------------------------------------------------------


class MessageKind(NamedTuple):
    """One row: all there is to know about a request.

    Attributes:
        request: Number and name.
        payload: What the request carries.
        reply: What the reply carries; None when there is only an acknowledgement, and that only if
            the sender set NEED_REPLY.
        fds: Fewest and most descriptors that the request carries. Where the payload decides
            (memory tables, descriptor words), see ``check_fds``.
        reply_fds: The same for the reply.
        needs: Protocol features that must all be negotiated before.
        needs_virtio: The same for virtio features; PROTOCOL_FEATURES need only be *offered* for the
            two messages that negotiate protocol features.
    """

    request: Request
    payload: PayloadCodec[Any]
    reply: PayloadCodec[Any] | None = None
    fds: tuple[int, int] = (0, 0)
    reply_fds: tuple[int, int] = (0, 0)
    needs: int = 0
    needs_virtio: int = 0


_F = FrontendRequest
_B = BackendRequest
_PF = ProtocolFeature
_VF = VirtioFeature
_ONE = (1, 1)
_MAYBE = (0, 1)


def _table(*rows: MessageKind) -> dict[int, MessageKind]:
    return {int(row.request): row for row in rows}


#: Requests of the front-end, by number.
FRONTEND_MESSAGES = _table(
    MessageKind(_F.GET_FEATURES, NOTHING, U64),
    MessageKind(_F.SET_FEATURES, U64),
    MessageKind(_F.SET_OWNER, NOTHING),
    MessageKind(_F.RESET_OWNER, NOTHING),
    MessageKind(_F.SET_MEM_TABLE, MEMORY_TABLE, fds=(1, MAX_REGIONS)),
    MessageKind(_F.SET_LOG_BASE, LOG, LOG_REPLY, fds=_ONE, needs=_PF.LOG_SHMFD),
    MessageKind(_F.SET_LOG_FD, NOTHING, fds=_ONE),
    MessageKind(_F.SET_VRING_NUM, VRING_STATE),
    MessageKind(_F.SET_VRING_ADDR, VRING_ADDR),
    MessageKind(_F.SET_VRING_BASE, VRING_STATE),
    MessageKind(_F.GET_VRING_BASE, VRING_STATE, VRING_STATE),
    MessageKind(_F.SET_VRING_KICK, FD_WORD, fds=_MAYBE),
    MessageKind(_F.SET_VRING_CALL, FD_WORD, fds=_MAYBE),
    MessageKind(_F.SET_VRING_ERR, FD_WORD, fds=_MAYBE),
    MessageKind(_F.GET_PROTOCOL_FEATURES, NOTHING, U64, needs_virtio=_VF.PROTOCOL_FEATURES),
    MessageKind(_F.SET_PROTOCOL_FEATURES, U64, needs_virtio=_VF.PROTOCOL_FEATURES),
    MessageKind(_F.GET_QUEUE_NUM, NOTHING, U64, needs=_PF.MQ),
    MessageKind(_F.SET_VRING_ENABLE, VRING_STATE, needs_virtio=_VF.PROTOCOL_FEATURES),
    MessageKind(_F.SEND_RARP, U64, needs=_PF.RARP),
    MessageKind(_F.NET_SET_MTU, U64, needs=_PF.MTU),
    MessageKind(_F.SET_BACKEND_REQ_FD, NOTHING, fds=_ONE, needs=_PF.BACKEND_REQ),
    MessageKind(_F.IOTLB_MSG, IOTLB, U64, needs_virtio=_VF.ACCESS_PLATFORM),
    MessageKind(_F.SET_VRING_ENDIAN, VRING_STATE, needs=_PF.CROSS_ENDIAN),
    MessageKind(_F.GET_CONFIG, CONFIG, CONFIG_REPLY, needs=_PF.CONFIG),
    MessageKind(_F.SET_CONFIG, CONFIG, needs=_PF.CONFIG),
    MessageKind(_F.CREATE_CRYPTO_SESSION, OPAQUE, OPAQUE, needs=_PF.CRYPTO_SESSION),
    MessageKind(_F.CLOSE_CRYPTO_SESSION, U64, needs=_PF.CRYPTO_SESSION),
    MessageKind(_F.POSTCOPY_ADVISE, NOTHING, NOTHING, reply_fds=_ONE, needs=_PF.PAGEFAULT),
    MessageKind(_F.POSTCOPY_LISTEN, NOTHING, needs=_PF.PAGEFAULT),
    MessageKind(_F.POSTCOPY_END, NOTHING, U64, needs=_PF.PAGEFAULT),
    MessageKind(_F.GET_INFLIGHT_FD, INFLIGHT, INFLIGHT, reply_fds=_ONE, needs=_PF.INFLIGHT_SHMFD),
    MessageKind(_F.SET_INFLIGHT_FD, INFLIGHT, fds=_ONE, needs=_PF.INFLIGHT_SHMFD),
    MessageKind(_F.GPU_SET_SOCKET, NOTHING, fds=_ONE),
    MessageKind(_F.RESET_DEVICE, NOTHING, needs=_PF.RESET_DEVICE),
    MessageKind(_F.VRING_KICK, VRING_STATE, needs=_PF.INBAND_NOTIFICATIONS),
    MessageKind(_F.GET_MAX_MEM_SLOTS, NOTHING, U64, needs=_PF.CONFIGURE_MEM_SLOTS),
    MessageKind(_F.ADD_MEM_REG, SINGLE_REGION, fds=_ONE, needs=_PF.CONFIGURE_MEM_SLOTS),
    # The standard sends none with REM_MEM_REG, old front-ends send one: close it.
    MessageKind(_F.REM_MEM_REG, SINGLE_REGION, fds=_MAYBE, needs=_PF.CONFIGURE_MEM_SLOTS),
    MessageKind(_F.SET_STATUS, U64, needs=_PF.STATUS),
    MessageKind(_F.GET_STATUS, NOTHING, U64, needs=_PF.STATUS),
    MessageKind(_F.GET_SHARED_OBJECT, UUID, NOTHING, reply_fds=_MAYBE, needs=_PF.SHARED_OBJECT),
    MessageKind(
        _F.SET_DEVICE_STATE_FD,
        DEVICE_STATE,
        U64,
        fds=_ONE,
        reply_fds=_MAYBE,
        needs=_PF.DEVICE_STATE,
    ),
    MessageKind(_F.CHECK_DEVICE_STATE, NOTHING, U64, needs=_PF.DEVICE_STATE),
    MessageKind(_F.GET_SHMEM_CONFIG, NOTHING, SHMEM_CONFIG, needs=_PF.SHMEM),
    MessageKind(
        _F.GET_VRING_BASE_SKIP_DRAIN,
        VRING_STATE,
        VRING_STATE,
        needs=_PF.GET_VRING_BASE_SKIP_DRAIN | _PF.GET_VRING_BASE_INFLIGHT | _PF.INFLIGHT_SHMFD,
    ),
)

#: Requests of the back-end, by number; all of them also need BACKEND_REQ.
BACKEND_MESSAGES = _table(
    MessageKind(_B.IOTLB_MSG, IOTLB, needs_virtio=_VF.ACCESS_PLATFORM),
    MessageKind(_B.CONFIG_CHANGE_MSG, NOTHING, needs=_PF.CONFIG),
    MessageKind(_B.VRING_HOST_NOTIFIER_MSG, HOST_NOTIFIER, fds=_MAYBE, needs=_PF.HOST_NOTIFIER),
    MessageKind(_B.VRING_CALL, VRING_STATE, needs=_PF.INBAND_NOTIFICATIONS),
    MessageKind(_B.VRING_ERR, VRING_STATE, needs=_PF.INBAND_NOTIFICATIONS),
    MessageKind(_B.SHARED_OBJECT_ADD, UUID, needs=_PF.SHARED_OBJECT),
    MessageKind(_B.SHARED_OBJECT_REMOVE, UUID, needs=_PF.SHARED_OBJECT),
    MessageKind(_B.SHARED_OBJECT_LOOKUP, UUID, NOTHING, reply_fds=_MAYBE, needs=_PF.SHARED_OBJECT),
    MessageKind(_B.SHMEM_MAP, SHMEM_MAP, fds=_ONE, needs=_PF.SHMEM | _PF.BACKEND_SEND_FD),
    MessageKind(_B.SHMEM_UNMAP, SHMEM_MAP, needs=_PF.SHMEM | _PF.BACKEND_SEND_FD),
)


def kind_of(table: dict[int, MessageKind], request: int) -> MessageKind:
    """Return the row of a request number that came over the wire.

    Raises:
        WireError: No such request in this direction.
    """
    kind = table.get(request)
    if kind is None:
        raise WireError(f"unknown vhost-user request {request}")
    return kind


def _row(request: Request) -> MessageKind:
    table = FRONTEND_MESSAGES if isinstance(request, FrontendRequest) else BACKEND_MESSAGES
    return table[int(request)]


def missing_features(kind: MessageKind, protocol_features: int, virtio_features: int) -> list[str]:
    """Return the names of features that ``kind`` needs and that are not among the given ones."""
    if not (kind.needs & ~protocol_features or kind.needs_virtio & ~virtio_features):
        return []  # each message is asked about; to look for names takes 12 us
    protocol = feature_names(ProtocolFeature, kind.needs & ~protocol_features)
    return protocol + feature_names(VirtioFeature, kind.needs_virtio & ~virtio_features)


def decode_payload(request: Request, data: bytes) -> Payload:
    """Decode the payload of a request.

    Raises:
        WireError: The bytes are not such a payload.
    """
    payload: Payload = _row(request).payload.decode(data)
    return payload


def encode_payload(request: Request, record: Payload) -> bytes:
    """Return the payload bytes of a request."""
    return _row(request).payload.encode(record)


def decode_reply(request: Request, data: bytes) -> Payload:
    """Decode the reply's payload: the request's own, or else an acknowledgement (u64).

    Raises:
        WireError: The bytes are not such a payload.
    """
    codec: PayloadCodec[Any] = _row(request).reply or U64
    record: Payload = codec.decode(data)
    return record


def encode_reply(request: Request, record: Payload) -> bytes:
    """Return the payload bytes of a reply."""
    codec: PayloadCodec[Any] = _row(request).reply or U64
    return codec.encode(record)


def decode_ack(data: bytes) -> bool:
    """Return whether an acknowledgement reports success.

    Raises:
        WireError: Not a u64.
    """
    return U64.decode(data) == ACK_OK


def encode_ack(error: int = ACK_OK) -> bytes:
    """Return the payload of an acknowledgement; ``error`` 0 is success."""
    return U64.encode(error)


def encode_message(request: Request, record: Payload = None, *, need_reply: bool = False) -> bytes:
    """Return header and payload of a request, in one piece."""
    payload = encode_payload(request, record)
    return encode_header(request, len(payload), need_reply=need_reply) + payload


def check_fds(request: Request, record: Payload, count: int) -> None:
    """Check how many descriptors came with a request.

    Args:
        request: The request.
        record: Its decoded payload, which decides for memory tables and descriptor words.
        count: Descriptors that arrived.

    Raises:
        WireError: Too few or too many.
    """
    low, high = _row(request).fds
    if isinstance(record, MemoryTable):
        low = high = len(record.regions)
    elif isinstance(record, FdWord | HostNotifier):
        low = high = 0 if record.no_fd else 1
    if not low <= count <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise WireError(f"{request.name} with {count} descriptors, expected {expected}")
