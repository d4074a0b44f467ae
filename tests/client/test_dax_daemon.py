"""A window between a session and the bundled daemon: descriptors come across, rules are kept."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

import vfsmount
from tests.support.daemons import start_daemon
from vfsmount.errors import RemoteErrno
from vfsmount.wire.fuse import InitFlag, SetupmappingFlag
from vfsmount.wire.vhost_user import ProtocolFeature

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE = 20.0
MIB = 1 << 20
READ, WRITE = SetupmappingFlag.READ, SetupmappingFlag.WRITE


async def test_descriptors_come_across(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    with start_daemon("bundled", tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with vfsmount.connect(daemon.socket, dax=64 * MIB) as guest:
            window = guest.window
            assert window is not None
            assert (window.size, window.range_size) == (64 * MIB, 2 * MIB)
            assert guest.channel.offer.shmem == {0: 1 << 30}
            entry = await guest.lookup(1, b"file")
            await guest.setupmapping(entry.nodeid, 0, 2 * MIB, READ, 0)
            assert window.descriptor(0, write=True) is None
            await guest.setupmapping(entry.nodeid, 0, 2 * MIB, READ | WRITE, 0)
            fd = window.descriptor(0, write=True)
            assert fd is not None
            assert os.pread(fd, 10, 0) == b"hello"
            os.pwrite(fd, b"J", 0)
            os.close(fd)
            assert (tmp_path / "file").read_bytes() == b"Jello"
            await guest.setupmapping(entry.nodeid, 0, 4096, READ, 4096)  # a hole in the middle
            assert window.mapped() == 3
            await guest.removemapping(entry.nodeid, [(0, 2 * MIB)])
            assert window.mapped() == 0
            with pytest.raises(RemoteErrno, match="Invalid"):
                await guest.setupmapping(entry.nodeid, 0, 4096, READ, 64 * MIB * 100)
            window.check_invariants()
            guest.forget(entry.nodeid)


async def test_a_window_smaller_than_the_daemons(tmp_path: Path) -> None:
    """What lies beyond it is refused here, and the daemon passes the refusal on."""
    (tmp_path / "file").write_bytes(b"hello")
    with start_daemon("bundled", tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with vfsmount.connect(daemon.socket, dax=4 * MIB) as guest:
            entry = await guest.lookup(1, b"file")
            with pytest.raises(RemoteErrno, match="Invalid"):
                await guest.setupmapping(entry.nodeid, 0, 2 * MIB, READ, 4 * MIB)
            await guest.setupmapping(entry.nodeid, 0, 2 * MIB, READ, 2 * MIB)
            guest.forget(entry.nodeid)


@pytest.mark.parametrize("options", [("--dax", "off"), ("--dax=64M",)])
async def test_on_offer_or_not(tmp_path: Path, options: tuple[str, ...]) -> None:
    with (
        start_daemon("bundled", tmp_path, extra=options) as daemon,
        trio.fail_after(DEADLINE),
    ):
        async with vfsmount.connect(daemon.socket, dax=1 << 40) as guest:
            on = options == ("--dax=64M",)
            assert bool(guest.channel.protocol_features & ProtocolFeature.SHMEM) == on
            assert (InitFlag.MAP_ALIGNMENT in guest.facts.flags) == on
            assert guest.facts.map_alignment == (12 if on else 0)
            assert (guest.window.size if guest.window else 0) == (64 * MIB if on else 0)


async def test_daemons_without_one(daemon_kind: str, tmp_path: Path) -> None:
    """Asked for or not, sessions with other daemons are as ever."""
    with start_daemon(daemon_kind, tmp_path) as daemon, trio.fail_after(DEADLINE):
        async with vfsmount.connect(daemon.socket, dax=64 * MIB) as guest:
            assert (guest.window is not None) == (daemon_kind == "bundled")
            await guest.statfs()
