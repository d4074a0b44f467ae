"""The exception tree: every error that vfsmount raises on purpose.

    VfsmountError
    ├── UsageError            the user asked for something that cannot be          exit 1
    ├── WireError             bytes do not decode (raised by decoders only)
    ├── FeatureMissing        the feature was not negotiated; names the bit
    ├── ConnectError          no back-end at the other end of the socket           exit 3
    ├── HandshakeError        it is there, but we could not agree                  exit 4
    ├── MountError            the kernel or fusermount3 refused the mount          exit 32
    ├── ChannelClosed         we closed the channel
    ├── ChannelBroken         the back-end went away or failed                     exit 5
    │   └── ProtocolViolation   ... by breaking the rules
    ├── RequestTimeout        one request had no reply in ``--request-timeout``
    └── RemoteErrno           the daemon said no: ordinary business, not a fault

``str(error)`` is one line that names the cause; ``error.cure`` is what to do about it and may be
empty. ``can_reconnect`` tells whether a new connection could help. Blame is in the type: whatever
breaks *our* own rules is an ``AssertionError`` or ``ValueError``, hence a bug, never one of these.
"""

from __future__ import annotations

import errno as errno_module
import os
from enum import IntEnum

__all__ = [
    "ChannelBroken",
    "ChannelClosed",
    "ConnectError",
    "ExitCode",
    "FeatureMissing",
    "HandshakeError",
    "MountError",
    "ProtocolViolation",
    "RemoteErrno",
    "RequestTimeout",
    "UsageError",
    "VfsmountError",
    "WireError",
]


class ExitCode(IntEnum):
    """Exit status of the ``vfsmount`` command; 1 and 32 as in mount(8)."""

    OK = 0
    USAGE = 1
    INTERNAL = 2
    CONNECT = 3
    HANDSHAKE = 4
    DAEMON_LOST = 5
    MOUNT = 32


class VfsmountError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One line, no full stop, naming what failed and why.
        cure: What the user can do about it; may be empty.
    """

    exit_code: ExitCode = ExitCode.INTERNAL
    can_reconnect: bool = False

    def __init__(self, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.cure = cure
        if cure:
            self.add_note(cure)  # so that tracebacks show it


class UsageError(VfsmountError):
    """An option or argument that cannot be; nothing was started."""

    exit_code = ExitCode.USAGE


class WireError(VfsmountError):
    """Bytes that do not decode. Decoders raise this and nothing else, whatever the input."""


class FeatureMissing(VfsmountError):
    """An operation needs a feature bit that was not negotiated."""

    exit_code = ExitCode.HANDSHAKE


class ConnectError(VfsmountError):
    """The socket does not exist, is not a socket, refuses us, or nobody listens."""

    exit_code = ExitCode.CONNECT
    can_reconnect = True


class HandshakeError(VfsmountError):
    """The peer answered, late, wrongly or not at all, before the device was ready."""

    exit_code = ExitCode.HANDSHAKE


class MountError(VfsmountError):
    """The mount point, ``/dev/fuse`` or fusermount3 stood in the way."""

    exit_code = ExitCode.MOUNT


class ChannelClosed(VfsmountError):
    """We closed the channel. Not raised when the back-end ended it: see ChannelBroken."""


class ChannelBroken(VfsmountError):
    """The back-end ended the channel; the cause is chained."""

    exit_code = ExitCode.DAEMON_LOST
    can_reconnect = True


class ProtocolViolation(ChannelBroken):
    """The back-end broke the rules, so nothing it says can be trusted any more."""

    can_reconnect = False


class RequestTimeout(VfsmountError):
    """No reply within ``request_timeout`` seconds; the device still owns the buffers."""


class RemoteErrno(VfsmountError):
    """The daemon answered a request with an error.

    Attributes:
        opcode: FUSE opcode of the request.
        nodeid: Node that the request named.
        errno: Positive errno value.
    """

    __slots__ = ("errno", "nodeid", "opcode")

    def __init__(self, opcode: int, nodeid: int, errno: int) -> None:
        # Raised for every ENOENT, so the text is made only when somebody reads it.
        Exception.__init__(self, opcode, nodeid, errno)
        self.opcode = opcode
        self.nodeid = nodeid
        self.errno = errno
        self.cure = ""

    def __str__(self) -> str:
        # The session asks with members of wire.fuse.Opcode, which know their names.
        asked = getattr(self.opcode, "name", f"opcode {self.opcode}")
        name = errno_module.errorcode.get(self.errno, str(self.errno))
        return f"{asked} on node {self.nodeid}: {name} ({os.strerror(self.errno)})"
