"""The examples run as they stand, against the bundled daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemons import REPOSITORY, start_daemon

EXAMPLES = REPOSITORY / "examples"
PATIENCE = 60


def run(example: str, *arguments: Path) -> str:
    """Run an example; return what it prints."""
    path = EXAMPLES / example
    command = [sys.executable, str(path)] if path.suffix == ".py" else ["sh", str(path)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "VFSMOUNT": f"{sys.executable} -m vfsmount",
    }
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder to share."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "present").write_text("content")
    return folder


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()

    examples = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert len(examples) >= 3
    for name in examples:
        assert f'run("{name}"' in tested


@pytest.mark.slow
@pytest.mark.needs_fuse
def test_mount_and_use(source: Path, mountpoint: Path) -> None:
    printed = run("mount_and_use.py", source, mountpoint)

    assert "at the host: hello from the mount" in printed
    assert "on the mount: present 7 bytes" in printed
    assert list(mountpoint.iterdir()) == []


@pytest.mark.slow
def test_session_api(source: Path) -> None:
    with start_daemon("bundled", source) as daemon:
        printed = run("session_api.py", daemon.socket)

    assert "note: written without a mount" in printed
    assert "-rw-r--r--        7 present" in printed
    assert (source / "note").read_text() == "written without a mount\n"


@pytest.mark.slow
@pytest.mark.needs_fuse
def test_serve_and_mount(source: Path, mountpoint: Path) -> None:
    printed = run("serve_and_mount.sh", source, mountpoint)

    assert "present" in printed
    assert "GETATTR" in printed or "LOOKUP" in printed
    assert list(mountpoint.iterdir()) == []
