"""Documents for people."""

from __future__ import annotations

from typing import Any

import pytest

from vfsmount.client.mount.tables import format_duration, format_probe, format_status

DAEMON: dict[str, Any] = {
    "tag": "",
    "num_request_queues": 1,
    "queue_size": 1024,
    "max_mem_slots": 32,
    "virtio_features": {"offered": ["RING_EVENT_IDX", "VERSION_1"], "acked": ["VERSION_1"]},
    "protocol_features": {"offered": [], "acked": []},
    "fuse_version": "7.38",
    "init_flags": ["ASYNC_READ", "POSIX_LOCKS"],
    "max_write": 1 << 20,
    "max_read": 1 << 17,
}
STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "pid": 77,
    "mountpoint": "/mnt",
    "device": "0:52",
    "origin": {"source": "/data", "daemon_pid": 78},
    "engine": "pyfuse3",
    "engine_reason": "as asked for",
    "state": "serving",
    "lost": None,
    "uptime_s": 61.5,
    "options": ["ro", "allow_other"],
    "cache": {
        "mode": "auto",
        "entry_timeout_s": 1.0,
        "attr_timeout_s": 0.5,
        "negative_timeout_s": 0.0,
        "direct_io": False,
        "writeback": True,
    },
    "daemon": DAEMON,
    "dax": {
        "active": True,
        "range_bytes": 2 << 20,
        "ranges": 9,
        "mapped_ranges": 3,
        "hits": 90,
        "misses": 2,
        "set_ups": 4,
        "reclaims": 1,
        "bypassed": 0,
        "failures": 0,
    },
    "in_flight": 2,
    "mute": [{"opcode": "READ", "nodeid": 9, "age_s": 12.0}],
    "requests": {
        "GETATTR": {"count": 3, "errors": 0, "mean_us": 10.2, "p50_us": 9.0, "p99_us": 20.0},
        "LOOKUP": {"count": 1200, "errors": 11, "mean_us": 45.4, "p50_us": 40.0, "p99_us": 90.7},
    },
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (3.24, "3.2 s"),
        (60, "1 min 0 s"),
        (3599.9, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_status_table() -> None:
    assert format_status(STATUS) == (
        "/data on /mnt\n"
        "  state         serving for 1 min 1 s\n"
        "  engine        pyfuse3 (as asked for), vfsmount 0.1.0\n"
        "  process       77, daemon 78\n"
        "  options       ro, allow_other\n"
        "  cache         auto, names 1 s, attributes 0.5 s, absent names 0 s, writeback\n"
        "  queues        1 for requests, 1024 entries each\n"
        "  memory slots  32\n"
        "  virtio        VERSION_1 (offered as well: RING_EVENT_IDX)\n"
        "  vhost-user    none\n"
        "  FUSE          7.38, write up to 1024 KiB, read up to 128 KiB\n"
        "  INIT flags    ASYNC_READ POSIX_LOCKS\n"
        "  DAX           3 of 9 ranges of 2 MiB mapped, 90 hits, 2 misses, 4 set-ups, 1 reclaims, "
        "0 bypassed,\n"
        "                0 failures\n"
        "  in flight     2\n"
        "  mute          READ on node 9 without a reply for 12.0 s\n"
        "\n"
        "  request  count  errors  mean us  p50 us  p99 us\n"
        "  LOOKUP    1200      11       45      40      91\n"
        "  GETATTR      3       0       10       9      20\n"
    )


def test_no_window_and_why() -> None:
    text = format_status(STATUS | {"dax": {"active": False, "why": "--dax=off"}})
    assert "  DAX           off: --dax=off\n" in text


def test_files_that_the_kernel_has() -> None:
    counts = {"backing_files": 7, "kept": 5, "opens": 9, "opens_by_message": 1}
    dax = {"active": True, "policy": "every file, as --dax=SIZE was given", **counts}
    text = format_status(STATUS | {"dax": dax})
    expected = "as --dax=SIZE was given: 7 so far, 5 kept, 9 opens, 1 by message"
    assert expected in " ".join(text.split())


def test_lost_daemon_is_told() -> None:
    lost = STATUS | {"state": "daemon lost", "lost": "the daemon closed the connection"}
    text = format_status(lost | {"origin": {"socket": "/s"}})
    assert text.startswith("/s on /mnt\n  state         daemon lost, mounted for ")
    assert "  lost          the daemon closed the connection\n" in text
    assert "  process       77\n" in text


def test_long_lists_are_wrapped_under_themselves() -> None:
    flags = [f"FLAG_NUMBER_{index}" for index in range(20)]
    lines = format_probe({"socket": "/s", "daemon": DAEMON | {"init_flags": flags, "tag": "t"}})
    assert max(map(len, lines.splitlines())) <= 100
    assert "\n                FLAG_NUMBER_" in lines


def test_probe_text() -> None:
    text = format_probe({"socket": "/s", "daemon": DAEMON | {"tag": "myfs", "max_mem_slots": None}})
    assert text.startswith("/s\n  tag           myfs\n  queues ")
    assert "memory" not in text


def test_pages_are_shown_where_they_are_ours() -> None:
    pages = {"pages_by": "vfsmount", "pages_bytes": 5 << 20, "pages_limit_bytes": 64 << 20}
    assert "pages 5 of 64 MiB" in format_status(STATUS | {"cache": STATUS["cache"] | pages})
    kernel = {"pages_by": "kernel"}
    assert "pages" not in format_status(STATUS | {"cache": STATUS["cache"] | kernel})
