"""The beginning of a mount: what is checked and started before anything heavy is loaded.

Everything that can be wrong without side effects is refused here, before the command goes to the
background. The daemon of ``--source`` is started before the event loop is even imported, which
takes as long as the daemon's own start.
"""

from __future__ import annotations

import gc
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from vfsmount.client.mount.background import Announcer, check_targets, go_to_background
from vfsmount.client.mount.bundled import BundledDaemon, bundled_daemon
from vfsmount.client.mount.mountpoint import check_fuse_available, check_mountpoint
from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from vfsmount.client.mount.options import MountSettings

__all__ = ["run_mount"]


def run_mount(settings: MountSettings) -> int:
    """Mount, serve until the end, and return the exit status.

    With ``settings.daemonize`` the caller's process leaves inside here (SystemExit), and the
    function goes on in a child.

    Raises:
        VfsmountError: The mount never became usable; nothing is left behind.
    """
    path = _check(settings)
    parent = go_to_background() if settings.daemonize else None
    announcer = Announcer(settings, parent)
    daemon: AbstractContextManager[BundledDaemon | None] = nullcontext()
    if settings.source is not None:
        daemon = bundled_daemon(settings)
    try:
        with daemon as running:
            from vfsmount.client.mount.life import serve_mount

            gc.enable()
            return serve_mount(settings, path, announcer, running)
    finally:
        announcer.close()


def _check(settings: MountSettings) -> str:
    """Refuse what cannot work before anything is started; returns the resolved mount point."""
    if settings.cpus is not None:
        _pin(settings.cpus)
    if settings.source is not None and not os.path.isdir(settings.source):
        what = "is not a directory" if os.path.exists(settings.source) else "does not exist"
        raise UsageError(f"--source {settings.source} {what}", "name a directory of this host")
    check_targets(settings)
    path = check_mountpoint(settings.mountpoint)
    if settings.source is not None and os.path.realpath(settings.source) == path:
        text = f"--source and mount point are the same directory, {path}"
        raise UsageError(text, "name another mount point")
    check_fuse_available()
    return path


def _pin(cpus: frozenset[int]) -> None:
    with suppress(OSError, OverflowError):
        os.sched_setaffinity(0, cpus)
    missing = sorted(cpus - os.sched_getaffinity(0))
    if missing:
        here = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        named = ", ".join(map(str, missing))
        raise UsageError(f"--cpus: there is no CPU {named} to run on", f"there is: {here}")
