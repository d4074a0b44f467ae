from __future__ import annotations

import errno
import mmap
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from vfsmount.channel.memory import SharedMemory
from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(SIZE)
    yield memory
    memory.close()


@pytest.mark.parametrize("size", [0, SIZE - 4096, SIZE + 4096])
def test_nobody_can_change_its_size(memory: SharedMemory, size: int) -> None:
    with pytest.raises(PermissionError):
        os.truncate(memory.fd, size)


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Map(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "CONFIG_TRANSPARENT_HUGEPAGE=n")

    monkeypatch.setattr(mmap, "mmap", Map)
    SharedMemory(SIZE).close()


def test_both_ends_see_the_same(memory: SharedMemory) -> None:
    with mmap.mmap(memory.fd, SIZE) as other:
        other[5:8] = b"abc"
        assert memory.map[5:8] == b"abc"


def test_it_grows_by_use_and_shrinks_by_punching(memory: SharedMemory) -> None:
    assert memory.resident() == 0
    memory.map[0 : 1 << 19] = b"x" * (1 << 19)
    assert memory.resident() == 1 << 19

    memory.punch(4096, (1 << 19) - 4096)

    assert memory.resident() == 4096
    assert memory.map[4095:4097] == b"x\0"


def test_a_file_without_holes_keeps_its_pages(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class NoHoles:
        def madvise(self, *_: int) -> None:
            calls.append(1)
            raise OSError(errno.EOPNOTSUPP, "no holes")

    real = memory.map
    monkeypatch.setattr(memory, "map", NoHoles())
    memory.punch(0, 4096)
    memory.punch(0, 4096)
    monkeypatch.setattr(memory, "map", real)
    assert calls == [1]


def test_region_covers_it_all(memory: SharedMemory) -> None:
    region = memory.region
    assert region.size == SIZE
    assert region.guest_addr == region.user_addr > 0
    assert region.mmap_offset == 0


def test_closing(memory: SharedMemory) -> None:
    assert not memory.closed
    memory.close()
    memory.close()
    assert memory.closed


def test_views_outlive_it(memory: SharedMemory) -> None:
    memory.map[0:3] = b"abc"
    view = memory.view[0:3]
    memory.close()
    assert bytes(view) == b"abc"
    view.release()
    memory.map.close()


def test_file(tmp_path: Path) -> None:
    memory = SharedMemory(SIZE, str(tmp_path / "memory"))
    memory.map[0:3] = b"abc"
    assert (tmp_path / "memory").read_bytes()[:3] == b"abc"
    memory.close()
    assert not (tmp_path / "memory").exists()


def test_file_that_was_removed_meanwhile(tmp_path: Path) -> None:
    memory = SharedMemory(SIZE, str(tmp_path / "memory"))
    (tmp_path / "memory").unlink()
    memory.close()


@pytest.mark.parametrize(
    ("name", "complaint"), [("there", "exists already"), ("no/such", "cannot create")]
)
def test_files_that_cannot_be(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match=complaint):
        SharedMemory(SIZE, str(tmp_path / name))
    assert (tmp_path / "there").read_text() == "mine"


def test_nothing_is_left_when_it_cannot_be_mapped(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((OSError, ValueError, OverflowError)):
        SharedMemory(1 << 62, str(tmp_path / "memory"))
    assert not (tmp_path / "memory").exists()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_no_room_for_the_file(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        with pytest.raises(UsageError, match=r"^no room .*: No space left"):
            SharedMemory(SIZE, str(tmp_path / "shm"))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)
