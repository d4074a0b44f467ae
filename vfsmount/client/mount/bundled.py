"""The bundled daemon behind ``--source``: a child process that lives exactly as long as the mount.

Its socket is made, connected and removed before the daemon even starts: a listening socket accepts
connections into its backlog by itself. So no path is ever left behind, nobody else can connect, and
the daemon finds its one guest waiting.

* The child is started from the main thread. PR_SET_PDEATHSIG (prctl(2)) follows the death of the
  *thread* that forked, and a worker thread would end long before the mount.
* It has a session of its own: Ctrl-C must reach us alone, for we still need the daemon to flush.
* Root gives it a pid namespace, in which it is the first process: that takes a child, and like
  this the child is the daemon itself. So it handles SIGTERM, which would be lost on it otherwise.
* What it writes to stderr goes to our log. If it ends before the mount is up, its last line is the
  reason that the user sees.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vfsmount.errors import ConnectError, ExitCode, UsageError, VfsmountError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfsmount.client.mount.options import MountSettings


__all__ = ["BundledDaemon", "bundled_daemon"]

PR_SET_PDEATHSIG = 1
CLONE_NEWPID = 0x20000000
STOP_SECONDS = 5.0
"""A daemon without guests ends at once on SIGTERM; after that it is killed."""
DEATH_SECONDS = 1.0
"""Between the end of a daemon's sockets and its exit status there are a few milliseconds."""
FORBIDDEN_CALL = (
    ", for a system call that it may not make; 'vfsmount serve DIR --seccomp log' lets it pass, and"
    " the kernel's log has its number"
)
LEVELS = {name: getattr(logging, name) for name in ("ERROR", "WARNING", "INFO", "DEBUG")}

logger = logging.getLogger("vfsmount.hostd")
libc = ctypes.CDLL(None)


class BundledDaemon:
    """A running daemon and our connection to it.

    Attributes:
        sock: Connected vhost-user socket; whoever connects the session owns it.
        pid: Process id of the daemon.
    """

    def __init__(self, settings: MountSettings) -> None:
        self.sock, listener = _connected_pair()
        with listener:
            try:
                self._process = _spawn(_arguments(settings, listener.fileno()), listener.fileno())
            except OSError as error:
                self.sock.close()
                raise ConnectError(f"cannot start the daemon: {error}") from error
        self.pid = self._process.pid
        self._patience = STOP_SECONDS
        self._early: list[str] | None = []
        self._log = threading.Thread(target=self._relay_log, name="hostd-log", daemon=True)
        self._log.start()

    def started(self) -> None:
        """Let its log lines through from now on; those so far first."""
        early, self._early = self._early, None
        for line in early or ():
            _log_line(line)

    def failure(self) -> VfsmountError | None:
        """Return why the daemon ended, in its own words, or None while it runs."""
        try:
            status = self._process.wait(DEATH_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        self._log.join(DEATH_SECONDS)
        reason = f"the daemon ended with {describe_status(status)}"
        if status > 0 and self._early:
            reason = _text(self._early[-1])[1]
        kind = UsageError if status == ExitCode.USAGE else ConnectError
        return kind(reason)

    def exit_status(self) -> str:
        """Return how the daemon ended, as a clause for the log, or an empty string."""
        try:
            return describe_status(self._process.wait(DEATH_SECONDS))
        except subprocess.TimeoutExpired:
            return ""

    def abort(self) -> None:
        """Do not be patient in the end."""
        self._patience = 0.0

    def stop(self) -> None:
        """End the daemon and collect it; bounded."""
        self.sock.close()
        self._process.terminate()
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.join(DEATH_SECONDS)

    def _relay_log(self) -> None:
        # A thread, not a task: the daemon must never wait for a full pipe, whatever trio does.
        stream = self._process.stderr
        assert stream is not None
        with stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                early = self._early
                if early is None:
                    _log_line(line)
                else:
                    early.append(line)


@contextmanager
def bundled_daemon(settings: MountSettings) -> Iterator[BundledDaemon]:
    """Run the bundled daemon for the directory of a mount while the body runs.

    Raises:
        ConnectError: The process cannot be started.
    """
    daemon = BundledDaemon(settings)
    try:
        yield daemon
    finally:
        daemon.stop()


def describe_status(status: int) -> str:
    """Return ``signal SIGKILL`` or ``exit status 3``; with a cure where there is one."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # most realtime signals have none
        name = str(-status)
    return f"signal {name}{FORBIDDEN_CALL if -status == signal.SIGSYS else ''}"


def _connected_pair() -> tuple[socket.socket, socket.socket]:
    """Return our end of a connection, and the listening socket in whose backlog the other waits."""
    with tempfile.TemporaryDirectory(prefix="vfsmount-") as folder:
        path = os.path.join(folder, "s")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen(1)
            sock.connect(path)
        except OSError as error:
            listener.close()
            sock.close()
            raise ConnectError(f"cannot make a socket in {folder}: {error.strerror}") from error
        return sock, listener


def _arguments(settings: MountSettings, listener: int) -> list[str]:
    """The daemon's command line: it serves us only, and may promise as much as the mount does."""
    words = ["--fd", str(listener), "--once", "--sandbox", "auto", "--cache", settings.cache]
    # What it has to say about a single, well-known guest interests those who look for a fault.
    level = "warning" if settings.log_level == "info" else settings.log_level
    words += ["--log-level", level]
    words += ["--dax", str(settings.window or "off")]
    words += ["--writeback"] * settings.writeback + ["--readonly"] * settings.readonly
    if settings.poll_us is not None:
        words += ["--poll-us", str(settings.poll_us)]
    return [*words, "--", settings.source or ""]


def _spawn(arguments: list[str], listener: int) -> subprocess.Popen[bytes]:
    # -P, and our own place instead: whoever owns the working directory must not choose the code.
    words = [sys.executable, "-P", "-m", "vfsmount", "serve", *arguments]
    # READY and STOPPING are ours to tell.
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    environment["PYTHONPATH"] = os.pathsep.join([_package_folder(), *_absolute_python_path()])
    with _children_in_a_pid_namespace(), _reference_to_us() as parent:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(listener,),
            start_new_session=True,
            env=environment,
            preexec_fn=_die_with_parent(parent),
        )


@contextmanager
def _children_in_a_pid_namespace() -> Iterator[None]:
    """Have the child of this block begin a pid namespace where the host allows that: to root."""
    try:
        home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    # Root of a user namespace may enter a new one, but may not come back to one of the host's:
    # going to where we are already tells.
    may_return = libc.setns(home, CLONE_NEWPID) == 0
    entered = may_return and libc.unshare(CLONE_NEWPID) == 0
    try:
        yield
    finally:
        # Later children must not be in the daemon's.
        if entered and libc.setns(home, CLONE_NEWPID) != 0:
            raise ConnectError("cannot return to our own pid namespace")
        os.close(home)


def _package_folder() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _absolute_python_path() -> list[str]:
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in entries if os.path.isabs(entry)]


@contextmanager
def _reference_to_us() -> Iterator[int]:
    """A pidfd, because in a pid namespace of its own the child has no number for us."""
    reference = os.pidfd_open(os.getpid())
    try:
        yield reference
    finally:
        os.close(reference)


def _die_with_parent(parent: int) -> Callable[[], None]:
    def in_child() -> None:
        # Kept for it until it listens to signals: the first process of a pid namespace ignores it.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        # Not SIGTERM, which would wait for SIGCONT in a daemon that is stopped.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([parent], [], [], 0)[0]:
            os._exit(ExitCode.INTERNAL)  # it died before the call above

    return in_child


def _text(line: str) -> tuple[int, str]:
    """Take prefix and level off a line of the daemon; what it says without a level is for few."""
    text = line.removeprefix("vfsmount serve: ")
    word, colon, rest = text.partition(": ")
    if colon and word in LEVELS:
        return LEVELS[word], rest
    return logging.DEBUG, text


def _log_line(line: str) -> None:
    level, text = _text(line)
    logger.log(level, "daemon: %s", text)
