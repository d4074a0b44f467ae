"""Unwanted descriptors: closed aside, by few threads, also when their file systems hang."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.support.silent_fuse import answered_within, silent_file
from tests.support.wait import wait_until
from vfsmount import closer

if TYPE_CHECKING:
    from pathlib import Path


def threads() -> int:
    return sum(one.name == "closer" for one in threading.enumerate())


def test_few_threads_wait_and_all_is_closed_in_the_end(tmp_path: Path) -> None:
    with silent_file(tmp_path / "mnt") as fd:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        for _ in range(3 * closer.THREADS):
            answered_within(5.0, partial(closer.discard, [os.dup(fd)]))
        closer.discard([writing])
        assert threads() == closer.THREADS
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    wait_until(lambda: not threads(), 5.0, "the closers to end")
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_without_threads_the_next_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = [os.pipe() for _ in range(2)]

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        closer.discard([pipes[0][1]])
    closer.discard([pipes[1][1]])
    for reading, _ in pipes:
        assert os.read(reading, 1) == b""
        os.close(reading)
