"""FS_MAP in both layouts, byte by byte, and anything else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.errors import WireError
from vfsmount.wire.fs_map import FsMapEntry, decode_fs_map


def eight(*entries: tuple[int, int, int, int]) -> bytes:
    padded = [*entries, *[(0, 0, 0, 0)] * (8 - len(entries))]
    return struct.pack("=32Q", *(one[field] for field in range(4) for one in padded))


def counted(*entries: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=IHH", 0, len(entries), 0) + b"".join(
        struct.pack("=4Q", *one) for one in entries
    )


ONE, TWO = (4096, 8192, 4096, 1), (0, 1 << 30, 1 << 21, 3)


@pytest.mark.parametrize("layout", [eight, counted])
def test_entries(layout: object) -> None:
    assert callable(layout)
    assert decode_fs_map(layout(ONE, TWO)) == [FsMapEntry(*ONE), FsMapEntry(*TWO)]
    assert [one.writable for one in decode_fs_map(layout(ONE, TWO))] == [False, True]
    assert decode_fs_map(layout()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        counted(ONE)[:-1],
        counted(ONE) + b"\0",
        eight(ONE)[:-1],
        counted(*[ONE] * 33),
        eight((0, 0, 4096, 4)),
    ],
)
def test_what_is_no_fs_map(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_fs_map(data)


@given(st.binary(max_size=300) | st.binary(min_size=256, max_size=256))
def test_any_bytes(data: bytes) -> None:
    try:
        found = decode_fs_map(data)
    except WireError:
        return
    assert all(one.length for one in found)
