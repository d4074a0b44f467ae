"""The back-end request channel from our end: what the daemon asks of the front-end.

A socket of the front-end's making, on which we ask and it answers. One request at a time, by the
guest's own thread, which waits for the answer for a bounded time: a front-end that stays mute loses
the channel, and with it the right to be asked again.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from vfsmount.closer import discard
from vfsmount.errors import VfsmountError
from vfsmount.hostd.faults import Refused
from vfsmount.hostd.messages import receive
from vfsmount.wire.vhost_user import decode_reply, encode_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfsmount.wire.vhost_user import BackendRequest, Payload

__all__ = ["RequestChannel"]

logger = logging.getLogger(__name__)

#: Seconds for one answer. Nobody else waits for this guest's thread.
_PATIENCE: Final = 5.0
_U64: Final = 1 << 64
#: Errors that FUSE can carry are 1 to 511.
_ERRNO_LIMIT: Final = 512


class RequestChannel:
    """One end of the channel; owns its socket.

    Args:
        fd: Descriptor that came with SET_BACKEND_REQ_FD; ours from here on if this returns.

    Raises:
        Refused: It is no stream socket.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._socket = socket.socket(fileno=fd)
        except OSError as error:
            raise Refused(f"back-end request channel that is no socket: {error}") from None
        if self._socket.type != socket.SOCK_STREAM:
            self._socket.detach()
            raise Refused("back-end request channel that is no stream socket")
        # By the kernel: Python's own time limit costs a poll(2) for each call.
        limit = struct.pack("ll", int(_PATIENCE), 0)
        try:
            self._socket.setblocking(True)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        except OSError as error:
            self._socket.detach()
            raise Refused(f"back-end request channel without a time limit: {error}") from None

    def close(self) -> None:
        """Close the channel; again is harmless. The front-end's answers no longer matter."""
        self._socket.close()

    def ask(
        self,
        request: BackendRequest,
        record: Payload,
        fds: Sequence[int] = (),
        *,
        wait: bool = True,
    ) -> None:
        """Ask the front-end for something and wait until it is done.

        Args:
            request: What, of those that have no reply but an acknowledgement.
            record: Its payload.
            fds: Descriptors to send along; they stay ours.
            wait: Else the front-end does it before whatever it is asked next, and nobody learns how
                it went.

        Raises:
            OSError: The front-end's errno, EIO for a failure without one; EIO as well when it does
                not answer, after which the channel is closed.
        """
        if self._socket.fileno() < 0:
            raise OSError(errno.EIO, "the back-end request channel is closed")
        try:
            message = encode_message(request, record, need_reply=wait)
            socket.send_fds(self._socket, [message], fds)
            answer = self._answer(request) if wait else 0
        except (OSError, VfsmountError) as error:
            logger.warning("the front-end did not answer %s: %s", request.name, str(error))
            self.close()
            raise OSError(errno.EIO, f"no answer to {request.name}") from None
        if answer:
            # Negated errnos, as most front-ends write them; whatever else is not 0 failed too.
            number = _U64 - answer
            number = number if number < _ERRNO_LIMIT else errno.EIO
            raise OSError(number, f"the front-end refused {request.name}: {os.strerror(number)}")

    def _answer(self, request: BackendRequest) -> int:
        message = receive(self._socket)
        if message is None:
            raise ConnectionResetError("closed by the front-end")
        discard(message.fds)
        if not message.header.is_reply or message.header.request != request:
            raise ConnectionAbortedError(f"message {message.header.request} instead of an answer")
        answer = decode_reply(request, message.payload)
        assert isinstance(answer, int)
        return answer
