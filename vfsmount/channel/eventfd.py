"""Eventfds shared with a peer that is not trusted.

The peer holds the same open file as we do: it may read it, fill it, and clear O_NONBLOCK on it. So
a call is never *read* (that could block): it is watched, edge triggered, through an epoll of our
own. A kick is written; a peer that both fills its own kick eventfd and makes it blocking can hold
us up there, as it could by never answering.
"""

from __future__ import annotations

import os
import select

__all__ = ["CallWatch", "close_fd", "new_eventfd"]


def new_eventfd() -> int:
    """Return a fresh eventfd: empty, not blocking, not inherited."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def close_fd(fd: int) -> None:
    """Close a descriptor unless it is -1."""
    if fd >= 0:
        os.close(fd)


class CallWatch:
    """Something to wait on that becomes readable with every call.

    Args:
        fds: Call eventfds.
    """

    def __init__(self, *fds: int) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        for fd in fds:
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def fileno(self) -> int:
        """The descriptor to wait on; -1 when closed."""
        return -1 if self._epoll.closed else self._epoll.fileno()

    def clear(self) -> None:
        """Forget the calls so far. Look at the ring afterwards, not before."""
        self._epoll.poll(0)

    def close(self) -> None:
        """Stop watching; the eventfds stay open."""
        self._epoll.close()
