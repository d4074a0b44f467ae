#!/usr/bin/env python3
"""Capture FUSE messages between the Linux kernel and real daemons, for ``tests/wire/golden/``.

Usage, as root: ``.venv/bin/python -m tools.capture_golden [c] [rust]`` (both by default).

Neither end is ours: the kernel writes the requests and virtiofsd the replies. Between them this
script only carries bytes, from /dev/fuse to a virtqueue and back, and keeps a few messages of each
opcode. Numbers and times in them are those of the machine where it ran.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tests.support.daemons import start_daemon
from vfsmount.channel import open_channel
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from vfsmount.channel import Channel

TARGET = Path(__file__).resolve().parent.parent / "tests" / "wire" / "golden"

# Messages of one opcode that are kept, with and without an error.
KEPT = 8
# /dev/fuse wants room for the largest WRITE.
DEVICE_READ = (1 << 20) + 4096
# Room for any reply but those that the request itself sizes.
USUAL_ROOM = 8192

_libc = ctypes.CDLL(None, use_errno=True)

#: Runs in a process of its own: everything that makes the kernel send another kind of request.
WORKLOAD = r"""
import ctypes, fcntl, os, stat, sys
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call, *arguments):
    try:
        return call(*arguments)
    except OSError:
        return None
os.mkdir("folder", 0o755)
attempt(os.mkdir, "folder")
fd = os.open("folder/file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
os.write(fd, b"some content\n")
os.pread(fd, 100, 0)
os.fsync(fd); os.fdatasync(fd)
os.posix_fallocate(fd, 0, 8192)
attempt(os.lseek, fd, 0, os.SEEK_HOLE); attempt(os.lseek, fd, 0, os.SEEK_DATA)
attempt(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB); attempt(fcntl.lockf, fd, fcntl.LOCK_UN)
attempt(fcntl.flock, fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
attempt(fcntl.ioctl, fd, 0x80086601, bytes(8))
other = os.open("folder/other", os.O_RDWR | os.O_CREAT, 0o600)
attempt(os.copy_file_range, fd, other, 10)
os.ftruncate(fd, 5); os.fchmod(fd, 0o600); os.fchown(fd, 1000, 100)
os.utime(fd, ns=(1_500_000_000_123_456_789, -1)); os.utime("folder/file")
os.close(fd); os.close(other)
os.truncate("folder/file", 3)
attempt(os.open, "folder", os.O_TMPFILE | os.O_RDWR)
os.symlink("folder/file", "link"); os.readlink("link")
os.link("folder/file", "hard")
os.mknod("fifo", stat.S_IFIFO | 0o600); os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
os.setxattr("hard", "user.key", b"value", os.XATTR_CREATE); os.getxattr("hard", "user.key")
os.listxattr("hard"); attempt(os.getxattr, "hard", "user.none"); os.removexattr("hard", "user.key")
os.statvfs("."); attempt(os.stat, "nothing"); os.stat("folder/file")
os.rename("hard", "folder/moved"); os.rename("folder/moved", "hard")
for flags in (1, 2):
    libc.renameat2(-100, b"hard", -100, b"link", flags)
os.listdir("."); os.listdir("folder")
folder = os.open("folder", os.O_RDONLY | os.O_DIRECTORY); os.fsync(folder); os.close(folder)
os.access("hard", os.R_OK)
os.mkdir("shared"); os.chown("shared", 0, 4003); os.chmod("shared", 0o2777)
if os.fork() == 0:
    os.setgroups([4003]); os.setgid(4002); os.setuid(4001)
    os.mkdir("shared/theirs")
    os.close(os.open("shared/file", os.O_WRONLY | os.O_CREAT, 0o644))
    os._exit(0)
os.wait()
os.unlink("shared/file"); os.rmdir("shared/theirs"); os.rmdir("shared")
os.unlink("hard"); os.unlink("link"); attempt(os.rmdir, "folder")
open("/proc/sys/vm/drop_caches", "w").write("2")
"""


class Capture:
    """The messages kept so far."""

    def __init__(self) -> None:
        self.exchanges: list[dict[str, str]] = []
        self._seen: dict[tuple[int, bool], int] = {}

    def keep(self, request: bytes, reply: bytes) -> None:
        """Keep an exchange unless there are enough of its kind; ``reply`` may be empty."""
        opcode = fuse.IN_HEADER.unpack(request).opcode
        failed = bool(reply) and fuse.OUT_HEADER.unpack(reply).error != 0
        number = self._seen[opcode, failed] = self._seen.get((opcode, failed), 0) + 1
        if number <= KEPT:
            name = fuse.opcode_name(opcode)
            row = {"opcode": name, "request": request.hex(), "reply": reply.hex()}
            self.exchanges.append(row)


def main(arguments: list[str]) -> None:
    """Capture from each kind of daemon."""
    for kind in arguments or ["c", "rust"]:
        capture = Capture()
        with tempfile.TemporaryDirectory(prefix="vfsmount-golden-") as folder:
            shared, mountpoint = Path(folder, "shared"), Path(folder, "mnt")
            shared.mkdir()
            mountpoint.mkdir()
            with start_daemon(kind, shared, cache="auto") as daemon:
                trio.run(_carry, daemon.socket, mountpoint, capture)
        TARGET.mkdir(exist_ok=True)
        rows = ",\n".join(json.dumps(row) for row in capture.exchanges)
        (TARGET / f"{kind}.json").write_text(f"[\n{rows}\n]\n")
        print(f"{kind}: {len(capture.exchanges)} messages")


async def _carry(socket: Path, mountpoint: Path, capture: Capture) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    result = _libc.mount(b"golden", os.fsencode(mountpoint), b"fuse", 0, options.encode())
    assert result == 0, os.strerror(ctypes.get_errno())
    try:
        async with open_channel(socket) as channel, trio.open_nursery() as nursery:
            nursery.start_soon(_serve, channel, device, capture)
            workload = [sys.executable, "-c", WORKLOAD, str(mountpoint)]
            await trio.run_process(workload)
            await trio.to_thread.run_sync(subprocess.check_call, ["umount", str(mountpoint)])
    finally:
        os.close(device)


async def _serve(channel: Channel, device: int, capture: Capture) -> None:
    """Carry requests, one at a time, until the file system is unmounted."""
    while True:
        await trio.lowlevel.wait_readable(device)
        try:
            request = os.read(device, DEVICE_READ)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR):
                continue
            raise
        reply = await _exchange(channel, request)
        capture.keep(request, reply)
        if reply:
            os.write(device, reply)


async def _exchange(channel: Channel, request: bytes) -> bytes:
    header = fuse.IN_HEADER.unpack(request)
    if header.opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
        await channel.request_raw([request], queue=0)
        return b""
    room = USUAL_ROOM
    if header.opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
        room = fuse.READ_IN.unpack(request, fuse.IN_HEADER.size).size
    elif header.opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        room = fuse.GETXATTR_IN.unpack(request, fuse.IN_HEADER.size).size or fuse.GETXATTR_OUT.size
    _, reply = await channel.request_raw([request], [fuse.OUT_HEADER.size + room])
    return reply


if __name__ == "__main__":
    main(sys.argv[1:])
