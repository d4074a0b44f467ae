"""``python -m vfsmount.hostd``: the daemon alone, the same as ``vfsmount serve``."""

from __future__ import annotations

import sys

from vfsmount.hostd.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
