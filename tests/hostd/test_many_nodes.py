"""A guest that knows many nodes: descriptors and memory of the daemon, as a process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import Frontend
from tests.hostd.guest import ROOT
from tests.support.daemons import start_daemon
from tests.support.wait import wait_until
from vfsmount.hostd.fs.inodes import MAX_NODE_FDS

if TYPE_CHECKING:
    from tests.support.daemons import Daemon

pytestmark = pytest.mark.slow

#: Of the next size of the tables, so that each node has a good part of them.
NODES = 22_500
IDLE = 60 << 20
DEADLINE = 20.0


def resident(daemon: Daemon) -> int:
    """Bytes of memory that the daemon has."""
    pages = Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_nodes_cost_few_bytes_and_no_descriptors(tmp_path: Path) -> None:
    for number in range(NODES):
        os.mknod(tmp_path / f"file{number:06}")
    with start_daemon("bundled", tmp_path) as daemon:
        files = daemon.fd_count()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(daemon.socket))
        with Frontend(sock) as guest:
            guest.handshake()
            guest.init()
            # What only the first replies need is not the nodes'.
            fh = guest.opendir()
            first = guest.readdirplus(fh, 0, 1 << 17)
            before, offset, known = resident(daemon), first[-1].off, 0
            assert before < IDLE
            while entries := guest.readdirplus(fh, offset, 1 << 17):
                offset = entries[-1].off
                known += sum(entry.entry.nodeid != 0 for entry in entries)
            assert known > 0.9 * NODES
            most = resident(daemon)
            assert (most - before) / known < 300
            assert daemon.fd_count() <= files + MAX_NODE_FDS + 10
            assert guest.getattr(first[5].entry.nodeid).ino == first[5].ino
            assert guest.getattr(ROOT).ino == tmp_path.stat().st_ino
        wait_until(lambda: daemon.fd_count() == files, DEADLINE, "descriptors to be closed")
        half = (before + most) // 2
        wait_until(lambda: resident(daemon) < half, DEADLINE, "memory to be given back")
