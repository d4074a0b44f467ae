"""A session that records what it is asked and answers from a script; no daemon, no ring."""

from __future__ import annotations

import inspect
import stat
from types import SimpleNamespace
from typing import Any

from vfsmount.client.session import InitFacts
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag

NO_FLAGS = InitFlag(0)


def attributes(ino: int = 10, mode: int = stat.S_IFREG | 0o644, **changes: int) -> fuse.Attr:
    """Attributes of a plausible file."""
    blank = fuse.ATTR.unpack(bytes(fuse.ATTR.size))
    return blank._replace(ino=ino, mode=mode, nlink=1, blksize=4096, **changes)


def entry(nodeid: int, attr: fuse.Attr | None = None) -> fuse.EntryOut:
    """An entry for ``nodeid``."""
    return fuse.EntryOut(nodeid, 0, 1, 1, 0, 0, attr or attributes(ino=nodeid * 10))


class FakeSession:
    """Stands in for ``Session`` under the handlers.

    Attributes:
        facts: What INIT settled.
        channel: Has ``orphans``, requests that the daemon may still carry out.
        calls: (method, positional arguments) in order.
        answers: Method name to what it returns, or to an exception that it raises.
    """

    def __init__(self, flags: InitFlag = NO_FLAGS, limit: int = 1 << 20) -> None:
        self.facts = InitFacts(45, flags, 1 << 20, limit, limit, 1, 0)
        self.dax = None
        self.channel = SimpleNamespace(orphans=0)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {"getattr": fuse.AttrOut(1, 0, attributes())}

    def forget(self, nodeid: int, nlookup: int = 1) -> None:
        self.calls.append(("forget", (nodeid, nlookup)))

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **_: Any) -> Any:
            self.calls.append((method, args))
            answer = self.answers.get(method)
            if callable(answer):
                answer = answer(*args)
            if inspect.isawaitable(answer):
                answer = await answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def names(self) -> list[str]:
        """Names of the methods called."""
        return [name for name, _ in self.calls]

    def arguments(self, method: str) -> list[tuple[Any, ...]]:
        """Arguments of each call of ``method``."""
        return [args for name, args in self.calls if name == method]
