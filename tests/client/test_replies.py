"""Replies that a daemon may not give: a body where none belongs, a struct of another size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

import vfsmount
from vfsmount.errors import ProtocolViolation
from vfsmount.testing import FakeDevice
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vfsmount.client.session import Session
    from vfsmount.testing import DeviceRequest

INIT = fuse.INIT_OUT.pack(
    fuse.INIT_OUT.unpack(bytes(fuse.INIT_OUT.size))._replace(major=7, minor=31, max_write=4096)
)


def answering(opcode: Opcode, body: bytes) -> FakeDevice:
    """A device that answers INIT as it should, and one opcode with ``body``."""
    bodies = {Opcode.INIT: INIT, opcode: body}

    def serve(request: DeviceRequest) -> None:
        request.reply(bodies.get(Opcode(request.header.opcode), b""))

    return FakeDevice(serve)


@pytest.mark.parametrize(
    ("opcode", "body", "call", "complaint"),
    [
        (Opcode.FLUSH, b"x", lambda guest: guest.flush(1, 1), "wrote 17 bytes .* room for 16"),
        (Opcode.STATFS, bytes(79), lambda guest: guest.statfs(), "79 bytes, 80 expected"),
        (Opcode.OPEN, bytes(15), lambda guest: guest.open(1, 0), "15 bytes, 16 expected"),
        (Opcode.LSEEK, b"", lambda guest: guest.lseek(1, 1, 0, 3), "0 bytes, 8 expected"),
    ],
)
async def test_refused(
    opcode: Opcode,
    body: bytes,
    call: Callable[[Session], Awaitable[Any]],
    complaint: str,
    expect_log: Callable[[str], None],
) -> None:
    expect_log("the channel to the daemon has ended: ")
    device = answering(opcode, body)
    with trio.fail_after(20), device:
        async with vfsmount.connect(sock=device.guest_socket()) as guest:
            with pytest.raises(ProtocolViolation, match=complaint):
                await call(guest)
