"""Host daemons for tests: start any of the three on a folder, watch it, get rid of it.

    with start_daemon("rust", source) as daemon:
        ... connect to daemon.socket ...

The kinds are ``bundled`` (``vfsmount serve``), ``c`` and ``rust`` (the real virtiofsd of either
origin, as brought by ``tools/fetch_daemons.py``). When the block is entered, the daemon listens.
When it is left, on whatever path, the daemon is dead and reaped and its socket is gone.

The real ones serve one connection and exit when it ends; the bundled one serves any number.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.environment import unavailable
from tests.support.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "DAEMON_KINDS",
    "Daemon",
    "daemon_marks",
    "daemon_problem",
    "each_daemon",
    "require_daemon",
    "start_daemon",
]

DAEMON_KINDS = ("bundled", "c", "rust")

REPOSITORY = Path(__file__).resolve().parents[2]
FETCHED = REPOSITORY / ".cache" / "daemons"

# The bundled daemon needs half a second of Python start-up on a busy machine; the others 20 ms.
START_DEADLINE = 20.0
STOP_DEADLINE = 20.0

# The C daemon's lock file there, the socket's path with dots for slashes and .pid, survives it.
C_LOCK_FOLDER = Path("/run/virtiofsd")

# __SO_ACCEPTON in the flags column of /proc/net/unix: listen() has been called.
ACCEPTING = 0x10000

# Targets of descriptors that are no files; /dev/shm, where tests like to share folders, has some.
# Sockets, pipes and the like ("socket:[1]") have no slash.
NO_FILES = ("/memfd:", "/dev/", "socket:", "pipe:", "anon_inode:")

# What the bundled daemon's log never holds, whatever guests do.
OUR_FAULT = ("Traceback", "internal error", " failed\n")

# The C daemon's and our words for the cache mode, in the Rust daemon's words.
RUST_CACHE = {"none": "never", "auto": "auto", "always": "always"}


class Daemon:
    """A running daemon process.

    Attributes:
        kind: One of `DAEMON_KINDS`.
        source: The folder that it shares.
        socket: The vhost-user socket on which it listens.
        pid: The process that serves.
        process: What was started. The bundled daemon's sandbox makes it the parent of the one
            that serves; its exit status is the daemon's.
    """

    def __init__(
        self, kind: str, source: Path, socket: Path, process: subprocess.Popen[bytes]
    ) -> None:
        self.kind = kind
        self.source = source
        self.socket = socket
        self.process = process
        self.pid = process.pid

    def find_server(self) -> None:
        """From now on `pid` is the process that serves: the one's only child, or itself."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        if children:
            self.pid = int(children[0])

    @property
    def stderr(self) -> str:
        """Everything that the daemon has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def log_path(self) -> Path:
        """The file that receives the daemon's stdout and stderr."""
        return self.socket.with_name("log")

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signal the one that serves; one that has ended is left alone. Reap it with `wait`."""
        if self.is_running():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def pause(self) -> None:
        """Make the daemon mute: it holds its sockets and memory, but does nothing."""
        self.kill(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused daemon go on."""
        self.kill(signal.SIGCONT)

    def wait(self, deadline: float = STOP_DEADLINE) -> int:
        """Wait until the process has ended, at most ``deadline`` seconds.

        Returns:
            The exit status; negative for a signal.
        """
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the {self.kind} daemon still runs after {deadline:g} s"
            ) from None

    def fd_count(self) -> int:
        """How many descriptors of files and folders the daemon holds.

        Sockets, eventfds, pipes, devices and the guest's memory are not counted: their number
        follows the connection, not what the guest has looked up and opened.
        """
        return len(self.open_files())

    def fd_limit(self) -> int:
        """How many descriptors the daemon may have at once."""
        return int(self._proc("limits", "Max open files").split()[0])

    def fd_table_size(self) -> int:
        """How many descriptors its table has room for by now."""
        return int(self._proc("status", "FDSize:"))

    def _proc(self, name: str, label: str) -> str:
        """What follows a label in a file of the process's below /proc."""
        for line in Path(f"/proc/{self.pid}/{name}").read_text().splitlines():
            if line.startswith(label):
                return line.removeprefix(label)
        raise AssertionError(f"no {label} in {name}")

    def open_files(self) -> list[str]:
        """What the descriptors counted by `fd_count` refer to, sorted."""
        folder = Path(f"/proc/{self.pid}/fd")
        targets = []
        for entry in folder.iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue  # closed between the two looks
            if target.startswith("/dev/shm/") or not target.startswith(NO_FILES):
                targets.append(target)
        return sorted(targets)


def daemon_problem(kind: str) -> str:
    """Why this kind of daemon cannot be used here; empty when it can."""
    if kind == "bundled":
        return ""
    if kind == "c" and os.geteuid() != 0:
        return "the c virtiofsd: it runs as root only"
    if _fetched(kind).exists():
        return ""
    try:
        reason = (FETCHED / kind / "missing").read_text().strip()
    except FileNotFoundError:
        reason = "not fetched yet: run tools/fetch_daemons.py"
    return f"the {kind} virtiofsd: {reason}"


def require_daemon(kind: str) -> None:
    """Skip the test (in CI: fail it) when this kind of daemon cannot be used here."""
    if problem := daemon_problem(kind):
        unavailable(problem)


def daemon_marks(kind: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test with this kind of daemon."""
    return [] if kind == "bundled" else [pytest.mark.needs_daemon]


def each_daemon(*others: Sequence[str]) -> list[object]:
    """Return parameters of a fixture: each kind of daemon with all that else may differ."""
    return [
        pytest.param(values, id="-".join(values), marks=daemon_marks(values[0]))
        for values in product(DAEMON_KINDS, *others)
    ]


@contextmanager
def start_daemon(
    kind: str,
    source: str | os.PathLike[str],
    *,
    cache: str | None = None,
    xattr: bool = True,
    writeback: bool = False,
    descriptors: int = 0,
    extra: Sequence[str] = (),
) -> Iterator[Daemon]:
    """Run a daemon on ``source`` for the length of a ``with`` block.

    Args:
        kind: One of `DAEMON_KINDS`.
        source: The folder to share.
        cache: ``none``, ``auto`` or ``always``; by default the bundled daemon's own, and ``none``
            for the others.
        xattr: Whether extended attributes are served; the bundled daemon always does here.
        writeback: Whether the guest's write-back cache is accepted.
        descriptors: How many its table of descriptors has room for from the start; 0 for what a
            shell gives it.
        extra: More arguments, as this kind of daemon spells them; none that makes a real one fork
            (a namespace sandbox, ``--daemonize``), or `Daemon.pid` would be the wrong process.

    Yields:
        The daemon, listening.

    Raises:
        AssertionError: it does not come up, or, the bundled one, has met a fault of its own; the
            text has what it printed. Or we may not have that many descriptors ourselves.
    """
    require_daemon(kind)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptors <= limit, f"{descriptors} descriptors: the limit is {limit} (ulimit -n)"
    # Not under pytest's tmp_path: a socket's path has 107 bytes at most.
    home = Path(tempfile.mkdtemp(prefix="vfsmount-daemon-"))
    socket = home / "socket"
    command = [*_command(kind, Path(source), socket, cache, xattr, writeback), *extra]
    with (home / "log").open("wb") as log, _descriptor_at(descriptors - 1) as inherited:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=inherited,
            cwd=REPOSITORY,
        )
    daemon = Daemon(kind, Path(source), socket, process)
    try:
        wait_until(lambda: _is_up(daemon), START_DEADLINE, f"the {kind} daemon to listen")
        daemon.find_server()
        yield daemon
    finally:
        daemon.kill()  # which ends it even when it is stopped, and its parent after it
        daemon.wait()
        said = daemon.stderr if kind == "bundled" else ""
        shutil.rmtree(home, ignore_errors=True)
        assert not any(words in said for words in OUR_FAULT), said
        (C_LOCK_FOLDER / f"{str(socket).replace('/', '.')}.pid").unlink(missing_ok=True)


@contextmanager
def _descriptor_at(number: int) -> Iterator[tuple[int, ...]]:
    """A descriptor of that number, or the next one free; none for a number below 0.

    Who inherits it has a table with room for it, its forks as well, and need not wait for all
    processors to make it larger, which a process with threads must.
    """
    if number < 0:
        yield ()
        return
    with Path(os.devnull).open("rb") as null:
        descriptor = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, number)
    try:
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _fetched(kind: str) -> Path:
    return FETCHED / kind / "virtiofsd"


def _command(
    kind: str, source: Path, socket: Path, cache: str | None, xattr: bool, writeback: bool
) -> list[str]:
    if kind == "bundled":
        # As users get it. Mere users (whom Ubuntu 24.04 allows no namespaces) go without a sandbox,
        # which is what --source does for them.
        command = [sys.executable, "-m", "vfsmount", "serve", str(source), "--sandbox=auto"]
        command += ["--socket", str(socket)] + ["--writeback"] * writeback
        return command + (["--cache", cache] if cache else [])
    cache = cache or "none"
    command = [str(_fetched(kind)), f"--socket-path={socket}"]
    if kind == "c":
        # The namespace sandbox forks, and needs more rights than a container gives.
        command += ["-o", f"source={source}", "-o", "sandbox=chroot", "-o", f"cache={cache}"]
        command += ["-o", "xattr" if xattr else "no_xattr"]
        return [*command, "-o", "writeback" if writeback else "no_writeback"]
    command += ["--shared-dir", str(source), "--sandbox=none", f"--cache={RUST_CACHE[cache]}"]
    if os.geteuid() != 0:
        command += ["--seccomp=none"]
    return command + ["--xattr"] * xattr + ["--writeback"] * writeback


def _is_up(daemon: Daemon) -> bool:
    if not daemon.is_running():
        raise AssertionError(
            f"the {daemon.kind} daemon ended at once with status {daemon.process.returncode}:\n"
            f"{daemon.stderr}"
        )
    # The bundled one listens before it has opened what it shares, and says when it has.
    said = daemon.kind != "bundled" or "listening on" in daemon.stderr
    return said and _is_listening(daemon.socket)


def _is_listening(socket: Path) -> bool:
    """Whether someone accepts on the socket, without connecting: a second guest is refused."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(socket):
            return bool(int(fields[3], 16) & ACCEPTING)
    return False
