"""Host attributes as the wire wants them: ``stat_result`` to ``fuse_attr`` and what holds one.

The structs are packed in one go from plain numbers: records would double the cost of the two
commonest replies. Sizes are compared with the codecs of ``wire`` when this module is loaded.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, cast

from vfsmount.wire.fuse import ATTR_OUT, DIRENT, ENTRY_OUT

if TYPE_CHECKING:
    import os

__all__ = ["ATTR_SUBMOUNT", "attr_out", "direntplus", "direntplus_unknown", "entry_out"]

_NANO: Final = 1_000_000_000
#: FUSE_ATTR_SUBMOUNT.
ATTR_SUBMOUNT: Final = 1

_ATTR = "QQQqqqIIIIIIIIII"
_ATTR_OUT = struct.Struct("<QII" + _ATTR)
_ENTRY_OUT = struct.Struct("<QQQQII" + _ATTR)
_DIRENTPLUS = struct.Struct("<QQQQII" + _ATTR + "QQII")
assert _ATTR_OUT.size == ATTR_OUT.size
assert _ENTRY_OUT.size == ENTRY_OUT.size
assert _DIRENTPLUS.size == ENTRY_OUT.size + DIRENT.size

_NO_ENTRY = bytes(ENTRY_OUT.size)
_PAD: Final = (b"", *(bytes(8 - rest) for rest in range(1, 8)))


def _fields(st: os.stat_result, flags: int) -> tuple[int, ...]:
    """Return the sixteen fields of ``fuse_attr``.

    glibc's dev_t has the kernel's 32-bit encoding in its low half, which is what rdev wants.
    """
    # The tuple inside a stat_result; its times are whole seconds (typeshed calls them floats).
    mode, ino, _, nlink, uid, gid, size, atime, mtime, ctime = cast("tuple[int, ...]", st)
    return (
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


def attr_out(attributes: os.stat_result, valid: int) -> bytes:
    """Build ``fuse_attr_out``, 104 bytes; ``valid`` in seconds."""
    return _ATTR_OUT.pack(valid, 0, 0, *_fields(attributes, 0))


def entry_out(nodeid: int, attributes: os.stat_result, valid: int, flags: int = 0) -> bytes:
    """Build ``fuse_entry_out``, 128 bytes; ``valid`` in seconds holds for name and attributes."""
    return _ENTRY_OUT.pack(nodeid, 0, valid, valid, 0, 0, *_fields(attributes, flags))


def direntplus(
    nodeid: int, attributes: os.stat_result, valid: int, flags: int, cookie: int, name: bytes
) -> bytes:
    """Build ``fuse_direntplus`` with its name, padded to 8 bytes."""
    fields = _fields(attributes, flags)
    length = len(name)
    head = _DIRENTPLUS.pack(
        nodeid,
        0,
        valid,
        valid,
        0,
        0,
        *fields,
        fields[0],
        cookie,
        length,
        attributes.st_mode >> 12,
    )
    return head + name + _PAD[length & 7]


def direntplus_unknown(ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """Build ``fuse_direntplus`` of a name that was not looked up: nodeid 0, no attributes."""
    return _NO_ENTRY + DIRENT.values(ino, cookie, len(name), kind) + name + _PAD[len(name) & 7]
