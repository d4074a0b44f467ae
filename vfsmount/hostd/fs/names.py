"""What a guest may say where one name is expected.

Every name-carrying operation checks here first, so no system call ever gets a name that leads out
of the directory it is used in. With a checked name and O_NOFOLLOW, nothing needs to be resolved.
"""

from __future__ import annotations

import errno

from vfsmount.wire.fuse import NAME_MAX

__all__ = ["check_name"]

_NOT_NAMES = frozenset((b"", b".", b".."))
#: As numbers: to look for bytes in bytes takes five times as long (0.25 us).
_SLASH, _NUL = b"/\0"


def check_name(name: bytes) -> bytes:
    """Return ``name`` if it is one component of a path.

    Raises:
        OSError: EINVAL for empty, ``.``, ``..`` and a name with ``/`` or NUL; ENAMETOOLONG.
    """
    if name in _NOT_NAMES or _SLASH in name or _NUL in name:
        raise OSError(errno.EINVAL, "not a name")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    return name
