"""The documents of ``status`` and ``probe``, built from live objects.

The dictionaries are the interface for scripts (``--json``): names stay, new ones may come. Feature
bits are lists of their names, lowest first; every duration says its unit in its name.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from vfsmount import __version__
from vfsmount.client.mount.mountpoint import is_root
from vfsmount.wire.fuse import InitFlag, opcode_name
from vfsmount.wire.vhost_user import ProtocolFeature, VirtioFeature, feature_names

if TYPE_CHECKING:
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel import Channel
    from vfsmount.channel.statistics import ChannelStatistics, InFlightRequest
    from vfsmount.client.mount.engine import Engine
    from vfsmount.client.mount.mountinfo import MountEntry
    from vfsmount.client.mount.options import MountSettings
    from vfsmount.client.session import InitFacts, Session
    from vfsmount.errors import VfsmountError

__all__ = ["cache_facts", "daemon_facts", "dax_facts", "status_document", "traffic"]


class Mount(Protocol):
    """What a serving mount tells about itself (``mount``)."""

    settings: MountSettings
    path: str
    policy: CachePolicy
    entry: MountEntry | None
    engine: Engine | None
    lost: VfsmountError | None
    readahead: int | None
    started: float

    @property
    def daemon_pid(self) -> int | None:
        """Process id of the bundled daemon."""


def status_document(mount: Mount, session: Session) -> dict[str, Any]:
    """Return all that ``vfsmount status`` shows; quick, and without touching the mount."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "mountpoint": mount.path,
        "device": mount.entry.device if mount.entry is not None else None,
        "origin": {
            "socket": mount.settings.socket,
            "source": mount.settings.source,
            "daemon_pid": mount.daemon_pid,
        },
        "engine": mount.engine.name if mount.engine is not None else None,
        "engine_reason": mount.engine.reason if mount.engine is not None else None,
        "state": "serving" if mount.lost is None else "daemon lost",
        "lost": None if mount.lost is None else str(mount.lost),
        "uptime_s": round(time.monotonic() - mount.started, 3),
        "options": mount.settings.libfuse_options(as_root=is_root()),
        "cache": cache_facts(mount.policy) | _write_back(mount) | _pages(mount),
        "kernel": _kernel_facts(mount),
        "readahead_bytes": mount.readahead,
        "daemon": daemon_facts(session),
        "dax": dax_facts(mount, session),
    } | traffic(session.channel.statistics())


def _kernel_facts(mount: Mount) -> dict[str, Any]:
    """What the kernel was told, where we know it, and how it liked what it got.

    ``writeback`` is None where libfuse has settled it.
    """
    flags = None if mount.engine is None else mount.engine.kernel_flags()
    return {
        "init_flags": None if flags is None else feature_names(InitFlag, flags),
        "writeback": None if flags is None else InitFlag.WRITEBACK_CACHE in flags,
        "replies_refused": 0 if mount.engine is None else mount.engine.refused(),
    }


def cache_facts(policy: CachePolicy) -> dict[str, Any]:
    """Return what the kernel may believe, and for how long."""
    return {
        "mode": policy.name,
        "entry_timeout_s": policy.entry_timeout,
        "attr_timeout_s": policy.attr_timeout,
        "negative_timeout_s": policy.negative_timeout,
        "dir_timeout_s": policy.dir_timeout,
        "direct_io": policy.direct_io,
        "keep_cache": policy.keep_cache,
        "revalidate": policy.revalidate,
        "from_host": policy.from_host,
        "writeback": policy.writeback,
    }


def _write_back(mount: Mount) -> dict[str, Any]:
    """Who keeps written pages for a while: ``kernel``, ``vfsmount``, or nobody and why."""
    who: str | None = None
    if mount.policy.writeback and mount.engine is not None:
        flags = mount.engine.kernel_flags()
        if flags is None:
            who = "vfsmount"
        else:
            who = "kernel" if InitFlag.WRITEBACK_CACHE in flags else "the daemon refuses"
    return {"writeback_by": who}


def _pages(mount: Mount) -> dict[str, Any]:
    return {} if mount.engine is None else mount.engine.pages_facts()


def dax_facts(mount: Mount, session: Session) -> dict[str, Any]:
    """Return the window as it is used; ``why`` says why there is none, else it is empty."""
    window = session.window
    facts: dict[str, Any] = {
        "active": window is not None,
        "why": _why_no_window(mount, session),
        "window_bytes": 0 if window is None else window.size,
        "range_bytes": 0 if window is None else window.range_size,
    }
    if session.dax is not None:
        facts |= session.dax.statistics()._asdict()
    return facts | ({} if mount.engine is None else mount.engine.dax_facts())


def _why_no_window(mount: Mount, session: Session) -> str:
    if session.window is not None:
        return ""
    if not mount.settings.window:
        return "--dax=off"
    if not session.channel.offer.shmem:
        return "the daemon offers no window"
    return "the daemon and this mount could not agree on a window"


def daemon_facts(session: Session) -> dict[str, Any]:
    """Return what the daemon offered and what was agreed on."""
    return _device_facts(session.channel) | _fuse_facts(session.facts)


def _device_facts(channel: Channel) -> dict[str, Any]:
    offer = channel.offer
    tag = offer.config.tag if offer.config is not None else b""
    return {
        "tag": tag.rstrip(b"\0").decode("utf-8", "backslashreplace"),
        "num_queues": offer.num_queues,
        "num_request_queues": channel.num_request_queues,
        "queue_size": channel.queue_size,
        "max_mem_slots": offer.max_mem_slots,
        "virtio_features": {
            "offered": feature_names(VirtioFeature, offer.features),
            "acked": feature_names(VirtioFeature, channel.features),
        },
        "protocol_features": {
            "offered": feature_names(ProtocolFeature, offer.protocol_features),
            "acked": feature_names(ProtocolFeature, channel.protocol_features),
        },
    }


def _fuse_facts(facts: InitFacts) -> dict[str, Any]:
    return {
        "fuse_version": f"7.{facts.minor}",
        "init_flags": feature_names(InitFlag, facts.flags),
        "max_write": facts.max_write,
        "max_read": facts.max_read,
        "max_readahead": facts.max_readahead,
        "time_granularity_ns": facts.time_gran,
    }


def traffic(statistics: ChannelStatistics) -> dict[str, Any]:
    """Return what has been asked so far, and what is being waited for.

    ``requests`` has one row per opcode: ``count``, ``errors``, ``mean_us``, ``p50_us``, ``p99_us``.
    """
    return {
        "in_flight": len(statistics.in_flight),
        "pending": [_pending(request) for request in statistics.in_flight],
        "mute": [_pending(request) for request in statistics.mute],
        "requests": {name: asdict(row) for name, row in statistics.requests.items()},
        "channel": asdict(statistics.notifications)
        | {
            "waiting": statistics.waiting,
            "forgets_waiting": statistics.forgets_waiting,
            "abandoned": statistics.abandoned,
            "arena_used_bytes": statistics.arena_used,
            "memory_resident_bytes": statistics.memory_resident,
        },
    }


def _pending(request: InFlightRequest) -> dict[str, Any]:
    return {
        "opcode": opcode_name(request.opcode),
        "nodeid": request.nodeid,
        "age_s": request.age,
        "abandoned": request.abandoned,
    }
