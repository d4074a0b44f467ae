"""Host attributes as the wire wants them: ``stat_result`` to ``fuse_attr`` and what holds one.

The structs are packed from plain numbers: records would double the cost of the two commonest
replies. Sizes are compared with the codecs of ``wire`` when this module is loaded.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, cast

from vfsmount.wire.fuse import ATTR, ATTR_OUT, DIRENT, ENTRY_OUT

if TYPE_CHECKING:
    import os

__all__ = [
    "ATTR_DAX",
    "ATTR_SUBMOUNT",
    "attr_out",
    "dirent",
    "direntplus",
    "direntplus_unknown",
    "entry_out",
]

_NANO: Final = 1_000_000_000
#: FUSE_ATTR_SUBMOUNT and FUSE_ATTR_DAX.
ATTR_SUBMOUNT: Final = 1
ATTR_DAX: Final = 2

_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
_ATTR_OUT_HEAD = struct.Struct("<QII")
_ENTRY_OUT_HEAD = struct.Struct("<QQQQII")
_DIRENT = struct.Struct("<QQII")
assert _ATTR.size == ATTR.size
assert _ATTR_OUT_HEAD.size + _ATTR.size == ATTR_OUT.size
assert _ENTRY_OUT_HEAD.size + _ATTR.size == ENTRY_OUT.size
assert _DIRENT.size == DIRENT.size

_NO_ENTRY = bytes(ENTRY_OUT.size)
_PAD: Final = (b"", *(bytes(8 - rest) for rest in range(1, 8)))


def _attr(st: os.stat_result, flags: int) -> bytes:
    """Build ``fuse_attr``, 88 bytes.

    glibc's dev_t has the kernel's 32-bit encoding in its low half, which is what rdev wants.
    """
    # The tuple inside a stat_result; its times are whole seconds (typeshed calls them floats).
    mode, ino, _, nlink, uid, gid, size, atime, mtime, ctime = cast("tuple[int, ...]", st)
    return _ATTR.pack(
        ino,
        size,
        st.st_blocks,
        atime,
        mtime,
        ctime,
        st.st_atime_ns % _NANO,
        st.st_mtime_ns % _NANO,
        st.st_ctime_ns % _NANO,
        mode,
        nlink & 0xFFFFFFFF,
        uid,
        gid,
        st.st_rdev & 0xFFFFFFFF,
        st.st_blksize & 0xFFFFFFFF,
        flags,
    )


def attr_out(attributes: os.stat_result, valid: int, flags: int = 0) -> bytes:
    """Build ``fuse_attr_out``, 104 bytes; ``valid`` in seconds."""
    return _ATTR_OUT_HEAD.pack(valid, 0, 0) + _attr(attributes, flags)


def entry_out(nodeid: int, attributes: os.stat_result, valid: int, flags: int = 0) -> bytes:
    """Build ``fuse_entry_out``, 128 bytes; ``valid`` in seconds holds for name and attributes."""
    return _ENTRY_OUT_HEAD.pack(nodeid, 0, valid, valid, 0, 0) + _attr(attributes, flags)


def direntplus(
    nodeid: int, attributes: os.stat_result, valid: int, flags: int, cookie: int, name: bytes
) -> bytes:
    """Build ``fuse_direntplus`` with its name, padded to 8 bytes."""
    entry = entry_out(nodeid, attributes, valid, flags)
    kind = attributes.st_mode >> 12
    return entry + dirent(attributes.st_ino, cookie, kind, name)


def direntplus_unknown(ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """Build ``fuse_direntplus`` of a name that was not looked up: nodeid 0, no attributes."""
    return _NO_ENTRY + dirent(ino, cookie, kind, name)


def dirent(ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """Build ``fuse_dirent`` with its name, padded to 8 bytes."""
    length = len(name)
    return _DIRENT.pack(ino, cookie, length, kind) + name + _PAD[length & 7]
