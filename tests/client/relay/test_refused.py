"""Replies that pass our checks but that the kernel refuses: EIO for the caller, life goes on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.mounts import start_mount
from tests.support.wait import wait_until
from vfsmount.client.mount.status import read_status
from vfsmount.testing.fake_device import DeviceRequest, FakeDevice
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.needs_fuse

FOLDER = fuse.Attr(1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
FILE = FOLDER._replace(ino=2, mode=stat.S_IFREG | 0o644, nlink=1, size=10)
CONTENT = b"0123456789"
ENTRY = fuse.ENTRY_OUT.pack(fuse.EntryOut(2, 0, 0, 0, 0, 0, FILE))


def good(request: DeviceRequest) -> bytes | None:
    """The body of a right answer; None where there is none."""
    flags, flags2 = fuse.split_flags(InitFlag.INIT_EXT | InitFlag.MAX_PAGES)
    attr = FOLDER if request.header.nodeid == 1 else FILE
    bodies = {
        Opcode.INIT: fuse.INIT_OUT.values(7, 38, 65536, flags, 0, 0, 65536, 1, 16, 0, flags2, 0, 0),
        Opcode.GETATTR: fuse.ATTR_OUT.pack(fuse.AttrOut(0, 0, attr)),
        Opcode.LOOKUP: ENTRY,
        Opcode.OPEN: fuse.OPEN_OUT.values(1, 0, 0),
        Opcode.OPENDIR: fuse.OPEN_OUT.values(1, 0, 0),
        Opcode.READ: b"" if request.body[8:16].strip(b"\0") else CONTENT,  # at an offset: the end
    }
    return bodies.get(Opcode(request.header.opcode), b"") if request.room else None


@contextmanager
def mount_of(path: Path, spoil: Callable[[int, bytes], bytes]) -> Iterator[Path]:
    """A real mount of a fake device that spoils the bodies of its replies."""

    def serve(request: DeviceRequest) -> None:
        body = good(request)
        if body is None:
            request.use()
        elif request.header.opcode == Opcode.IOCTL:  # isatty(), by open() of Python
            request.reply(error=-errno.ENOTTY)
        else:
            request.reply(spoil(request.header.opcode, body)[: request.room - 16])

    address, mountpoint = path / "socket", path / "mnt"
    mountpoint.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        device = _Listening(serve, listener)
        with (
            device,
            start_mount(
                mountpoint,
                address,
                cache="none",
                engine="relay",
                expected_complaint="warning: the kernel refused the daemon.s reply.*",
            ),
        ):
            yield mountpoint


class _Listening(FakeDevice):
    """A fake device that waits for its guest on a socket of its own."""

    def __init__(self, serve: Callable[[DeviceRequest], object], listener: socket.socket) -> None:
        super().__init__(serve)
        self._listener = listener
        self._thread: threading.Thread

    def _run(self) -> None:
        accepted, _ = self._listener.accept()
        self._sock, unused = accepted, self._sock
        unused.close()
        super()._run()


def test_a_healthy_fake_can_be_used(tmp_path: Path) -> None:
    with mount_of(tmp_path, lambda _, body: body) as mountpoint:
        assert (mountpoint / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.LOOKUP, Opcode.OPEN])
def test_a_reply_of_the_wrong_size(tmp_path: Path, opcode: Opcode) -> None:
    spoiling: list[bool] = []

    def spoil(asked: int, body: bytes) -> bytes:
        return body[:-8] if spoiling and asked == opcode else body

    with mount_of(tmp_path, spoil) as mountpoint:
        spoiling.append(True)
        with pytest.raises(OSError) as caught:  # noqa: PT011  # the errno is looked at below
            os.close(os.open(mountpoint / "file", os.O_RDONLY))
        assert caught.value.errno == errno.EIO
        wait_until(
            lambda: read_status(str(mountpoint))["kernel"]["replies_refused"], 5, "it to be counted"
        )
        spoiling.clear()
        assert (mountpoint / "file").read_bytes() == CONTENT
