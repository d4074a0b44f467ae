"""A mount namespace of the tests' own.

Whatever the tests mount is seen by nobody else, whatever others mount meanwhile is no leak of the
tests, and what is left over when pytest dies goes with it. Only root can have one; other users'
tests share the namespace of their shell.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 0x40000

#: Holds read_ahead_kb of each mount.
_KNOBS = "/sys/devices/virtual/bdi"


@contextmanager
def small_readahead() -> Iterator[None]:
    """Mounts made below may not have the kernel read further ahead, as those of other users."""
    if os.geteuid() != 0:
        yield
        return
    subprocess.run(["mount", "--bind", _KNOBS, _KNOBS], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", _KNOBS], check=True)
        yield
    finally:
        subprocess.run(["umount", _KNOBS], check=True)


def enter_mount_namespace() -> None:
    """Move this process, which must not have started threads, into a new mount namespace."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return  # a container without CAP_SYS_ADMIN: as for other users
    if libc.mount(None, b"/", None, _MS_REC_PRIVATE, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "/")


def detach(path: str | os.PathLike[str]) -> None:
    """Take a mount away, whoever uses it; where none is, nothing happens."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    subprocess.run([*command, path], check=False, capture_output=True)
