"""How far ahead the kernel reads in files of the mount.

Its own choice is 128 KiB a message, and INIT can only lower that. The limit is a property of the
mount's backing device (``/sys/class/bdi``), which root may raise; 1 MiB is the largest message.
The window still grows from 16 KiB with each sequential read, so random reads stay small.

16 MiB read in order: 128 messages without, 18 with.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["raise_readahead"]

#: Bytes; the largest message that real daemons take.
READAHEAD = 1 << 20


def raise_readahead(device: str, limit: int) -> int | None:
    """Let the kernel read further ahead; does not touch the mount.

    Args:
        device: The mount's ``major:minor``.
        limit: Bytes of the largest READ that the daemon takes.

    Returns:
        Bytes that it reads ahead from now on; None where nobody tells us (no sysfs).
    """
    knob = Path("/sys/class/bdi") / device / "read_ahead_kb"
    try:
        current = int(knob.read_text())
    except (OSError, ValueError):
        return None
    wanted = min(READAHEAD, limit) >> 10
    if current < wanted:
        try:
            knob.write_text(str(wanted))
        except OSError:  # not root, or sysfs is read-only
            wanted = current
    return max(current, wanted) << 10
