"""sshfs without ssh: becomes sshfs, wired by a socket pair to an sftp-server of its own.

    python -m benchmarks.sftp SFTP_SERVER SSHFS ARGUMENT...

Nothing listens anywhere: sshfs speaks over its stdin and stdout (``-o passive``), and the server
ends when they are closed. The process that was started is sshfs in the end: it can be waited for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def main() -> None:
    """Start the server, become sshfs."""
    server, *sshfs = sys.argv[1:]
    ours, its = socket.socketpair()
    subprocess.Popen([server], stdin=its.fileno(), stdout=its.fileno())
    for standard in (0, 1):
        os.dup2(ours.fileno(), standard)
    os.execvp(sshfs[0], [*sshfs, "-o", "passive"])


if __name__ == "__main__":
    main()
