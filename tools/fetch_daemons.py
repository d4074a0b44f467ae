#!/usr/bin/env python3
"""Bring the real virtio-fs host daemons that the tests and the benchmark talk to.

Usage: ``python3 tools/fetch_daemons.py [c] [rust]`` (both by default). Needs nothing but Python,
apt and dpkg-deb; no root, and nothing on the system changes.

What is left behind, per daemon, under ``.cache/daemons/KIND/``:

- ``virtiofsd``: a two-line script that runs the daemon; start it like the daemon itself, it execs.
- ``root/``: the unpacked packages that it runs from, its own C library included.
- ``missing``: instead of the two, when the daemon cannot be had: one line saying why. Tests print
  it when they skip. The next run tries again.

How: the C virtiofsd was last shipped in Debian 12 and Ubuntu 22.04, the Rust one comes with
Debian 13 and later and with Ubuntu 24.04. Whatever release this machine is, the packages are
downloaded from the release that has them (``other_release``). Because the binaries come with the C
library that they were built against and run through that library's own loader, the machine's
libraries do not matter.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from other_release import CannotBeHadError, os_release, other_release, run

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "daemons"


class Origin(NamedTuple):
    """Where a daemon comes from.

    Attributes:
        release: Code name of the release that ships it.
        packages: The daemon's package and every library package that it loads.
        binary: The daemon inside its package, and on a machine that has it installed.
    """

    release: str
    packages: tuple[str, ...]
    binary: str


C_BINARY = "usr/lib/qemu/virtiofsd"
C_PACKAGES = ("qemu-system-common", "libc6", "libseccomp2", "libcap-ng0", "libglib2.0-0")
RUST_BINARY = "usr/libexec/virtiofsd"
RUST_PACKAGES = ("virtiofsd", "libc6", "libseccomp2", "libcap-ng0", "libgcc-s1")

# daemon -> distribution (ID of os-release) -> origin
ORIGINS = {
    "c": {
        "debian": Origin("bookworm", (*C_PACKAGES, "libnuma1", "libpcre2-8-0"), C_BINARY),
        "ubuntu": Origin("jammy", (*C_PACKAGES, "libnuma1", "libpcre3"), C_BINARY),
    },
    "rust": {
        "debian": Origin("trixie", RUST_PACKAGES, RUST_BINARY),
        "ubuntu": Origin("noble", RUST_PACKAGES, RUST_BINARY),
    },
}


def main(arguments: list[str]) -> int:
    """Fetch what is asked for and not yet there; 0 unless a kind is unknown."""
    kinds = arguments or list(ORIGINS)
    unknown = [kind for kind in kinds if kind not in ORIGINS]
    if unknown:
        print(f"fetch_daemons: unknown daemon {unknown[0]!r}, one of: {', '.join(ORIGINS)}")
        return 1
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make test` at once: the second finds all done
        for kind in kinds:
            fetch(kind)
    return 0


def fetch(kind: str) -> None:
    """Make ``CACHE/kind`` hold either a daemon that starts or the reason why there is none."""
    home = CACHE / kind
    if (home / "virtiofsd").exists():
        return
    print(f"Fetching the {kind} virtiofsd (some 30 MB, once) ...", flush=True)
    # Everything is made aside and moved into place, so that an interrupted run leaves no half.
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{kind}-") as aside_name:
        aside = Path(aside_name)
        aside.chmod(0o755)  # mkdtemp's 0700 would hide the daemon from other users
        try:
            version = bring(kind, aside)
        except CannotBeHadError as error:
            shutil.rmtree(aside / "root", ignore_errors=True)
            (aside / "missing").write_text(f"{error}\n")
            print(f"  cannot be had: {error}", flush=True)
        else:
            print(f"  {version}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        aside.rename(home)
        aside.mkdir()  # for TemporaryDirectory to remove


def bring(kind: str, aside: Path) -> str:
    """Put the daemon's files and start script in ``aside``.

    Returns:
        The version line that the daemon prints.

    Raises:
        CannotBeHadError: this machine cannot have it.
    """
    release = os_release()
    origin = ORIGINS[kind].get(release.get("ID", ""))
    if origin is None:
        raise CannotBeHadError(f"no package of it is known for {release.get('ID', 'this system')}")
    if kind == "c" and os.geteuid() != 0:
        # It does not even tell its version to others, so could not be checked.
        raise CannotBeHadError("it runs as root only")
    try:
        return use_installed(origin, aside)
    except CannotBeHadError:
        pass
    with other_release(origin.release, CACHE) as apt:
        apt.unpack(origin.packages, aside / "root")
    return use_unpacked(origin, aside)


def use_installed(origin: Origin, aside: Path) -> str:
    """Use the daemon that the machine has in its own folders, if it starts."""
    binary = Path("/") / origin.binary
    if not binary.exists():
        raise CannotBeHadError(f"{binary} is not installed")
    return finish(aside, f'exec {binary} "$@"')


def use_unpacked(origin: Origin, aside: Path) -> str:
    """Use the unpacked packages, through the loader of their own C library."""
    root = aside / "root"
    # The loader's place differs between releases (/lib, /usr/lib), its name does not.
    loaders = [p for p in sorted(root.rglob("ld-linux*.so.*")) if not p.is_symlink()]
    if not loaders or not (root / origin.binary).exists():
        raise CannotBeHadError(f"the packages of {origin.release} hold no {origin.binary}")
    loader = loaders[0]
    folders = sorted({path.parent for path in root.rglob("lib*.so.*")})
    library_path = ":".join(f"$here/{folder.relative_to(aside)}" for folder in folders)
    return finish(
        aside,
        'here=$(dirname "$(readlink -f "$0")")\n'
        f'exec "$here/{loader.relative_to(aside)}" --library-path "{library_path}" '
        f'"$here/root/{origin.binary}" "$@"',
    )


def finish(aside: Path, body: str) -> str:
    """Write the start script and prove that it works; return the version line."""
    script = aside / "virtiofsd"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    try:
        return run([str(script), "--version"], timeout=30.0).strip().splitlines()[0]
    except CannotBeHadError:
        script.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
