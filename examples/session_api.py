#!/usr/bin/env python3
"""Talk to a virtio-fs daemon with no mount at all: list a folder, write a file, read it back.

    vfsmount serve DIR --socket /tmp/vfsd.sock &      (or a virtiofsd)
    examples/session_api.py /tmp/vfsd.sock

The session API has one async method per FUSE opcode. It keeps no count for you: what a reply
refers to (``entry.nodeid``) is given back with ``forget``, what it opens (``fh``) with ``release``.
"""

from __future__ import annotations

import os
import stat
import sys

import trio

import vfsmount

ROOT = 1
LISTING_SIZE = 32768


async def main(socket: str) -> None:
    """Write and read a file, then list the root of the share."""
    async with vfsmount.connect(socket) as guest:
        print(f"the daemon speaks FUSE 7.{guest.facts.minor}")
        await write_and_read(guest, b"note", b"written without a mount\n")
        await list_folder(guest, ROOT)


async def write_and_read(guest: vfsmount.Session, name: bytes, data: bytes) -> None:
    """CREATE, WRITE, READ, RELEASE, FORGET."""
    mode = stat.S_IFREG | 0o644
    entry, handle = await guest.create(ROOT, name, os.O_RDWR | os.O_TRUNC, mode)
    await guest.write(entry.nodeid, handle.fh, 0, data)
    content = await guest.read(entry.nodeid, handle.fh, 0, 4096)
    print(f"{name.decode()}: {content.decode()}", end="")
    await guest.release(entry.nodeid, handle.fh)
    guest.forget(entry.nodeid)


async def list_folder(guest: vfsmount.Session, nodeid: int) -> None:
    """OPENDIR, READDIRPLUS until it is empty, RELEASEDIR."""
    handle = await guest.opendir(nodeid)
    offset = 0
    while batch := await guest.readdirplus(nodeid, handle.fh, offset, LISTING_SIZE):
        for found in batch:
            offset = found.off
            if found.name not in (b".", b".."):
                attr = found.entry.attr
                name = found.name.decode(errors="replace")
                print(f"{stat.filemode(attr.mode)} {attr.size:8} {name}")
                guest.forget(found.entry.nodeid)
    await guest.releasedir(nodeid, handle.fh)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: session_api.py SOCKET")
    trio.run(main, sys.argv[1])
