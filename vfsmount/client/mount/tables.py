"""The documents of ``status`` and ``probe`` as text for people.

Pure; ``report`` makes the documents, and scripts read them as JSON.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["format_duration", "format_probe", "format_status"]

LABEL = 16
"""Columns of the label before a line's text."""
WIDTH = 100


def format_duration(seconds: float) -> str:
    """Return ``3.2 s``, ``5 min 7 s``, ``2 h 5 min`` or ``3 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    return f"{whole // 60} min {whole % 60} s"


def format_status(status: Mapping[str, Any]) -> str:
    """Return a status document as text, ending in a newline."""
    origin = status["origin"].get("socket") or status["origin"].get("source")
    lines = [f"{origin} on {status['mountpoint']}"]
    joint = ", mounted" if status["lost"] else ""
    duration = format_duration(status["uptime_s"])
    lines += _line("state", f"{status['state']}{joint} for {duration}")
    if status["lost"]:
        lines += _line("lost", status["lost"])
    lines += _line("engine", _engine(status))
    lines += _line("process", _processes(status))
    lines += _line("options", ", ".join(status["options"]) or "none")
    lines += _line("cache", _cache(status["cache"]))
    lines += _daemon(status["daemon"])
    lines += _line("DAX", _dax(status.get("dax", {})))
    lines += _line("in flight", str(status["in_flight"]))
    lines += [line for request in status["mute"] for line in _line("mute", _request(request))]
    lines += ["", *_requests(status["requests"])]
    return "\n".join(lines) + "\n"


def format_probe(probe: Mapping[str, Any]) -> str:
    """Return a probe document as text, ending in a newline."""
    return "\n".join([probe["socket"], *_daemon(probe["daemon"])]) + "\n"


def _line(label: str, text: str) -> list[str]:
    """One labelled line, wrapped under its own text."""
    first, *rest = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False) or [""]
    indent = " " * LABEL
    return [f"  {label:<{LABEL - 2}}{first}".rstrip(), *(indent + line for line in rest)]


def _engine(status: Mapping[str, Any]) -> str:
    reason = status.get("engine_reason")
    named = f"{status['engine']} ({reason})" if reason else status["engine"]
    return f"{named}, vfsmount {status['version']}"


def _processes(status: Mapping[str, Any]) -> str:
    daemon = status["origin"].get("daemon_pid")
    return f"{status['pid']}" + (f", daemon {daemon}" if daemon else "")


def _cache(cache: Mapping[str, Any]) -> str:
    if cache.get("from_host"):  # a mount of an older version does not say
        return f"{cache['mode']}, as the daemon says"
    words = [cache["mode"], f"names {cache['entry_timeout_s']:g} s"]
    words += [f"attributes {cache['attr_timeout_s']:g} s"]
    words += [f"absent names {cache['negative_timeout_s']:g} s"]
    words += [name.replace("_", " ") for name in ("direct_io", "writeback") if cache[name]]
    if cache.get("writeback_by"):
        words[-1] += f" ({cache['writeback_by']})"
    if cache.get("pages_by") == "vfsmount":
        words.append(
            f"pages {cache['pages_bytes'] >> 20} of {cache['pages_limit_bytes'] >> 20} MiB"
        )
    return ", ".join(words)


def _dax(dax: Mapping[str, Any]) -> str:
    if not dax.get("active"):
        return f"off: {dax.get('why', 'this version has none')}"
    if "backing_files" in dax:
        opens = f"{dax['opens']} opens, {dax['opens_by_message']} by message"
        counts = f"{dax['backing_files']} so far, {dax['kept']} kept, {opens}"
        return f"in the kernel: {dax['policy']}: {counts}"
    ranges = f"{dax['mapped_ranges']} of {dax['ranges']} ranges of {dax['range_bytes'] >> 20} MiB"
    names = ("hits", "misses", "set_ups", "reclaims", "bypassed", "failures")
    counts = ", ".join(f"{dax[name]} {name.replace('_', '-')}" for name in names)
    return f"{ranges} mapped, {counts}"


def _daemon(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["tag"]:
        yield from _line("tag", facts["tag"])
    queues = f"{facts['num_request_queues']} for requests, {facts['queue_size']} entries each"
    yield from _line("queues", queues)
    if facts["max_mem_slots"] is not None:
        yield from _line("memory slots", str(facts["max_mem_slots"]))
    for name, label in (("virtio_features", "virtio"), ("protocol_features", "vhost-user")):
        yield from _line(label, _offered(facts[name]))
    yield from _line("FUSE", f"{facts['fuse_version']}, {_sizes(facts)}")
    yield from _line("INIT flags", " ".join(facts["init_flags"]) or "none")


def _offered(features: Mapping[str, Sequence[str]]) -> str:
    """The acked features, then in brackets those that were offered only."""
    only = [name for name in features["offered"] if name not in features["acked"]]
    text = " ".join(features["acked"]) or "none"
    return f"{text} (offered as well: {' '.join(only)})" if only else text


def _sizes(facts: Mapping[str, Any]) -> str:
    return f"write up to {facts['max_write'] >> 10} KiB, read up to {facts['max_read'] >> 10} KiB"


def _request(request: Mapping[str, Any]) -> str:
    age = format_duration(request["age_s"])
    return f"{request['opcode']} on node {request['nodeid']} without a reply for {age}"


def _requests(requests: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    rows: list[list[str]] = [["request", "count", "errors", "mean us", "p50 us", "p99 us"]]
    for name, row in sorted(requests.items(), key=lambda item: -item[1]["count"]):
        times = [f"{row[key]:.0f}" for key in ("mean_us", "p50_us", "p99_us")]
        rows.append([name, f"{row['count']:.0f}", f"{row['errors']:.0f}", *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join(["  " + first.ljust(widths[0]), *cells])
