"""The grammar of command lines, on a table of its own."""

from __future__ import annotations

import pytest

from vfsmount.client.mount.arguments import HELP, Group, Option, nearest, parse, render_help
from vfsmount.errors import UsageError

GROUPS = (
    Group(
        "Options",
        (
            Option("size", "how much", "N", int, short="s"),
            Option("quiet", "say nothing", short="q"),
            Option("cache", "keep things", negatable=True),
            Option("o", "a list", "LIST", repeatable=True),
            Option("a-very-long-option-name", "first line\nsecond line", "VALUE"),
            HELP,
        ),
    ),
)


@pytest.mark.parametrize(
    ("words", "values", "operands"),
    [
        ([], {}, []),
        (["a", "b"], {}, ["a", "b"]),
        (["--size", "3", "a"], {"size": 3}, ["a"]),
        (["a", "--size=3"], {"size": 3}, ["a"]),
        (["-s3"], {"size": 3}, []),
        (["-s", "3"], {"size": 3}, []),
        (["-qs3"], {"quiet": True, "size": 3}, []),
        (["--size", "3", "--size", "4"], {"size": 4}, []),
        (["--size", "-3"], {"size": -3}, []),
        (["-o", "a", "-ob"], {"o": ["a", "b"]}, []),
        (["--cache"], {"cache": True}, []),
        (["--no-cache"], {"cache": False}, []),
        (["--cache", "--no-cache"], {"cache": False}, []),
        (["--", "--size", "-q"], {}, ["--size", "-q"]),
        (["a", "--", "b"], {}, ["a", "b"]),
        (["-"], {}, ["-"]),
        ([""], {}, [""]),
        (["-h"], {"help": True}, []),
    ],
)
def test_words_become_values_and_operands(
    words: list[str], values: dict[str, object], operands: list[str]
) -> None:
    assert parse(words, GROUPS, "tool") == (values, operands)


@pytest.mark.parametrize(
    ("words", "message", "cure"),
    [
        (["--sise", "3"], "unknown option --sise", "did you mean --size?"),
        (["--sise=3"], "unknown option --sise", "did you mean --size?"),
        (["--zzzzzzzzz"], "unknown option --zzzzzzzzz", "'tool --help' lists them all"),
        (["-x"], "unknown option -x", "'tool --help' lists them all"),
        (["-quiet"], "unknown option -quiet", "did you mean --quiet?"),
        (["--no-size"], "unknown option --no-size", "did you mean --size?"),
        (["--size"], "--size needs a value", "write --size N"),
        (["-s"], "-s needs a value", "write -s N"),
        (["-o"], "-o needs a value", "write -o LIST"),
        (["--quiet=yes"], "--quiet takes no value", ""),
        (["--si", "3"], "unknown option --si", "did you mean --size?"),
    ],
)
def test_mistakes_name_the_nearest(words: list[str], message: str, cure: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words, GROUPS, "tool")
    assert (str(caught.value), caught.value.cure) == (message, cure)


def test_value_that_does_not_convert() -> None:
    def never(text: str) -> int:
        raise ValueError("is not a number")

    groups = (Group("", (Option("size", "", "N", never),)),)
    with pytest.raises(UsageError, match="--size: 'x' is not a number"):
        parse(["--size", "x"], groups, "tool")


def test_nearest_is_empty_when_nothing_is_near() -> None:
    assert nearest("cahce", ["cache", "size"]) == "cache"
    assert nearest("qqq", ["cache", "size"]) == ""


def test_help_shows_every_option_aligned() -> None:
    text = render_help(("tool A", "tool B"), "About.\n", GROUPS, "\nAfter.\n")
    assert text == (
        "Usage: tool A\n"
        "       tool B\n"
        "\n"
        "About.\n"
        "\n"
        "Options:\n"
        "  -s, --size N            how much\n"
        "  -q, --quiet             say nothing\n"
        "  --[no-]cache            keep things\n"
        "  -o LIST                 a list\n"
        "  --a-very-long-option-name VALUE\n"
        "                          first line\n"
        "                          second line\n"
        "  -h, --help              show this text and leave\n"
        "\n"
        "After.\n"
    )
