"""A file whose file system does not answer: FUSE, with a server that has fallen silent."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from tests.support.environment import fuse_problem, unavailable
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["answered_within", "silent_file"]

T = TypeVar("T")

_MNT_DETACH = 2
_FOLDER = fuse.Attr(1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
_FILE = _FOLDER._replace(ino=2, mode=stat.S_IFREG | 0o644, nlink=1, size=4096)
#: What is answered so that the file can be opened. Attributes are valid for no time at all.
_ANSWERS = {
    Opcode.INIT: fuse.INIT_OUT.values(7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0, 0, 0),
    Opcode.GETATTR: fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, _FOLDER)),
    Opcode.LOOKUP: fuse.ENTRY_OUT.pack(fuse.EntryOut(2, 0, 0, 0, 0, 0, _FILE)),
    Opcode.OPEN: fuse.OPEN_OUT.values(1, 0, 0),
}


@contextmanager
def silent_file(mountpoint: Path) -> Iterator[int]:
    """Yield a descriptor of a file; whoever asks for anything about it waits until the end."""
    if problem := fuse_problem():
        unavailable(problem)
    libc = ctypes.CDLL(None)
    device = os.open("/dev/fuse", os.O_RDWR)
    mountpoint.mkdir()
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"silent", bytes(mountpoint), b"fuse.silent", 0, options):
        os.close(device)
        unavailable("only root can mount without fusermount3")
    server = threading.Thread(target=_serve_until_opened, args=(device,))
    server.start()
    fd = os.open(mountpoint / "file", os.O_RDONLY)
    server.join()
    try:
        yield fd
    finally:
        os.close(device)  # which ends all waits with ENOTCONN
        with suppress(OSError):
            os.close(fd)
        libc.umount2(bytes(mountpoint), _MNT_DETACH)


def _serve_until_opened(device: int) -> None:
    while True:
        header = fuse.IN_HEADER.unpack(os.read(device, 8192))
        body = _ANSWERS.get(Opcode(header.opcode))
        size = fuse.OUT_HEADER.size + len(body or b"")
        error = 0 if body is not None else -38  # ENOSYS
        os.write(device, fuse.OUT_HEADER.values(size, error, header.unique) + (body or b""))
        if header.opcode == Opcode.OPEN:
            return


def answered_within(seconds: float, call: Callable[[], T]) -> T:
    """Call it in a thread, because nothing else can end a wait for a file system.

    Raises:
        AssertionError: It has not returned after that long.
    """
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no answer for {seconds} s"
    return results[0]
