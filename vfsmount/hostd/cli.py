"""``vfsmount serve``: arguments to a running daemon.

Exit status: 0 after SIGTERM, SIGINT or (``--once``) the guest's leave; else ``errors.ExitCode``.
One line on stderr says that it listens, one says why it cannot; the rest is the log.

Arguments are parsed by a table of a few lines, because argparse alone takes 10 ms of a start that
a mount waits for.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from vfsmount.errors import ExitCode, UsageError, VfsmountError
from vfsmount.hostd.fs.share import CacheMode, Share, ShareOptions
from vfsmount.hostd.server import DEFAULT_POLL_US, Server, listen, listen_on_fd
from vfsmount.wire.virtio_fs import MAX_REQUEST_QUEUES, TAG_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["Arguments", "main", "parse"]

USAGE: Final = """\
usage: vfsmount serve DIR (--socket PATH | --fd N) [options]

Share a directory with virtio-fs guests.

  --socket PATH          listen here; a stale socket file is replaced
  --fd N                 listen on this inherited socket instead
  --readonly             refuse every change
  --tag NAME             name of the share, 1 to 36 bytes (default: vfsmount)
  --cache MODE           what guests may cache: auto (default), always, never, metadata
  --writeback            let guests keep writes back
  --no-xattr             serve no extended attributes
  --dax SIZE|off         DAX window to offer: 2M to 64T in steps of 2M (default: 1G)
  --request-queues N     request queues of the device (default: 1)
  --poll-us N            longest look at a guest's queues before sleeping (default: 50)
  --once                 exit when the first guest has left
  --log-level LEVEL      debug, info, warning (default) or error
  --help                 show this
"""

_LEVELS: Final = ("debug", "info", "warning", "error")
#: ``none`` is what ``vfsmount`` calls the mode that virtiofsd calls ``never``.
_CACHE_WORDS: Final = {mode.value: mode for mode in CacheMode} | {"none": CacheMode.NEVER}

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: One range of a Linux guest, and half of what a process of 47-bit addresses can map at all.
_WINDOW_STEP: Final = 2 << 20
_MAX_WINDOW: Final = 64 << 40

_FLAGS: Final = frozenset(("readonly", "writeback", "no-xattr", "once", "help"))
_VALUES: Final = frozenset(
    ("socket", "fd", "tag", "cache", "dax", "request-queues", "poll-us", "log-level")
)


class Arguments(NamedTuple):
    """What the command line says.

    Attributes:
        directory: What to share.
        socket: Where to listen, or None with ``fd``.
        fd: Inherited listening socket, or None.
        options: How to share.
        poll_us: See ``Server``.
        once: See ``Server``.
        log_level: One of ``logging``'s.
    """

    directory: str
    socket: str | None
    fd: int | None
    options: ShareOptions
    poll_us: int
    once: bool
    log_level: int


def parse(argv: Sequence[str]) -> Arguments | None:
    """Parse the arguments behind ``serve``; None for ``--help``.

    Raises:
        UsageError: They make no sense.
    """
    flags, values, names = _split(argv)
    if "help" in flags:
        return None
    if len(names) != 1:
        raise UsageError("expected one directory to share", "see vfsmount serve --help")
    if ("socket" in values) == ("fd" in values):
        raise UsageError("expected one of --socket and --fd")
    return Arguments(
        directory=names[0],
        socket=values.get("socket"),
        fd=_number(values, "fd", 0, 1 << 20) if "fd" in values else None,
        options=_options(flags, values),
        poll_us=_number(values, "poll-us", 0, 1_000_000, DEFAULT_POLL_US),
        once="once" in flags,
        log_level=getattr(logging, _word(values, "log-level", _LEVELS, "warning").upper()),
    )


def _split(argv: Sequence[str]) -> tuple[set[str], dict[str, str], list[str]]:
    """Sort arguments into flags, options with their values, and the rest."""
    flags: set[str] = set()
    values: dict[str, str] = {}
    names: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            names += rest
        elif argument == "-h":
            flags.add("help")
        elif not argument.startswith("-") or argument == "-":
            names.append(argument)
        else:
            option, has_value, value = argument.removeprefix("--").partition("=")
            if option in _FLAGS and not has_value:
                flags.add(option)
            elif option in _VALUES and argument.startswith("--"):
                values[option] = value if has_value else _next(rest, argument)
            else:
                raise UsageError(f"unknown option {argument}", "see vfsmount serve --help")
    return flags, values, names


def _next(rest: Iterator[str], option: str) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{option} needs a value")
    return value


def _options(flags: set[str], values: dict[str, str]) -> ShareOptions:
    tag = os.fsencode(values.get("tag", "vfsmount"))
    if not 1 <= len(tag) <= TAG_SIZE or b"\0" in tag:
        raise UsageError(f"--tag {values['tag']!r} is not 1 to {TAG_SIZE} bytes")
    return ShareOptions(
        cache=_CACHE_WORDS[_word(values, "cache", _CACHE_WORDS, "auto")],
        readonly="readonly" in flags,
        writeback="writeback" in flags,
        xattr="no-xattr" not in flags,
        tag=tag,
        request_queues=_number(values, "request-queues", 1, MAX_REQUEST_QUEUES, 1),
        dax=_window(values.get("dax", "1G")),
    )


def _window(text: str) -> int:
    """Bytes of the DAX window: a number with K, M, G or T behind it, or ``off``."""
    if text == "off":
        return 0
    number, unit = text[:-1], _UNITS.get(text[-1:].upper(), 0)
    if not unit:
        number, unit = text, 1
    size = int(number) * unit if number.isascii() and number.isdigit() else 0
    if not 0 < size <= _MAX_WINDOW or size % _WINDOW_STEP:
        raise UsageError(f"--dax {text!r} is neither off nor a multiple of 2M up to 64T")
    return size


def _word(values: dict[str, str], option: str, words: Collection[str], default: str) -> str:
    word = values.get(option, default)
    if word not in words:
        raise UsageError(f"--{option} {word!r} is none of {', '.join(words)}")
    return word


def _number(values: dict[str, str], option: str, low: int, high: int, default: int = 0) -> int:
    text = values.get(option, str(default))
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise UsageError(f"--{option} {text!r} is no number from {low} to {high}")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Run the daemon.

    Args:
        argv: Arguments behind ``serve``.

    Returns:
        The exit status.
    """
    try:
        arguments = parse(argv)
        if arguments is None:
            sys.stdout.write(USAGE)
            return ExitCode.OK
        _serve(arguments)
    except VfsmountError as error:
        cure = f" ({error.cure})" if error.cure else ""
        sys.stderr.write(f"vfsmount serve: {error}{cure}\n")
        return error.exit_code
    return ExitCode.OK


def _serve(arguments: Arguments) -> None:
    logging.basicConfig(
        level=arguments.log_level, format="vfsmount serve: %(levelname)s: %(message)s"
    )
    _raise_descriptor_limit()
    # What a guest holds is freed by counting. Looking through it for cycles made the slowest reply
    # of a listing of 100,000 names (40 ms; 15 like this), and what has been loaded by now stays.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    # Guests whose threads wait for the CPU should not wait for a whole default turn of 5 ms.
    sys.setswitchinterval(0.001)
    with Share(arguments.directory, arguments.options) as share:
        if arguments.fd is not None:
            sock, path, where = listen_on_fd(arguments.fd), None, f"descriptor {arguments.fd}"
        else:
            assert arguments.socket is not None
            sock, path, where = listen(arguments.socket), arguments.socket, arguments.socket
        server = Server(share, sock, path=path, poll_us=arguments.poll_us, once=arguments.once)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        sys.stderr.write(f"vfsmount serve: sharing {arguments.directory}, listening on {where}\n")
        sys.stderr.flush()
        server.run()


def _raise_descriptor_limit() -> None:
    """Every node that a guest knows takes a descriptor, so have as many as the host allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
