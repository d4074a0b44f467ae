"""How many messages it takes to read a large file from its beginning to its end."""

from __future__ import annotations

import os

import pytest

from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import start_mount
from vfsmount.client.mount.status import read_status
from vfsmount.client.readahead import READAHEAD, raise_readahead

MIB = 1 << 20


@pytest.mark.needs_fuse
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["relay", "pyfuse3"])
def test_sequential_reads_are_large(engine: str, daemon_kind: str) -> None:
    with (
        quick_folders("ahead", "host", "mnt") as (host, path),
        start_daemon(daemon_kind, host) as daemon,
        start_mount(path, daemon.socket, engine=engine, options=["--dax=off"]),
    ):
        content = os.urandom(16 * MIB)
        (host / "large").write_bytes(content)
        before = read_status(str(path))
        with (path / "large").open("rb", buffering=0) as handle:
            pieces = iter(lambda: handle.read(128 << 10), b"")
            assert b"".join(pieces) == content
        after = read_status(str(path))
        if before["readahead_bytes"] != READAHEAD:
            pytest.skip("the kernel's read-ahead cannot be raised here")
        assert after["requests"]["READ"]["count"] <= 20
        with (path / "large").open("rb", buffering=0) as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for at in (9, 3, 12, 6):
                assert os.pread(handle.fileno(), 10, at * MIB) == content[at * MIB :][:10]


def test_no_such_device() -> None:
    assert raise_readahead("9999:9999", MIB) is None
