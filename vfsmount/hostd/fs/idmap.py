"""Translating users and groups between guest and host (``--translate-uid``, ``--translate-gid``).

Pure tables of ranges. The two directions are independent: what a guest's number becomes on the host
says nothing about the way back, except for ``map``, which is both. A number in no range stays as it
is. The grammar is virtiofsd's:

    guest:GUEST:HOST:COUNT           a range of guest numbers, one to one
    host:HOST:GUEST:COUNT            a range of host numbers, one to one
    map:GUEST:HOST:COUNT             both of these
    squash-guest:GUEST:HOST:COUNT    a range of guest numbers to a single one of the host
    squash-host:HOST:GUEST:COUNT     a range of host numbers to a single one of the guest
    forbid-guest:GUEST:COUNT         a guest may not use these: EPERM
"""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["IdMap", "Translation", "parse_id_map"]

#: Exclusive end of all numbers: the last one means "none" to system calls.
_END: Final = 0xFFFFFFFF


class _Range(NamedTuple):
    """``target`` is what ``start`` becomes; None forbids."""

    start: int
    length: int
    target: int | None
    squash: bool

    def translate(self, number: int) -> int | None:
        if self.target is None or self.squash:
            return self.target
        return self.target + number - self.start


class IdMap:
    """Both directions for one kind of number.

    Args:
        to_host: Ranges of guest numbers.
        to_guest: Ranges of host numbers.
    """

    __slots__ = ("_to_guest", "_to_host")

    def __init__(self, to_host: Sequence[_Range] = (), to_guest: Sequence[_Range] = ()) -> None:
        self._to_host = tuple(to_host)
        self._to_guest = tuple(to_guest)

    def to_host(self, number: int) -> int:
        """Return the host's number of a guest's.

        Raises:
            OSError: EPERM: forbidden.
        """
        found = _look_up(self._to_host, number)
        if found is None:
            raise OSError(errno.EPERM, "a forbidden user or group")
        return found

    def may_use(self, number: int) -> bool:
        """Whether a guest's number is not forbidden."""
        return _look_up(self._to_host, number) is not None

    def to_guest(self, number: int) -> int:
        """Return the guest's number of a host's."""
        found = _look_up(self._to_guest, number)
        assert found is not None  # only guests are forbidden anything
        return found


class Translation(NamedTuple):
    """Users and groups."""

    uid: IdMap
    gid: IdMap


def _look_up(ranges: tuple[_Range, ...], number: int) -> int | None:
    for entry in ranges:
        if 0 <= number - entry.start < entry.length:
            return entry.translate(number)
    return number


def parse_id_map(rules: Sequence[str]) -> IdMap:
    """Read the values of all ``--translate-uid`` or ``--translate-gid`` options.

    Raises:
        ValueError: A rule that is none, numbers that are none, or ranges that overlap.
    """
    to_host: list[_Range] = []
    to_guest: list[_Range] = []
    for rule in rules:
        kind, *fields = rule.split(":")
        if kind not in _KINDS:
            raise ValueError(f"{rule!r} begins with none of {', '.join(_KINDS)}")
        names = ("base", "count") if kind == "forbid-guest" else ("base", "target", "count")
        if len(fields) != len(names):
            raise ValueError(f"{rule!r} is not {':'.join((kind, *map(str.upper, names)))}")
        start, *target, count = map(_number, fields)
        entry = _Range(start, count, target[0] if target else None, kind.startswith("squash"))
        _check(rule, entry)
        if kind in ("host", "squash-host"):
            to_guest.append(entry)
        else:
            to_host.append(entry)
        if kind == "map":
            to_guest.append(_Range(target[0], count, start, squash=False))
    for ranges in (to_host, to_guest):
        _check_disjoint(ranges)
    return IdMap(to_host, to_guest)


_KINDS: Final = ("guest", "host", "squash-guest", "squash-host", "forbid-guest", "map")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        raise ValueError(f"{text!r} is no user or group number")
    return int(text)


def _check(rule: str, entry: _Range) -> None:
    last = 0 if entry.target is None else entry.target + (0 if entry.squash else entry.length - 1)
    if not entry.length or max(entry.start + entry.length, last + 1) > _END:
        raise ValueError(f"{rule!r} leaves the numbers 0 to {_END - 1}")


def _check_disjoint(ranges: list[_Range]) -> None:
    ordered = sorted(ranges, key=lambda entry: entry.start)
    for one, two in pairwise(ordered):
        if one.start + one.length > two.start:
            raise ValueError(f"two ranges overlap at {two.start}")
