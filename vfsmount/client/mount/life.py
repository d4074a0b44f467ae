"""The life of one mount: connect, mount, serve, end; and what ends it.

Theory of operation. Each step happens inside the one before, so that leaving them in reverse leaves
nothing behind (``launch`` has the steps before these):

    bundled daemon (only --source) > session with the daemon > its root is listed >
    kernel mount > control socket > ready is announced > the engine runs

What ends the loop:
    umount by anybody        the kernel closes the connection; exit status 0
    SIGTERM, SIGINT, SIGHUP  we unmount while still serving, so that the kernel can flush; busy
                             users are flushed as far as possible and then cut off; exit status 0
    the same once more       the connection is aborted, nothing is waited for
    the daemon is lost       the loop goes on, so that users get errors instead of writing into the
                             directory underneath; it ends in one of the ways above; exit status 5

Never touch the mount from a thread of this process: should the daemon be mute, that thread would
sleep beyond SIGKILL while it keeps /dev/fuse open, and the mount could not even be aborted by our
death. Flushing is therefore left to a child process, and readiness is asked of the daemon.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from vfsmount.cache.policy import CachePolicy
from vfsmount.channel import ChannelOptions
from vfsmount.client.mount.background import sd_notify
from vfsmount.client.mount.causes import cause_of
from vfsmount.client.mount.control_server import Command, control_socket
from vfsmount.client.mount.engine import Engine, choose_engine
from vfsmount.client.mount.kernel import KernelMount, mounted
from vfsmount.client.mount.mountpoint import (
    FUSE_DEVICE,
    abort_connection,
    describe_holders,
    detach,
    is_mounted,
    unmount,
)
from vfsmount.client.mount.report import status_document
from vfsmount.client.readahead import raise_readahead
from vfsmount.client.session import Session, connect
from vfsmount.errors import (
    ChannelBroken,
    ConnectError,
    ExitCode,
    HandshakeError,
    MountError,
    RemoteErrno,
    VfsmountError,
)
from vfsmount.wire.fuse import ROOT_ID, InitFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from vfsmount.client.mount.background import Announcer
    from vfsmount.client.mount.bundled import BundledDaemon
    from vfsmount.client.mount.mountinfo import MountEntry
    from vfsmount.client.mount.options import MountSettings

__all__ = ["serve_mount"]

ROOT_SECONDS = 10.0
"""How long a daemon may take to list its root, as long as each step of the handshake."""
FLUSH_SECONDS = 10.0
"""How long the end waits for dirty pages of files that are still open."""
GRACE_SECONDS = 5.0
"""How long the end waits for requests that are already with the daemon."""
WATCH_SECONDS = 5.0
"""Between two looks for a connection that has ended while requests hang."""
LISTING_BYTES = 4096

logger = logging.getLogger(__name__)
channel_log = logging.getLogger("vfsmount.channel")


def serve_mount(
    settings: MountSettings, path: str, announcer: Announcer, daemon: BundledDaemon | None
) -> int:
    """Connect, mount, serve until the end, and return the exit status.

    Args:
        settings: What is asked for, checked by ``launch``.
        path: The mount point, resolved.
        announcer: Who is told of readiness.
        daemon: The daemon of ``--source``, running; ours to connect, not to stop.

    Raises:
        VfsmountError: The mount never became usable; nothing is left behind.
    """
    return trio.run(_Mount(settings, path, announcer, daemon).run)


class _Mount:
    """One mount from the handshake to DESTROY.

    Invariants: ``entry`` is set exactly while the kernel has the mount; ``lost`` is set once.
    """

    def __init__(
        self,
        settings: MountSettings,
        path: str,
        announcer: Announcer,
        daemon: BundledDaemon | None,
    ) -> None:
        self.settings = settings
        self.path = path
        self.policy = _cache_policy(settings)
        self.entry: MountEntry | None = None
        self.engine: Engine | None = None
        self.lost: VfsmountError | None = None
        self.started = time.monotonic()
        self.readahead: int | None = None
        self._announcer = announcer
        self._daemon = daemon
        self._ready = False
        self._has_session = False
        # Cancelled by the second signal: the former until there is a session, which must not be
        # cancelled but ended; the latter from then on.
        self._connecting = trio.CancelScope()
        self._mounting = trio.CancelScope()
        self._serving = trio.CancelScope()

    @property
    def daemon_pid(self) -> int | None:
        """Process id of the bundled daemon, if this mount has one."""
        return None if self._daemon is None else self._daemon.pid

    async def run(self) -> ExitCode:
        """Serve until something ends the mount.

        Raises:
            VfsmountError: Before the mount was ready.
        """
        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup keeps its meaning
            signals.append(signal.SIGHUP)
        # Until the mount is there, what goes wrong is the command's error, told once.
        channel_log.setLevel(logging.CRITICAL if logger.getEffectiveLevel() > logging.DEBUG else 0)
        try:
            with trio.open_signal_receiver(*signals) as received:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._heed, received)
                    with self._connecting:
                        await self._connected()
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise self._cause(cause_of(group)) from group
        finally:
            channel_log.setLevel(logging.NOTSET)
        if not self._ready:
            raise MountError("ended by a signal before the mount was ready")
        logger.info("%s is unmounted", self.path)
        return ExitCode.DAEMON_LOST if self.lost else ExitCode.OK

    def _cause(self, error: BaseException) -> BaseException:
        """A bundled daemon that ended knows better why than we who lost the connection."""
        early = isinstance(error, (ConnectError, HandshakeError, ChannelBroken))
        if self._daemon is not None and early and not self._ready:
            return self._daemon.failure() or error
        return error

    # --- the steps, each inside the one before ---

    async def _connected(self) -> None:
        extra = InitFlag.WRITEBACK_CACHE if self.policy.writeback else InitFlag(0)
        async with connect(
            self.settings.socket,
            sock=self._daemon.sock if self._daemon else None,
            options=_channel_options(self.settings),
            extra_flags=extra,
            dax=self.settings.window,
        ) as session:
            with self._mounting:
                self._has_session = True
                await _list_root(session)
                await self._mounted(session)

    async def _mounted(self, session: Session) -> None:
        self.engine = choose_engine(self.settings, session, self.policy)
        with mounted(self.engine.operations, self.settings, self.path) as kernel:
            self.entry = kernel.entry
            try:
                await self.engine.start(kernel.device)
                commands = {"status": self._status_command(session), "abort": self._abort_command}
                async with control_socket(self.entry.device, commands):
                    await self._serve(session, kernel)
            finally:
                self.entry = None

    async def _serve(self, session: Session, kernel: KernelMount) -> None:
        assert self.engine is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, session.facts.max_read)
            nursery.start_soon(self._watch_channel, session)
            nursery.start_soon(self._watch_kernel, kernel)
            with self._serving:
                try:
                    await self.engine.run()
                except OSError as error:
                    raise MountError(f"{FUSE_DEVICE} failed: {error.strerror}") from error
            nursery.cancel_scope.cancel()

    async def _announce(self, limit: int) -> None:
        assert self.engine is not None
        await self.engine.wait_ready()
        if self.entry is not None:  # else it is unmounted again
            self.readahead = raise_readahead(self.entry.device, limit)
            self.engine.note_readahead(self.readahead)
        self._announcer.ready()  # in the background the log leaves the terminal with this
        self._ready = True
        channel_log.setLevel(logging.NOTSET)
        if self._daemon is not None:
            self._daemon.started()
        logger.info("%s is mounted on %s", self.settings.origin, self.path)

    def _status_command(self, session: Session) -> Command:
        async def status(request: dict[str, Any]) -> dict[str, Any]:
            return status_document(self, session)

        return status

    async def _abort_command(self, request: dict[str, Any]) -> dict[str, Any]:
        logger.info("asked to abort")
        self._abort()
        return {}

    # --- what ends it ---

    async def _watch_channel(self, session: Session) -> None:
        """Note the loss of the daemon; the channel has put the cause into the log."""
        error = await session.channel.wait_ended()
        self.lost = error
        sd_notify(f"STATUS=the daemon is lost: {error}")
        ended = ""
        if self._daemon is not None:
            ended = await trio.to_thread.run_sync(self._daemon.exit_status)
        how = f" (its process ended with {ended})" if ended else ""
        logger.warning("the daemon is lost%s: %s gives errors until unmounted", how, self.path)

    async def _watch_kernel(self, kernel: KernelMount) -> None:
        """Let go of requests that a mute daemon holds when nobody can wait for them any more."""
        # There is nothing to wait for: the device is readable and writable all the time.
        while kernel.is_connected():  # noqa: ASYNC110
            await trio.sleep(WATCH_SECONDS)
        self._serving.deadline = trio.current_time() + GRACE_SECONDS

    async def _heed(self, received: AsyncIterator[int]) -> None:
        """First signal: end gently. Any further one: end at once."""
        count = 0
        async for number in received:
            count += 1
            what = "unmounting" if count == 1 and self._ready else "aborting"
            logger.info("%s: %s", signal.Signals(number).name, what)
            if count == 1 and self._ready:
                self._announcer.stopping()
                if self.entry is not None:  # else it is unmounted already, and flushing
                    self._nursery.start_soon(self._end_gently, self.entry)
                continue
            self._abort()

    def _abort(self) -> None:
        """End at once: pending requests fail, what is not with the host is lost."""
        if self.entry is not None:
            abort_connection(self.entry)
        if self._daemon is not None:
            self._daemon.abort()
        (self._mounting if self._has_session else self._connecting).cancel()

    async def _end_gently(self, entry: MountEntry) -> None:
        if is_mounted(self.path, entry.device):
            try:
                await _in_thread(unmount, self.path)
            except OSError as error:
                await self._cut_off(error)
        # Requests on their way may finish; a daemon that answers nothing must not hold us.
        self._serving.deadline = trio.current_time() + GRACE_SECONDS
        if self.entry is not None and self.engine is not None:
            self.engine.terminate()

    async def _cut_off(self, error: OSError) -> None:
        if error.errno == errno.EBUSY:
            await _flush(self.path)
            users = describe_holders(self.path) or "a process that we cannot see"
            logger.warning("%s is busy, %s: cut off", self.path, users)
        else:
            logger.warning("%s cannot be unmounted: %s", self.path, error.strerror)
        try:
            await _in_thread(detach, self.path)
        except OSError as again:
            logger.warning("%s stays mounted, dead: %s", self.path, again.strerror)


async def _in_thread(function: Callable[[str], None], path: str) -> None:
    # umount2 of a FUSE mount sends nothing to us, and fusermount3 is a process of its own: the rule
    # about threads is kept.
    await trio.to_thread.run_sync(function, path, abandon_on_cancel=True)


async def _flush(path: str) -> None:
    """Have the kernel write back what it holds for files that are still open; bounded."""
    with trio.move_on_after(FLUSH_SECONDS):
        process = _start_sync(path)
        descriptor = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
            process.wait()
        finally:
            os.close(descriptor)
            if process.returncode is None:
                process.kill()  # may take effect only when the connection ends: not waited for


def _start_sync(path: str) -> subprocess.Popen[bytes]:
    # Not trio's way of starting processes: that would wait for the end of one that cannot end.
    return subprocess.Popen(["sync", "-f", path], stderr=subprocess.DEVNULL)


async def _list_root(session: Session) -> None:
    """Make sure that there is something to mount: the daemon lists its root.

    Raises:
        HandshakeError: It does not, or not in time.
    """
    try:
        with trio.fail_after(ROOT_SECONDS):
            opened = await session.opendir(ROOT_ID)
            await session.readdir(ROOT_ID, opened.fh, 0, LISTING_BYTES)
            await session.releasedir(ROOT_ID, opened.fh)
    except trio.TooSlowError as error:
        raise HandshakeError(f"the daemon did not list its root in {ROOT_SECONDS:g} s") from error
    except RemoteErrno as error:
        # A directory that may be entered but not listed is a daemon's right (mode 0711).
        if error.errno not in (errno.EACCES, errno.EPERM):
            reason = os.strerror(error.errno)
            raise HandshakeError(f"the daemon cannot list its root: {reason}") from error


def _cache_policy(settings: MountSettings) -> CachePolicy:
    return CachePolicy.for_mode(
        settings.cache,
        settings.timeout,
        settings.writeback,
        entry_timeout=settings.entry_timeout,
        attr_timeout=settings.attr_timeout,
        negative_timeout=settings.negative_timeout,
        dir_timeout=settings.dir_timeout,
    )


def _channel_options(settings: MountSettings) -> ChannelOptions:
    options = ChannelOptions(shm_file=settings.shm_file, request_timeout=settings.request_timeout)
    if settings.queue_size is not None:
        options = replace(options, queue_size=settings.queue_size)
    if settings.poll_us is not None:
        options = replace(options, poll_us=settings.poll_us)
    return options
