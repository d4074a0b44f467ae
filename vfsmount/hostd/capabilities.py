"""Which capabilities the daemon keeps (capabilities(7)), and giving up the others.

Kept is what virtiofsd keeps: what it takes to make, own and change files as any user. What goes,
goes from every set, the bounding set included, so that nothing can bring it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfsmount.hostd import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DAC_OVERRIDE", "DAC_READ_SEARCH", "KEPT", "parse_changes", "reduce_to"]

# fmt: off
#: By number, as in linux/capability.h.
_NAMES: Final = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw",
    "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct",
    "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
    "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)
KEPT: Final = frozenset(map(_NAMES.index, (
    "chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap",
)))
# fmt: on
DAC_OVERRIDE: Final = _NAMES.index("dac_override")
#: What opening file handles takes.
DAC_READ_SEARCH: Final = _NAMES.index("dac_read_search")


def parse_changes(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Read ``+sys_admin:-chown``; returns the numbers to add, and those to drop.

    Raises:
        ValueError: A word without sign, or no capability.
    """
    sets: dict[str, set[int]] = {"+": set(), "-": set()}
    for word in text.split(":") if text else ():
        name = word[1:].lower().removeprefix("cap_")
        if word[:1] not in sets or name not in _NAMES:
            raise ValueError(f"{word!r} is not + or - and a capability, such as +sys_admin")
        sets[word[0]].add(_NAMES.index(name))
    return frozenset(sets["+"]), frozenset(sets["-"])


def reduce_to(kept: Iterable[int]) -> None:
    """Keep these capabilities of those that the process has, for good.

    To be called before there are other threads: each has its own.

    Raises:
        OSError: The host refuses.
    """
    mask = sum(1 << number for number in kept)
    effective, permitted, _, effective_high, permitted_high, _ = syscalls.thread_capabilities()
    if (permitted | permitted_high << 32) & 1 << _NAMES.index("setpcap"):
        syscalls.drop_bounding_set()
    low, high = mask & 0xFFFFFFFF, mask >> 32
    syscalls.thread_set_capabilities(
        [effective & low, permitted & low, 0, effective_high & high, permitted_high & high, 0]
    )
