"""The exerciser itself: content with a plain folder, and not with one that loses something."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from benchmarks.fsx import Exerciser

if TYPE_CHECKING:
    from pathlib import Path


def run(folder: Path, seed: int = 1) -> Exerciser:
    exerciser = Exerciser(folder, folder, seed, through=True)
    try:
        exerciser.run(500)
    finally:
        exerciser.close()
    return exerciser


def test_plain_folder(tmp_path: Path) -> None:
    exerciser = run(tmp_path)
    assert len(exerciser.counts) == 12


def test_same_seed_same_steps(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    assert run(first).counts == run(second).counts
    assert [path.read_bytes() for path in first.iterdir()] == [
        path.read_bytes() for path in second.iterdir()
    ]


def lose_write(fd: int, data: bytes, position: int) -> int:
    del fd, position
    return len(data)


def lose_truncation(fd: int, size: int) -> None:
    del fd, size


@pytest.mark.parametrize(
    ("call", "broken"), [("pwrite", lose_write), ("ftruncate", lose_truncation)]
)
def test_loss_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, broken: object
) -> None:
    monkeypatch.setattr(os, call, broken)
    with pytest.raises(AssertionError, match=r"step \d+, .* of seed 3: .*\n +before that:"):
        run(tmp_path, 3)
