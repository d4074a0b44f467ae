"""Programs that the benchmark needs and the project does not: fetched or compiled on the spot.

They are kept in the cache folder, under names that say what they were made from, so that a second
run does neither. Whatever cannot be had raises `Unavailable` with the reason.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["CACHE", "Unavailable", "load_generator", "passthrough_ll", "passthroughfs"]

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks"

# Debian and Ubuntu; a source checkout of libfuse has it in example/.
LIBFUSE_EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
COMPILE_DEADLINE = 120.0
# pip builds the metadata of what it downloads, in an environment of its own: 5-60 s.
DOWNLOAD_DEADLINE = 300.0


class Unavailable(Exception):
    """Something cannot be had on this machine; the text says what, and why."""


@cache
def load_generator() -> Path:
    """The compiled ``load.c``."""
    return _compile(Path(__file__).with_name("load.c"))


@cache
def passthrough_ll() -> Path:
    """libfuse's low-level passthrough example, compiled."""
    source = LIBFUSE_EXAMPLES / "passthrough_ll.c"
    if not source.exists():
        # Ubuntu and some Debian mirrors' packages compress documentation.
        raise Unavailable(f"{source} does not exist (package libfuse3-dev)")
    return _compile(source, *_flags("fuse3"), "-pthread")


@cache
def passthroughfs() -> Path:
    """pyfuse3's passthrough example, out of the source distribution of the installed version."""
    version = metadata.version("pyfuse3")
    script = CACHE / f"passthroughfs-{version}.py"
    if not script.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _download_source("pyfuse3", version, Path(folder))
            content = _member(Path(folder), "examples/passthroughfs.py")
        _put(script, content)
    return script


def _compile(source: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable(f"no C compiler for {source.name}")
    digest = hashlib.sha256(source.read_bytes() + repr(flags).encode()).hexdigest()
    program = CACHE / f"{source.stem}-{digest[:12]}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        _run([compiler, "-O2", "-o", str(unfinished), str(source), *flags], COMPILE_DEADLINE)
        unfinished.rename(program)
    return program


def _flags(package: str) -> list[str]:
    if shutil.which("pkg-config") is None:
        raise Unavailable("pkg-config is not installed")
    return shlex.split(_run(["pkg-config", "--cflags", "--libs", package], COMPILE_DEADLINE))


def _download_source(package: str, version: str, folder: Path) -> None:
    """Let pip bring the source distribution of one package; its build tools come and go."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", package, "--dest", str(folder), f"{package}=={version}"]
    _run(command, DOWNLOAD_DEADLINE)


def _member(folder: Path, suffix: str) -> bytes:
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as contents:
            for member in contents:
                if member.name.endswith(f"/{suffix}") and (file := contents.extractfile(member)):
                    return file.read()
    raise Unavailable(f"the source distribution has no {suffix}")


def _put(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.rename(path)


def _run(command: list[str], deadline: float) -> str:
    """Run a command and return what it prints; `Unavailable` with its last words if it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as error:
        words = str(error.stderr).strip().splitlines() or [f"status {error.returncode}"]
        raise Unavailable(f"{Path(command[0]).name} failed: {words[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(command[0]).name} took over {deadline:g} s") from error
    return done.stdout
