"""What several tests of the relay start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import DAEMON_KINDS, daemon_marks
from tests.support.shares import Shared, open_shared

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=daemon_marks(kind)) for kind in DAEMON_KINDS],
)
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """A mount over each daemon that believes names and attributes for ten minutes."""
    with open_shared(request.param, "relay", "auto", options=("--timeout", "600")) as shared:
        yield shared
