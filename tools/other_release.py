"""Packages of another release than this machine's, through a *private* apt.

The machine's own sources with the release name replaced, its keyrings, proxies and credentials
kept, and lists, cache and state in a temporary folder. Packages are downloaded and unpacked;
nothing on the system changes, and no root is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Package lists are ~10 MB to 30 MB; ten minutes also covers a slow mirror.
APT_TIMEOUT = 600.0


class CannotBeHadError(Exception):
    """It is out of reach on this machine; the text is one line for people."""


class OtherRelease:
    """A release whose package lists are at hand.

    Attributes:
        folder: Temporary; downloads go there.
        configuration: Of the private apt.
    """

    def __init__(self, folder: Path, configuration: Path) -> None:
        self.folder = folder
        self.configuration = configuration

    def unpack(self, packages: tuple[str, ...], root: Path) -> None:
        """Download packages and unpack them under ``root``.

        Raises:
            CannotBeHadError: one is not there, or the mirror fails.
        """
        apt = ["apt-get", "-c", str(self.configuration), "-q"]
        run([*apt, "download", *packages], timeout=APT_TIMEOUT, cwd=self.folder)
        for package in sorted(self.folder.glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(root)], timeout=120.0)
            package.unlink()

    def dependencies(self, package: str) -> list[str]:
        """Names that a package depends on, as a meta package does on what it stands for.

        Raises:
            CannotBeHadError: there is no such package.
        """
        apt = ["apt-cache", "-c", str(self.configuration), "depends", "--important"]
        return re.findall(r"(?m)^ +Depends: (\S+)$", run([*apt, package], timeout=60.0))


@contextmanager
def other_release(release: str, scratch: Path) -> Iterator[OtherRelease]:
    """Fetch a release's package lists, for the length of a ``with`` block.

    Args:
        release: Code name, of the distribution that this machine has.
        scratch: Where a temporary folder may be made.

    Raises:
        CannotBeHadError: no apt here, no such release, or the mirror fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CannotBeHadError(f"{tool} is not on this machine")
    sources = translated_sources(os_release().get("VERSION_CODENAME", ""), release)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".apt-") as name:
        configuration = write_apt_configuration(Path(name), sources)
        run(["apt-get", "-c", str(configuration), "-q", "update"], timeout=APT_TIMEOUT)
        yield OtherRelease(Path(name), configuration)


def os_release() -> dict[str, str]:
    """The fields of os-release(5), unquoted."""
    text = Path("/etc/os-release").read_text()
    fields = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, value in fields}


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
