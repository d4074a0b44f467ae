"""The kernel's side of a mount, by way of pyfuse3: mounted while a ``with`` body runs.

libfuse tells its troubles by printing them. ``mounted`` catches what it prints, so that the user
gets one line of ours that holds the reason.
"""

from __future__ import annotations

import logging
import os
import re
import select
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import pyfuse3

from vfsmount.client.mount.mountinfo import MountEntry, locate
from vfsmount.client.mount.mountpoint import detach, is_mounted, is_root
from vfsmount.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfsmount.client.mount.options import MountSettings

__all__ = ["KernelMount", "mounted"]

CURES = (
    ("user_allow_other", "leave out allow_other, or let root set it"),
    ("write access", "mount on a directory that you may write to"),
    ("/dev/fuse", "a container must be given the device and the right to mount"),
    ("username", "fusermount3 wants an entry for this user in /etc/passwd"),
    (
        "permitted",
        "mounting takes CAP_SYS_ADMIN (a container: --cap-add SYS_ADMIN), or fusermount3 with its"
        " set-user-id bit",
    ),
)
"""Advice by a word of libfuse's message."""

FUSE_RDEV = os.makedev(10, 229)
"""Device number of /dev/fuse (linux/miscdevice.h, FUSE_MINOR)."""

logger = logging.getLogger(__name__)


class KernelMount(NamedTuple):
    """A mount of ours.

    Attributes:
        entry: As the mount table has it.
        device: The open /dev/fuse; libfuse owns it.
    """

    entry: MountEntry
    device: int

    def is_connected(self) -> bool:
        """Whether requests can still come: False after the last unmount and after an abort.

        The loop of pyfuse3 sees that too, but then waits for requests that are with the daemon.
        """
        watch = select.poll()
        watch.register(self.device, 0)
        return not watch.poll(0)


@contextmanager
def mounted(
    operations: pyfuse3.Operations, settings: MountSettings, path: str
) -> Iterator[KernelMount]:
    """Mount at ``path``; afterwards neither the mount nor the connection is left.

    Args:
        operations: Who answers requests while the body runs ``pyfuse3.main``.
        settings: Mount options.
        path: The mount point, resolved.

    Yields:
        The mount.

    Raises:
        MountError: The kernel or fusermount3 refused, in their words.
    """
    others = _fuse_devices()
    _initialise(operations, set(settings.libfuse_options(as_root=is_root())), path)
    entry: MountEntry | None = None
    try:
        entry = locate(path)[1]
        if entry is None:
            raise MountError(f"{path} was unmounted as soon as it was mounted")
        (device,) = _fuse_devices() - others
        yield KernelMount(entry, device)
    finally:
        if entry is not None and is_mounted(path, entry.device):
            _detach_quietly(path)
        # Never pyfuse3.close(unmount=True): it unmounts whatever is at the path by then.
        pyfuse3.close(unmount=False)


def _initialise(operations: pyfuse3.Operations, options: set[str], path: str) -> None:
    failure: RuntimeError | None = None
    with _captured_stderr() as printed:
        try:
            pyfuse3.init(operations, path, options)
        except RuntimeError as error:
            failure = error
    text = _readable(printed.pop())
    if failure is not None:
        cure = next((advice for word, advice in CURES if word in text), "")
        raise MountError(f"cannot mount on {path}: {text or failure}", cure) from failure
    if text:
        logger.warning("%s", text)


def _fuse_devices() -> set[int]:
    # pyfuse3 does not tell its descriptor. By number, as the name depends on who opened it where.
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if _rdev(fd) == FUSE_RDEV}


def _rdev(descriptor: int) -> int:
    with suppress(OSError):  # the one that listed the directory is gone
        return os.fstat(descriptor).st_rdev
    return 0


def _detach_quietly(path: str) -> None:
    try:
        detach(path)
    except OSError as error:
        logger.warning("%s cannot be unmounted: %s", path, error.strerror)


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collect what anybody, C libraries and child processes too, writes to descriptor 2.

    Yields:
        A list to which the text is appended when the body ends.
    """
    printed: list[str] = []
    saved = os.dup(2)
    sink = os.memfd_create("stderr")
    try:
        os.dup2(sink, 2)
        yield printed
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        printed.append(os.pread(sink, 4096, 0).decode("utf-8", "replace"))
        os.close(sink)


def _readable(text: str) -> str:
    """Turn ``fuse: mount failed: X`` lines into one clause."""
    lines = (re.sub(r"^(fuse|fusermount3): ", "", line) for line in text.splitlines())
    return "; ".join(line.strip() for line in lines if line.strip())
