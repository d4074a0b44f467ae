"""Security labels of new files: extended attributes that come with the request (SECURITY_CTX).

They are set right after the file is made, before its maker hears of it. A file that cannot have its
label is removed again, so that none is left with less protection than was asked for. To the host's
processes it may show for an instant without.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from xattr import pyxattr_compat

from vfsmount.hostd import procfd

if TYPE_CHECKING:
    from vfsmount.hostd.fs.inodes import Inode
    from vfsmount.hostd.fs.xattrmap import XattrMap

__all__ = ["label"]

_host: Any = pyxattr_compat
_PREFIX = b"security."


def label(
    contexts: tuple[tuple[bytes, bytes], ...],
    inode: Inode,
    parent: Inode,
    name: bytes,
    rules: XattrMap | None = None,
) -> None:
    """Label a new node, or remove it.

    Args:
        contexts: Name and value of each label.
        inode: The node, open.
        parent: The directory that it was made in, open.
        name: Its name there; empty where it has none.
        rules: Other names for the labels on the host.

    Raises:
        OSError: The host does not take a label (EPERM, EOPNOTSUPP, ...); EINVAL: it is none.
    """
    try:
        for attribute, value in contexts:
            if not attribute.startswith(_PREFIX):
                raise OSError(errno.EINVAL, "no security label")
            host_name = attribute if rules is None else rules.to_host(attribute)
            _host.setxattr(procfd.path(inode.proc_name), host_name, value)
    except OSError:
        if name:
            # Whoever has put something else there meanwhile keeps it, as far as can be told.
            with suppress(OSError):
                _remove(inode, parent, name)
        raise


def _remove(inode: Inode, parent: Inode, name: bytes) -> None:
    made, there = os.fstat(inode.fd), os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
    if not os.path.samestat(made, there):
        return
    if stat.S_ISDIR(made.st_mode):
        os.rmdir(name, dir_fd=parent.fd)
    else:
        os.unlink(name, dir_fd=parent.fd)
