"""The table of known deviations holds nothing that no test looks at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.deviations import DEVIATIONS, Deviation

SOURCES = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]


@pytest.mark.parametrize("row", DEVIATIONS, ids=lambda row: row.case)
def test_row_is_used(row: Deviation) -> None:
    assert row.reason
    assert any(f'"{row.case}"' in source for source in SOURCES)
