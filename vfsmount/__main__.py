"""``python -m vfsmount``: the same as the ``vfsmount`` command."""

from __future__ import annotations

import sys

from vfsmount.cli import main

if __name__ == "__main__":
    sys.exit(main())
