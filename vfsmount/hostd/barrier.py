"""The full memory barrier that a device needs where it stores one index and then loads another.

x86-64 keeps every order but store → load; others keep none. In Python there are three ways:

* x86-64: taking and releasing a ``threading.Lock`` executes a locked instruction, which is a full
  barrier there (0.09 us; a call through ctypes takes 0.33).
* elsewhere: ``atomic_thread_fence`` of the C runtime's atomic library.
* elsewhere without that library: two lock pairs, which order all but a store and a later load. The
  rare miss is then a delay and no hang, because ``RECHECK`` bounds every sleep.
"""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECHECK", "TOTAL_STORE_ORDER", "fence"]

#: Whether stores become visible in order, so that only store → load needs a fence.
TOTAL_STORE_ORDER = platform.machine() in {"x86_64", "i686", "AMD64"}

_SEQ_CST = 5

_lock = threading.Lock()


def _lock_fence() -> None:
    _lock.acquire()
    _lock.release()


def _two_lock_fences() -> None:
    _lock_fence()
    _lock_fence()


def _library_fence() -> Callable[[], None] | None:
    import ctypes

    try:
        function = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int]
    function.restype = None
    return lambda: function(_SEQ_CST)


def _choose() -> tuple[Callable[[], None], float | None]:
    if TOTAL_STORE_ORDER:
        return _lock_fence, None
    library = _library_fence()
    return (library, None) if library else (_two_lock_fences, 0.05)


#: ``fence()``: no store before it is seen after a load behind it.
#: ``RECHECK``: longest sleep before an index is looked at again, in seconds; None where there is no
#: need to.
fence, RECHECK = _choose()
