"""The ``vfsmount`` command: words to calls, errors to one line and an exit status.

The first word is a command (``serve``, ``umount``, ``status``, ``probe``) or else belongs to a
mount. Each command is imported only when it runs: ``serve`` must not load the event loop, and help
must not load anything.

No error that a user can cause shows a traceback. One that is our own fault does, and ends with 2.

While a command is loaded the garbage collector rests: it would find nothing in 7 % of the time. One
that goes on for long (a mount, ``serve``) has it resume.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

from vfsmount import __version__
from vfsmount.client.mount.arguments import (
    HELP,
    Arguments,
    Group,
    Option,
    nearest,
    parse,
    render_help,
)
from vfsmount.errors import ExitCode, UsageError, VfsmountError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

EXIT_CODES = """
Exit status:
  0   done; for a mount: unmounted, everything is with the host
  1   wrong use: an option, value or argument that cannot be
  2   a fault of vfsmount itself
  3   cannot connect: no such socket, nobody listens, not permitted
  4   the handshake failed: it speaks something else, too old, or no answer
  5   the daemon was lost while mounted
  32  the mount failed: mount point, /dev/fuse, fusermount3, busy
"""

MOUNT_USAGE = (
    "vfsmount MNT --socket PATH [option...]    mount what a running daemon shares",
    "vfsmount MNT --source DIR [option...]     share a directory and mount it",
    "vfsmount DIR|PATH MNT [option...]         either, in the background: as mount(8), sshfs",
    "vfsmount serve DIR --socket PATH          run the bundled daemon alone",
    "vfsmount umount MNT                       unmount, wait until all is written",
    "vfsmount status MNT [--json]              what a mount is doing",
    "vfsmount probe --socket PATH [--json]     what a daemon offers, without mounting",
)
MOUNT_INTRO = """
Mounts what a virtio-fs host daemon shares, without a virtual machine. Runs until it
is unmounted, or until Ctrl-C or SIGTERM (which unmount it).
"""
MOUNT_AFTER = f"""
Examples:
  vfsmount ~/mnt --source ~/project
  vfsmount /mnt --socket /run/virtiofsd.sock --cache always --daemonize
  vfsmount /mnt --socket /run/virtiofsd.sock -o ro,nosuid,nodev --cpus 0
  in /etc/fstab:
  /run/virtiofsd.sock  /mnt  fuse.vfsmount  cache=none,nofail,_netdev  0  0

A mount point named like a command is written with its folder: vfsmount ./serve ...
'vfsmount COMMAND --help' explains the other commands.
{EXIT_CODES}"""

UMOUNT_GROUPS = (
    Group(
        "Options",
        (
            Option("lazy", "take it out of sight at once, even when busy; do not wait", short="l"),
            Option(
                "force",
                "abort: pending requests fail, what is not written yet is lost;\n"
                "for a mount that hangs",
                short="f",
            ),
            HELP,
        ),
    ),
)
STATUS_GROUPS = (Group("Options", (Option("json", "print JSON for scripts"), HELP)),)
PROBE_GROUPS = (
    Group(
        "Options",
        (
            Option("socket", "vhost-user socket of a running host daemon", "PATH"),
            Option("json", "print JSON for scripts"),
            HELP,
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The words after the program's name; by default those of this process.

    Returns:
        The exit status (``ExitCode``, or 128 plus a signal's number).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    command = COMMANDS.get(words[0]) if words else None
    gc.disable()
    try:
        return _mount(words) if command is None else command(words[1:])
    except VfsmountError as error:
        _tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Our reader (head, less) has left. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception:
        # The top of the program: whatever comes here is a bug, and must not look like status 1.
        traceback.print_exc()
        return ExitCode.INTERNAL
    finally:
        gc.enable()


def _open_standard_streams() -> None:
    """Give a process that was started without them (``>&-``) descriptors 0 to 2.

    Else a socket of ours would get such a number, and whoever prints would write there.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _show(text: str) -> None:
    """Print on stdout.

    Raises:
        UsageError: It cannot be written to.
        BrokenPipeError: Its reader has left.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write to stdout: {error.strerror}") from error


def _tell(error: VfsmountError) -> None:
    from vfsmount.client.mount.logs import tell

    tell(error)


def _mount(words: list[str]) -> int:
    from vfsmount.client.mount.options import MOUNT_GROUPS, parse_mount

    if words:
        _check_command(words[0])
    given = parse(words, MOUNT_GROUPS, "vfsmount").values
    if given.get("help"):
        _show(render_help(MOUNT_USAGE, MOUNT_INTRO, MOUNT_GROUPS, MOUNT_AFTER))
        return ExitCode.OK
    if given.get("version"):
        _show(f"vfsmount {__version__}\n")
        return ExitCode.OK
    settings = parse_mount(words)

    from vfsmount.client.mount.logs import start_logging

    start_logging(settings.log_level, settings.log_file)

    from vfsmount.client.mount.launch import run_mount

    return run_mount(settings)


def _check_command(word: str) -> None:
    """Refuse a misspelt command, which would be taken for a mount point or a socket.

    Raises:
        UsageError: The first word is much like a command's name, and no file has that name.
    """
    if word.startswith("-") or "/" in word or os.path.lexists(word):
        return
    meant = LIKE_COMMANDS.get(word) or nearest(word, COMMANDS, alike=0.8)
    if meant:
        raise UsageError(f"unknown command {word}", f"did you mean 'vfsmount {meant}'?")


def _serve(words: list[str]) -> int:
    from vfsmount.hostd.cli import main as serve

    return serve(words)


def _umount(words: list[str]) -> int:
    intro = "Unmounts, and waits until everything written is with the host."
    given = _given(words, "umount", "MNT [option...]", intro, UMOUNT_GROUPS)
    if given is None:
        return ExitCode.OK

    from vfsmount.client.mount.umount import run_umount

    run_umount(_one_mountpoint(given), lazy="lazy" in given.values, force="force" in given.values)
    return ExitCode.OK


def _status(words: list[str]) -> int:
    intro = "Shows what a mount is doing. Never touches the mount, so it works when that hangs."
    given = _given(words, "status", "MNT [--json]", intro, STATUS_GROUPS)
    if given is None:
        return ExitCode.OK

    from vfsmount.client.mount.status import format_status, read_status

    status = read_status(_one_mountpoint(given))
    _print_document(status, format_status, as_json="json" in given.values)
    return ExitCode.OK


def _probe(words: list[str]) -> int:
    intro = (
        "Connects to a daemon, shows what it offers, and leaves without mounting. A daemon\n"
        "that serves a single connection (virtiofsd) ends after that."
    )
    given = _given(words, "probe", "--socket PATH [--json]", intro, PROBE_GROUPS)
    if given is None:
        return ExitCode.OK
    socket = given.values.get("socket")
    if given.operands or not socket:
        raise UsageError("probe needs a socket", "write vfsmount probe --socket PATH")

    from vfsmount.client.mount.probe import format_probe, run_probe

    _print_document(run_probe(socket), format_probe, as_json="json" in given.values)
    return ExitCode.OK


def _given(
    words: list[str], name: str, operands: str, intro: str, groups: Sequence[Group]
) -> Arguments | None:
    """Read the words of a command; None when they ask for its help, which is shown."""
    command = f"vfsmount {name}"
    given = parse(words, groups, command)
    if given.values.get("help"):
        _show(render_help((f"{command} {operands}",), intro, groups))
        return None
    return given


def _one_mountpoint(given: Arguments) -> str:
    if len(given.operands) != 1 or not given.operands[0]:
        cure = "'findmnt -t fuse.vfsmount' lists what is mounted"
        raise UsageError("exactly one mount point is needed", cure)
    return given.operands[0]


def _print_document(
    document: dict[str, Any], formatter: Callable[[dict[str, Any]], str], *, as_json: bool
) -> None:
    import json

    _show(json.dumps(document, indent=2) + "\n" if as_json else formatter(document))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "umount": _umount,
    "status": _status,
    "probe": _probe,
}
LIKE_COMMANDS = {"unmount": "umount", "mount": "DIR MNT", "help": "--help"}
"""What people try, and what it is called here."""
