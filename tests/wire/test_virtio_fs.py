from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.errors import WireError
from vfsmount.wire.virtio_fs import Config, decode_config, encode_config, first_request_queue

tags = st.binary(min_size=1, max_size=36).filter(lambda tag: b"\0" not in tag)


def test_golden_config() -> None:
    # Rust virtiofsd 1.13 started with --tag golden.
    data = bytes.fromhex("676f6c64656e" + "00" * 30 + "01000000")

    assert decode_config(data) == Config(b"golden", 1)
    assert encode_config(Config(b"golden", 1)) == data


def test_tag_of_36_bytes_has_no_terminator() -> None:
    data = b"t" * 36 + struct.pack("<I", 3)

    assert decode_config(data) == Config(b"t" * 36, 3)


def test_notification_buffers() -> None:
    config = Config(b"tag", 2, 4096)

    data = encode_config(config)

    assert len(data) == 44
    assert decode_config(data) == config


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "0 bytes"),
        (bytes(39), "39 bytes"),
        (bytes(36) + b"\x01\0\0\0", "empty"),
        (b"a\0b" + bytes(33) + b"\x01\0\0\0", "NUL"),
        (b"a" + bytes(35) + bytes(4), "0 request queues"),
        (b"a" + bytes(35) + b"\0\x01\0\0", "256 request queues"),
    ],
)
def test_bad_config(data: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        decode_config(data)


@pytest.mark.parametrize("tag", [b"", b"x" * 37, b"a\0b"])
def test_tags_that_we_do_not_write(tag: bytes) -> None:
    with pytest.raises(ValueError, match="tag"):
        encode_config(Config(tag))


@given(tags, st.integers(1, 255), st.none() | st.integers(0, 2**32 - 1))
def test_round_trip(tag: bytes, queues: int, notify: int | None) -> None:
    config = Config(tag, queues, notify)

    assert decode_config(encode_config(config)) == config


@given(st.binary(max_size=60) | st.binary(min_size=40, max_size=40))
def test_any_bytes_are_a_config_or_a_wire_error(data: bytes) -> None:
    try:
        config = decode_config(data)
    except WireError:
        return
    assert encode_config(config) == data


def test_where_the_request_queues_begin() -> None:
    assert first_request_queue(False) == 1
    assert first_request_queue(True) == 2
