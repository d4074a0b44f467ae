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
downloaded from the release that has them, through a *private* apt configuration: the machine's own
sources with the release name replaced, its keyrings, proxies and credentials kept, and lists,
cache and state in a temporary folder. Because the binaries come with the C library that they were
built against and run through that library's own loader, the machine's libraries do not matter.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "daemons"

# Package lists are ~10 MB to 30 MB; ten minutes also covers a slow mirror.
APT_TIMEOUT = 600.0


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


class CannotBeHadError(Exception):
    """The daemon is out of reach on this machine; the text is one line for people."""


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
    download(origin, release.get("VERSION_CODENAME", ""), aside)
    return use_unpacked(origin, aside)


def os_release() -> dict[str, str]:
    """The fields of os-release(5), unquoted."""
    text = Path("/etc/os-release").read_text()
    fields = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, value in fields}


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


def download(origin: Origin, codename: str, aside: Path) -> None:
    """Download the packages of ``origin`` and unpack them under ``aside/root``."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CannotBeHadError(f"{tool} is not on this machine")
    sources = translated_sources(codename, origin.release)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".apt-") as private_name:
        private = Path(private_name)
        apt = ["apt-get", "-c", str(write_apt_configuration(private, sources)), "-q"]
        run([*apt, "update"], timeout=APT_TIMEOUT)
        run([*apt, "download", *origin.packages], timeout=APT_TIMEOUT, cwd=private)
        for package in sorted(private.glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(aside / "root")], timeout=120.0)


def write_apt_configuration(private: Path, sources: dict[str, str]) -> Path:
    """A private apt: the machine's settings, but folders, sources and pins of its own."""
    for folder in ("sources.list.d", "state/lists/partial", "cache/archives/partial"):
        (private / folder).mkdir(parents=True)
    (private / "state/status").touch()  # an empty machine: nothing installed interferes
    for name, text in sources.items():
        (private / "sources.list.d" / name).write_text(text)
    configuration = private / "apt.conf"
    configuration.write_text(f"""\
Dir::State "{private}/state";
Dir::State::status "{private}/state/status";
Dir::Cache "{private}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{private}/sources.list.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
Acquire::Retries "3";
// Run as root, apt would download as a user that may not enter this folder.
APT::Sandbox::User "root";
APT::Default-Release "";
// Hooks of the machine are about the machine's own package lists.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
""")
    return configuration


def translated_sources(codename: str, release: str) -> dict[str, str]:
    """The machine's apt sources of its distribution, with ``codename`` replaced by ``release``.

    Returns:
        File name to content, in the format (one-line or deb822) that the file had.

    Raises:
        CannotBeHadError: no source of this machine names its release.
    """
    etc = Path("/etc/apt")
    translated = {}
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix not in {".list", ".sources"} or not path.is_file():
            continue
        translate = translate_deb822 if path.suffix == ".sources" else translate_one_line
        text = translate(path.read_text(), codename, release)
        if text:
            translated[path.name] = text
    if not codename or not translated:
        raise CannotBeHadError(f"no apt source of this machine names its release {codename!r}")
    return translated


def translate_deb822(text: str, codename: str, release: str) -> str:
    """Translate a ``.sources`` file; stanzas of other archives are left out."""
    stanzas = re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text))
    kept = []
    for stanza in stanzas:
        fields = {
            name.lower(): value
            for name, value in re.findall(r"(?m)^(\S+):[ \t]*((?:.*(?:\n[ \t].*)*))", stanza)
        }
        suites = translate_suites(fields.get("suites", "").split(), codename, release)
        of_archive = "main" in fields.get("components", "").split()
        enabled = fields.get("enabled", "yes").strip().lower() not in {"no", "false"}
        if suites and of_archive and enabled:
            # One value per line: a Signed-By may hold a whole key, lines and all.
            replaced = fields | {"types": "deb", "suites": " ".join(suites)}
            kept.append("".join(f"{name}: {value}\n" for name, value in replaced.items()))
    return "\n".join(kept)


def translate_one_line(text: str, codename: str, release: str) -> str:
    """Translate a ``.list`` file; lines of other archives are left out."""
    kept = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match is None or "main" not in match[4].split():
            continue
        kept += [
            f"deb {match[1] or ''}{match[2]} {suite} {match[4]}\n"
            for suite in translate_suites([match[3]], codename, release)
        ]
    return "".join(kept)


def translate_suites(suites: list[str], codename: str, release: str) -> list[str]:
    """Replace the release name; drop suites of other archives, and backports."""
    pockets = {codename + pocket: release + pocket for pocket in ("", "-updates", "-security")}
    return [pockets[suite] for suite in suites if suite in pockets]


def run(command: list[str], *, timeout: float, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        CannotBeHadError: it could not start, failed, or took longer than ``timeout`` seconds.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            timeout=timeout,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBeHadError(f"{Path(command[0]).name}: {error}") from error
    if done.returncode != 0:
        complaints = [line for line in done.stdout.splitlines() if line.startswith("E:")]
        lines = complaints or done.stdout.splitlines() or [f"exit status {done.returncode}"]
        raise CannotBeHadError(f"{Path(command[0]).name}: {lines[-1]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
