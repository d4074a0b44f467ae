"""Backing files of a real /dev/fuse, and the capabilities of who registers them."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfsmount.client.relay import backing
from vfsmount.client.relay.backing import BackingFiles, drop_capabilities, problem
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs_fuse

_MNT_DETACH = 2
_SYS_ADMIN = 1 << 21
_SET_ID = 1 << 4


def device_with(flags: InitFlag, path: Path) -> int:
    """Mount, answer INIT with these flags, and return the device."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"none", bytes(path), b"fuse.vfsmount-test", 0, options):
        os.close(device)
        pytest.skip("cannot mount")
    request = fuse.decode_request(os.read(device, 8192))
    offered = fuse.join_flags(request.args.flags, request.args.flags2)
    low, high = fuse.split_flags((flags | InitFlag.INIT_EXT) & offered)
    depth = 1
    body = fuse.INIT_OUT.values(7, 40, 0, low, 16, 12, 4096, 1, 0, 0, high, depth, 0)
    os.write(device, fuse.OUT_HEADER.values(16 + len(body), 0, request.header.unique) + body)
    if flags & ~offered:
        pytest.skip("the kernel has no FUSE passthrough")
    return device


@pytest.fixture
def device(tmp_path: Path) -> Iterator[int]:
    """A mount with passthrough."""
    path = tmp_path / "mnt"
    path.mkdir()
    made = device_with(InitFlag.PASSTHROUGH, path)
    yield made
    os.close(made)
    ctypes.CDLL(None).umount2(bytes(path), _MNT_DETACH)


def in_thread(call: Callable[[], object]) -> object:
    """Do it in a thread of its own, whose capabilities nobody else uses."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def effective() -> int:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))


def test_registered_and_forgotten(device: int, tmp_path: Path) -> None:
    files = BackingFiles(device)
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    first, second = files.open(fd), files.open(fd)
    os.close(fd)
    assert 0 < first != second > 0
    for one in (first, second, first):
        files.close(one)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
        files.open(folder)
    os.close(folder)


def test_tried_before_it_is_promised(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem(device) == ""
    monkeypatch.setattr(backing, "_UNWANTED", _SYS_ADMIN)

    def without() -> str:
        drop_capabilities()
        return problem(device)

    assert "CAP_SYS_ADMIN" in str(in_thread(without))


def test_capabilities_are_dropped_by_this_thread_alone() -> None:
    before = effective()

    def without() -> int:
        drop_capabilities()
        return effective()

    assert in_thread(without) == before & ~_SET_ID & ~(1 << 24)
    assert effective() == before
