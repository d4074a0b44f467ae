"""A nursery for tasks that only serve a body of code: users of that body need not know of it.

trio wraps whatever leaves a nursery in an exception group. Here, what the body raises comes out as
it is, because users of a session catch ``RemoteErrno`` and not a group that has one.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["open_helpers"]


@asynccontextmanager
async def open_helpers() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks raise nothing, and are cancelled when the body ends.

    Raises:
        BaseException: What the body raised.
    """
    caught: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                # Raised again below, outside the nursery, which would wrap it in a group.
                caught = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The tasks raise nothing; what came late is a cancellation of the caller.
        if caught is None or group.split(trio.Cancelled)[1] is not None:
            raise
    if caught is not None:
        raise caught
