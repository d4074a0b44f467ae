"""The window as memory: mapped files to look at without a copy, and no death by SIGBUS.

Addresses for the whole window are reserved; a range is mapped over them, read-only, when somebody
first wants to look at it. What is not mapped reads as zeros, so that a view that is kept beyond its
time shows nothing of other files and hits no hole.

A file that the host truncates under a view: loads behind its end raise SIGBUS, which would end the
process. A handler puts zeros there instead, and the load goes on. It is entered by the load itself,
in the thread that made it, at a point where Python may be entered, too: inside a C function that
copies or looks at a buffer. (A system call that is given such an address fails with EFAULT by
itself.) Faults elsewhere are none of its business: it puts the handler back that was there before
it, and the access is repeated.

Python's own ``mmap`` cannot map at an address, hence ctypes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import weakref
from typing import Any, Final

__all__ = ["WindowMemory"]

_PAGE: Final = mmap.PAGESIZE
#: Ranges are multiples of it.
_BLOCK: Final = 2 << 20
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_ZEROS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_SA_SIGINFO: Final = 4
#: Where siginfo_t has si_addr on 64-bit Linux.
_SI_ADDR: Final = 16
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap: Any = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap: Any = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class _SigAction(ctypes.Structure):
    """``struct sigaction`` of glibc and musl on 64-bit Linux, 152 bytes."""

    _fields_ = [  # type: ignore[mutable-override]  # the way of ctypes
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def _map(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found: int = _mmap(address, length, protection, flags, fd, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


class WindowMemory:
    """Addresses of one window.

    Args:
        size: Bytes, a multiple of the page size.

    Attributes:
        tears: Counts faults that have put zeros somewhere: what was mapped before has holes.

    Raises:
        OSError: There are not that many addresses.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.tears = 0
        self.base = _map(0, size, mmap.PROT_READ, _ZEROS, -1, 0)
        array = (ctypes.c_ubyte * size).from_address(self.base)
        self._view = memoryview(array).cast("B").toreadonly()
        # Each view holds the array.
        weakref.finalize(array, _release, self.base, size)
        _guard.watch(self)

    def map(self, moffset: int, length: int, fd: int, foffset: int) -> None:
        """Map a part of a file. Raises OSError: ENOMEM, or a file system that cannot."""
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(self.base + moffset, length, mmap.PROT_READ, flags, fd, foffset)

    def unmap(self, moffset: int, length: int) -> None:
        """Show zeros again."""
        _map(self.base + moffset, length, mmap.PROT_READ, _ZEROS | _MAP_FIXED, -1, 0)

    def view(self, moffset: int, length: int) -> memoryview:
        """Return a read-only view; zeros once unmapped."""
        return self._view[moffset : moffset + length]

    def patch(self, address: int) -> None:
        """Put zeros where a load has failed, and behind: one fault for the rest of a range."""
        self.tears += 1
        moffset = address - self.base
        start = moffset - moffset % _PAGE
        self.unmap(start, min(start - start % _BLOCK + _BLOCK, self.size) - start)

    def close(self) -> None:
        """Forget the files. The addresses are given back when nobody has a view of them."""
        self.unmap(0, self.size)
        self._view = memoryview(b"")


def _release(base: int, size: int) -> None:
    _guard.forget(base)
    _munmap(base, size)


class _Guard:
    """The handler of SIGBUS of this process; there as soon as there is a window to look at."""

    def __init__(self) -> None:
        self._memories: list[WindowMemory] = []
        self._before = _SigAction()
        # Kept alive by this object, which is never freed: the kernel has its address.
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._entry = prototype(self._on_fault)
        self._installed = False

    def watch(self, memory: WindowMemory) -> None:
        """Look after one more."""
        self._memories.append(memory)
        if not self._installed:
            action = _SigAction()
            action.handler = ctypes.cast(self._entry, ctypes.c_void_p).value
            action.flags = _SA_SIGINFO
            _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(self._before))
            self._installed = True

    def forget(self, base: int) -> None:
        """Addresses are given back."""
        self._memories = [memory for memory in self._memories if memory.base != base]

    def _on_fault(self, _number: int, info: int, _context: int) -> None:
        address = ctypes.c_uint64.from_address(info + _SI_ADDR).value
        for memory in self._memories:
            if memory.base <= address < memory.base + memory.size:
                try:
                    memory.patch(address)
                except OSError:
                    break  # no memory for a page: as if we were not there
                return
        _libc.sigaction(int(signal.SIGBUS), ctypes.byref(self._before), None)
        self._installed = False


_guard: Final = _Guard()
