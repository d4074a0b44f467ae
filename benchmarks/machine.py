"""Where and with what the numbers were made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from tests.support.daemons import FETCHED

__all__ = ["describe"]


def describe() -> dict[str, object]:
    """The machine, its load (over the last minute), and every version that matters, for JSON."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "load": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "root": os.geteuid() == 0,
        "versions": {
            "python": platform.python_version(),
            **{name: _package(name) for name in ("vfsmount", "pyfuse3", "trio")},
            "libfuse": _says("pkg-config", "--modversion", "fuse3"),
            "c virtiofsd": _says(str(FETCHED / "c" / "virtiofsd"), "--version"),
            "rust virtiofsd": _says(str(FETCHED / "rust" / "virtiofsd"), "--version"),
        },
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _says(*command: str) -> str:
    """The first line that a command prints; empty when it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()
