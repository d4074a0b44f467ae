"""``vfsmount probe``: what a daemon offers, found out by a handshake and INIT, without a mount."""

from __future__ import annotations

from typing import Any

import trio

from vfsmount.client.mount.causes import cause_of
from vfsmount.client.mount.report import daemon_facts
from vfsmount.client.mount.tables import format_probe
from vfsmount.client.session import connect

__all__ = ["format_probe", "run_probe"]


def run_probe(socket: str) -> dict[str, Any]:
    """Connect, agree, say goodbye, and return what was learnt.

    Raises:
        ConnectError: Nobody is there.
        HandshakeError: It speaks something else, or does not answer in time.
    """
    try:
        return trio.run(_probe, socket)
    except BaseExceptionGroup as group:
        raise cause_of(group) from group


async def _probe(socket: str) -> dict[str, Any]:
    async with connect(socket) as session:
        return {"socket": socket, "daemon": daemon_facts(session)}
