r"""What a mount command asks for: the option table of ``vfsmount MNT`` and its pure reading.

Three ways lead to the same ``MountSettings``:

    vfsmount MNT --socket PATH --cache none          the command
    vfsmount MNT -o socket=PATH,cache=none,nosuid    everything in one list
    vfsmount PATH MNT -o cache=none,_netdev          as mount(8) and fstab call a helper

* In an ``-o`` list every long option may stand without its dashes, ``-`` and ``_`` alike; a comma
  inside a value is written ``\,``. What is given outside the list wins over the list.
* Words that only mean something to mount(8) or to the boot process are ignored; words that mean
  something to the kernel go to libfuse; anything else is refused, naming the nearest.
* In the third form the command goes to the background once the mount is ready, because mount(8)
  waits for its helper to end.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vfsmount.client.mount.arguments import HELP, Group, Option, nearest, parse, store
from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "CACHE_MODES",
    "ENGINES",
    "LOG_LEVELS",
    "MOUNT_GROUPS",
    "MountSettings",
    "cpu_list",
    "one_of",
    "parse_mount",
    "seconds",
    "split_options",
]

CACHE_MODES = ("none", "auto", "always", "host")
ENGINES = ("auto", "relay", "pyfuse3")
LOG_LEVELS = ("error", "warning", "info", "debug")
MAX_QUEUE_SIZE = 32768
"""Entries; the split ring's own limit (virtio 1.3, "Split Virtqueues")."""
MAX_POLL_US = 10_000
"""Microseconds; beyond a reschedule's cost polling can only burn the CPU."""
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
"""log2 of bytes."""
WINDOW_STEP = 2 << 20
"""Bytes of one range of the DAX window."""
DEFAULT_WINDOW = 1 << 30
"""Bytes; addresses only, nothing is held by a window."""
MAX_WINDOW = 64 << 40
"""Bytes; the bundled daemon offers no more."""
DEFAULT_CACHE = 64 << 20
"""Bytes of pages that are kept here."""

# fmt: off
KERNEL_FLAGS = frozenset((
    "ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec",
    "sync", "async", "dirsync", "atime", "noatime",
))
"""Words that libfuse 3.10 and later turn into flags of mount(2)."""
IGNORED = frozenset((
    "_netdev", "nofail", "auto", "noauto", "user", "nouser", "users", "owner", "group", "defaults",
    "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "lazytime", "nolazytime",
    "nonempty", "default_permissions",
))
"""Words for mount(8), fstab and old FUSE, or what is on anyway; without effect on the mount."""
# fmt: on


def seconds(text: str) -> float:
    """Convert a duration in seconds; fractions are allowed.

    Raises:
        ValueError: Not a finite number of 0 or more.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("is not a number of seconds (0 or more, fractions allowed)")
    return value


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a converter that accepts exactly these words."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return text

    return convert


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a converter for whole numbers from ``low`` to ``high``, both included."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:12]) <= high):
            raise ValueError(f"is not a whole number from {low} to {high}")
        return int(text)

    return convert


def queue_size(text: str) -> int:
    """Convert a number of ring entries: a power of two, as the split ring demands.

    Raises:
        ValueError: Not a power of two from 4 to 32768.
    """
    value = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 0
    if not 4 <= value <= MAX_QUEUE_SIZE or value & (value - 1):
        raise ValueError(f"is not a power of two from 4 to {MAX_QUEUE_SIZE}")
    return value


def cpu_list(text: str) -> frozenset[int]:
    """Convert a CPU list as taskset(1) writes it: ``0,2-3``.

    Raises:
        ValueError: Not such a list, or a range that runs backwards.
    """
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        last = int(match[2] or match[1]) if match else -1
        if match is None or last < int(match[1]):
            raise ValueError("is not a list of CPUs such as 0 or 0,2-3")
        cpus.update(range(int(match[1]), last + 1))
    return frozenset(cpus)


def window_size(text: str) -> int:
    """Convert the size of the DAX window; ``off`` is 0.

    Raises:
        ValueError: Neither off nor a multiple of 2 MiB.
    """
    if text == "off":
        return 0
    match = re.fullmatch(r"([0-9]{1,9})([KMGT]?)", text.upper())
    size = int(match[1]) << UNITS[match[2]] if match else 0
    if not 0 < size <= MAX_WINDOW or size % WINDOW_STEP:
        raise ValueError("is neither off nor a size from 2M to 64T in steps of 2M, such as 512M")
    return size


def byte_size(text: str) -> int:
    """Convert a number of bytes, with K, M, G or T behind it or not.

    Raises:
        ValueError: Not such a size.
    """
    match = re.fullmatch(r"([0-9]{1,9})([KMGT]?)", text.upper())
    if match is None:
        raise ValueError("is not a size such as 64M")
    return int(match[1]) << UNITS[match[2]]


def path(text: str) -> str:
    """Accept a non-empty path.

    Raises:
        ValueError: Empty, or holding a NUL byte, which no system call could take.
    """
    if not text or "\0" in text:
        raise ValueError("is not a path")
    return text


MOUNT_GROUPS = (
    Group(
        "What to mount (exactly one of the two)",
        (
            Option("socket", "vhost-user socket of a running host daemon", "PATH", path),
            Option("source", "a directory; its daemon starts and ends with the mount", "DIR", path),
        ),
    ),
    Group(
        "Freshness",
        (
            Option(
                "cache",
                "none: always ask the host\n"
                "auto: names and attributes for --timeout, data while unchanged (default)\n"
                "always: never ask twice\n"
                "host: as long as the daemon says",
                "MODE",
                one_of(CACHE_MODES),
            ),
            Option("timeout", "how long 'auto' trusts an answer (default 1)", "SEC", seconds),
            Option("attr-timeout", "the same for attributes alone, in any mode", "SEC", seconds),
            Option("entry-timeout", "for names", "SEC", seconds),
            Option("negative-timeout", "for names that do not exist", "SEC", seconds),
            Option("dir-timeout", "for listings of directories", "SEC", seconds),
            Option(
                "cache-size",
                "file contents that the pyfuse3 engine may keep, where the kernel may not\n"
                "read far ahead; 0: none (default 64M)",
                "SIZE",
                byte_size,
            ),
            Option("writeback", "gather writes here until close or fsync", negatable=True),
            Option(
                "dax",
                "map that much of the host's files where the daemon can, instead of a\n"
                "message per access: every file (default: 1G, for files from 512 KiB up)",
                "SIZE|off",
                window_size,
            ),
        ),
    ),
    Group(
        "Mount",
        (
            Option("readonly", "the same as -o ro"),
            Option(
                "o",
                "comma separated list, as mount(8): ro rw nosuid suid nodev dev noexec\n"
                "exec noatime sync dirsync allow_other fsname=NAME subtype=NAME, and any\n"
                "long option here without its dashes (cache=none). Options that only\n"
                "concern fstab (_netdev nofail noauto user x-*) are ignored.",
                "LIST",
                repeatable=True,
            ),
        ),
    ),
    Group(
        "Process",
        (
            Option("foreground", "stay in the foreground (default)", short="f"),
            Option("daemonize", "return as soon as the mount can be used; exit status tells"),
            Option("pid-file", "write the serving process's id there while mounted", "PATH", path),
            Option(
                "ready-fd",
                "write READY and a newline to this descriptor when mounted",
                "N",
                integer(0, 1 << 20),
            ),
            Option(
                "engine",
                "relay: hand the kernel's requests on as they are; pyfuse3: decode\n"
                "them here; auto: relay where it can run (default)",
                "NAME",
                one_of(ENGINES),
            ),
            Option("cpus", "run on these CPUs only, daemon of --source included", "LIST", cpu_list),
            Option(
                "log-level",
                "error, warning, info (default) or debug",
                "LEVEL",
                one_of(LOG_LEVELS),
            ),
            Option(
                "log-file",
                "append the log there (default: stderr, or syslog when\ndaemonized)",
                "PATH",
                path,
            ),
            Option("debug", "as -f --log-level debug: shows each message to the daemon", short="d"),
        ),
    ),
    Group(
        "Channel to the daemon",
        (
            Option(
                "request-timeout",
                "give up on a request after SEC with ETIMEDOUT (default 0: never)",
                "SEC",
                seconds,
            ),
            Option("shm-file", "keep the shared memory in this file, not in a memfd", "PATH", path),
            Option(
                "queue-size",
                "entries per virtqueue, a power of two (default 1024)",
                "N",
                queue_size,
            ),
            Option(
                "poll-us",
                "look for a reply that long before sleeping (default 50)",
                "N",
                integer(0, MAX_POLL_US),
            ),
        ),
    ),
    Group("Help", (HELP, Option("version", "show the version and leave", short="V"))),
)

TIMES = ("attr-timeout", "entry-timeout", "negative-timeout", "dir-timeout")
"""What overrides the mode's own times."""
NOT_IN_LISTS = frozenset(("o", "help", "version"))


@dataclass(frozen=True, slots=True)
class MountSettings:
    """One mount as asked for, checked as far as words alone can be.

    Paths are absolute, because the process may change its working directory. Durations are in
    seconds. ``kernel_flags`` hold at most one word of each pair such as ro and rw. Exactly one of
    ``socket`` and ``source`` is set.
    """

    mountpoint: str
    socket: str | None
    source: str | None
    cache: str = "auto"
    timeout: float = 1.0
    attr_timeout: float | None = None
    entry_timeout: float | None = None
    negative_timeout: float | None = None
    dir_timeout: float | None = None
    cache_size: int = DEFAULT_CACHE
    writeback: bool = False
    kernel_flags: tuple[str, ...] = ()
    allow_other: bool = False
    fsname: str | None = None
    subtype: str = "vfsmount"
    daemonize: bool = False
    pid_file: str | None = None
    ready_fd: int | None = None
    engine: str = "auto"
    cpus: frozenset[int] | None = None
    log_level: str = "info"
    log_file: str | None = None
    request_timeout: float = 0.0
    shm_file: str | None = None
    queue_size: int | None = None
    poll_us: int | None = None
    dax: int | None = None

    @property
    def origin(self) -> str:
        """What is mounted, for messages and for the mount table."""
        return self.socket or self.source or ""

    @property
    def window(self) -> int:
        """Bytes of the DAX window; 0 for none."""
        return DEFAULT_WINDOW if self.dax is None else self.dax

    @property
    def readonly(self) -> bool:
        """Whether nothing may be changed through this mount."""
        return "ro" in self.kernel_flags

    def libfuse_options(self, *, as_root: bool) -> list[str]:
        """Return the ``-o`` words for libfuse.

        Permissions are always checked by the kernel (default_permissions), as on a guest. Root lets
        everybody enter, as a mounted file system does; others need allow_other, which
        /etc/fuse.conf must permit.
        """
        options = [f"fsname={_escape(self.fsname or self.origin)}", f"subtype={self.subtype}"]
        options += ["default_permissions", *self.kernel_flags]
        return options + ["allow_other"] * (as_root or self.allow_other)


def parse_mount(
    argv: Sequence[str], is_directory: Callable[[str], bool] = os.path.isdir
) -> MountSettings:
    """Read the words of a mount command.

    Args:
        argv: Everything after the program's name.
        is_directory: Tells what the first word of ``vfsmount PATH MNT`` is.

    Raises:
        UsageError: Anything that cannot be, with the nearest thing that can.
    """
    given, operands = parse(argv, MOUNT_GROUPS, "vfsmount")
    values: dict[str, Any] = {"flags": {}}
    for word in (word for text in given.pop("o", []) for word in split_options(text)):
        _apply_list_word(values, word)
    values |= given
    as_helper = len(operands) == 2
    if as_helper:
        _take_origin(values, operands[0], is_directory)
    elif len(operands) != 1:
        raise _operand_error(operands)
    _check_combinations(values)
    return _settings(values, operands[-1], as_helper)


def _take_origin(values: dict[str, Any], origin: str, is_directory: Callable[[str], bool]) -> None:
    # In fstab the first field may be any name when the list says socket= or source=.
    if not (values.get("socket") or values.get("source")):
        values["source" if is_directory(origin) else "socket"] = origin
    else:
        values.setdefault("fsname", origin)


def _operand_error(operands: Sequence[str]) -> UsageError:
    cure = "write vfsmount MNT --socket PATH, or vfsmount MNT --source DIR"
    if not operands:
        return UsageError("the mount point is missing", cure)
    return UsageError(f"too many words: {' '.join(operands[2:])}", cure)


def _check_combinations(values: dict[str, Any]) -> None:
    socket, source = values.get("socket"), values.get("source")
    if socket and source:
        raise UsageError("--socket and --source exclude each other", "give exactly one of them")
    if not socket and not source:
        cure = "give --socket PATH of a running daemon, or --source DIR to share a directory"
        raise UsageError("neither --socket nor --source is given", cure)
    if values.get("cache") == "host" and (given := [name for name in TIMES if name in values]):
        cure = "leave it out, or choose another mode"
        raise UsageError(f"--cache host has the daemon's times, not --{given[0]}", cure)
    if values.get("daemonize") and (values.get("foreground") or values.get("debug")):
        raise UsageError("--daemonize and --foreground (or -d) exclude each other")


def _settings(values: dict[str, Any], mountpoint: str, as_helper: bool) -> MountSettings:
    def absolute(name: str) -> str | None:
        return os.path.abspath(values[name]) if name in values else None

    flags: dict[str, str] = values["flags"]
    if values.get("readonly"):
        flags["ro"] = "ro"
    stay = values.get("foreground") or values.get("debug")
    # fmt: off
    plain = (
        "cache", "timeout", "writeback", "allow_other", "fsname", "subtype", "ready-fd",
        "cache-size", "cpus", "dax", "engine", "log-level", "request-timeout", "queue-size",
        "poll-us", *TIMES,
    )
    # fmt: on
    if values.get("debug"):
        values["log-level"] = "debug"
    return MountSettings(
        mountpoint=os.path.abspath(_operand_path(mountpoint)),
        socket=absolute("socket"),
        source=absolute("source"),
        kernel_flags=tuple(flags.values()),
        daemonize=bool(values.get("daemonize", as_helper and not stay)),
        pid_file=absolute("pid-file"),
        log_file=absolute("log-file"),
        shm_file=absolute("shm-file"),
        **{name.replace("-", "_"): values[name] for name in plain if name in values},
    )


def _operand_path(text: str) -> str:
    try:
        return path(text)
    except ValueError as error:
        raise UsageError(f"mount point: {text!r} {error}") from None


# --- the -o list ---


def split_options(text: str) -> Iterator[str]:
    """Split a mount(8) option list at its commas; a backslash keeps the next character as it is."""
    word = ""
    characters = iter(text)
    for character in characters:
        if character == ",":
            if word:
                yield word
            word = ""
        else:
            word += next(characters, "") if character == "\\" else character
    if word:
        yield word


def _apply_list_word(values: dict[str, Any], word: str) -> None:
    name, equals, value = word.partition("=")
    options = _list_options()
    option = options.get(name.replace("_", "-"))
    if not equals and name in KERNEL_FLAGS:
        family = "ro" if name in ("ro", "rw") else name.removeprefix("no")
        values["flags"][family] = name
    elif name in IGNORED or name.startswith(("x-", "X-")) or (equals and name == "comment"):
        return
    elif not equals and name == "allow_other":
        values["allow_other"] = True
    elif equals and name in ("fsname", "subtype"):
        values[name] = _label(name, value)
    elif option is not None:
        _apply_long_option(values, option, name, equals, value)
    elif name == "remount":
        cure = "unmount it, and mount it with the new options"
        raise UsageError("what is mounted cannot be changed (remount)", cure)
    else:
        raise _unknown_word(word, name, options)


def _apply_long_option(
    values: dict[str, Any], option: Option, name: str, equals: str, value: str
) -> None:
    spelled = f"-o {name}"
    if not option.metavar:
        if equals:
            raise UsageError(f"{spelled} takes no value")
        values[option.name] = not (option.negatable and name.startswith("no"))
    elif not equals:
        raise UsageError(f"{spelled} needs a value", f"write {spelled}={option.metavar}")
    else:
        store(values, option, spelled, value)


def _list_options() -> dict[str, Option]:
    named: dict[str, Option] = {}
    for option in (option for group in MOUNT_GROUPS for option in group.options):
        if option.name not in NOT_IN_LISTS:
            named[option.name] = option
            if option.negatable:
                named["no-" + option.name] = named["no" + option.name] = option
    return named


def _unknown_word(word: str, name: str, options: dict[str, Option]) -> UsageError:
    known = {*KERNEL_FLAGS, *IGNORED, *options, "allow_other", "fsname", "subtype"}
    near = nearest(name, sorted(known))
    cure = f"did you mean {near}?" if near else "'vfsmount --help' lists them"
    return UsageError(f"unknown mount option {word!r}", cure)


def _label(name: str, value: str) -> str:
    # The mount table is lines of words for everybody to read; pyfuse3 encodes options as ASCII.
    if not value or not value.isascii() or not value.isprintable():
        raise UsageError(f"-o {name}: {value!r} is not printable ASCII text")
    return value


def _escape(text: str) -> str:
    # libfuse splits at commas and takes backslash as escape, like split_options above. A path that
    # is not ASCII is shown with question marks: pyfuse3 cannot pass it on.
    shown = text.encode("ascii", "replace").decode("ascii")
    return re.sub(r"([\\,])", r"\\\1", re.sub(r"[^ -~]", "?", shown))
