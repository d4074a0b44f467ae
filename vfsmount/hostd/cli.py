"""``vfsmount serve``: arguments to a running daemon.

Exit status: 0 after SIGTERM, SIGINT or (``--once``) the guest's leave; else ``errors.ExitCode``.
One line on stderr says that it listens, one says why it cannot; the rest is the log.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import tokenize  # noqa: F401  # else loaded to print a traceback, and out of reach (Python 3.13)
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final

from vfsmount.errors import ExitCode, UsageError, VfsmountError
from vfsmount.hostd import sandbox, seccomp
from vfsmount.hostd.arguments import parse
from vfsmount.hostd.fs.share import HandleUse, Share, open_directory
from vfsmount.hostd.isolation import Sandbox
from vfsmount.hostd.server import Server, SocketFile, listen, listen_on_fd
from vfsmount.hostd.supervisor import STOP_SIGNALS, continue_in_child

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from vfsmount.hostd.arguments import Arguments

__all__ = ["inherited_socket", "main"]

logger = logging.getLogger(__name__)

#: First descriptor that systemd passes, sd_listen_fds(3).
_SD_LISTEN_FDS_START: Final = 3
#: A guest's nodes and 1,500 open files; the table takes 32 KiB.
_ROOM_FOR_DESCRIPTORS: Final = 4096


def main(argv: Sequence[str]) -> int:
    """Run the daemon.

    Args:
        argv: Arguments behind ``serve``.

    Returns:
        The exit status.
    """
    try:
        arguments = parse(argv, inherited_socket)
        if not isinstance(arguments, str):
            return _serve(arguments)
        sys.stdout.write(arguments)
    except VfsmountError as error:
        cure = f" ({error.cure})" if error.cure else ""
        sys.stderr.write(f"vfsmount serve: {error}{cure}\n")
        return error.exit_code
    return ExitCode.OK


def inherited_socket() -> int | None:
    """Return the listening socket that systemd has passed to this process, sd_listen_fds(3).

    Raises:
        UsageError: It has passed several.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None  # meant for another process, if for any
    count = os.environ.get("LISTEN_FDS")
    if count != "1":
        raise UsageError(
            f"systemd passes {count} sockets, expected 1", "give it one ListenStream= each"
        )
    return _SD_LISTEN_FDS_START


def _serve(arguments: Arguments) -> int:
    _start_log(arguments)
    _raise_descriptor_limit(arguments.nofile)
    with ExitStack() as stack, ExitStack() as outside:
        directory = open_directory(arguments.directory)
        outside.callback(os.close, directory)
        sock, file, where = _listen(arguments)
        stack.callback(file.remove)
        kind = _begin_isolation(arguments)
        # Nobody need clean up after the first process of a pid namespace that was given a socket:
        # it has been started as one, by vfsmount MNT --source.
        if kind is not Sandbox.NONE and (os.getpid() != 1 or file.path is not None):
            status = continue_in_child(sock.close, file.remove)
            if status is not None:
                return status
        _make_room_for_descriptors(directory)
        with _open_share(arguments, kind, directory) as share:
            outside.close()
            # In a sandbox the file cannot be reached; it is for the parent to remove.
            _run(arguments, share, sock, file.path if kind is Sandbox.NONE else None, where)
    return ExitCode.OK


def _run(
    arguments: Arguments, share: Share, sock: socket.socket, path: str | None, where: str
) -> None:
    server = Server(share, sock, path=path, poll_us=arguments.poll_us, once=arguments.once)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: server.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    sys.stderr.write(f"vfsmount serve: sharing {arguments.directory}, listening on {where}\n")
    sys.stderr.flush()
    server.run()


def _listen(arguments: Arguments) -> tuple[socket.socket, SocketFile, str]:
    """Return the listening socket, its file, and a name for the log."""
    if arguments.socket is None:
        assert arguments.fd is not None
        return listen_on_fd(arguments.fd), SocketFile(None), f"descriptor {arguments.fd}"
    sock = listen(arguments.socket, arguments.socket_group)
    return sock, SocketFile(arguments.socket), arguments.socket


def _begin_isolation(arguments: Arguments) -> Sandbox:
    """Do what comes before the daemon's own process; returns the kind that it shall be."""
    isolation = arguments.isolation
    kind = isolation.sandbox
    if kind is Sandbox.AUTO and os.geteuid() != 0:
        return Sandbox.NONE
    if kind is Sandbox.NAMESPACE and (os.geteuid() != 0 or isolation.mapped):
        sandbox.enter_user_namespace(isolation)
    if kind in (Sandbox.NAMESPACE, Sandbox.AUTO) and os.getpid() != 1:
        try:
            sandbox.begin_pid_namespace()
        except UsageError as error:
            if kind is not Sandbox.AUTO:
                raise
            logger.warning("%s; going on without", error)
            return Sandbox.NONE
    return kind


def _open_share(arguments: Arguments, kind: Sandbox, directory: int) -> Share:
    """Enter the sandbox and open the share in it; what is left to do takes no more rights."""
    with sandbox.step("filter of system calls", "take --seccomp none"):
        restrict = seccomp.prepare(arguments.isolation.seccomp)
    place = arguments.directory if kind is Sandbox.NONE else "/"
    if kind is Sandbox.CHROOT:
        sandbox.enter_chroot(directory)
    elif kind is not Sandbox.NONE:
        try:
            sandbox.enter_namespaces(directory, or_return=kind is Sandbox.AUTO)
        except UsageError as error:
            if kind is not Sandbox.AUTO:
                raise
            logger.warning("%s; going on without", error)
            os.fchdir(directory)
            place = "."
    options = arguments.options
    use_handles = options.handles is not HandleUse.NEVER
    sandbox.give_up_rights(arguments.isolation, restrict, file_handles=use_handles)
    # What a guest holds is freed by counting. Looking through it for cycles made the slowest reply
    # of a listing of 100,000 names (40 ms; 15 like this), and what has been loaded by now stays.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
    # Guests whose threads wait for the CPU should not wait for a whole default turn of 5 ms.
    sys.setswitchinterval(0.001)
    return Share(place, options)


def _start_log(arguments: Arguments) -> None:
    form = "vfsmount serve: %(levelname)s: %(message)s"
    if not arguments.syslog:
        logging.basicConfig(level=arguments.log_level, format=form)
        return
    from logging.handlers import SysLogHandler  # with what it loads, for those who want it

    try:
        handler: Any = SysLogHandler("/dev/log", SysLogHandler.LOG_DAEMON)
        handler.socket.getpeername()  # it says nothing itself where nobody listens
    except OSError as error:
        raise UsageError(f"cannot log to syslog: {error.strerror}", "leave --syslog out") from None
    logging.basicConfig(level=arguments.log_level, format=form, handlers=[handler])


def _raise_descriptor_limit(wanted: int | None) -> None:
    """Set the limit of open descriptors; without a number, as many as the host allows.

    Raises:
        UsageError: The host does not allow that number.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted is None:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    elif wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        except (OSError, ValueError):
            raise UsageError(
                f"cannot allow {wanted} open descriptors", f"{hard} are allowed here"
            ) from None


def _make_room_for_descriptors(any_fd: int) -> None:
    """Have the table of descriptors grow now, while there is one thread; it never shrinks again.

    With threads, who opens the 64th file, the 128th and so on waits for all processors
    (``expand_fdtable`` calls ``synchronize_rcu``): of 544 ms for a guest's first 2,000 opens, six
    such waits were 79 ms, the longest 36. Like this there are none, and it is 415 ms.
    A fork's table has room for what is open and no more, so this comes after the last one.

    Args:
        any_fd: Some descriptor, to be duplicated for a moment.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = min(_ROOM_FOR_DESCRIPTORS, soft) - 1
    with suppress(OSError):  # there is none left: what there is must do
        os.close(fcntl.fcntl(any_fd, fcntl.F_DUPFD_CLOEXEC, highest))
