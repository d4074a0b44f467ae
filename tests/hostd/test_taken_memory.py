"""Memory that its owner cuts off while the daemon uses it: who suffers."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import GUEST_ADDR, REQUEST_AT, RING_SPACE, Disconnected, Frontend
from tests.hostd.guest import ROOT
from tests.support.daemons import start_daemon
from vfsmount.wire.vhost_user import FrontendRequest, MemoryTable

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemons import Daemon

pytestmark = pytest.mark.slow


def connect(daemon: Daemon, *, sealable: bool) -> Frontend:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(daemon.socket))
    return Frontend(sock, sealable=sealable)


def test_a_guest_among_others_may_not_bring_such_memory(tmp_path: Path) -> None:
    with (
        start_daemon("bundled", tmp_path) as daemon,
        connect(daemon, sealable=True) as good,
        connect(daemon, sealable=False) as bad,
    ):
        good.handshake()
        good.init()
        bad.negotiate()
        table = MemoryTable((bad.region,))
        assert not bad.ack(FrontendRequest.SET_MEM_TABLE, table, [bad.memfd])
        assert good.getattr(ROOT).ino
        with pytest.raises(PermissionError):
            os.ftruncate(good.memfd, 4096)
        assert "memfd" in daemon.stderr


def test_a_lone_guest_may_and_harms_itself(tmp_path: Path) -> None:
    with (
        start_daemon("bundled", tmp_path, extra=["--once"]) as daemon,
        connect(daemon, sealable=False) as guest,
    ):
        guest.handshake()
        guest.init()
        guest.rings[1].put(0, GUEST_ADDR + REQUEST_AT, 40)
        os.ftruncate(guest.memfd, 2 * RING_SPACE)  # the rings stay
        guest.publish(1, 0)
        with pytest.raises(Disconnected):
            guest.wait_used(1)
        assert daemon.wait() != 0
