"""Reads of the pyfuse3 engine that are gathered here, where the kernel does not read far ahead.

Only root may have the kernel read further ahead than 128 KiB (``readahead``). For anybody else a
handle that reads in order has up to 1 MiB fetched by one message, and the next while it reads; what
was fetched is kept (``cache.pages``), because the kernel asks for it piece by piece. Where the
kernel reads far enough ahead, this would only hold everything twice, and is not used: 32 MiB in
order took 26 ms like that, 44 through these pages, and 57 (256 messages) with neither.

The kernel's pages lie above these and know nothing of them, so these must be true whenever the
kernel asks. They are dropped

    by an open that does not keep the kernel's pages      when attributes come that differ from
    by a write, truncation or O_TRUNC made here           those before, which the kernel asks for
    when the kernel forgets the node                      before it reads on past their time

and what is on its way in that moment is not kept either (``Pages.fetching``). Nor is what was asked
for while the daemon had a request that timed out: a write may still be carried out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from vfsmount.cache.pages import BLOCK, Pages
from vfsmount.client.readahead import READAHEAD
from vfsmount.errors import VfsmountError

if TYPE_CHECKING:
    from vfsmount.client.session import Session

__all__ = ["Reader", "Reading"]

#: A handle that has read so much in order gets that many times as much in one message.
_GROWTH: Final = 4
_EVERYTHING: Final = 1 << 63


class _Ahead:
    """What is on its way for a handle, from ``start`` to ``end``."""

    __slots__ = ("done", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done = trio.Event()


class Reader:
    """A handle that reads.

    Attributes:
        nodeid: Of its file.
        fh: The daemon's.
        end: Where its last read ended.
        run: Bytes that it has read in order up to there.
        known: Where what was fetched for this run ends; 0 when nothing was.
        ahead: What is being fetched ahead of it.
    """

    __slots__ = ("ahead", "end", "fh", "known", "nodeid", "run")

    def __init__(self, nodeid: int, fh: int) -> None:
        self.nodeid = nodeid
        self.fh = fh
        self.end = self.run = self.known = 0
        self.ahead: _Ahead | None = None

    def note(self, start: int, size: int) -> bool:
        """Take note of a read; return whether it goes on where the last one ended."""
        in_order = start == self.end and self.run > 0
        if not in_order:
            self.run = self.known = 0
        self.run += size
        self.end = start + size
        return in_order

    async def leave(self) -> None:
        """Wait until nothing is on its way; for a handle that is given back."""
        while self.ahead is not None:
            await self.ahead.done.wait()


class Reading:
    """The pages of a mount, and who fetches them.

    Args:
        session: Where is read.
        limit: Bytes that may be kept.
    """

    def __init__(self, session: Session, limit: int) -> None:
        self._session = session
        self._most = min(READAHEAD, session.facts.max_read, limit // 2) // BLOCK * BLOCK
        self._nursery: trio.Nursery | None = None
        self.limit = limit
        self.pages = Pages(limit)

    async def run(self) -> None:
        """Have what is read ahead fetched, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def read(self, reader: Reader, start: int, size: int) -> bytes:
        """Read up to ``size`` bytes, at most ``facts.max_read``; fewer only at the end.

        Raises:
            VfsmountError: As the session does.
        """
        in_order = reader.note(start, size)
        while True:
            data = self.pages.read(reader.nodeid, start, size)
            if data is not None:
                if reader.known:
                    self._stay_ahead(reader)
                return data
            ahead = reader.ahead
            if ahead is None or start + size <= ahead.start or ahead.end <= start:
                break
            await ahead.done.wait()
        begin, most = start - start % BLOCK, self._session.facts.max_read
        least = start + size - begin
        # Less than what was asked for would be taken for the end of the file.
        if not in_order or not self._most or least > most:
            return await self._fetch(reader, start, size)
        data = await self._fetch_ahead(reader, begin, min(max(self._window(reader), least), most))
        return data[start - begin :][:size]

    def _window(self, reader: Reader) -> int:
        return max(BLOCK, min(self._most, reader.run * _GROWTH // BLOCK * BLOCK))

    def _stay_ahead(self, reader: Reader) -> None:
        """Fetch on when half of what was fetched has been read."""
        window = self._window(reader)
        if self._nursery is None or reader.ahead is not None:
            return
        if reader.end <= reader.known < reader.end + window // 2:
            # Noted here, not by the task: the handle may be released before that has begun.
            ahead = reader.ahead = _Ahead(reader.known, reader.known + window)
            self._nursery.start_soon(self._fetch_unasked, reader, ahead)

    async def _fetch_unasked(self, reader: Reader, ahead: _Ahead) -> None:
        try:
            await self._fetch_in_order(reader, ahead.start, ahead.end - ahead.start)
        except VfsmountError:
            reader.known = 0  # who reads there is told
        finally:
            reader.ahead = None
            ahead.done.set()

    async def _fetch_ahead(self, reader: Reader, start: int, size: int) -> bytes:
        """Fetch what somebody waits for, and what he will want next."""
        if reader.ahead is not None:
            return await self._fetch(reader, start, size)
        ahead = reader.ahead = _Ahead(start, start + size)
        try:
            return await self._fetch_in_order(reader, start, size)
        finally:
            reader.ahead = None
            ahead.done.set()

    async def _fetch_in_order(self, reader: Reader, start: int, size: int) -> bytes:
        data = await self._fetch(reader, start, size)
        reader.known = start + size if len(data) == size else _EVERYTHING
        return data

    async def _fetch(self, reader: Reader, start: int, size: int) -> bytes:
        """Read by message, and keep whole blocks."""
        sure = not self._session.channel.orphans
        with self.pages.fetching(reader.nodeid) as fetch:
            data = await self._session.read(reader.nodeid, reader.fh, start, size)
            if fetch.is_true and sure and not start % BLOCK:
                self.pages.put(reader.nodeid, start, data, ends=len(data) < size)
        return data
