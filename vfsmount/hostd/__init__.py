"""The bundled host daemon: a vhost-user back-end that shares a directory with virtio-fs guests.

``serve`` is all of it in one call; ``Server`` with a ``Share`` is the same for a program that wants
to stop it again. This room shares ``wire`` with the rest of the package and nothing else, and knows
no event loop: each guest has a thread that blocks.

    cli ─> server ─> connection ─┬─> messages      vhost-user on a socket
                     (a thread)  ├─> backend       its state machine ─> memory, vring
                                 └─> fs.dispatch   FUSE requests ─> fs.session, fs.*
"""

from __future__ import annotations

from vfsmount.hostd.fs.share import CacheMode, Share, ShareOptions
from vfsmount.hostd.server import Server, listen, serve

__all__ = ["CacheMode", "Server", "Share", "ShareOptions", "listen", "serve"]
