"""Who lists directories and looks at nothing in them, like find(1): names are enough for those.

The kernel begins each listing with READDIRPLUS, whoever lists. An entry with attributes takes Rust
virtiofsd 13 us, a name alone 0.5 to 1. What a *walker* (a thread that lists) does with entries is
told by two things:

* A *sentinel*: one file of a listing, whose attributes the kernel gets without validity. When
  somebody looks at it, the kernel asks for them (GETATTR). After ``_UNSEEN`` listings in a row of
  which nobody has, the walker is given names alone.
* LOOKUPs in a directory of which it was given names alone: what the kernel would have known.

A walker for whom either tells that it looks is given all, and not watched, for ``_TRUSTED``
listings: rm(1), for one, uses names without looking at files, and would be taken for each in turn.
Evidence counts whoever gives it: threads share work, and to be wrong that way costs what was paid
before there was any of this. Directories tell nothing, as who goes through a tree looks at those.

The attributes of a sentinel are kept here, so that this one GETATTR need not go to the daemon.

So this is about time only, never about what is true: a listing is always the daemon's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

__all__ = ["Plan", "Sentinel", "Walkers"]

#: Listings in full that a new walker gets before names: 2.6 ms each at most, as one message has up
#: to 200 entries, and whether the next one has attributes, the kernel decides.
_UNSEEN: Final = 2
#: LOOKUPs that tell of looks; one may be of a file that is opened by name. A walker wrongly given
#: names alone costs 200 LOOKUPs of 25 us in place of 13: 2.4 ms at most, before the kernel notices.
_LOOKUPS: Final = 2
#: Listings for which a walker that looks is believed to go on. So the 2.4 ms are at most every 67th
#: listing's, and the GETATTR of a sentinel (25 us if it goes to the daemon) every 65th's.
_TRUSTED: Final = 64


class Plan(Enum):
    """What a listing that begins is to have."""

    ALL = "names and attributes"
    WATCHED = "the same, with a sentinel"
    NAMES = "names alone"


class Sentinel(NamedTuple):
    """A file whose attributes somebody will ask for who looks.

    Attributes:
        pid: The walker that it was set for.
        until: Clock seconds to which that may be believed.
        attributes: ``fuse_attr``, 88 bytes.
        version: Changes begun when the listing was asked for; -1 when some were on their way, or
            others can be made without anybody's seeing them.
        placed: When it was given to the kernel, clock seconds.
    """

    pid: int
    until: float
    attributes: bytes
    version: int
    placed: float


class _Walker:
    """What is known of a thread that lists.

    Attributes:
        unseen: Sentinels in a row that nobody has looked at.
        trusted: Listings for which it is believed to look.
    """

    __slots__ = ("trusted", "unseen")

    def __init__(self) -> None:
        self.unseen = self.trusted = 0


class _Told:
    """A directory that a walker was given the names of.

    Attributes:
        pid: The walker.
        until: Clock seconds to which the kernel would have known more.
        lookups: How often it had to ask.
    """

    __slots__ = ("lookups", "pid", "until")

    def __init__(self, pid: int, until: float) -> None:
        self.pid, self.until = pid, until
        self.lookups = 0


def _bound(table: dict[int, _Walker] | dict[int, Sentinel] | dict[int, _Told], limit: int) -> None:
    """Give up the oldest of a table that has got one more."""
    if len(table) > limit:
        del table[next(iter(table))]


class Walkers:
    """All walkers that are remembered, and what is watched of them; bounded.

    Args:
        valid: Seconds that the kernel believes names and attributes; 0 has all listed in full.
        limit: Most walkers, and most sentinels.
        directories: Most directories; 200 bytes each.

    Attributes:
        sentinels: By nodeid; to be looked into by others, as is ``told``.
        told: Directories of which names alone were given.
        valid: As above.
    """

    __slots__ = ("_directories", "_limit", "_walkers", "sentinels", "told", "valid")

    def __init__(self, valid: float, limit: int = 64, directories: int = 1 << 12) -> None:
        self.valid = valid
        self._directories = directories
        self._limit = limit
        self._walkers: dict[int, _Walker] = {}
        self.sentinels: dict[int, Sentinel] = {}
        self.told: dict[int, _Told] = {}

    def begins(self, pid: int, directory: int, now: float) -> Plan:
        """Say what a listing is to have that begins at ``now`` seconds.

        Args:
            pid: The thread that lists; 0 for one that is in no namespace of ours.
            directory: Its nodeid.
            now: Clock seconds.
        """
        if not pid or not self.valid:
            return Plan.ALL
        walker = self._walkers.pop(pid, None) or _Walker()
        self._walkers[pid] = walker
        _bound(self._walkers, self._limit)
        if walker.trusted:
            walker.trusted -= 1
            return Plan.ALL
        if walker.unseen < _UNSEEN:
            return Plan.WATCHED
        self.told.pop(directory, None)
        self.told[directory] = _Told(pid, now + self.valid)
        _bound(self.told, self._directories)
        return Plan.NAMES

    def is_enough(self, pid: int, directory: int, now: float) -> bool:
        """Whether the names that were given to some walker are enough for who opens the directory.

        They are for another that looks at nothing, as long as they may be believed.
        """
        walker, told = self._walkers.get(pid), self.told.get(directory)
        if walker is None or told is None or walker.unseen < _UNSEEN or now >= told.until:
            return False
        told.pid, told.lookups = pid, 0
        return True

    def placed(self, nodeid: int, sentinel: Sentinel) -> None:
        """Take note of a sentinel in the reply to a listing."""
        walker = self._walkers.get(sentinel.pid)
        if walker is None:
            return
        if not walker.trusted:
            walker.unseen = min(walker.unseen + 1, _UNSEEN)
        self.sentinels.pop(nodeid, None)
        self.sentinels[nodeid] = sentinel
        _bound(self.sentinels, self._limit)

    def asked(self, nodeid: int, now: float) -> Sentinel | None:
        """Return the sentinel that somebody looks at, if it is one in its time; it is none now."""
        sentinel = self.sentinels.pop(nodeid, None)
        if sentinel is None or now >= sentinel.until:
            return None
        self._looks(sentinel.pid)
        return sentinel

    def looked_up(self, directory: int, now: float) -> None:
        """A name in a directory is looked up that is there, and is not a directory's."""
        told = self.told.get(directory)
        if told is None or now >= told.until:
            return
        told.lookups += 1
        if told.lookups >= _LOOKUPS:
            del self.told[directory]
            self._looks(told.pid)

    def forget(self, nodeid: int) -> None:
        """The kernel forgets a node; its number may come back as another's."""
        self.sentinels.pop(nodeid, None)
        self.told.pop(nodeid, None)

    def _looks(self, pid: int) -> None:
        walker = self._walkers.get(pid)
        if walker is not None:
            walker.unseen, walker.trusted = 0, _TRUSTED

    def check_invariants(self) -> None:
        """Raise AssertionError unless all keeps within its bounds."""
        assert len(self._walkers) <= self._limit
        assert len(self.sentinels) <= self._limit
        assert len(self.told) <= self._directories
        for walker in self._walkers.values():
            assert 0 <= walker.unseen <= _UNSEEN
            assert 0 <= walker.trusted <= _TRUSTED
            assert not (walker.unseen and walker.trusted)
        assert all(told.lookups < _LOOKUPS for told in self.told.values())
