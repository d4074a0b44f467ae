"""The pyfuse3 file system: each VFS operation becomes requests of one session.

    kernel ──/dev/fuse──> pyfuse3 ──> a handler here ──> Session ──> virtqueue

A handler looks up the node, sends the request and turns the reply into pyfuse3's terms: those of
names and attributes are in ``names``, of open files in ``files``, of open directories in
``directories``; what they share is in ``handlers``.

The kernel checks permissions (``default_permissions``), because the daemon does not.

Set-id bits. libfuse tells the kernel that *we* clear suid and sgid bits when somebody without
CAP_FSETID writes or truncates (HANDLE_KILLPRIV). A daemon with HANDLE_KILLPRIV_V2 does that when
told; for any other we send a SETATTR first. pyfuse3 does not say who writes, so the opener counts.
"""

from __future__ import annotations

from vfsmount.client.pyfuse.directories import DirectoryHandlers
from vfsmount.client.pyfuse.files import FileHandlers
from vfsmount.client.pyfuse.names import NameHandlers

__all__ = ["VirtioFsOperations"]


class VirtioFsOperations(NameHandlers, FileHandlers, DirectoryHandlers):
    """The handlers that pyfuse3 calls, for one session and one cache policy."""
