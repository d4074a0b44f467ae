"""What ``vfsmount serve`` is asked for: the command line, read and checked as far as words can be.

Two spellings mean the same thing: ``vfsmount serve DIR --socket PATH``, and virtiofsd's own,
``--shared-dir DIR --socket-path PATH``, with whatever other options a script has for it. They
differ in two defaults, because each must keep its promise: with ``--shared-dir`` extended
attributes are off and the log level is info.

Arguments are parsed by a table of a few lines, because argparse alone takes 10 ms of a start that
a mount waits for.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfsmount.errors import UsageError
from vfsmount.hostd.capabilities import parse_changes
from vfsmount.hostd.fs.share import CacheMode, HandleUse, ShareOptions
from vfsmount.hostd.isolation import Isolation, Sandbox, parse_user_map
from vfsmount.hostd.server import DEFAULT_POLL_US
from vfsmount.wire.virtio_fs import MAX_REQUEST_QUEUES, TAG_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from vfsmount.hostd.fs.idmap import Translation
    from vfsmount.hostd.fs.xattrmap import XattrMap

__all__ = ["CAPABILITIES", "USAGE", "Arguments", "parse"]

USAGE: Final = """\
usage: vfsmount serve DIR (--socket PATH | --fd N) [option...]
       vfsmount serve --shared-dir DIR (--socket-path PATH | --fd N) [option...]

Share a directory with virtio-fs guests. The options are virtiofsd's; those below "Also" are not.

  --socket-path PATH        listen here; a stale socket file is replaced
  --socket-group NAME       let members of this group connect as well
  --fd N                    listen on this inherited socket instead; without either, on the
                            one that systemd passes (LISTEN_FDS)
  --tag NAME                name of the share, 1 to 36 bytes (default: vfsmount)

What guests may do:
  --readonly                refuse every change
  --cache MODE              what they may cache: auto (default), always, never, metadata
  --writeback               let them keep writes back
  --allow-mmap              let them map files also with --cache never or metadata
  --allow-direct-io         open with O_DIRECT where an application of theirs does
  --preserve-noatime        the same for O_NOATIME
  --no-readdirplus          never list with attributes
  --no-announce-submounts   do not tell them where another filesystem begins
  --no-killpriv-v2          do not clear set-id bits for them (shares that lie on NFS)
  --xattr                   serve extended attributes (default with DIR, not with --shared-dir)
  --xattrmap RULES          under other names on the host
  --security-label          label files when they are made; takes --xattr along
  --posix-acl               let access control lists count; takes --xattr along

Users and groups:
  --translate-uid RULE      guest:GUEST:HOST:COUNT, host:HOST:GUEST:COUNT, map:GUEST:HOST:COUNT,
                            squash-guest:GUEST:HOST:COUNT, squash-host:HOST:GUEST:COUNT or
                            forbid-guest:GUEST:COUNT; may be repeated
  --translate-gid RULE      the same for groups
  --uid-map :NS:HOST:COUNT: run in a user namespace with these users; may be repeated
  --gid-map :NS:HOST:COUNT: the same for groups

The daemon itself:
  --sandbox KIND            namespace (default), chroot, none
  --seccomp ACTION          what a forbidden system call does: kill (default), log, trap, none
  --modcaps CHANGES         capabilities to keep or drop besides, such as +sys_admin:-chown
  --inode-file-handles USE  prefer (default), mandatory, never
  --rlimit-nofile N         open descriptors at most; 0 leaves the limit alone
  --thread-pool-size N      accepted; each guest has a thread in any case
  --log-level LEVEL         error, warn (default with DIR), info (with --shared-dir), debug, off
  --syslog                  log to syslog instead of stderr
  --print-capabilities      print what vhost-user.json describes
  --help                    show this

Also:
  --no-xattr                serve no extended attributes
  --dax SIZE|off            DAX window to offer: 2M to 64T in steps of 2M (default: 1G)
  --request-queues N        request queues of the device (default: 1)
  --poll-us N               longest look at a guest's queues before sleeping (default: 50)
  --once                    take one guest only, and exit when it has left
  --sandbox auto            namespace where the host lets us, else none
"""

#: What vhost-user's back-end conventions ask a device of type "fs" to print.
CAPABILITIES: Final = '{\n  "type": "fs",\n  "features": [\n    "separate-options"\n  ]\n}\n'

_LEVELS: Final = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
#: ``none`` is what ``vfsmount`` calls the mode that virtiofsd calls ``never``.
_CACHE_WORDS: Final = {mode.value: mode for mode in CacheMode} | {"none": CacheMode.NEVER}
_HANDLE_WORDS: Final = {use.value: use for use in HandleUse} | {"fallback": HandleUse.PREFER}
_SANDBOX_WORDS: Final = {kind.value: kind for kind in Sandbox}

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: One range of a Linux guest, and half of what a process of 47-bit addresses can map at all.
_WINDOW_STEP: Final = 2 << 20
_MAX_WINDOW: Final = 64 << 40

# fmt: off
_FLAGS: Final = frozenset((
    "allow-direct-io", "allow-mmap", "announce-submounts", "help", "killpriv-v2",
    "no-announce-submounts", "no-killpriv-v2", "no-readdirplus", "no-xattr", "once",
    "posix-acl", "preserve-noatime", "print-capabilities", "readonly", "security-label",
    "syslog", "writeback", "xattr",
))
_VALUES: Final = frozenset((
    "cache", "dax", "fd", "inode-file-handles", "log-level", "modcaps", "poll-us", "request-queues",
    "rlimit-nofile", "sandbox", "seccomp", "shared-dir", "socket", "socket-group", "socket-path",
    "tag", "thread-pool-size", "xattrmap",
))
#: May be given more than once.
_LISTS: Final = frozenset(("gid-map", "translate-gid", "translate-uid", "uid-map"))
# fmt: on
_SHORT: Final = {"-h": "--help", "-d": "--log-level=debug"}

#: Options of virtiofsd that cannot be had here, and what to do about it.
_NOT_HERE: Final = {
    "-o": "write its words as options of their own: -o cache=auto,xattr is --cache auto --xattr",
    "--version": "ask vfsmount --version",
    "-V": "ask vfsmount --version",
    "--migration-mode": "leave it out: a guest cannot be migrated with this daemon",
    "--migration-on-error": "leave it out: a guest cannot be migrated with this daemon",
    "--migration-verify-handles": "leave it out: a guest cannot be migrated with this daemon",
    "--migration-confirm-paths": "leave it out: a guest cannot be migrated with this daemon",
}


class Arguments(NamedTuple):
    """What the command line says.

    Attributes:
        directory: What to share.
        socket: Where to listen, or None with ``fd``.
        socket_group: Group whose members may connect, or None.
        fd: Inherited listening socket, or None.
        options: How to share.
        isolation: How to keep the daemon in.
        poll_us: See ``Server``.
        once: See ``Server``.
        nofile: Limit of open descriptors; 0 to leave it, None for what the host allows.
        log_level: One of ``logging``'s.
        syslog: Log there instead of stderr.
    """

    directory: str
    socket: str | None
    socket_group: str | None
    fd: int | None
    options: ShareOptions
    isolation: Isolation
    poll_us: int
    once: bool
    nofile: int | None
    log_level: int
    syslog: bool


class _Words(NamedTuple):
    """A command line sorted into flags, options with values, options with lists, and the rest."""

    flags: set[str]
    values: dict[str, str]
    lists: dict[str, list[str]]
    names: list[str]


def parse(
    argv: Sequence[str], inherited: Callable[[], int | None] = lambda: None
) -> Arguments | str:
    """Parse the arguments behind ``serve``; returns a text if that is all that is asked for.

    Args:
        argv: The arguments.
        inherited: Asked for a socket that systemd has passed, where no other is named.

    Raises:
        UsageError: They make no sense, or ask for what cannot be had.
    """
    words = _split(argv)
    if text := _text_asked_for(words.flags):
        return text
    directory, ported = _directory(words)
    socket, fd = _listener(words.values, inherited)
    _number(words.values, "thread-pool-size", 0, 1 << 16)  # a maximum, so any number is kept to
    level = _word(words.values, "log-level", _LEVELS, "info" if ported else "warning")
    nofile = "rlimit-nofile" in words.values
    return Arguments(
        directory=directory,
        socket=socket,
        socket_group=words.values.get("socket-group"),
        fd=fd,
        options=_options(words, ported),
        isolation=_isolation(words),
        poll_us=_number(words.values, "poll-us", 0, 1_000_000, DEFAULT_POLL_US),
        once="once" in words.flags,
        nofile=_number(words.values, "rlimit-nofile", 0, 1 << 30) if nofile else None,
        log_level=_LEVELS[level],
        syslog="syslog" in words.flags,
    )


def _text_asked_for(flags: set[str]) -> str:
    if "help" in flags:
        return USAGE
    if "print-capabilities" in flags:
        return CAPABILITIES
    return ""


def _split(argv: Sequence[str]) -> _Words:
    words = _Words(set(), {}, {}, [])
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            words.names.extend(rest)
        elif not argument.startswith("-") or argument == "-":
            words.names.append(argument)
        elif argument != "-f":  # to stay in the foreground, as ever
            _take_option(words, _SHORT.get(argument, argument), rest)
    return words


def _take_option(words: _Words, argument: str, rest: Iterator[str]) -> None:
    option, has_value, value = argument.removeprefix("--").partition("=")
    if option in _FLAGS and not has_value and argument.startswith("--"):
        words.flags.add(option)
    elif option in _VALUES and argument.startswith("--"):
        words.values[option] = value if has_value else _next(rest, argument)
    elif option in _LISTS and argument.startswith("--"):
        words.lists.setdefault(option, []).append(value if has_value else _next(rest, argument))
    else:
        name = argument[:2] if argument[1] != "-" else f"--{option}"
        cure = _NOT_HERE.get(name)
        if cure is None:
            raise UsageError(f"unknown option {argument}", "see vfsmount serve --help")
        raise UsageError(f"no {name} here", cure)


def _next(rest: Iterator[str], option: str) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{option} needs a value")
    return value


def _directory(words: _Words) -> tuple[str, bool]:
    """Return the directory, and whether it is spelled as for virtiofsd."""
    names = [*words.names]
    ported = "shared-dir" in words.values
    if ported:
        names.append(words.values["shared-dir"])
    if len(names) != 1:
        raise UsageError("expected one directory to share", "see vfsmount serve --help")
    return names[0], ported


def _listener(
    values: dict[str, str], inherited: Callable[[], int | None]
) -> tuple[str | None, int | None]:
    """Return the path or the descriptor to listen on."""
    paths = [values[name] for name in ("socket", "socket-path") if name in values]
    if len(paths) + ("fd" in values) > 1:
        raise UsageError("expected one of --socket and --fd")
    if paths:
        return paths[0], None
    if "fd" in values:
        return None, _number(values, "fd", 0, 1 << 20)
    fd = inherited()
    if fd is None:
        raise UsageError("expected one of --socket and --fd", "see vfsmount serve --help")
    return None, fd


def _options(words: _Words, ported: bool) -> ShareOptions:
    flags, values = words.flags, words.values
    tag = os.fsencode(values.get("tag", "vfsmount"))
    if not 1 <= len(tag) <= TAG_SIZE or b"\0" in tag:
        raise UsageError(f"--tag {values['tag']!r} is not 1 to {TAG_SIZE} bytes")
    for one, other in _OPPOSITES:
        if one in flags and other in flags:
            raise UsageError(f"--{one} and --{other} contradict each other")
    translation = _translation(words.lists)
    if "posix-acl" in flags and translation is not None:
        raise UsageError(
            "--posix-acl does not go with --translate-uid or --translate-gid",
            "numbers inside of lists are not translated",
        )
    return ShareOptions(
        cache=_CACHE_WORDS[_word(values, "cache", _CACHE_WORDS, "auto")],
        readonly="readonly" in flags,
        writeback="writeback" in flags,
        xattr=bool(flags & _NEEDING_XATTR) or not (ported or "no-xattr" in flags),
        posix_acl="posix-acl" in flags,
        security_label="security-label" in flags,
        tag=tag,
        request_queues=_number(values, "request-queues", 1, MAX_REQUEST_QUEUES, 1),
        dax=_window(values.get("dax", "1G")),
        xattrmap=_xattr_map(values),
        translation=translation,
        submounts="no-announce-submounts" not in flags,
        readdirplus="no-readdirplus" not in flags,
        direct_io="allow-direct-io" in flags,
        keep_noatime="preserve-noatime" in flags,
        allow_mmap="allow-mmap" in flags,
        killpriv="no-killpriv-v2" not in flags,
        handles=_HANDLE_WORDS[_word(values, "inode-file-handles", _HANDLE_WORDS, "prefer")],
    )


_NEEDING_XATTR: Final = {"xattr", "posix-acl", "security-label"}
_OPPOSITES: Final = (
    ("xattr", "no-xattr"),
    ("posix-acl", "no-xattr"),
    ("security-label", "no-xattr"),
    ("announce-submounts", "no-announce-submounts"),
    ("killpriv-v2", "no-killpriv-v2"),
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


def _xattr_map(values: dict[str, str]) -> XattrMap | None:
    if "xattrmap" not in values:
        return None
    from vfsmount.hostd.fs.xattrmap import parse_xattr_map  # rarely needed, at every start

    rules: XattrMap = _read(parse_xattr_map, "xattrmap", values["xattrmap"])
    return rules


def _translation(lists: dict[str, list[str]]) -> Translation | None:
    if "translate-uid" not in lists and "translate-gid" not in lists:
        return None
    from vfsmount.hostd.fs.idmap import Translation, parse_id_map

    uid, gid = (_read(parse_id_map, option, lists.get(option, [])) for option in _TRANSLATIONS)
    return Translation(uid, gid)


_TRANSLATIONS: Final = ("translate-uid", "translate-gid")


def _isolation(words: _Words) -> Isolation:
    values, lists = words.values, words.lists
    sandbox = _SANDBOX_WORDS[_word(values, "sandbox", _SANDBOX_WORDS, "namespace")]
    maps = {
        name: tuple(_read(parse_user_map, name, text) for text in lists.get(name, ()))
        for name in ("uid-map", "gid-map")
    }
    if any(maps.values()) and sandbox is not Sandbox.NAMESPACE:
        raise UsageError("--uid-map and --gid-map take --sandbox namespace")
    added, dropped = _read(parse_changes, "modcaps", values.get("modcaps", ""))
    return Isolation(
        sandbox=sandbox,
        seccomp=_word(values, "seccomp", ("kill", "log", "trap", "none"), "kill"),
        added=added,
        dropped=dropped,
        uid_map=maps["uid-map"],
        gid_map=maps["gid-map"],
    )


def _read(reader: Callable[[Any], Any], option: str, value: str | list[str]) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise UsageError(f"--{option}: {error}") from None


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
