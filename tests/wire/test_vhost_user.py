from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.errors import WireError
from vfsmount.wire.vhost_user import (
    BACKEND_MESSAGES,
    FRONTEND_MESSAGES,
    HEADER,
    MAX_PAYLOAD,
    BackendRequest,
    ConfigRange,
    DeviceStateTransfer,
    FdWord,
    FrontendRequest,
    Header,
    HostNotifier,
    InflightDescription,
    Iotlb,
    LogDescription,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    ShmemConfig,
    ShmemMap,
    VirtioFeature,
    VirtioStatus,
    VringAddr,
    VringState,
    check_fds,
    decode_ack,
    decode_header,
    decode_payload,
    decode_reply,
    encode_ack,
    encode_header,
    encode_message,
    encode_payload,
    encode_reply,
    feature_names,
    kind_of,
    missing_features,
)

ALL_REQUESTS: list[Request] = [*FrontendRequest, *BackendRequest]


def request_id(request: Request) -> str:
    side = "frontend" if isinstance(request, FrontendRequest) else "backend"
    return f"{side}-{request.name}"


every_request = pytest.mark.parametrize("request_", ALL_REQUESTS, ids=request_id)


# --- golden bytes: what two foreign daemons really said (little-endian machines) -----------------

GOLDEN_REPLIES: list[tuple[str, FrontendRequest, str, Payload]] = [
    ("rust", FrontendRequest.GET_FEATURES, "0000007401000000", 0x174000000),
    ("c", FrontendRequest.GET_FEATURES, "0000007501000000", 0x175000000),
    ("rust", FrontendRequest.GET_PROTOCOL_FEATURES, "2ba6080000000000", 0x8A62B),
    ("c", FrontendRequest.GET_PROTOCOL_FEATURES, "2b8c000000000000", 0x8C2B),
    ("rust", FrontendRequest.GET_QUEUE_NUM, "0200000000000000", 2),
    ("rust", FrontendRequest.GET_MAX_MEM_SLOTS, "fd01000000000000", 509),
    ("c", FrontendRequest.GET_MAX_MEM_SLOTS, "2000000000000000", 32),
    ("rust", FrontendRequest.SET_FEATURES, "0000000000000000", 0),
    (
        "rust",
        FrontendRequest.GET_CONFIG,
        "000000002800000000000000676f6c64656e" + "00" * 30 + "01000000",
        ConfigRange(0, 0, b"golden" + bytes(30) + b"\x01\0\0\0"),
    ),
]


@pytest.mark.parametrize(("daemon", "request_", "payload", "record"), GOLDEN_REPLIES)
def test_golden_replies(
    daemon: str, request_: FrontendRequest, payload: str, record: Payload
) -> None:
    message = struct.pack("=III", request_, 5, len(payload) // 2) + bytes.fromhex(payload)

    header = decode_header(message)

    assert header == Header(request_, 5, len(payload) // 2)
    assert header.is_reply
    assert not header.needs_reply
    assert decode_reply(request_, message[HEADER.size :]) == record
    assert encode_reply(request_, record) == message[HEADER.size :]


def test_golden_requests() -> None:
    # As daemons accepted them.
    assert encode_message(FrontendRequest.GET_FEATURES).hex() == "010000000100000000000000"
    assert (
        encode_message(FrontendRequest.SET_FEATURES, 0x170000000, need_reply=True).hex()
        == "0200000009000000080000000000007001000000"
    )
    assert (
        encode_message(FrontendRequest.SET_VRING_NUM, VringState(0, 128), need_reply=True).hex()
        == "0800000009000000080000000000000080000000"
    )


# Offsets from the specification's tables, not from the code.
LAYOUTS: list[tuple[Request, Payload, bytes]] = [
    (FrontendRequest.SET_VRING_NUM, VringState(1, 2), struct.pack("=II", 1, 2)),
    (
        FrontendRequest.SET_VRING_ADDR,
        VringAddr(1, 0, 0xD, 0x5ED, 0xA, 0x10),
        struct.pack("=IIQQQQ", 1, 0, 0xD, 0x5ED, 0xA, 0x10),
    ),
    (FrontendRequest.SET_VRING_KICK, FdWord(3), struct.pack("=Q", 3)),
    (FrontendRequest.SET_VRING_CALL, FdWord(3, no_fd=True), struct.pack("=Q", 0x103)),
    (
        FrontendRequest.SET_MEM_TABLE,
        MemoryTable((MemoryRegion(1, 2, 3, 4), MemoryRegion(5, 6, 7, 8))),
        struct.pack("=II8Q", 2, 0, 1, 2, 3, 4, 5, 6, 7, 8),
    ),
    (FrontendRequest.ADD_MEM_REG, MemoryRegion(1, 2, 3, 4), struct.pack("=5Q", 0, 1, 2, 3, 4)),
    (FrontendRequest.REM_MEM_REG, MemoryRegion(1, 2, 3, 4), struct.pack("=5Q", 0, 1, 2, 3, 4)),
    (FrontendRequest.GET_CONFIG, ConfigRange(4, 1, b"xyz"), struct.pack("=III", 4, 3, 1) + b"xyz"),
    (
        FrontendRequest.IOTLB_MSG,
        Iotlb(1, 2, 3, 1, 2),
        struct.pack("=QQQBB6s", 1, 2, 3, 1, 2, bytes(6)),
    ),
    (
        FrontendRequest.GET_INFLIGHT_FD,
        InflightDescription(1, 2, 3, 4),
        struct.pack("=QQHHI", 1, 2, 3, 4, 0),
    ),
    (FrontendRequest.SET_LOG_BASE, LogDescription(1, 2), struct.pack("=QQ", 1, 2)),
    (
        FrontendRequest.SET_DEVICE_STATE_FD,
        DeviceStateTransfer(1, 0),
        struct.pack("=II", 1, 0),
    ),
    (
        BackendRequest.VRING_HOST_NOTIFIER_MSG,
        HostNotifier(1, False, 4096, 8192),
        struct.pack("=QQQ", 1, 4096, 8192),
    ),
    (
        BackendRequest.SHMEM_MAP,
        ShmemMap(0, 1, 2, 3, 1),
        struct.pack("=B7sQQQQ", 0, bytes(7), 1, 2, 3, 1),
    ),
    (BackendRequest.SHARED_OBJECT_ADD, b"u" * 16, b"u" * 16),
]


@pytest.mark.parametrize(("request_", "record", "data"), LAYOUTS, ids=lambda v: str(v)[:40])
def test_layouts(request_: Request, record: Payload, data: bytes) -> None:
    assert encode_payload(request_, record) == data
    assert decode_payload(request_, data) == record


def test_shmem_config_is_2056_bytes_and_lists_what_exists() -> None:
    config = ShmemConfig({0: 1 << 30, 7: 4096})

    data = encode_reply(FrontendRequest.GET_SHMEM_CONFIG, config)

    assert len(data) == 2056
    assert struct.unpack_from("=IIQ", data) == (2, 0, 1 << 30)
    assert decode_reply(FrontendRequest.GET_SHMEM_CONFIG, data) == config


def test_shmem_config_that_miscounts_is_refused() -> None:
    data = struct.pack("=II256Q", 3, 0, 4096, *[0] * 255)

    with pytest.raises(WireError, match="3 regions"):
        decode_reply(FrontendRequest.GET_SHMEM_CONFIG, data)


def test_inflight_without_its_padding_is_accepted() -> None:
    data = struct.pack("=QQHH", 1, 2, 3, 4)

    record = decode_payload(FrontendRequest.SET_INFLIGHT_FD, data)

    assert record == InflightDescription(1, 2, 3, 4)
    assert len(encode_payload(FrontendRequest.SET_INFLIGHT_FD, record)) == 24


def test_empty_config_reply_means_that_there_is_none() -> None:
    assert decode_reply(FrontendRequest.GET_CONFIG, b"") is None
    assert encode_reply(FrontendRequest.GET_CONFIG, None) == b""
    with pytest.raises(WireError):
        decode_payload(FrontendRequest.GET_CONFIG, b"")


def test_log_base_reply_may_be_empty_or_a_number() -> None:
    assert decode_reply(FrontendRequest.SET_LOG_BASE, b"") is None
    assert decode_reply(FrontendRequest.SET_LOG_BASE, bytes(8)) == 0
    assert encode_reply(FrontendRequest.SET_LOG_BASE, None) == b""
    assert encode_reply(FrontendRequest.SET_LOG_BASE, 0) == bytes(8)


# --- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ((1, 0, 0), "version 0"),
        ((1, 2, 0), "version 2"),
        ((1, 3, 0), "version 3"),
        ((1, 0x11, 0), "unknown vhost-user header flags 0x11"),
        ((1, 0x80000001, 0), "unknown"),
        ((1, 1, MAX_PAYLOAD + 1), "4097 bytes"),
    ],
)
def test_bad_headers(fields: tuple[int, int, int], complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode_header(struct.pack("=III", *fields))


def test_header_flags() -> None:
    assert decode_header(encode_header(7, 8)) == Header(7, 0x1, 8)
    assert decode_header(encode_header(7, 8, reply=True)).is_reply
    assert decode_header(encode_header(7, 8, need_reply=True)).needs_reply


@given(st.binary(max_size=32))
def test_any_bytes_are_a_header_or_a_wire_error(data: bytes) -> None:
    try:
        header = decode_header(data)
    except WireError:
        return
    assert header.size <= MAX_PAYLOAD


# --- the tables -----------------------------------------------------------------------------------


def test_every_number_has_its_row() -> None:
    assert sorted(FRONTEND_MESSAGES) == list(range(1, 46))
    assert sorted(BACKEND_MESSAGES) == list(range(1, 11))


def test_feature_bits() -> None:
    bits = {feature.name: feature.value.bit_length() - 1 for feature in ProtocolFeature}
    assert bits["REPLY_ACK"] == 3
    assert bits["CONFIG"] == 9
    assert bits["STATUS"] == 16
    assert bits["SHMEM"] == 22
    assert sorted(bits.values()) == list(range(24))
    assert VirtioFeature.VERSION_1 == 1 << 32
    assert VirtioFeature.PROTOCOL_FEATURES == 1 << 30
    assert VirtioStatus.ACKNOWLEDGE | VirtioStatus.DRIVER | VirtioStatus.FEATURES_OK == 11


def test_needs_of_the_messages() -> None:
    by_name = {kind.request.name: kind for kind in FRONTEND_MESSAGES.values()}
    no_needs = [name for name, kind in by_name.items() if not kind.needs and not kind.needs_virtio]
    # The messages that every back-end knows, whatever was negotiated.
    assert no_needs == [
        "GET_FEATURES",
        "SET_FEATURES",
        "SET_OWNER",
        "RESET_OWNER",
        "SET_MEM_TABLE",
        "SET_LOG_FD",
        "SET_VRING_NUM",
        "SET_VRING_ADDR",
        "SET_VRING_BASE",
        "GET_VRING_BASE",
        "SET_VRING_KICK",
        "SET_VRING_CALL",
        "SET_VRING_ERR",
        "GPU_SET_SOCKET",
    ]
    assert by_name["GET_CONFIG"].needs == ProtocolFeature.CONFIG
    assert by_name["GET_SHMEM_CONFIG"].needs == ProtocolFeature.SHMEM
    assert by_name["SET_VRING_ENABLE"].needs_virtio == VirtioFeature.PROTOCOL_FEATURES


def test_missing_features_are_named() -> None:
    kind = BACKEND_MESSAGES[BackendRequest.SHMEM_MAP]

    assert missing_features(kind, 0, 0) == ["BACKEND_SEND_FD", "SHMEM"]
    assert missing_features(kind, int(ProtocolFeature.SHMEM), 0) == ["BACKEND_SEND_FD"]
    assert missing_features(kind, -1, 0) == []


def test_unknown_requests() -> None:
    with pytest.raises(WireError, match="request 46"):
        kind_of(FRONTEND_MESSAGES, 46)
    with pytest.raises(WireError, match="request 0"):
        kind_of(BACKEND_MESSAGES, 0)


def test_feature_names_know_their_limits() -> None:
    assert feature_names(ProtocolFeature, 0x9 | 1 << 63) == ["MQ", "REPLY_ACK", "bit_63"]
    assert feature_names(VirtioFeature, 0) == []


# --- descriptors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "record", "good"),
    [
        (FrontendRequest.GET_FEATURES, None, {0}),
        (FrontendRequest.SET_BACKEND_REQ_FD, None, {1}),
        (FrontendRequest.SET_VRING_KICK, FdWord(0), {1}),
        (FrontendRequest.SET_VRING_KICK, FdWord(0, no_fd=True), {0}),
        (FrontendRequest.REM_MEM_REG, MemoryRegion(0, 1, 0, 0), {0, 1}),
        (FrontendRequest.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 1, 0, 0),) * 3), {3}),
        (BackendRequest.SHMEM_MAP, ShmemMap(0, 0, 0, 4096, 0), {1}),
        (BackendRequest.SHMEM_UNMAP, ShmemMap(0, 0, 0, 4096, 0), {0}),
        (BackendRequest.VRING_HOST_NOTIFIER_MSG, HostNotifier(0, True, 0, 0), {0}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_numbers_of_descriptors(request_: Request, record: Payload, good: set[int]) -> None:
    for count in range(5):
        if count in good:
            check_fds(request_, record, count)
        else:
            with pytest.raises(WireError, match=f"{count} descriptors"):
                check_fds(request_, record, count)


# --- any bytes ------------------------------------------------------------------------------------

# Lengths at and around those that mean something, so that decoders get past their size check.
payloads = st.one_of(
    st.binary(max_size=80),
    *[st.binary(min_size=size, max_size=size) for size in (4, 8, 12, 16, 20, 24, 32, 40, 52, 296)],
    # A small count or size in front, zeros or noise behind.
    st.builds(
        lambda head, body: struct.pack("=III", *head) + body,
        st.tuples(st.integers(0, 9), st.integers(0, 60), st.integers(0, 3)),
        st.binary(max_size=60),
    ),
    st.just(bytes(2056)),
)


@every_request
@given(data=payloads)
def test_any_payload_is_a_record_or_a_wire_error(request_: Request, data: bytes) -> None:
    try:
        record = decode_payload(request_, data)
    except WireError:
        return
    # What was understood can be said again, and means the same. Padding may differ.
    assert decode_payload(request_, encode_payload(request_, record)) == record


@every_request
@given(data=payloads)
def test_any_reply_is_a_record_or_a_wire_error(request_: Request, data: bytes) -> None:
    try:
        record = decode_reply(request_, data)
    except WireError:
        return
    assert decode_reply(request_, encode_reply(request_, record)) == record


@given(st.integers(0, 2**64 - 1))
def test_acknowledgements(error: int) -> None:
    assert decode_ack(encode_ack(error)) is (error == 0)


@pytest.mark.parametrize("count", [0, 9, 2**32 - 1])
def test_memory_tables_have_one_to_eight_regions(count: int) -> None:
    data = struct.pack("=II", count, 0) + bytes(32 * min(count, 9))
    with pytest.raises(WireError, match="regions"):
        decode_payload(FrontendRequest.SET_MEM_TABLE, data)


def test_config_ranges_stay_in_256_bytes() -> None:
    data = struct.pack("=III", 250, 7, 0) + bytes(7)
    with pytest.raises(WireError, match="250"):
        decode_payload(FrontendRequest.SET_CONFIG, data)


def test_unknown_bits_of_a_descriptor_word_are_refused() -> None:
    with pytest.raises(WireError, match="0x200"):
        decode_payload(FrontendRequest.SET_VRING_CALL, struct.pack("=Q", 0x200))
