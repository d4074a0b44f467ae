"""What users of the session API meet when something goes wrong: exceptions by their own type."""

from __future__ import annotations

import errno
import logging
import re
import traceback
from typing import TYPE_CHECKING

import pytest
import trio

import vfsmount
from tests.support.daemons import start_daemon
from vfsmount.errors import ChannelBroken, ConnectError, RemoteErrno

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.daemons import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """The bundled daemon with an empty share."""
    with start_daemon("bundled", tmp_path) as running:
        yield running


async def test_refusal_leaves_the_session_as_it_is(daemon: Daemon) -> None:
    async def look() -> None:
        async with vfsmount.connect(daemon.socket) as guest:
            await guest.lookup(1, b"absent")

    with pytest.raises(RemoteErrno) as caught:
        await look()
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value) == "LOOKUP on node 1: ENOENT (No such file or directory)"


async def test_opcode_without_a_name(daemon: Daemon) -> None:
    async with vfsmount.connect(daemon.socket) as guest:
        with pytest.raises(RemoteErrno, match=r"^opcode 9999 on node 1: ENOSYS"):
            await guest.raw(9999, 1, b"", 0)


async def test_trace(daemon: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vfsmount.channel.trace")
    async with vfsmount.connect(daemon.socket) as guest:
        with pytest.raises(RemoteErrno):
            await guest.lookup(1, b"absent")
    lines = [re.sub(r"[0-9]+ us", "N us", line) for line in caplog.messages]
    assert lines[0] == "SET_OWNER"
    assert "GET_QUEUE_NUM -> 0x2" in lines
    assert "SET_VRING_ENABLE VringState(ring=1, num=1)" in lines
    assert "LOOKUP on node 1: ENOENT, N us" in lines
    assert "DESTROY on node 0: 0 bytes, N us" in lines


async def test_loss_of_the_daemon_leaves_the_session_as_it_is(
    daemon: Daemon, expect_log: Callable[[str], None]
) -> None:
    expect_log("the channel to the daemon has ended")

    async def outlive_it() -> None:
        async with vfsmount.connect(daemon.socket) as guest:
            daemon.kill()
            with trio.fail_after(10):
                await guest.channel.wait_ended()
            await guest.getattr(1)

    with pytest.raises(ChannelBroken):
        await outlive_it()


async def test_cancellation_is_the_callers(daemon: Daemon) -> None:
    with trio.CancelScope() as scope:
        async with vfsmount.connect(daemon.socket) as guest:
            await guest.getattr(1)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_traceback_shows_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConnectError) as caught:
        await vfsmount.connect(tmp_path / "absent").__aenter__()
    assert "start the daemon first" in traceback.format_exception(caught.value)[-1]
