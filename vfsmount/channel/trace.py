"""A debug line for each message to the daemon: those of the handshake, and every FUSE request.

The log level is looked at when a channel is opened, so that requests pay nothing for it otherwise.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from vfsmount.wire.fuse import opcode_name

if TYPE_CHECKING:
    from vfsmount.channel.inflight import Pending
    from vfsmount.wire.vhost_user import FrontendRequest, Payload

__all__ = ["is_traced", "trace_message", "trace_request"]

log = logging.getLogger(__name__)


def is_traced() -> bool:
    """Whether anybody wants to see requests."""
    return log.isEnabledFor(logging.DEBUG)


def trace_message(request: FrontendRequest, said: Payload, answer: Payload) -> None:
    """Tell of a vhost-user message and its answer; None for what has no payload."""
    if is_traced():
        told = f" -> {_shown(answer)}" if answer is not None else ""
        log.debug("%s%s%s", request.name, f" {_shown(said)}" if said is not None else "", told)


def trace_request(request: Pending, nanoseconds: int) -> None:
    """Tell of a FUSE request that was answered."""
    outcome = errno.errorcode.get(request.errno, str(request.errno))
    if not request.errno:
        outcome = f"{request.length} bytes"
    name, duration = opcode_name(request.opcode), nanoseconds / 1000
    log.debug("%s on node %d: %s, %.0f us", name, request.nodeid, outcome, duration)


def _shown(payload: Payload) -> str:
    # Numbers are sets of features or small counts.
    return f"{payload:#x}" if isinstance(payload, int) else repr(payload)
