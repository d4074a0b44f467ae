"""Translating names of extended attributes between guest and host (``--xattrmap``).

Rules are tried in order and the first that matches decides; the grammar is virtiofsd's
(doc/xattr-mapping.md there). A rule is ``:TYPE:SCOPE:KEY:PREPEND:``, where any character may stand
for the colon, and white space may stand between rules:

* SCOPE ``client`` looks for KEY at the start of a guest's name, ``server`` for PREPEND at the start
  of a host's, ``all`` does both; an empty text matches every name.
* TYPE ``prefix`` puts PREPEND before a guest's name and takes it off a host's; ``ok`` leaves names
  as they are; ``bad`` refuses a guest's with EPERM and hides a host's; ``unsupported`` is the same
  with EOPNOTSUPP.
* ``:map:KEY:PREPEND:``, the last rule, prefixes what begins with KEY and bars all ways around that.

Some rule must match every name, in each direction.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["XattrMap", "parse_xattr_map"]

_TYPES: Final = ("prefix", "ok", "bad", "unsupported")
_SCOPES: Final = ("client", "server", "all")
_CAPABILITY: Final = b"security.capability"


class _Rule(NamedTuple):
    kind: str
    scope: str
    key: bytes
    prepend: bytes


class XattrMap:
    """The rules of a share.

    Attributes:
        capability: The host's name of a guest's ``security.capability``, where it has another one:
            then the host's kernel does not remove it when a file changes.
    """

    __slots__ = ("_client", "_server", "capability")

    def __init__(self, rules: Sequence[_Rule]) -> None:
        self._client = [rule for rule in rules if rule.scope != "server"]
        self._server = [rule for rule in rules if rule.scope != "client"]
        self.capability: bytes | None = None
        try:
            name = self.to_host(_CAPABILITY)
        except OSError:
            return
        if name != _CAPABILITY:
            self.capability = name

    def to_host(self, name: bytes) -> bytes:
        """Return the host's name of a guest's attribute.

        Raises:
            OSError: EPERM, EOPNOTSUPP: the guest may not use it.
        """
        for kind, _, key, prepend in self._client:
            if name.startswith(key):
                if kind == "unsupported":
                    raise OSError(errno.EOPNOTSUPP, "attribute is not supported")
                if kind == "bad":
                    break
                return prepend + name if kind == "prefix" else name
        raise OSError(errno.EPERM, "attribute is barred")

    def to_guest(self, name: bytes) -> bytes | None:
        """Return the guest's name of a host's attribute; None where it is hidden."""
        for kind, _, _, prepend in self._server:
            if name.startswith(prepend):
                if kind == "prefix":
                    # What is nothing but the prefix has no name left.
                    return name[len(prepend) :] or None
                return name if kind == "ok" else None
        return None


def parse_xattr_map(text: str) -> XattrMap:
    """Read the value of ``--xattrmap``.

    Raises:
        ValueError: It is no list of rules, or leaves names to none of them.
    """
    rules: list[_Rule] = []
    rest = text.lstrip()
    while rest:
        separator = rest[0]
        kind, fields, rest = _split(rest, separator)
        if kind == "map":
            rules += _map_rules(*map(os.fsencode, fields))
            if rest:
                raise ValueError("a rule follows the map rule, which must be the last")
        else:
            scope, key, prepend = fields
            if scope not in _SCOPES:
                raise ValueError(f"{scope!r} is none of {', '.join(_SCOPES)}")
            rules.append(_Rule(kind, scope, os.fsencode(key), os.fsencode(prepend)))
    for scope, texts in (
        ("client", [rule.key for rule in rules if rule.scope != "server"]),
        ("server", [rule.prepend for rule in rules if rule.scope != "client"]),
    ):
        if b"" not in texts:
            raise ValueError(f"no rule for all other {scope} names: end with :ok:all:::")
    return XattrMap(rules)


def _split(text: str, separator: str) -> tuple[str, list[str], str]:
    """Take the first rule off; returns its type, its other fields, and what follows it."""
    kind, _, rest = text[1:].partition(separator)
    if kind != "map" and kind not in _TYPES:
        raise ValueError(f"{kind!r} is none of map, {', '.join(_TYPES)}")
    fields = []
    for _ in range(2 if kind == "map" else 3):
        field, found, rest = rest.partition(separator)
        if not found:
            raise ValueError(f"rule {text!r} ends too early: each field ends with {separator!r}")
        fields.append(field)
    return kind, fields, rest.lstrip()


def _map_rules(key: bytes, prepend: bytes) -> list[_Rule]:
    first = _Rule("prefix", "all", key, prepend)
    if not key:
        return [first, _Rule("bad", "all", b"", b"")]
    return [
        first,
        _Rule("bad", "server", b"", key),
        _Rule("bad", "client", prepend, b""),
        _Rule("ok", "all", b"", b""),
    ]
