"""The two ways to serve a mount, behind one face: who answers the kernel's requests.

    relay     one thread hands messages on as they are; every opcode works; the default
    pyfuse3   pyfuse3 decodes them and calls ``operations``; a file system in Python

Both have the same life: made before the mount (``operations`` is what ``pyfuse3.init`` gets),
``start`` with the mounted device, ``run`` until the connection ends, ``terminate`` to end sooner.
``run`` may be cancelled at any time; it leaves nothing running.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import pyfuse3
import trio

from vfsmount.client.pyfuse.eager import eager_trio
from vfsmount.client.pyfuse.operations import VirtioFsOperations
from vfsmount.client.pyfuse.reading import Reading
from vfsmount.client.readahead import READAHEAD
from vfsmount.client.relay.backing import problem
from vfsmount.client.relay.init import (
    flags_to_withdraw,
    init_answer,
    settled_terms,
    why_no_passthrough,
)
from vfsmount.client.relay.passthrough import PASS_FROM
from vfsmount.client.relay.thread import Relay
from vfsmount.client.relay.time_slice import lengthen_slice
from vfsmount.errors import MountError, WireError
from vfsmount.wire import fuse
from vfsmount.wire.fuse import InitFlag, Opcode

if TYPE_CHECKING:
    from types import ModuleType, SimpleNamespace

    from vfsmount.cache.policy import CachePolicy
    from vfsmount.client.mount.options import MountSettings
    from vfsmount.client.session import Session
    from vfsmount.errors import ProtocolViolation, VfsmountError

__all__ = ["Engine", "Pyfuse3Engine", "RelayEngine", "choose_engine"]

log = logging.getLogger(__name__)

#: Seconds for the kernel to send INIT, which it does when the mount is made.
_INIT_SECONDS = 10.0
#: Largest INIT that is known, and the least that a read of the device must ask for.
_INIT_ROOM = 8192
#: Seconds after which a thread that was told to end at once is given up; it is never that long.
_END_SECONDS = 2.0


class Engine(Protocol):
    """What serves a mount.

    Attributes:
        name: As ``--engine`` and ``status`` call it.
        reason: Why it is this one.
        operations: For ``pyfuse3.init``.
    """

    name: str
    reason: str
    operations: pyfuse3.Operations

    async def start(self, device: int) -> None:
        """Answer the kernel's INIT, if that is not done elsewhere.

        Raises:
            MountError: The kernel and we do not agree.
        """

    async def wait_ready(self) -> None:
        """Wait, while ``run`` runs, until INIT is settled; requests of early users wait for it."""

    async def run(self) -> None:
        """Serve until the connection ends.

        Raises:
            OSError: The device failed.
        """

    def note_readahead(self, kernel: int | None) -> None:
        """While ``run`` runs: the kernel reads ahead that many bytes; None: nobody knows."""

    def pages_facts(self) -> dict[str, Any]:
        """Who keeps pages of files, ``kernel`` or ``vfsmount``, for ``status``."""

    def terminate(self) -> None:
        """Make ``run`` return when what is in flight has been answered."""

    def kernel_flags(self) -> InitFlag | None:
        """What the kernel was told in INIT; None when somebody else did that."""

    def refused(self) -> int:
        """Replies that the kernel would not take."""

    def dax_facts(self) -> dict[str, Any]:
        """What the engine makes of the DAX window, for ``status``."""


class Pyfuse3Engine:
    """Handlers in Python, called by pyfuse3's loop."""

    name = "pyfuse3"

    def __init__(self, session: Session, policy: CachePolicy, reason: str, cache_size: int) -> None:
        self.reason = reason
        self._session = session
        self._handlers = handlers = VirtioFsOperations(session, policy)
        self.operations: pyfuse3.Operations = handlers
        self._keeps_pages = not policy.direct_io
        self._cache_size = cache_size
        self._nursery: trio.Nursery | None = None
        self._behind = handlers.behind
        self._initialised = handlers.initialised
        self._poll_us = session.channel.poll_us
        self._trio: ModuleType | SimpleNamespace = trio

    async def start(self, device: int) -> None:
        """Nothing to answer: libfuse does. A daemon must not expect the kernel's write-back."""
        if InitFlag.WRITEBACK_CACHE in self._session.facts.flags:
            await self._session.begin_again(without=InitFlag.WRITEBACK_CACHE)
        self._trio = eager_trio(device, self._poll_us)

    async def wait_ready(self) -> None:
        """Wait until libfuse has answered INIT, within the step after it has told the handlers."""
        with trio.move_on_after(_INIT_SECONDS):
            await self._initialised.wait()

    async def run(self) -> None:
        """Run pyfuse3's loop, and what writes behind."""
        pyfuse3.trio = self._trio  # type: ignore[attr-defined]  # as pyfuse3.asyncio.enable() does
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._behind is not None:
                    nursery.start_soon(self._behind.run)
                await pyfuse3.main()
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.trio = trio  # type: ignore[attr-defined]
            if self._behind is not None:
                await self._behind.finish()

    def note_readahead(self, kernel: int | None) -> None:
        """Read ahead here where the kernel does not read as much as the daemon takes."""
        enough = min(READAHEAD, self._session.facts.max_read)
        small = kernel is None or kernel < enough
        if small and self._keeps_pages and self._cache_size and self._nursery is not None:
            reading = Reading(self._session, self._cache_size)
            self._nursery.start_soon(reading.run)
            self._handlers.reading = reading

    def pages_facts(self) -> dict[str, Any]:
        """Who keeps pages."""
        reading = self._handlers.reading
        if reading is None:
            return {"pages_by": "kernel"}
        used = reading.pages.size
        return {"pages_by": "vfsmount", "pages_bytes": used, "pages_limit_bytes": reading.limit}

    def terminate(self) -> None:
        """End pyfuse3's loop."""
        pyfuse3.terminate()

    def kernel_flags(self) -> InitFlag | None:
        """Libfuse does not tell."""
        return None

    def refused(self) -> int:
        """Libfuse keeps them to itself."""
        return 0

    def dax_facts(self) -> dict[str, Any]:
        """Nothing but what the session does."""
        return {}


class RelayEngine:
    """The relay's thread, and what the event loop does for it."""

    name = "relay"

    def __init__(
        self, session: Session, policy: CachePolicy, reason: str, *, pass_all: bool = False
    ) -> None:
        self.reason = reason
        self.operations = pyfuse3.Operations()
        self._session = session
        self._policy = policy
        #: Small files, too, are to be read and written by the kernel itself.
        self._pass_all = pass_all
        self._flags = InitFlag(0)
        self._relay: Relay | None = None
        self._failure: BaseException | None = None
        self._device = -1
        #: Why the kernel does not read and write by itself; empty when it does.
        self._no_passthrough = "there is no window"

    async def start(self, device: int) -> None:
        """Answer INIT; where the kernel lacks what the daemon accepted, begin anew with that.

        Raises:
            MountError: The kernel sends none, or one that is too old.
        """
        self._device = device
        with trio.move_on_after(_INIT_SECONDS):
            await trio.lowlevel.wait_readable(device)
        os.set_blocking(device, False)
        try:
            request = fuse.decode_request(os.read(device, _INIT_ROOM))
        except (OSError, WireError) as error:
            raise MountError(f"the kernel sent no usable INIT: {error}") from error
        if request.header.opcode != Opcode.INIT or request.args.major != fuse.KERNEL_VERSION:
            raise MountError("the kernel speaks another FUSE than version 7")
        offered = fuse.join_flags(request.args.flags, request.args.flags2)
        missing = flags_to_withdraw(offered, self._session.facts)
        if missing:
            await self._session.begin_again(without=missing)
        facts = self._session.facts
        if self._session.window is not None:
            self._no_passthrough = why_no_passthrough(offered, facts, self._policy)
        passthrough = not self._no_passthrough
        answer = init_answer(request.args, facts, self._policy, passthrough=passthrough)
        self._flags = fuse.join_flags(answer.flags, answer.flags2)
        if self._policy.writeback and InitFlag.WRITEBACK_CACHE not in self._flags:
            log.warning("no write-back: the daemon does not accept it; see its own options")
        body = fuse.INIT_OUT.pack(answer)
        header = fuse.OUT_HEADER.values(fuse.OUT_HEADER.size + len(body), 0, request.header.unique)
        os.write(device, header + body)
        if passthrough:
            self._no_passthrough = problem(device)
        if self._session.window is not None and self._no_passthrough:
            # News only for who asked for a window; status says it to all.
            level = logging.INFO if self._pass_all else logging.DEBUG
            log.log(level, "no DAX, data go by message: %s", self._no_passthrough)

    async def wait_ready(self) -> None:
        """INIT was settled by ``start``."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Lend the queues to the relay's thread until the connection ends.

        Raises:
            OSError: The device failed.
            VfsmountError: The channel had failed before.
        """
        channel, token = self._session.channel, trio.lowlevel.current_trio_token()
        loan = await channel.lend(self._failed)

        def violated(violation: ProtocolViolation) -> None:
            token.run_sync_soon(channel.fail, violation)

        # The kernel writes back only where the daemon has agreed.
        policy = replace(self._policy, writeback=InitFlag.WRITEBACK_CACHE in self._flags)
        self._relay = relay = Relay(
            self._device,
            loan,
            policy,
            settled_terms(self._session.facts, self._flags),
            violated,
            window=None if self._no_passthrough else self._session.window,
            pass_from=0 if self._pass_all else PASS_FROM,
        )
        ended = trio.Event()
        # A thread of our own, and a daemon one: if the worst comes to the worst, the process ends.
        threading.Thread(
            target=self._run_thread, args=(relay, token, ended), name="relay", daemon=True
        ).start()
        try:
            await ended.wait()
        finally:
            relay.abort()
            with trio.move_on_after(_END_SECONDS, shield=True):
                await ended.wait()
                channel.end_loan()
                relay.close()
        if self._failure is not None:
            raise self._failure

    def _failed(self, error: VfsmountError) -> None:
        if self._relay is not None:
            self._relay.fail(error)

    def _run_thread(self, relay: Relay, token: trio.lowlevel.TrioToken, ended: trio.Event) -> None:
        lengthen_slice()
        try:
            relay.run()
        except BaseException as error:  # top of a thread: told to the event loop
            self._failure = error
        token.run_sync_soon(ended.set)

    def note_readahead(self, kernel: int | None) -> None:
        """The kernel alone reads ahead."""

    def pages_facts(self) -> dict[str, Any]:
        """The kernel alone has pages."""
        return {"pages_by": "kernel"}

    def terminate(self) -> None:
        """Have the thread end when what is in flight has been answered."""
        if self._relay is not None:
            self._relay.stop()

    def kernel_flags(self) -> InitFlag | None:
        """What the kernel was told in INIT."""
        return self._flags

    def refused(self) -> int:
        """Replies that the kernel would not take."""
        return 0 if self._relay is None else self._relay.refused

    def dax_facts(self) -> dict[str, Any]:
        """Whether the kernel reads and writes by itself, and how often it is asked to."""
        if self._session.window is None:
            return {}
        facts = {} if self._relay is None else self._relay.passthrough_facts()
        return {"active": not self._no_passthrough, "why": self._no_passthrough} | facts


def choose_engine(settings: MountSettings, session: Session, policy: CachePolicy) -> Engine:
    """Return the engine for a mount.

    Args:
        settings: What was asked for: ``relay``, ``pyfuse3`` or ``auto``, the window, the pages.
        session: The session with the daemon.
        policy: The cache policy.
    """
    wanted, pass_all = settings.engine, settings.dax is not None
    if wanted == "pyfuse3":
        return Pyfuse3Engine(session, policy, "as asked for", settings.cache_size)
    if wanted == "relay":
        return RelayEngine(session, policy, "as asked for", pass_all=pass_all)
    if problem := _relay_problem(session):
        return Pyfuse3Engine(session, policy, f"relay cannot run: {problem}", settings.cache_size)
    return RelayEngine(session, policy, "the default", pass_all=pass_all)


def _relay_problem(session: Session) -> str:
    """Why the relay cannot run here; empty when it can."""
    if session.channel.queue_size < 8:
        return f"a queue of {session.channel.queue_size} entries is too small for it"
    return ""
