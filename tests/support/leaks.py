"""What a test may leave behind: nothing. Mounts, child processes and descriptors are compared.

The comparison costs well under a millisecond when nothing changed, so every test has it. A
difference is given a moment to go away (a daemon winds down, a lazy unmount completes, the garbage
collector closes a forgotten socket) before it is called a leak.
"""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.namespace import detach
from tests.support.wait import wait_until

__all__ = ["Footprint", "check_footprint", "fuse_mounts"]

# Seconds that a difference may take to go away, also where somebody else has the CPU.
GRACE = 15.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What this process holds of the machine.

    Attributes:
        mounts: Mount points of FUSE filesystems.
        children: Process ids of our children that have not ended.
        descriptors: (descriptor, what it refers to).
    """

    mounts: frozenset[str]
    children: frozenset[int]
    descriptors: frozenset[tuple[int, str]]

    @classmethod
    def take(cls) -> Footprint:
        """Look at the machine as it is now."""
        return cls(fuse_mounts(), _children(), _descriptors())

    def growth_since(self, earlier: Footprint) -> list[str]:
        """One line per thing held now that was not held before."""
        return [
            *(f"mount {path}" for path in sorted(self.mounts - earlier.mounts)),
            *(
                f"process {pid}: {_command_line(pid)}"
                for pid in sorted(self.children - earlier.children)
            ),
            *(
                f"descriptor {fd}: {target}"
                for fd, target in sorted(self.descriptors - earlier.descriptors)
            ),
        ]


def check_footprint(before: Footprint) -> None:
    """Fail the test when more is held than ``before``.

    Leaked processes and mounts are ended first, to spare the tests that follow.
    """
    if not Footprint.take().growth_since(before):
        return
    gc.collect()
    try:
        wait_until(lambda: not Footprint.take().growth_since(before), GRACE, "leaks to go away")
    except AssertionError:
        after = Footprint.take()
        leaks = after.growth_since(before)
        _clean_up(before, after)
        pytest.fail("\n  ".join(["the test left behind:", *leaks]), pytrace=False)


def fuse_mounts() -> frozenset[str]:
    """Mount points of all FUSE filesystems, as /proc/self/mountinfo spells them."""
    mounts = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount_fields, _, type_fields = line.partition(" - ")
        if type_fields.startswith("fuse"):
            mounts.add(mount_fields.split()[4])
    return frozenset(mounts)


def _children() -> frozenset[int]:
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return frozenset(pid for pid in pids if _is_alive(pid))


def _is_alive(pid: int) -> bool:
    """False for a zombie: it holds nothing, and subprocess warns of those itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(ended)"


def _descriptors() -> frozenset[tuple[int, str]]:
    held = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            held.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            continue  # the one that listed the folder
    return frozenset(held)


def _clean_up(before: Footprint, after: Footprint) -> None:
    """End leaked processes, then detach leaked mounts; descriptors stay with their owners."""
    for pid in after.children - before.children:
        os.kill(pid, signal.SIGKILL)
    for path in after.mounts - before.mounts:
        detach(path)
