"""The answering side of the control socket: a table of commands, served by trio tasks.

A new command is one more row of the table. Commands run inside the event loop, so they must be
quick and must not touch the mount.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import trio

from vfsmount.client.mount.control import (
    ANSWER_SECONDS,
    peer_credentials,
    prepare_folder,
    remove_stale_sockets,
    socket_name,
)

__all__ = ["Command", "control_socket"]

Command: TypeAlias = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Takes the request, returns the result; both become JSON."""

MAX_REQUEST = 65536
"""Bytes of one request line."""
BACKLOG = 16

logger = logging.getLogger(__name__)


@asynccontextmanager
async def control_socket(device: str, commands: Mapping[str, Command]) -> AsyncIterator[None]:
    """Serve commands for one mount while the body runs; the socket is gone afterwards.

    A mount without its control socket is still a mount: where none can be made, this says so in
    the log and goes on.

    Args:
        device: The mount's ``major:minor``.
        commands: What can be asked, by name.
    """
    try:
        path, listener = _listen(device)
    except OSError as error:
        logger.warning("no status for this mount: %s", error)
        yield
        return
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, listener, commands)
            yield
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        _remove(path)


def _listen(device: str) -> tuple[str, trio.socket.SocketType]:
    folder = prepare_folder()
    remove_stale_sockets(folder)
    path = os.path.join(folder, socket_name(device))
    _remove(path)  # nobody else can have our device number now
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        plain.bind(path)
        os.chmod(path, 0o600)
        plain.listen(BACKLOG)
        return path, trio.socket.from_stdlib_socket(plain)
    except OSError:
        plain.close()
        raise


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


async def _accept(listener: trio.socket.SocketType, commands: Mapping[str, Command]) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            link, _ = await listener.accept()
            nursery.start_soon(_converse, trio.SocketStream(link), commands)


async def _converse(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    """Answer one client until it hangs up, is silent for too long or sends too much."""
    async with stream:
        pid, uid = peer_credentials(stream)
        if uid not in (0, os.geteuid()):
            logger.warning("control socket: process %d of uid %d is refused", pid, uid)
            return
        try:
            pending = b""
            while True:
                with trio.fail_after(ANSWER_SECONDS):
                    line, pending = await _read_line(stream, pending)
                    if not line:
                        return
                    await stream.send_all(await _answer(line, commands))
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            logger.debug("control socket: process %d: %r", pid, error)


async def _read_line(stream: trio.SocketStream, pending: bytes) -> tuple[bytes, bytes]:
    while b"\n" not in pending:
        more = await stream.receive_some()
        pending += more
        if not more or len(pending) > MAX_REQUEST:
            return b"", b""
    line, _, pending = pending.partition(b"\n")
    return line + b"\n", pending


async def _answer(line: bytes, commands: Mapping[str, Command]) -> bytes:
    try:
        request = json.loads(line)
        command = commands[request["command"]]
    except (ValueError, TypeError, KeyError):
        known = ", ".join(sorted(commands))
        reply: dict[str, Any] = {"ok": False, "error": f"no such command; there are: {known}"}
    else:
        reply = {"ok": True, "result": await command(request)}
    return json.dumps(reply).encode() + b"\n"
