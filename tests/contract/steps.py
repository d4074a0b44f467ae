"""Steps that many cases share; each works on any tree."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.contract.trees import Tree

__all__ = ["get", "put"]


def put(tree: Tree, name: bytes, data: bytes = b"", mode: int = 0o644) -> None:
    """Make a new file."""
    with tree.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode) as handle:
        if data:
            assert handle.pwrite(data, 0) == len(data)


def get(tree: Tree, name: bytes, size: int = 1 << 20, offset: int = 0) -> bytes:
    """Read a file."""
    with tree.open(name, os.O_RDONLY) as handle:
        return handle.pread(size, offset)
