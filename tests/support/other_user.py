"""A shell script run by another user than root, who mounts by fusermount3 as anybody would."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.environment import unavailable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NOBODY", "run_as_other_user"]

#: User and group.
NOBODY = 65534

#: All may open /dev/fuse in this mount namespace; reading everything is for our own code.
_BECOME = f"""
mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse || exit 77
shift
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps +dac_read_search \\
    --ambient-caps +dac_read_search sh -c "$@"
"""


def run_as_other_user(
    folder: Path, script: str, environment: dict[str, str], timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a script in a mount namespace of its own, where ``$PYTHON`` is this interpreter.

    Args:
        folder: Where every user can go.
        script: Shell commands.
        environment: All of it but PYTHON.
        timeout: Seconds.
    """
    if os.geteuid() != 0:
        unavailable("becoming another user needs root")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _BECOME, "sh", str(folder), script],
        env=environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode == 77:
        unavailable(f"no /dev/fuse for everybody: {done.stderr}")
    return done
