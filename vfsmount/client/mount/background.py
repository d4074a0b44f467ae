"""How others learn that the mount is ready: going to the background, pid file, descriptor, systemd.

Ready means one thing everywhere: the daemon has listed its root, and the kernel has the mount.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from vfsmount.client.mount.logs import to_background
from vfsmount.errors import ExitCode, MountError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfsmount.client.mount.options import MountSettings

__all__ = ["Announcer", "check_targets", "go_to_background", "sd_notify"]

READY = b"READY\n"

logger = logging.getLogger(__name__)


def check_targets(settings: MountSettings) -> None:
    """Make sure, before anything is started, that readiness can be told where it is wanted.

    Raises:
        UsageError: ``--ready-fd`` is not open for writing, or ``--pid-file`` cannot be written.
    """
    if settings.ready_fd is not None:
        try:
            mode = fcntl.fcntl(settings.ready_fd, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            mode = os.O_RDONLY
        if mode == os.O_RDONLY:
            raise UsageError(f"--ready-fd {settings.ready_fd} is not a descriptor open for writing")
        # Neither fusermount3 nor the daemon of --source may keep it open.
        os.set_inheritable(settings.ready_fd, False)
    if settings.pid_file is not None:
        folder = os.path.dirname(settings.pid_file)
        if not os.path.isdir(folder):
            raise UsageError(f"--pid-file: there is no directory {folder}", "make it first")
        if not os.access(folder, os.W_OK) or os.path.isdir(settings.pid_file):
            raise UsageError(f"--pid-file {settings.pid_file} cannot be written", "name another")


def go_to_background() -> int:
    """Fork; go on in the child, and let the parent wait until the child is ready or has failed.

    The child keeps stderr until it is ready, so that its error line appears where the command was
    typed. It starts a session of its own: no terminal can signal it. Call this before any thread
    exists, trio included.

    Returns:
        In the child: the descriptor on which ``Announcer`` tells the parent. The parent never
        returns: it leaves with the child's exit status, or with 0 once the child is ready.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        raise SystemExit(_wait_for(child, reader))
    os.close(reader)
    os.setsid()
    os.chdir("/")
    return writer


def _wait_for(child: int, reader: int) -> int:
    try:
        if os.read(reader, 1):
            return ExitCode.OK
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        return 128 + signal.SIGINT
    if status < 0:
        name = signal.Signals(-status).name
        sys.stderr.write(f"vfsmount: error: the background process was killed by {name}\n")
        return ExitCode.INTERNAL
    return status or ExitCode.INTERNAL


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the service manager, if there is one; failures are ignored.

    The protocol is that of sd_notify(3); a name that starts with ``@`` is an abstract socket.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        try:
            link.setblocking(False)
            link.connect("\0" + address[1:] if address[0] == "@" else address)
            link.send(state.encode())
        except OSError as error:
            logger.debug("sd_notify %s: %s", address, error)


class Announcer:
    """Tells everybody once that the mount is ready, and takes back what it left in the end.

    Args:
        settings: Where to tell.
        parent: Descriptor from ``go_to_background``, or None in the foreground.
    """

    def __init__(self, settings: MountSettings, parent: int | None) -> None:
        self._settings = settings
        self._parent = parent
        self._pid_file_written = False

    def ready(self) -> None:
        """Write the pid file and tell the descriptor, the service manager and the parent.

        Raises:
            UsageError: The pid file cannot be written.
            MountError: The parent that started us is gone, so nobody wants this mount.
        """
        self._write_pid_file()
        if self._settings.ready_fd is not None:
            _tell(self._settings.ready_fd)
        sd_notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=mounted {self._settings.mountpoint}")
        if self._parent is not None:
            self._leave_terminal()
            if not _tell(self._parent):
                raise MountError("the command that asked for this mount was ended")
            self._parent = None

    def stopping(self) -> None:
        """Tell the service manager that the end has begun."""
        sd_notify("STOPPING=1")

    def close(self) -> None:
        """Remove the pid file if it is still ours."""
        path = self._settings.pid_file
        if path is None or not self._pid_file_written:
            return
        try:
            with open(path, encoding="ascii") as file:
                ours = file.read().strip() == str(os.getpid())
            if ours:
                os.unlink(path)
        except (OSError, ValueError) as error:
            logger.warning("pid file %s: %s", path, error)

    def _write_pid_file(self) -> None:
        path = self._settings.pid_file
        if path is None:
            return
        # Renamed into place: a reader never sees half a number.
        fresh = f"{path}.{os.getpid()}"
        try:
            with open(fresh, "w", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
            os.replace(fresh, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(fresh)
            raise UsageError(f"--pid-file {path}: {error.strerror}", "name another") from error
        self._pid_file_written = True

    def _leave_terminal(self) -> None:
        to_background()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        if null > 2:
            os.close(null)


def _tell(descriptor: int) -> bool:
    try:
        os.write(descriptor, READY)
        return True
    except OSError:
        return False  # the reader lost interest; SIGPIPE is ignored by Python
    finally:
        os.close(descriptor)
