"""The table of docs/semantics.md is the litmus table that the tests run, row by row."""

from __future__ import annotations

from pathlib import Path

from tests.litmus.rows import MODES, ROWS, When

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "semantics.md"
HEADING = ["change", "what is looked at", *MODES]


def table(text: str, heading: list[str]) -> list[list[str]]:
    """Return the cells of the markdown table with this heading, without heading and rule."""
    lines = iter(text.splitlines())
    for line in lines:
        if cells(line) == heading:
            break
    else:
        raise AssertionError(f"there is no table with the heading {heading}")
    assert set(next(lines)) == set("|-")
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_table_is_what_is_tested() -> None:
    tested = [[row.change, row.look, *(row.when(mode).value for mode in MODES)] for row in ROWS]
    assert table(DOCUMENT.read_text(), HEADING) == tested


def test_rows_have_different_names() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_words_are_explained() -> None:
    text = DOCUMENT.read_text()
    for when in When:
        assert f"**{when.value}**" in text
