"""Descriptors from the other side that nobody wants, closed without waiting for that.

close(2) asks the file's file system, and one in userspace, the sender's own perhaps, need not
answer (FUSE_FLUSH); nothing ends that wait but its end. So threads wait, THREADS at most in a
process. What comes while all of them do stays open until there is a thread again. Who sends such
without end is found out when there is no descriptor left for the next: that message lacks what
belongs to it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["THREADS", "discard"]

#: Threads that close at a time; one, were it not for file systems that do not answer.
THREADS: Final = 4


class _Closer:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwanted: deque[int] = deque()
        self._threads = 0

    def discard(self, fds: Iterable[int]) -> None:
        """Have descriptors closed soon; any thread."""
        with self._lock:
            self._unwanted.extend(fds)
            if not self._unwanted or self._threads == THREADS:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._run, name="closer", daemon=True).start()
        except RuntimeError:  # the host allows no more, or Python ends: the next one closes these
            with self._lock:
                self._threads -= 1

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._unwanted:
                    self._threads -= 1
                    return
                fd = self._unwanted.popleft()
            with suppress(OSError):  # of the file system; the descriptor is gone all the same
                os.close(fd)


discard = _Closer().discard
