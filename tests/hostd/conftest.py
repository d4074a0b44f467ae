"""A shared folder with a guest on it, and a canary next to it that no guest may reach."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.hostd.guest import DirectGuest
from vfsmount.hostd.fs.share import Share, ShareOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CANARY = b"untouched"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder to share; next to it lies a file that must survive whatever a guest says."""
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY)
    before = canary.stat()
    path = tmp_path / "share"
    path.mkdir()
    yield path
    assert canary.read_bytes() == CANARY
    assert canary.stat().st_mode == before.st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["canary", "share"]


@pytest.fixture
def options() -> ShareOptions:
    """Overridden by tests that share in another way."""
    return ShareOptions()


@pytest.fixture
def share(folder: Path, options: ShareOptions) -> Iterator[Share]:
    with Share(folder, options) as share:
        yield share


@pytest.fixture
def guest(share: Share) -> Iterator[DirectGuest]:
    """A guest that has said INIT; its server's thread, this one, has no umask."""
    umask = os.umask(0)
    with DirectGuest(share) as guest:
        guest.init()
        yield guest
    os.umask(umask)
