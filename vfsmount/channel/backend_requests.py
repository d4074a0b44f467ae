"""The back-end request channel: a second socket, on which the daemon asks and we answer.

Handlers are a table, request to function. Whatever is not in the table, or was not negotiated, is
refused: its descriptors are closed and a failure is answered where an answer is wanted. Bytes that
are no message at all end the channel.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from vfsmount.channel.socket import Message, MessageSocket, close_all
from vfsmount.errors import ProtocolViolation, WireError
from vfsmount.wire.vhost_user import (
    BACKEND_MESSAGES,
    BackendRequest,
    Payload,
    ProtocolFeature,
    check_fds,
    decode_payload,
    encode_ack,
    encode_header,
    kind_of,
    missing_features,
)

__all__ = ["BackendHandler", "BackendRequestServer", "OlderHandler"]

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

#: Serves one kind of request: given the payload and the descriptors, which it may use but not keep
#: (``os.dup`` them), it returns 0 or a positive errno. It runs in the event loop and must not
#: block.
BackendHandler: TypeAlias = Callable[[Payload, list[int]], int]
#: The same for requests that are in no standard: they get the payload's bytes, may raise WireError,
#: and count the descriptors themselves.
OlderHandler: TypeAlias = Callable[[bytes, list[int]], int]

_U64_MASK: Final = (1 << 64) - 1


class Negotiated(Protocol):
    """Acked features; they may still grow while the channel is open already."""

    features: int
    protocol_features: int


class BackendRequestServer:
    """Answers the back-end's requests.

    Args:
        sock: Our end of the channel; this object owns it.
        negotiated: Who knows the features that have been acked.
        handlers: What we can do.
        older: What we can do of what came before the standard, by number: looked at where the
            standard's meaning of a number was not negotiated.
    """

    def __init__(
        self,
        sock: MessageSocket,
        negotiated: Negotiated,
        handlers: Mapping[BackendRequest, BackendHandler],
        older: Mapping[int, OlderHandler] | None = None,
    ) -> None:
        self._socket = sock
        self._negotiated = negotiated
        self._handlers = handlers
        self._older = older or {}

    def close(self) -> None:
        """Close the channel; again is harmless."""
        self._socket.close()

    async def serve(self) -> None:
        """Serve until the daemon closes its end; run as a task.

        The end of this channel alone means nothing: the main connection tells when the daemon goes.

        Raises:
            ProtocolViolation: What came is not a vhost-user request.
        """
        while True:
            try:
                message = await self._socket.receive()
                if message is None:
                    return
                await self._answer(message)
            except WireError as error:
                text = f"garbage on the back-end request channel: {error}"
                raise ProtocolViolation(text) from error
            except (OSError, trio.ClosedResourceError):
                return

    async def _answer(self, message: Message) -> None:
        header = message.header
        try:
            result = self._handle(message)
        finally:
            close_all(message.fds)
        if header.needs_reply and self._negotiated.protocol_features & ProtocolFeature.REPLY_ACK:
            # Failures are negated errnos in a u64, as the Rust implementations write them.
            payload = encode_ack(-result & _U64_MASK)
            reply = encode_header(header.request, len(payload), reply=True)
            await self._socket.send(reply + payload)

    def _handle(self, message: Message) -> int:
        """Return 0 or a positive errno."""
        number, features = message.header.request, self._negotiated
        kind = BACKEND_MESSAGES.get(number)
        missing = (
            missing_features(kind, features.protocol_features, features.features) if kind else []
        )
        if number in self._older and (kind is None or missing) and not message.header.is_reply:
            return self._older[number](message.payload, message.fds)
        if kind is None or message.header.is_reply:
            kind_of(BACKEND_MESSAGES, number)
            raise WireError("a reply to nothing")
        request = BackendRequest(number)
        handler = self._handlers.get(request)
        if missing or handler is None:
            log.warning("refused the daemon's %s: %s", request.name, missing or "not supported")
            return errno.EOPNOTSUPP
        record = decode_payload(request, message.payload)
        check_fds(request, record, len(message.fds))
        return handler(record, message.fds)
