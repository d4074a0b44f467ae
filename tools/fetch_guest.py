#!/usr/bin/env python3
"""Bring the Linux kernel that the guest tests boot: ``.cache/guest/vmlinuz``.

Usage: ``python3 tools/fetch_guest.py``. Needs Python, apt and dpkg-deb on Debian; no root, and
nothing on the system changes.

It is Debian 13's cloud kernel, whatever release this machine is: small, made for virtual machines,
with all that it takes to mount built in, and new enough (6.11) for several request queues.
``.cache/guest/missing`` says, in one line, why there is none; the next run tries again.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from other_release import CannotBeHadError, os_release, other_release

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "guest"

RELEASE = "trixie"
META_PACKAGE = "linux-image-cloud-amd64"
#: What a guest needs to mount; this kernel has all of it built in.
DRIVERS = ("virtio_pci", "virtiofs")


def main() -> int:
    """Fetch the kernel unless it is there; always 0: the tests say what is missing."""
    CACHE.parent.mkdir(exist_ok=True)
    with (CACHE.parent / ".guest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "vmlinuz").exists():
            print("Fetching a kernel for guests (some 30 MB, once) ...", flush=True)
            fetch()
    return 0


def fetch() -> None:
    """Make ``CACHE`` hold either a kernel or the reason why there is none."""
    # Made aside and moved into place, so that an interrupted run leaves no half.
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix=".guest-") as name:
        aside = Path(name, "guest")
        aside.mkdir()
        try:
            bring(aside, Path(name))
        except CannotBeHadError as error:
            (aside / "missing").write_text(f"{error}\n")
            print(f"  cannot be had: {error}", flush=True)
        shutil.rmtree(CACHE, ignore_errors=True)
        aside.rename(CACHE)


def bring(aside: Path, scratch: Path) -> None:
    """Put the kernel into ``aside``.

    Raises:
        CannotBeHadError: this machine cannot have it.
    """
    machine, system = platform.machine(), os_release().get("ID", "this system")
    if machine != "x86_64" or system != "debian":
        raise CannotBeHadError(f"no package of a guest kernel is known for {system} on {machine}")
    root = scratch / "root"
    with other_release(RELEASE, scratch) as apt:
        apt.unpack((apt.dependencies(META_PACKAGE)[0],), root)
    kernels = list(root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise CannotBeHadError(f"the package holds {len(kernels)} kernels")
    built_in = "".join(path.read_text() for path in root.rglob("modules.builtin"))
    absent = [name for name in DRIVERS if f"/{name}.ko" not in built_in]
    if absent:
        raise CannotBeHadError(f"{kernels[0].name} has {' and '.join(absent)} as modules only")
    shutil.move(kernels[0], aside / "vmlinuz")
    print(f"  {kernels[0].name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
