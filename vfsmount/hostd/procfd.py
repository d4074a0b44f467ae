"""Where this process's descriptors have names: ``/proc/self/fd``.

A name there leads to the file itself, whatever kind it is and wherever it was moved. In a sandbox
there is no ``/proc``; there the folder is the working directory, which like this module's one
variable belongs to the process as a whole.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["open_folder", "path", "use_working_directory"]

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_prefix = b"/proc/self/fd/"


def path(name: bytes) -> bytes:
    """Return the path of a descriptor, given as its decimal digits."""
    return _prefix + name


def open_folder() -> int:
    """Return an O_PATH descriptor of the folder.

    Raises:
        OSError: There is no proc.
    """
    return os.open(_prefix or b".", _FLAGS)


def use_working_directory() -> None:
    """From now on the folder is the working directory."""
    global _prefix
    _prefix = b""
