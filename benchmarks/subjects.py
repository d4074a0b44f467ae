"""Who is measured: a table of subjects, each a way to mount a folder.

A subject says what it is, how to get ready (once; may raise `Unavailable`), and the command that
mounts a stage. Everything about starting, pinning, waiting and killing is `processes`' business.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import Unavailable, passthrough_ll, passthroughfs
from tests.support.daemons import daemon_problem, start_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["DAX_ONLY", "SUBJECTS", "TREES_ONLY", "Stage", "Subject"]

# Debian and its children; Red Hat and its; Arch.
SFTP_SERVERS = tuple(
    Path(folder, "sftp-server")
    for folder in ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh")
)

#: For so many descriptors a daemon has room from the start, more than it comes to hold while a
#: clock runs: one for each file that the kernel knows. A process with threads waits for all
#: processors, 5 to 20 ms, each time its table has to grow: of a cold `ls -lR` of 5,000 files 50 to
#: 78 ms of 145 to 190. Peers that are pinned have one thread, and never wait.
DESCRIPTORS = 16_384


@dataclass(frozen=True, slots=True)
class Stage:
    """Where and how a subject is to perform.

    Attributes:
        source: The folder to show.
        mountpoint: An empty folder.
        cache: ``none`` or ``auto``, in vfsmount's words.
        cpu: The only processor to use; None for all.
    """

    source: Path
    mountpoint: Path
    cache: str
    cpu: int | None


@dataclass(frozen=True, slots=True)
class Subject:
    """One column of the tables.

    Attributes:
        name: Its name on the command line, in tables, bars and the JSON file.
        what: One line that says what it is and what is peculiar about it.
        prepare: Brings what it needs; raises `Unavailable`.
        command: For the length of a ``with`` block, whatever the subject needs besides itself runs;
            the value is the command that mounts the stage and stays in the foreground. An empty
            one mounts nothing: the source itself is measured.
        churn: Whether it is asked to create, list and remove thousands of files.
        crowd: Whether it is asked to list a hundred thousand.
    """

    name: str
    what: str
    prepare: Callable[[], object]
    command: Callable[[Stage], AbstractContextManager[list[str]]]
    churn: bool = False
    crowd: bool = False

    @property
    def mounts(self) -> bool:
        return self.name != "native"


@contextmanager
def _nothing(stage: Stage) -> Iterator[list[str]]:
    yield []


@contextmanager
def _passthrough_ll(stage: Stage) -> Iterator[list[str]]:
    cache = {"none": "never", "auto": "auto"}[stage.cache]
    # The two others let the kernel check permissions, so this one is made to.
    options = f"source={stage.source},cache={cache},default_permissions,fsname=passthrough_ll"
    # On one processor its threads only cost: a backlog of RELEASEs makes it start some and end
    # them again, and open+read+close takes twice as long. The others have one thread, too.
    words = [str(passthrough_ll()), "-f", "-o", options, str(stage.mountpoint)]
    yield _with_room(words) if stage.cpu is None else [*words, "-s"]


def _with_room(words: list[str]) -> list[str]:
    """The command that runs a command with room for `DESCRIPTORS` descriptors."""
    return ["bash", "-c", f'exec "$@" {DESCRIPTORS - 1}</dev/null', "bash", *words]


@contextmanager
def _passthroughfs(stage: Stage) -> Iterator[list[str]]:
    yield [sys.executable, str(passthroughfs()), str(stage.source), str(stage.mountpoint)]


def _command_of(name: str) -> str:
    if path := shutil.which(name):
        return path
    raise Unavailable(f"{name} is not installed (package {name})")


@contextmanager
def _bindfs(stage: Stage) -> Iterator[list[str]]:
    # Written by libfuse 2: without big_writes, in pieces of 4 KiB.
    words = [_command_of("bindfs"), "-f", "--xattr-none", "-o", "default_permissions,big_writes"]
    yield [*words, str(stage.source), str(stage.mountpoint)]


def _sftp_server() -> Path:
    for path in SFTP_SERVERS:
        if path.exists():
            return path
    raise Unavailable("there is no sftp-server (package openssh-sftp-server)")


@contextmanager
def _sshfs(stage: Stage) -> Iterator[list[str]]:
    words = [sys.executable, "-m", "benchmarks.sftp", str(_sftp_server()), _command_of("sshfs")]
    words += ["-f", "-s"] if stage.cpu is not None else ["-f"]
    yield [*words, "-o", "default_permissions", f"here:{stage.source}", str(stage.mountpoint)]


def _vfsmount(
    kind: str,
    engine: str = "auto",
    dax: str = "off",
    mark: str = "",
    *,
    descriptors: int = DESCRIPTORS,
) -> Subject:
    """A row for vfsmount.

    Args:
        kind: Whose daemon.
        engine: Which engine.
        dax: As the option; empty for what vfsmount does by itself.
        mark: Ends the names of rows about that.
        descriptors: For how many the daemon has room from the start; 0 for what a shell gives it.
    """

    def prepare() -> None:
        if problem := daemon_problem(kind):
            raise Unavailable(problem)

    @contextmanager
    def command(stage: Stage) -> Iterator[list[str]]:
        # No extended attributes: neither peer serves them, and where a daemon does, the kernel
        # asks for security.capability before each write. The bundled daemon always does.
        cache = None if kind == "bundled" else stage.cache
        with start_daemon(
            kind, stage.source, cache=cache, xattr=False, descriptors=descriptors
        ) as daemon:
            words = [sys.executable, "-m", "vfsmount", str(stage.mountpoint)]
            words += ["--socket", str(daemon.socket), "--cache", stage.cache, "-f"]
            words += ["--engine", engine, *(["--dax", dax] if dax else [])]
            yield words + (["--cpus", str(stage.cpu)] if stage.cpu is not None else [])

    origin = {"c": "QEMU's C virtiofsd", "rust": "Rust virtiofsd", "bundled": "the bundled daemon"}
    name, what = f"vfsmount-{kind}", f"vfsmount over {origin[kind]}"
    if engine != "auto":
        name, what = f"{name}-{engine}", f"{what}, {engine} engine"
    if mark:
        name, what = f"{name}-{mark}", f"{what}, " + (f"--dax {dax}" if dax else "no --dax given")
    if not descriptors:
        name, what = f"{name}-plain", f"{what} as a shell starts it"
    return Subject(name, what, prepare, command, churn=True, crowd=name == "vfsmount-rust")


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("native", "the folder itself, on tmpfs", lambda: None, _nothing),
        Subject(
            "passthrough_ll",
            "libfuse's example in C; in-process; one thread when pinned, else as many as it likes",
            passthrough_ll,
            _passthrough_ll,
        ),
        Subject(
            "passthroughfs",
            "pyfuse3's example in Python; in-process. Its one mode: names and attributes are "
            "never valid, pages are cached (so each uncached read is GETATTR and READ)",
            passthroughfs,
            _passthroughfs,
        ),
        Subject(
            "bindfs",
            "another folder shown, in C, by path; in-process; one thread, names valid for 1 s",
            lambda: _command_of("bindfs"),
            _bindfs,
        ),
        Subject(
            "sshfs",
            "over an sftp-server of its own by a socket pair, no ssh; "
            "keeps names and attributes for 20 s; one thread when pinned",
            lambda: (_sftp_server(), _command_of("sshfs")),
            _sshfs,
        ),
        _vfsmount("c"),
        _vfsmount("rust"),
        _vfsmount("bundled"),
        _vfsmount("rust", "pyfuse3"),
        _vfsmount("rust", descriptors=0),
        _vfsmount("bundled", "pyfuse3", mark="off"),
        _vfsmount("bundled", "pyfuse3", "1G", "dax"),
        _vfsmount("bundled", "pyfuse3", "64M", "narrow"),
        _vfsmount("bundled", "relay", mark="off"),
        _vfsmount("bundled", "relay", "1G", "dax"),
        _vfsmount("bundled", "relay", "", "default"),
    )
}

#: Names of those that have nothing to say about single calls.
TREES_ONLY = frozenset({"bindfs", "sshfs", "vfsmount-rust-plain"})
#: Names of those that differ from others by their DAX window alone.
_MARKS = ("-off", "-dax", "-default", "-narrow")
DAX_ONLY = frozenset(name for name in SUBJECTS if name.endswith(_MARKS))
