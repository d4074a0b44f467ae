"""A process of the host that truncates a file and grows it again, as fast as it can."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["hammered"]

_HAMMER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("ready", flush=True)
size = int(sys.argv[2])
while True:
    for cut in (0, 1, 4096, size // 2, size - 1):
        os.ftruncate(fd, cut)
        os.ftruncate(fd, size)
"""


@contextmanager
def hammered(path: Path, size: int) -> Iterator[None]:
    """Have a file of ``size`` bytes truncated and grown by another process for the whole block."""
    command = [sys.executable, "-c", _HAMMER, str(path), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as hammer:
        try:
            assert hammer.stdout is not None
            assert hammer.stdout.readline() == b"ready\n"
            yield
            assert hammer.poll() is None
        finally:
            hammer.kill()
