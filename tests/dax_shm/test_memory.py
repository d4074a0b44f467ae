"""The window in memory: what becomes of views whose file is cut, and of other people's faults."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfsmount.dax_shm.memory import WindowMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 2 << 20
PAGE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("file")
    os.pwrite(fd, b"a" * BLOCK, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[WindowMemory]:
    memory = WindowMemory(2 * BLOCK)
    yield memory
    memory.close()


def test_a_view_is_the_file(memory: WindowMemory, file: int) -> None:
    memory.map(BLOCK, BLOCK, file, 0)
    view = memory.view(BLOCK, BLOCK)
    assert view.readonly
    assert view == b"a" * BLOCK
    os.pwrite(file, b"b", 5)
    assert bytes(view[4:7]) == b"aba"
    assert memory.view(0, BLOCK) == bytes(BLOCK)
    memory.unmap(BLOCK, BLOCK)
    assert view == bytes(BLOCK)
    assert memory.tears == 0


def copied(view: memoryview, offset: int) -> memoryview:
    """Copy to some place in a page. glibc copies backwards to one just behind the source's."""
    room = bytearray(len(view) + 2 * PAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % PAGE + offset
    copy = memoryview(room)[start : start + len(view)]
    copy[:] = view
    return copy


def test_truncated_under_a_view(memory: WindowMemory, file: int) -> None:
    """Without the handler each of these would end the process."""
    view = memory.view(0, BLOCK)
    looks = (
        lambda one: copied(one, PAGE // 2), lambda one: one[BLOCK - 1], hashlib.sha256,
        memoryview.tolist,
    )  # fmt: skip
    for look in looks:
        os.truncate(file, BLOCK)
        memory.map(0, BLOCK, file, 0)
        os.truncate(file, 3 * PAGE + 5)
        tears = memory.tears
        look(view)
        assert tears < memory.tears < tears + 10  # some copies look at several pages in turn
        assert view == b"a" * (3 * PAGE + 5) + bytes(BLOCK - 3 * PAGE - 5)
        os.pwrite(file, b"a" * BLOCK, 0)
        assert view[4 * PAGE] == 0
        memory.map(0, BLOCK, file, 0)
        assert view[4 * PAGE] == ord("a")


@pytest.mark.parametrize("offset", [0, 64, PAGE // 2])
def test_a_copy_of_a_truncated_file(memory: WindowMemory, file: int, offset: int) -> None:
    """It ends in zeros in whichever direction it is made; backwards with a fault for each page."""
    memory.map(0, BLOCK, file, 0)
    os.truncate(file, 3 * PAGE + 5)
    assert copied(memory.view(0, BLOCK), offset) == b"a" * (3 * PAGE + 5) + bytes(
        BLOCK - 3 * PAGE - 5
    )
    assert 0 < memory.tears <= BLOCK // PAGE


def test_a_system_call_fails_by_itself(memory: WindowMemory, file: int) -> None:
    memory.map(0, BLOCK, file, 0)
    os.truncate(file, 0)
    with open("/proc/self/comm", "wb", buffering=0) as target, pytest.raises(OSError, match="Bad"):
        target.write(memory.view(0, 10))
    assert memory.tears == 0


def test_threads(memory: WindowMemory, file: int) -> None:
    memory.map(0, BLOCK, file, 0)
    view, done = memory.view(0, BLOCK), []

    def look() -> None:
        for _ in range(20):
            hashlib.sha256(view).digest()
            bytes(view)
        done.append(1)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        os.truncate(file, 0)
        os.truncate(file, BLOCK)
        memory.map(0, BLOCK, file, 0)
    assert len(done) == 4


def test_views_outlive_the_window(file: int) -> None:
    memory = WindowMemory(BLOCK)
    base = f"{memory.base:x}-"
    memory.map(0, BLOCK, file, 0)
    view = memory.view(0, PAGE)
    memory.close()
    assert view == bytes(PAGE)
    assert base in Path("/proc/self/maps").read_text()
    del view, memory
    gc.collect()
    assert base not in Path("/proc/self/maps").read_text()


FOREIGN = """
import mmap, os
from vfsmount.dax_shm.memory import WindowMemory
memory = WindowMemory(1 << 21)
fd = os.memfd_create("file")
os.truncate(fd, 8192)
foreign = mmap.mmap(fd, 8192)
os.truncate(fd, 0)
print("before", flush=True)
foreign[5000]
print("after", flush=True)
"""


def test_faults_elsewhere_are_as_ever() -> None:
    result = subprocess.run([sys.executable, "-c", FOREIGN], stdout=subprocess.PIPE, timeout=20)
    assert result.returncode == -signal.SIGBUS
    assert result.stdout == b"before\n"
