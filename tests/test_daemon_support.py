"""What tests and the benchmark rely on when they start a real daemon."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.support.daemons import start_daemon

pytestmark = pytest.mark.needs_daemon


@pytest.mark.parametrize("kind", ["c", "rust"])
def test_room_for_descriptors(kind: str, tmp_path: Path) -> None:
    with (
        start_daemon(kind, tmp_path) as usual,
        start_daemon(kind, tmp_path, descriptors=1000) as roomy,
    ):
        assert usual.fd_table_size() < 1000 <= roomy.fd_table_size()
        # Where a daemon forks, its child's table has room for what is open, and no more.
        assert Path(f"/proc/{roomy.pid}/fd/999").exists()
        assert roomy.fd_count() == usual.fd_count()


def test_room_that_the_limit_forbids(tmp_path: Path) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        pytest.raises(AssertionError, match="ulimit -n"),
        start_daemon("rust", tmp_path, descriptors=limit + 1),
    ):
        pass
