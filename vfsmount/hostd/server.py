"""The listening socket: one thread per guest, and an orderly end.

``Server`` is the daemon as an object: make one, call ``run`` in some thread, ``stop`` it from any
other. It owns its socket, and its file where it made one; the share is the caller's.

A stale socket file, left behind by a process that was killed, is replaced. Whether somebody listens
on it is asked with a socket of another type: the kernel refuses that differently for a live socket
and a dead one, and the daemon behind a live one, which may serve only one connection in its life,
never notices.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from contextlib import suppress
from typing import Final

from vfsmount.errors import UsageError
from vfsmount.hostd.connection import Connection
from vfsmount.hostd.fs.share import Share, ShareOptions

__all__ = ["DEFAULT_POLL_US", "Server", "SocketFile", "listen", "listen_on_fd", "serve"]

logger = logging.getLogger(__name__)

#: Guests at once; each takes a thread.
_MAX_GUESTS: Final = 64
_BACKLOG: Final = 16
#: Seconds that guests get to finish the request they are in when the daemon stops.
_FAREWELL: Final = 5.0
#: Milliseconds to wait when there is no descriptor left for another guest.
_STARVED_MS: Final = 100
#: Longest time in microseconds to look at rings before sleeping: about what a wake-up costs.
DEFAULT_POLL_US: Final = 50


def listen(path: str, group: str | None = None) -> socket.socket:
    """Return a socket that listens at ``path``, for its owner alone or a group as well.

    Raises:
        UsageError: Somebody listens there, it is no socket, there is no such group, or the host
            refuses.
    """
    if not path or "\0" in path:  # to the kernel: a name outside of the filesystem
        raise UsageError(f"cannot listen on {path!r}: that is no path")
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Whoever can connect acts as root here, so nobody else may from the first moment on.
    umask = os.umask(0o077)
    try:
        sock.bind(path)
        try:
            if group is not None:
                _admit_group(path, group)
            sock.listen(_BACKLOG)
        except (OSError, ValueError):
            os.unlink(path)
            raise
    except (OSError, ValueError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        cure = "check the path" if group is None else "check path and group"
        raise UsageError(f"cannot listen on {path}: {reason}", cure) from None
    finally:
        os.umask(umask)
    return sock


def _admit_group(path: str, group: str) -> None:
    import grp  # hardly ever needed, at every start

    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {group!r}") from None
    os.chown(path, -1, gid)
    os.chmod(path, 0o660)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing there, or something that bind will complain about
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"cannot listen on {path}: it exists and is no socket", "name another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise UsageError(
                f"cannot listen on {path}: another process does", "stop it, or choose another path"
            )
    with suppress(FileNotFoundError):
        os.unlink(path)


def listen_on_fd(fd: int) -> socket.socket:
    """Return the listening socket that was inherited as ``fd``; takes the descriptor.

    Raises:
        UsageError: There is no such descriptor, or it is not a listening AF_UNIX stream socket.
    """
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"descriptor {fd} is no socket: {reason}") from None
    kind = (sock.family, sock.type)
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM) or not sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        sock.detach()
        raise UsageError(f"descriptor {fd} is no listening UNIX stream socket")
    sock.set_inheritable(False)
    return sock


class SocketFile:
    """The file of a listening socket that was just made, to be removed at the end.

    Args:
        path: Where it is; None where the socket's file is somebody else's affair.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._identity = None if path is None else _identity(path)

    def remove(self) -> None:
        """Remove it, once, unless another daemon has put its own there."""
        path, self.path = self.path, None
        if path is not None and _identity(path) == self._identity:
            with suppress(FileNotFoundError):
                os.unlink(path)


class Server:
    """Accepts guests until it is stopped.

    Args:
        share: What they see.
        sock: A listening socket; owned from here on.
        path: Its file, if it is ours to remove at the end.
        poll_us: Longest time in microseconds to look at a guest's rings before sleeping.
        once: Take one guest only, and end when it has left.
    """

    def __init__(
        self,
        share: Share,
        sock: socket.socket,
        *,
        path: str | None = None,
        poll_us: int = DEFAULT_POLL_US,
        once: bool = False,
    ) -> None:
        self._share = share
        self._sock = sock
        self._file = SocketFile(path)
        self._poll_us = poll_us
        self._once = once
        self._guests: dict[Connection, threading.Thread] = {}
        # Guards _guests, from which threads remove themselves, and _wake, which must not be written
        # to once it is closed and its number somebody else's. A signal handler may come in between.
        self._lock = threading.RLock()
        self._count = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        sock.setblocking(False)

    def run(self) -> None:
        """Accept guests until ``stop``, then see them off and clean up."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while self._wake not in [fd for fd, _ in poll.poll()]:
                self._accept()
        finally:
            self.close()

    def stop(self) -> None:
        """Make ``run`` return soon; callable from any thread and from a signal handler."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Send all guests away and give the socket back."""
        self._sock.close()
        self._file.remove()
        with self._lock:
            guests = dict(self._guests)
        for guest in guests:
            guest.stop()
        deadline = time.monotonic() + _FAREWELL
        for thread in guests.values():
            thread.join(max(deadline - time.monotonic(), 0))
        with self._lock:
            wake, self._wake = self._wake, -1
            if wake >= 0:
                os.close(wake)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has left again
        except OSError as error:
            logger.warning("cannot accept a guest: %s", error)
            select.poll().poll(_STARVED_MS)
            return
        if len(self._guests) >= (1 if self._once else _MAX_GUESTS):
            logger.warning("turned a guest away: there are %d", len(self._guests))
            sock.close()
            return
        self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        self._count += 1
        name = f"guest {self._count}"
        try:
            guest = Connection(
                sock, self._share, name=name, poll_ns=self._poll_us * 1000, alone=self._once
            )
        except OSError as error:  # no descriptor left for its root
            logger.warning("cannot serve %s: %s", name, str(error))
            sock.close()
            return
        thread = threading.Thread(target=self._serve, args=(guest,), name=name, daemon=True)
        try:
            with self._lock:  # at which it waits, if it is done so soon
                thread.start()
                self._guests[guest] = thread
        except RuntimeError as error:  # the host allows no more threads
            logger.warning("cannot serve %s: %s", name, str(error))
            guest.close()

    def _serve(self, guest: Connection) -> None:
        try:
            guest.run()
        finally:
            with self._lock:
                del self._guests[guest]
            if self._once:
                self.stop()


def serve(
    directory: str | os.PathLike[str],
    socket_path: str | os.PathLike[str],
    options: ShareOptions | None = None,
) -> None:
    """Share a directory with whoever connects to a socket; does not return.

    For a daemon that can be stopped, make a ``Server``.

    Raises:
        UsageError: The directory cannot be shared, or nobody can listen there.
    """
    path = os.fspath(socket_path)
    with (
        Share(directory, options or ShareOptions()) as share,
        Server(share, listen(path), path=path) as server,
    ):
        server.run()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
