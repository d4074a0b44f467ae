"""A daemon in a child process, and its parent, which stays outside to clean up.

A process cannot enter a pid namespace itself: only its next child begins there. And the daemon,
once its root is the shared directory, cannot remove its socket's file. So the parent passes signals
on, waits, removes the file, and ends as the child did. Whoever kills the parent kills the child.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
from typing import TYPE_CHECKING, Final

from vfsmount.errors import ExitCode
from vfsmount.hostd import capabilities, syscalls
from vfsmount.hostd.sandbox import step

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STOP_SIGNALS", "continue_in_child"]

#: What ends a daemon in good order. Blocked until there is somebody to handle them: the first
#: process of a pid namespace would not get them at all.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_WAITED_FOR: Final = (*STOP_SIGNALS, signal.SIGCHLD)


def continue_in_child(outlive: Callable[[], None], clean_up: Callable[[], None]) -> int | None:
    """Fork. Returns None in the child, with ``STOP_SIGNALS`` blocked.

    In the parent it returns the child's exit status, or dies of the same signal.

    Args:
        outlive: Called in the parent as soon as there is a child, to let go of what only that
            needs.
        clean_up: Called in the parent when the child has ended.

    Raises:
        UsageError: There can be no more processes.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    child = _fork()
    if not child:
        return None
    outlive()
    # What is left to do is to remove a file, maybe from somebody else's folder.
    capabilities.reduce_to({capabilities.DAC_OVERRIDE})
    syscalls.set_no_new_privs()
    status = _watch(child)
    clean_up()
    return _end_as(status)


def _fork() -> int:
    """Fork, with a child that follows its parent's death; 0 in the child."""
    with step("a process of its own", "allow more processes (ulimit -u), or take --sandbox none"):
        parent = os.pidfd_open(os.getpid())
        try:
            child = os.fork()
            if not child:
                _die_with(parent)
            return child
        finally:
            os.close(parent)


def _die_with(parent: int) -> None:
    """Follow the parent's death; it may have come before we could say so."""
    syscalls.set_parent_death_signal(signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(ExitCode.INTERNAL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def _watch(child: int) -> int:
    """Pass signals on until the child has ended; returns its wait status."""
    while True:
        number = signal.sigwait(_WAITED_FOR)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def _end_as(status: int) -> int:
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number == signal.SIGSYS:
        sys.stderr.write(
            "vfsmount serve: ended for a system call that it may not make (--seccomp log lets it"
            " pass, and the kernel's log has its number)\n"
        )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has left one, if any
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    return 128 + number
