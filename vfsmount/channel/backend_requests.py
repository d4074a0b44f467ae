"""The back-end request channel: a second socket, on which the daemon asks and we answer.

Handlers are a table, request to function. Whatever is not in the table, or was not negotiated, is
refused: its descriptors are closed and a failure is answered where an answer is wanted. Bytes that
are no message at all end the channel.

While the queues are lent, the borrower's thread serves this channel, too (``LentRequests``): what
the daemon asks for belongs to a request of that thread, and waking the event loop for each of them
would cost several times what the request does.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from vfsmount.channel.socket import Message, MessageSocket, receive_now
from vfsmount.closer import discard
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

__all__ = ["BackendHandler", "BackendRequestServer", "LentRequests", "OlderHandler"]

if TYPE_CHECKING:
    import socket as stdlib_socket
    from collections.abc import Mapping

log = logging.getLogger(__name__)

#: Messages after which a thread looks at what else there is to do, the end above all. One set-up
#: asks for few, and 32 of them are on their way at most.
_AT_ONCE: Final = 1024

#: Serves one kind of request: given the payload and the descriptors, it returns 0 or a positive
#: errno. Descriptors that it keeps or closes it takes out of the list; what is left is closed
#: without waiting (``discard``). It runs in the event loop, or in the thread that the queues are
#: lent to, and must not block.
BackendHandler: TypeAlias = Callable[[Payload, list[int]], int]
#: The same for requests that are in no standard: they get the payload's bytes, may raise WireError,
#: and count the descriptors themselves.
OlderHandler: TypeAlias = Callable[[bytes, list[int]], int]

_U64_MASK: Final = (1 << 64) - 1
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)


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
        self._refused: set[BackendRequest] = set()
        self._at_home = trio.Event()
        self._at_home.set()
        self._idle = trio.CancelScope()
        #: Whether a message is being read or answered just now.
        self.busy = False

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
            await self._at_home.wait()
            with trio.CancelScope() as self._idle:
                await self._socket.wait_readable()
            if not self._at_home.is_set():
                continue  # lent meanwhile
            self.busy = True
            try:
                if not await self._serve_one():
                    return
            except (OSError, trio.ClosedResourceError):
                return
            finally:
                self.busy = False

    async def _serve_one(self) -> bool:
        try:
            message = await self._socket.receive()
            if message is None:
                return False
            answer = self.answer(message)
        except WireError as error:
            raise _violation(error) from error
        if answer:
            await self._socket.send(answer)
        return True

    def lend(self) -> LentRequests:
        """Let a thread serve the channel from now on; not while ``busy``."""
        self._at_home = trio.Event()
        self._idle.cancel()
        return LentRequests(self._socket.duplicate(), self.answer)

    def end_loan(self) -> None:
        """The thread does not serve it any more. Again is harmless."""
        self._at_home.set()

    def answer(self, message: Message) -> bytes:
        """Do what a message asks for; return the answer, empty when none is wanted.

        Raises:
            WireError: It is no request.
        """
        header = message.header
        try:
            result = self._handle(message)
        finally:
            discard(message.fds)
        if header.needs_reply and self._negotiated.protocol_features & _REPLY_ACK:
            # Failures are negated errnos in a u64, as the Rust implementations write them.
            payload = encode_ack(-result & _U64_MASK)
            return encode_header(header.request, len(payload), reply=True) + payload
        return b""

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
            self._note_refusal(request, missing)
            return errno.EOPNOTSUPP
        record = decode_payload(request, message.payload)
        check_fds(request, record, len(message.fds))
        return handler(record, message.fds)

    def _note_refusal(self, request: BackendRequest, missing: list[str]) -> None:
        """Log a refusal: the first of each kind as a warning, for a daemon may ask very often."""
        level = logging.DEBUG if request in self._refused else logging.WARNING
        self._refused.add(request)
        log.log(level, "refused the daemon's %s: %s", request.name, missing or "not supported")


class LentRequests:
    """The channel in the hands of a thread.

    Args:
        sock: A duplicate of our end, not blocking; this object owns it.
        answer: Does what a message asks for.

    Attributes:
        ended: The daemon has closed its end, which alone means nothing.
    """

    def __init__(self, sock: stdlib_socket.socket, answer: Callable[[Message], bytes]) -> None:
        self.ended = False
        self._socket = sock
        self._answer = answer

    def fileno(self) -> int:
        """Readable when there is something to serve."""
        return self._socket.fileno()

    def serve(self) -> None:
        """Serve what has come; waits only for the rest of a message that has begun, and not long.

        Raises:
            ProtocolViolation: What came is not a vhost-user request.
        """
        for _ in range(_AT_ONCE):
            if self.ended:
                return
            try:
                message = receive_now(self._socket)
                self.ended = message is None or not self._serve_one(message)
            except BlockingIOError:
                return
            except WireError as error:
                raise _violation(error) from error
            except OSError:
                self.ended = True

    def _serve_one(self, message: Message) -> bool:
        """Answer; False when that does not fit: so many answers that it does not read."""
        answer = self._answer(message)
        try:
            return not answer or self._socket.send(answer) == len(answer)
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()


def _violation(error: WireError) -> ProtocolViolation:
    return ProtocolViolation(f"garbage on the back-end request channel: {error}")
