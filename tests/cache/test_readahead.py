"""How many messages it takes to read a large file from its beginning to its end."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.client.mount.running import ENVIRONMENT
from tests.support.daemons import start_daemon
from tests.support.environment import quick_folders
from tests.support.mounts import start_mount
from tests.support.other_user import NOBODY, run_as_other_user
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


AS_OTHER_USER = """
vfsmount() { "$PYTHON" -m vfsmount "$@" || exit; }
vfsmount "$MNT" --source "$SOURCE" --daemonize --engine "$ENGINE" --dax=off
trap 'vfsmount umount "$MNT"' EXIT
dd if="$MNT/large" of="$COPY" bs=128k status=none || exit
vfsmount status "$MNT" --json
"""


@pytest.mark.needs_fuse
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "most"), [("pyfuse3", 20), ("relay", 132)])
def test_of_another_user(engine: str, most: int) -> None:
    """For whom the kernel reads 128 KiB ahead: the pyfuse3 engine does better, the relay cannot."""
    with tempfile.TemporaryDirectory(prefix="vfsmount-ahead-") as name:
        home = Path(name)
        home.chmod(0o755)
        places = {"MNT": home / "mnt", "SOURCE": home / "source", "COPY": home / "own" / "copy"}
        for path in (home / "mnt", home / "source", home / "own"):
            path.mkdir()
            os.chown(path, NOBODY, NOBODY)
        content = os.urandom(16 * MIB)
        (home / "source" / "large").write_bytes(content)
        words = {key: str(path) for key, path in places.items()}
        done = run_as_other_user(home, AS_OTHER_USER, {**ENVIRONMENT, **words, "ENGINE": engine})
        assert done.returncode == 0, done.stderr
        assert places["COPY"].read_bytes() == content
        status = json.loads(done.stdout)
        assert (status["engine"], status["readahead_bytes"]) == (engine, 128 << 10)
        assert status["cache"]["pages_by"] == ("vfsmount" if engine == "pyfuse3" else "kernel")
        assert status["requests"]["READ"]["count"] <= most


def test_no_such_device() -> None:
    assert raise_readahead("9999:9999", MIB) is None
