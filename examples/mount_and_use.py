#!/usr/bin/env python3
"""Mount a directory, use it like any other, and unmount it.

    examples/mount_and_use.py SOURCE MOUNTPOINT

``--source`` starts the bundled daemon along with the mount, so one command is all it takes.
``--daemonize`` returns when the mount can be used; its exit status says whether that worked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VFSMOUNT = [sys.executable, "-m", "vfsmount"]


def main(source: Path, mountpoint: Path) -> None:
    """Write a file on the mount, and see it at the host."""
    subprocess.run(
        [*VFSMOUNT, mountpoint, "--source", source, "--cache", "none", "--daemonize"], check=True
    )
    try:
        (mountpoint / "greeting").write_text("hello from the mount\n")
        print("at the host:", (source / "greeting").read_text(), end="")
        for path in sorted(mountpoint.iterdir()):
            print("on the mount:", path.name, path.stat().st_size, "bytes")
    finally:
        subprocess.run([*VFSMOUNT, "umount", mountpoint], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: mount_and_use.py SOURCE MOUNTPOINT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
