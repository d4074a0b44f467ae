"""Command line grammar: which words are options, what their values are, and the help that says so.

Every command is a table of ``Group``s of ``Option``s. The parser, the help text and the option list
of mount(8) (``-o``) are made from that one table, so they cannot drift apart.

* Options and operands may be mixed; ``--`` ends the options; one-letter switches may be joined.
* Long options are not abbreviated: a script written today must mean the same when more exist.
* Every mistake raises ``UsageError`` and names the nearest thing that would have been right.

No I/O here and nothing of the FUSE world. argparse was not used: it cannot share its table with
``-o`` lists, and it takes longer to import than ``vfsmount --help`` takes to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "HELP",
    "Arguments",
    "Group",
    "Option",
    "nearest",
    "parse",
    "render_help",
    "store",
]

HELP_COLUMN = 26
"""Column at which explanations start; a longer option gets a line of its own."""


class Option(NamedTuple):
    """One option of one command.

    Attributes:
        name: Long name without dashes.
        help: One or more lines for the reader.
        metavar: What the value stands for; empty for a switch.
        convert: Text to value; raises ValueError whose text completes "'X' ...".
        short: One letter, or empty.
        negatable: Whether ``--no-NAME`` turns the switch off.
        repeatable: Whether values gather in a list instead of the last one winning.
    """

    name: str
    help: str
    metavar: str = ""
    convert: Callable[[str], Any] = str
    short: str = ""
    negatable: bool = False
    repeatable: bool = False

    @property
    def spelling(self) -> str:
        """How help shows it: ``-d, --debug`` or ``--timeout SEC``."""
        dashed = f"--[no-]{self.name}" if self.negatable else f"--{self.name}"
        if len(self.name) == 1:
            dashed = f"-{self.name}"
        return f"{f'-{self.short}, ' if self.short else ''}{dashed} {self.metavar}".rstrip()


class Group(NamedTuple):
    """Options that help shows under one heading."""

    title: str
    options: tuple[Option, ...]


class Arguments(NamedTuple):
    """What a command line says: given options by name, and the words that are no options."""

    values: dict[str, Any]
    operands: list[str]


HELP = Option("help", "show this text and leave", short="h")


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Return the known word most like ``word``, or ``""`` when none is ``alike`` (1: the same)."""
    # Imported late: only mistakes need it, and it costs 3 ms.
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(known), n=1, cutoff=alike)), "")


def parse(argv: Sequence[str], groups: Sequence[Group], command: str) -> Arguments:
    """Read one command line.

    Args:
        argv: The words after the command's name.
        groups: The command's option table.
        command: Name for the advice in errors, e.g. ``"vfsmount status"``.

    Raises:
        UsageError: An unknown option, a missing or superfluous value, or a value that cannot be.
    """
    names = _by_spelling(groups)
    found = Arguments({}, [])
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if word == "--":
            found.operands.extend(reversed(words))
            break
        if word.startswith("--"):
            _long_option(word, words, names, found, command)
        elif word.startswith("-") and word != "-":
            _short_options(word, words, names, found, command)
        else:
            found.operands.append(word)
    return found


def _by_spelling(groups: Sequence[Group]) -> dict[str, Option]:
    names: dict[str, Option] = {}
    for option in (option for group in groups for option in group.options):
        dashes = "-" if len(option.name) == 1 else "--"
        names[dashes + option.name] = option
        if option.short:
            names["-" + option.short] = option
        if option.negatable:
            names["--no-" + option.name] = option
    return names


def _unknown(word: str, names: Iterable[str], command: str) -> UsageError:
    near = nearest(word, names)
    cure = f"did you mean {near}?" if near else f"'{command} --help' lists them all"
    return UsageError(f"unknown option {word}", cure)


def _long_option(
    word: str, words: list[str], names: dict[str, Option], found: Arguments, command: str
) -> None:
    spelled, equals, value = word.partition("=")
    option = names.get(spelled)
    if option is None:
        raise _unknown(spelled, names, command)
    if not option.metavar:
        if equals:
            raise UsageError(f"{spelled} takes no value")
        found.values[option.name] = not spelled.startswith("--no-") or not option.negatable
        return
    if not equals:
        value = _next_value(spelled, option, words)
    store(found.values, option, spelled, value)


def _short_options(
    word: str, words: list[str], names: dict[str, Option], found: Arguments, command: str
) -> None:
    letters = word[1:]
    while letters:
        spelled, letters = "-" + letters[0], letters[1:]
        option = names.get(spelled)
        if option is None:
            raise _unknown(word if len(word) > 2 else spelled, names, command)
        if option.metavar:
            value = letters or _next_value(spelled, option, words)
            store(found.values, option, spelled, value)
            return
        found.values[option.name] = True


def _next_value(spelled: str, option: Option, words: list[str]) -> str:
    if not words:
        raise UsageError(f"{spelled} needs a value", f"write {spelled} {option.metavar}")
    return words.pop()


def store(values: dict[str, Any], option: Option, spelled: str, text: str) -> None:
    """Convert ``text`` and file it under the option's name.

    Raises:
        UsageError: ``text`` is not a value of this option; names option, text and what is wanted.
    """
    try:
        value = option.convert(text)
    except ValueError as error:
        raise UsageError(f"{spelled}: {text!r} {error}") from None
    if option.repeatable:
        values.setdefault(option.name, []).append(value)
    else:
        values[option.name] = value


def render_help(usage: Sequence[str], intro: str, groups: Sequence[Group], after: str = "") -> str:
    """Return the help text of one command, ending in a newline."""
    lines = [f"{'Usage:' if index == 0 else '      '} {line}" for index, line in enumerate(usage)]
    lines += ["", *intro.strip().splitlines()]
    for group in groups:
        lines += ["", f"{group.title}:"]
        for option in group.options:
            lines += _help_lines(option)
    if after:
        lines += ["", *after.strip("\n").splitlines()]
    return "\n".join(lines) + "\n"


def _help_lines(option: Option) -> list[str]:
    head = f"  {option.spelling}"
    first, *rest = option.help.splitlines()
    indent = " " * HELP_COLUMN
    start = [f"{head:<{HELP_COLUMN}}{first}"]
    if len(head) > HELP_COLUMN - 2:
        start = [head, indent + first]
    return start + [indent + line for line in rest]
