"""git, rsync, make with a C compiler, and SQLite, at work on a mount."""

from __future__ import annotations

import filecmp
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.support.environment import unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from tests.workloads.conftest import Share

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

# Seconds that one program may take; each takes a few on a busy machine with two CPUs.
PATIENCE = 120

GIT_ENVIRONMENT = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **{
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "A. Tester"), ("EMAIL", "a@example.org"))
    },
}


def need(*programs: str) -> None:
    """Skip (in CI: fail) unless these are installed."""
    for program in programs:
        if shutil.which(program) is None:
            unavailable(f"{program} is not installed")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program that must succeed; return what it prints."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=GIT_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def plant(folder: Path, generation: int = 0) -> None:
    """Make or change a tree of files: text, binary, executable, linked, empty, deep."""
    for number in range(40):
        sub = folder / f"dir{number % 8}" / "deep"
        sub.mkdir(parents=True, exist_ok=True)
        (sub / f"text{number}.txt").write_text(f"{generation} line\n" * (number + 1))
    (folder / "binary").write_bytes(bytes(range(256)) * 1000 + bytes([generation]))
    (folder / "large").write_bytes(os.urandom(1 << 20) + bytes([generation]))
    script = folder / "script.sh"
    script.write_text(f"#!/bin/sh\necho {generation}\n")
    script.chmod(0o755)
    (folder / "empty").touch()
    link = folder / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(f"dir{generation}/deep")


def assert_same_tree(one: Path, two: Path) -> None:
    """Compare two folders, contents included."""
    comparison = filecmp.dircmp(one, two, ignore=[".git"])
    stack = [comparison]
    seen = 0
    while stack:
        here = stack.pop()
        assert not here.left_only, here.left_only
        assert not here.right_only, here.right_only
        files = here.common_files
        _, different, strange = filecmp.cmpfiles(here.left, here.right, files, shallow=False)
        assert not different + strange
        seen += len(files)
        stack += here.subdirs.values()
    assert seen > 40


# --- git -----------------------------------------------------------------------------------------


def make_repository(folder: Path) -> None:
    """Make a repository of two branches."""
    folder.mkdir()
    run("git", "init", "-q", "-b", "main", cwd=folder)
    for generation in range(3):
        plant(folder, generation)
        run("git", "add", "-A", cwd=folder)
        run("git", "commit", "-q", "-m", f"generation {generation}", cwd=folder)
    run("git", "branch", "old", "HEAD~2", cwd=folder)


def test_git(share: Share) -> None:
    """Clone onto the mount, check branches out, commit, collect garbage, fsck, clone back."""
    need("git")
    origin = share.local / "origin"
    make_repository(origin)
    clone = share.path / "clone"

    run("git", "clone", "-q", f"file://{origin}", clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("git", "checkout", "-q", "origin/old", cwd=clone)
    run("git", "checkout", "-q", "main", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    plant(clone, 7)
    run("git", "add", "-A", cwd=clone)
    run("git", "commit", "-q", "-m", "on the mount", cwd=clone)
    run("git", "gc", "-q", cwd=clone)
    run("git", "fsck", "--full", "--strict", cwd=clone)
    run("git", "clone", "-q", clone, share.local / "back")

    assert_same_tree(share.local / "back", share.host / "clone")
    # The same repository, seen at the host, without the mount.
    run("git", "fsck", "--full", "--strict", cwd=share.host / "clone")


# --- rsync ---------------------------------------------------------------------------------------


def test_rsync_both_ways(share: Share) -> None:
    need("rsync")
    source, back = share.local / "source", share.local / "back"
    source.mkdir()
    plant(source)

    for generation in range(2):
        plant(source, generation)
        run("rsync", "-acH", "--delete", f"{source}/", share.path / "copy")
        run("rsync", "-acH", "--delete", f"{share.path}/copy/", back)
        assert_same_tree(source, share.host / "copy")
        assert_same_tree(source, back)
    # Nothing is left to do, in both directions: names, types, modes, times and contents agree.
    for one, two in ((source, share.path / "copy"), (share.path / "copy", source)):
        listed = run("rsync", "-acHn", "--delete", "--itemize-changes", f"{one}/", two)
        assert listed == ""


# --- a C build -----------------------------------------------------------------------------------

MAKEFILE = """
OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))
program: libparts.a main.o
\t$(CC) -o $@ main.o -L. -lparts
libparts.a: $(filter part%,$(OBJECTS))
\t$(AR) rcs $@ $^
%.o: %.c parts.h
\t$(CC) -O1 -g -c -o $@ $<
clean:
\trm -f *.o *.a program
"""
PARTS = 12


def write_project(folder: Path) -> None:
    """Write a small C project: a library of some parts, and a program that sums them up."""
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE)
    header = [f"int part{number}(int);" for number in range(PARTS)]
    (folder / "parts.h").write_text("#include <stdio.h>\n" + "\n".join(header) + "\n")
    for number in range(PARTS):
        body = f'#include "parts.h"\nint part{number}(int x) {{ return x + {number}; }}\n'
        (folder / f"part{number}.c").write_text(body)
    calls = " + ".join(f"part{number}(1)" for number in range(PARTS))
    (folder / "main.c").write_text(
        f'#include "parts.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )


def test_c_build(share: Share) -> None:
    """Build in parallel, run the result from the mount, touch a file, build what changed."""
    need("make", "cc")
    project = share.path / "project"
    write_project(project)

    run("make", "-j4", cwd=project)
    assert run(project / "program") == f"{PARTS + sum(range(PARTS))}\n"
    assert "up to date" in run("make", "program", cwd=project)

    (project / "part3.c").write_text('#include "parts.h"\nint part3(int x) { return x + 1003; }\n')
    rebuilt = run("make", cwd=project)
    assert rebuilt.count(" -c ") == 1
    assert run(project / "program") == f"{PARTS + sum(range(PARTS)) + 1000}\n"
    run("make", "clean", cwd=project)
    assert not list(project.glob("*.o"))


# --- SQLite --------------------------------------------------------------------------------------

WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60)
for number in range(50):
    with database:
        database.execute("insert into entries values (?, ?)", (int(sys.argv[2]), number))
database.close()
"""


def test_sqlite_wal(share: Share) -> None:
    """Write-ahead logging: its index is memory that several processes map, shared and writable."""
    path = share.path / "data.db"
    with closing(sqlite3.connect(path, timeout=60)) as database:
        assert database.execute("pragma journal_mode=wal").fetchone() == ("wal",)
        database.execute("create table entries (writer int, number int)")
        database.commit()
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, path, str(writer)])
            for writer in range(4)
        ]
        statuses = [writer.wait(PATIENCE) for writer in writers]
        assert statuses == [0] * 4
        count = database.execute("select count(*), count(distinct writer) from entries")
        assert count.fetchone() == (200, 4)
        assert (share.path / "data.db-shm").exists()
        assert database.execute("pragma wal_checkpoint(truncate)").fetchone()[0] == 0
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    with closing(sqlite3.connect(share.host / "data.db")) as database:
        assert database.execute("select count(*) from entries").fetchone() == (200,)
