"""The table of opcodes: which functions see which requests, and what is done to their replies.

What is not in the tables here is handed on as it stands. The functions are in files by subject:

    known        what is remembered, and forgotten: attributes, listings, FORGET; with walkers
    handles      OPEN, CREATE, FLUSH, RELEASE; and the same where files are passed through
    reuse        OPEN and RELEASE again: handles that are kept for the next open
    writes       what writes
    set_id       what clears set-id bits, where the daemon does not
    writeback    what is different below the kernel's write-back
    locks        locks, and INTERRUPT
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Final

from vfsmount.client.relay.handles import HandleRules, PassedHandleRules
from vfsmount.client.relay.known import KnownRules
from vfsmount.client.relay.locks import LockRules
from vfsmount.client.relay.opens import CHANGES
from vfsmount.client.relay.rewrite import judge_write_back, reply_rewriters
from vfsmount.client.relay.rooms import named_rooms, small_rooms
from vfsmount.client.relay.route import Route
from vfsmount.client.relay.set_id import SetIdRules
from vfsmount.client.relay.slots import SMALL_REPLY
from vfsmount.client.relay.writeback import WritebackRules
from vfsmount.client.relay.writes import WriteRules
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vfsmount.client.relay.parts import Parts
    from vfsmount.client.relay.reuse import HandleReuse
    from vfsmount.client.relay.rewrite import Rewriter
    from vfsmount.client.relay.route import Handler

__all__ = ["ROUTES", "make_routes"]

#: Routes that are made; opcodes above share one, on which the daemon decides.
ROUTES: Final = max(Opcode.COPY_FILE_RANGE_64, 63) + 1

_MAKES: Final = (Opcode.CREATE, Opcode.TMPFILE)
_COPIES: Final = (Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64)
#: What takes a descriptor of the daemon's, for a moment at least, and changes nothing.
_LOOKS: Final = (
    Opcode.LOOKUP, Opcode.GETATTR, Opcode.READLINK, Opcode.GETXATTR, Opcode.LISTXATTR,
    Opcode.STATFS, Opcode.OPEN, Opcode.OPENDIR, Opcode.READDIRPLUS,
)  # fmt: skip
_XATTR_CHANGES: Final = (Opcode.SETXATTR, Opcode.REMOVEXATTR)


def make_routes(parts: Parts) -> list[Route]:
    """Return the routes by opcode; the last one is for all opcodes that are unknown."""
    routes = _plain_routes(parts)
    handles, writes = HandleRules(parts), WriteRules(parts)
    _add_always(routes, parts, handles, writes)
    if parts.terms.quiet_flush:
        _local(routes, {Opcode.FLUSH: handles.flush})
    if parts.policy.revalidate or parts.passthrough is not None:
        _special(routes, {Opcode.OPEN: handles.open})
    if parts.policy.revalidate and not parts.policy.dir_timeout:
        _special(routes, {Opcode.OPENDIR: handles.opendir})
    if not parts.terms.clears_set_id:
        _add_set_id(routes, SetIdRules(parts))
    if parts.passthrough is not None:
        _add_passed(routes, PassedHandleRules(parts, handles), flushes=parts.terms.quiet_flush)
    # The kernel writes pages back in all modes: maps that are shared can be had in ``none`` too.
    writes.of_pages = copy(routes[Opcode.WRITE])
    writes.of_pages.rewrite = judge_write_back
    if parts.memory.unwritten is not None:
        _add_writeback(routes, WritebackRules(parts, parts.memory.unwritten, writes), writes)
    if parts.reuse is not None:
        _add_reuse(routes, parts.reuse)
    return routes


def _plain_routes(parts: Parts) -> list[Route]:
    """Routes with their rooms and rewriters, on which no function sees a request."""
    routes = [Route(is_known=opcode < ROUTES) for opcode in range(ROUTES + 1)]
    for opcode, room in small_rooms(SMALL_REPLY).items():
        routes[opcode].room = room
    for opcode, size_at in named_rooms().items():
        routes[opcode].size_at = size_at
    if parts.policy.revalidate:
        for opcode in (*CHANGES, Opcode.READ):  # which changes the time of the last access
            routes[opcode].changes = True
    for opcode, rewriter in _rewriters(parts).items():
        routes[opcode].rewrite = rewriter
    return routes


def _add_always(
    routes: list[Route], parts: Parts, handles: HandleRules, writes: WriteRules
) -> None:
    known, locks = KnownRules(parts), LockRules(parts)
    local: dict[Opcode, Handler] = {
        Opcode.FORGET: known.forget,
        Opcode.BATCH_FORGET: known.batch_forget,
        Opcode.GETATTR: known.getattr,
        Opcode.GETXATTR: known.getxattr,
        **dict.fromkeys(_XATTR_CHANGES, known.change_xattr),
        Opcode.CREATE: handles.create,
        Opcode.FALLOCATE: writes.fallocate,
        **dict.fromkeys(_COPIES, writes.copy),
        Opcode.SETLK: locks.lock,
        Opcode.SETLKW: locks.wait_for_lock,
        Opcode.INTERRUPT: locks.interrupt,
        Opcode.NOTIFY_REPLY: lambda *_: True,  # we never ask
        Opcode.INIT: known.unexpected,
        Opcode.DESTROY: known.unexpected,  # only fuseblk mounts send it
    }
    special: dict[Opcode, Handler] = {
        Opcode.READDIR: known.list_names,
        Opcode.READDIRPLUS: known.list,
        Opcode.RELEASE: handles.release,
        Opcode.RELEASEDIR: handles.post,
        Opcode.WRITE: writes.write,
    }
    _local(routes, local)
    _special(routes, special)
    for opcode in _XATTR_CHANGES:
        routes[opcode].rewrite = known.xattr_changed
    created = routes[Opcode.CREATE].rewrite
    if created is not None and parts.policy.attr_timeout:
        routes[Opcode.CREATE].rewrite = known.created(created)
    routes[Opcode.READDIRPLUS].failed = known.list_failed


def _add_set_id(routes: list[Route], rules: SetIdRules) -> None:
    """Files whose set-id bits are ours to clear."""
    _special(
        routes,
        {
            Opcode.SETATTR: rules.setattr,
            Opcode.FALLOCATE: rules.fallocate,
            **dict.fromkeys(_COPIES, rules.copy),
        },
    )


def _add_passed(routes: list[Route], passed: PassedHandleRules, *, flushes: bool) -> None:
    """Files that the kernel reads and writes by itself."""
    if flushes:
        _local(routes, {Opcode.FLUSH: passed.flush})
    _special(
        routes,
        {
            **dict.fromkeys(_MAKES, passed.create),
            Opcode.SETATTR: passed.setattr,
            Opcode.RELEASE: passed.release,
        },
    )


def _add_writeback(routes: list[Route], below: WritebackRules, writes: WriteRules) -> None:
    """Files that the kernel writes back."""
    _local(
        routes,
        {
            **dict.fromkeys((Opcode.OPEN, *_MAKES), below.open),
            **dict.fromkeys(_COPIES, below.copy),
            Opcode.FLUSH: below.flush,
            Opcode.FSYNC: below.fsync,
        },
    )
    writes.of_pages.failed = below.pages_failed
    for opcode in (Opcode.FLUSH, Opcode.FSYNC):
        routes[opcode].failed = below.not_known


def _add_reuse(routes: list[Route], reuse: HandleReuse) -> None:
    """Handles that are opened again."""
    _local(routes, {Opcode.RELEASE: reuse.keep})
    for opcode in _LOOKS:
        routes[opcode].failed = reuse.retried(routes[opcode].failed)


def _local(routes: list[Route], table: Mapping[Opcode, Handler]) -> None:
    for opcode, handler in table.items():
        routes[opcode].local = handler


def _special(routes: list[Route], table: Mapping[Opcode, Handler]) -> None:
    for opcode, handler in table.items():
        routes[opcode].special = handler


def _rewriters(parts: Parts) -> dict[int, Rewriter]:
    terms, memory, policy = parts.terms, parts.memory, parts.policy
    return reply_rewriters(
        policy,
        None if terms.clears_set_id else memory.modes,
        parts.opens.fresh,
        memory.names if policy.revalidate else None,
        memory.unwritten,
        memory.walkers,
        no_flush=terms.quiet_reads,
    )
