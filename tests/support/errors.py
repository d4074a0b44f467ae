"""Errors by their names, which read better than numbers when a test fails."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["error_name", "error_of", "outcome"]


def error_name(error: OSError) -> str:
    """Return an error's symbolic name: ENOENT."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def error_of(call: Callable[..., object], *args: object) -> str:
    """Return the name of the error that a call ends with, "" for none."""
    try:
        call(*args)
    except OSError as error:
        return error_name(error)
    return ""


def outcome(call: Callable[..., object], *args: object) -> object:
    """Return what a call returns, or the name of the error that it ends with."""
    try:
        return call(*args)
    except OSError as error:
        return error_name(error)
