"""The command line of the daemon, and the daemon as a process."""

from __future__ import annotations

import errno
import grp
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import Frontend
from tests.hostd.guest import ROOT
from tests.support.daemons import require_daemon
from tests.support.wait import wait_until
from vfsmount.errors import UsageError
from vfsmount.hostd.arguments import USAGE, Arguments, parse
from vfsmount.hostd.cli import main
from vfsmount.hostd.fs.share import CacheMode, HandleUse, ShareOptions
from vfsmount.hostd.isolation import Isolation, Sandbox, UserMap

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = [sys.executable, "-m", "vfsmount.hostd"]
REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 20.0


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="hostd-") as folder:
        yield Path(folder)


@contextmanager
def daemon(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon, listening; killed at the end unless it has ended.

    Without a sandbox, because these look at the one process that was started; ``test_sandbox`` has
    the others.
    """
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--sandbox", "none"],
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        pass_fds=fds,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert b"listening" in line, line + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connect(path: Path) -> Frontend:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(path))
    return Frontend(sock)


# --- arguments -----------------------------------------------------------------------------------


def test_defaults() -> None:
    arguments = parse(["dir", "--socket", "sock"])

    assert isinstance(arguments, Arguments)
    assert (arguments.directory, arguments.socket, arguments.fd) == ("dir", "sock", None)
    assert arguments.options == ShareOptions()
    assert not arguments.once


def test_every_option() -> None:
    line = "--fd=7 --readonly --tag t --cache=never --writeback --no-xattr --request-queues 3"
    arguments = parse([*line.split(), "--poll-us=0", "--once", "--log-level", "debug", "--", "-d"])

    assert isinstance(arguments, Arguments)
    assert (arguments.directory, arguments.socket, arguments.fd) == ("-d", None, 7)
    assert arguments.options == ShareOptions(
        cache=CacheMode.NEVER,
        readonly=True,
        writeback=True,
        xattr=False,
        tag=b"t",
        request_queues=3,
    )
    assert (arguments.poll_us, arguments.once, arguments.log_level) == (0, True, 10)


def test_cache_none_is_never() -> None:
    arguments = parse(["dir", "--fd", "3", "--cache", "none"])
    assert isinstance(arguments, Arguments)
    assert arguments.options.cache is CacheMode.NEVER


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "one directory"),
        ("--socket s", "one directory"),
        ("a b --socket s", "one directory"),
        ("a", "one of --socket and --fd"),
        ("a --socket s --fd 3", "one of --socket and --fd"),
        ("a --socket", "--socket needs a value"),
        ("a --fd x", "--fd 'x' is no number"),
        ("a --fd -1", "--fd '-1' is no number"),
        ("a --fd 3 --cache maybe", "--cache 'maybe' is none of auto, always, never, metadata"),
        ("a --fd 3 --tag " + "t" * 37, "not 1 to 36 bytes"),
        ("a --fd 3 --tag=", "not 1 to 36 bytes"),
        ("a --fd 3 --request-queues 0", "no number from 1"),
        ("a --fd 3 --log-level loud", "--log-level 'loud'"),
        ("a --fd 3 --readonly=yes", "unknown option --readonly=yes"),
        ("a --fd 3 --sandbox none --uid-map :0:1:1:", "--uid-map and --gid-map take --sandbox"),
        ("a --fd 3 -r", "unknown option -r"),
        ("a --shared-dir b --fd 3", "one directory"),
        ("a --socket s --socket-path t", "one of --socket and --fd"),
        ("a --fd 3 --xattr --no-xattr", "contradict"),
        ("a --fd 3 --posix-acl --no-xattr", "contradict"),
        ("a --fd 3 --posix-acl --translate-uid map:1:2:3", "does not go with --translate"),
        ("a --fd 3 --xattrmap :map:a", "--xattrmap: rule ':map:a' ends too early"),
        ("a --fd 3 --translate-uid map:1:2", "--translate-uid: 'map:1:2' is not map:BASE"),
        ("a --fd 3 --uid-map 0:1:1", "--uid-map: '0:1:1' is not :INSIDE"),
        ("a --fd 3 --modcaps sys_admin", "--modcaps: 'sys_admin' is not . or -"),
        ("a --fd 3 --modcaps=+sysadmin", "--modcaps: '.sysadmin' is not . or -"),
        ("a --fd 3 --thread-pool-size many", "--thread-pool-size 'many' is no number"),
        ("a --fd 3 --seccomp maybe", "--seccomp 'maybe' is none of kill"),
        ("a --fd 3 -o cache=auto", "no -o here"),
        ("a --fd 3 --migration-mode=find-paths", "no --migration-mode here"),
    ],
)
def test_arguments_that_make_no_sense(line: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(line.split())


def test_virtiofsds_spelling() -> None:
    line = (
        "--shared-dir /srv --socket-path=/run/s --socket-group kvm --tag t --cache auto --xattr "
        "--writeback --allow-mmap --allow-direct-io --preserve-noatime --no-readdirplus "
        "--announce-submounts --no-killpriv-v2 --xattrmap :map::user.v.: "
        "--translate-uid map:0:1000:10 --translate-uid forbid-guest:50:1 "
        "--translate-gid host:1:2:3 --inode-file-handles=mandatory --sandbox namespace "
        "--uid-map :0:1000:1: --gid-map=:0:1000:1: --seccomp log --modcaps=+sys_admin:-chown "
        "--rlimit-nofile 1000 --thread-pool-size 4 --syslog --log-level trace -f"
    )
    arguments = parse(line.split())

    assert isinstance(arguments, Arguments)
    assert (arguments.directory, arguments.socket) == ("/srv", "/run/s")
    assert (arguments.socket_group, arguments.nofile, arguments.syslog) == ("kvm", 1000, True)
    assert arguments.log_level == logging.DEBUG
    options = arguments.options
    assert options.xattrmap is not None
    assert options.xattrmap.to_host(b"a") == b"user.v.a"
    assert options.translation is not None
    assert options.translation.uid.to_host(3) == 1003
    assert options.translation.gid.to_guest(1) == 2
    assert options._replace(xattrmap=None, translation=None) == ShareOptions(
        writeback=True,
        tag=b"t",
        readdirplus=False,
        direct_io=True,
        keep_noatime=True,
        allow_mmap=True,
        killpriv=False,
        handles=HandleUse.MANDATORY,
    )
    assert arguments.isolation == Isolation(
        sandbox=Sandbox.NAMESPACE,
        seccomp="log",
        added=frozenset((21,)),
        dropped=frozenset((0,)),
        uid_map=(UserMap(0, 1000, 1),),
        gid_map=(UserMap(0, 1000, 1),),
    )


def test_every_option_of_the_real_one_is_known() -> None:
    """Either it is taken, or the error says what to do instead."""
    require_daemon("rust")
    program = REPOSITORY / ".cache" / "daemons" / "rust" / "virtiofsd"
    text = subprocess.run([program, "--help"], capture_output=True, check=True).stdout.decode()
    options = re.findall(r"^\s+(?:-\w, )?(--[a-z0-9-]+)", text, re.MULTILINE)
    assert len(options) > 35
    for option in options:
        with suppress(UsageError):
            parse(["--shared-dir", "d", "--fd", "3", option])
            continue
        with pytest.raises(UsageError) as caught:
            parse(["--shared-dir", "d", "--fd", "3", option])
        assert "unknown option" not in str(caught.value)
        assert caught.value.cure or "needs a value" in str(caught.value)


def test_every_option_is_documented() -> None:
    text = (REPOSITORY / "docs" / "serve.md").read_text()
    options = set(re.findall(r"--[a-z0-9-]+", USAGE)) - {"--help"}
    assert [option for option in options if f"`{option}" not in text] == []


def test_defaults_that_follow_the_spelling() -> None:
    ours, ported = parse(["d", "--fd", "3"]), parse(["--shared-dir", "d", "--fd", "3"])
    assert isinstance(ours, Arguments)
    assert isinstance(ported, Arguments)
    assert (ours.options.xattr, ours.log_level) == (True, logging.WARNING)
    assert (ported.options.xattr, ported.log_level) == (False, logging.INFO)


def test_what_takes_attributes_along() -> None:
    for option, expected in (
        ("--posix-acl", ShareOptions(posix_acl=True)),
        ("--security-label", ShareOptions(security_label=True)),
    ):
        arguments = parse(["--shared-dir", "d", "--fd", "3", option])
        assert isinstance(arguments, Arguments)
        assert arguments.options == expected


def test_what_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "fs", "features": ["separate-options"]}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--socket PATH" in capsys.readouterr().out


# --- one clear line ------------------------------------------------------------------------------


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run what must fail; returns its one line."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_shared(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    line = failure(capsys, f"{home}/missing", "--socket", f"{home}/s")

    assert line == (
        f"vfsmount serve: cannot share {home}/missing: No such file or directory"
        " (name a directory that you may enter)\n"
    )
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/s", "No such file or directory"),
        ("x" * 120, "too long"),
        ("file", "it exists and is no socket"),
        ("live", "another process does"),
    ],
)
def test_where_nobody_can_listen(
    capsys: pytest.CaptureFixture[str], home: Path, name: str, reason: str
) -> None:
    (home / "file").touch()
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(f"{home}/live")
        live.listen()
        live.setblocking(False)
        line = failure(capsys, str(home), "--socket", f"{home}/{name}")
        with pytest.raises(BlockingIOError):
            live.accept()  # and whoever listens there was left alone

    assert line.startswith(f"vfsmount serve: cannot listen on {home}/{name[:5]}")
    assert line.endswith(")\n")  # the cure
    assert reason in line


@pytest.mark.parametrize("path", ["", "\0abstract", "nul\0"])
def test_what_is_no_path(capsys: pytest.CaptureFixture[str], home: Path, path: str) -> None:
    assert "no path" in failure(capsys, str(home), "--socket", path)


def test_descriptors_that_do_not_listen(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert "no socket" in failure(capsys, str(home), "--fd", "999")
    with (
        socket.socket(socket.AF_UNIX) as idle,
        socket.socket() as other,
        (home / "f").open("w") as f,
    ):
        for fd in (idle.fileno(), other.fileno()):
            assert "no listening UNIX" in failure(capsys, str(home), "--fd", str(fd))
        assert "no socket" in failure(capsys, str(home), "--fd", str(f.fileno()))


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_orderly_end(home: Path, number: signal.Signals) -> None:
    with daemon(str(home), "--socket", f"{home}/s") as process, connect(home / "s") as guest:
        guest.handshake()
        guest.init()
        assert guest.getattr(ROOT).ino == home.stat().st_ino
        process.send_signal(number)

        assert process.wait(DEADLINE) == 0
        assert guest.is_disconnected()
        assert not (home / "s").exists()


def test_socket_of_a_group(home: Path) -> None:
    group = grp.getgrgid(os.getegid())
    with daemon(str(home), "--socket", f"{home}/s", "--socket-group", group.gr_name):
        info = (home / "s").stat()
        assert info.st_mode & 0o777 == 0o660
        assert info.st_gid == group.gr_gid


def test_no_such_group(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    words = (str(home), "--socket", f"{home}/s", "--socket-group", "no such")
    assert "there is no group 'no such' (check path and group)" in failure(capsys, *words)
    assert not (home / "s").exists()


def test_a_group_that_the_host_does_not_admit_leaves_no_socket(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not your group")

    monkeypatch.setattr(os, "chown", refuse)
    words = (str(home), "--socket", f"{home}/s", "--socket-group", grp.getgrgid(0).gr_name)
    assert "not your group (check path and group)" in failure(capsys, *words)
    assert not (home / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "limit"), [("0", 700), ("500", 500)])
def test_limit_of_descriptors(home: Path, wanted: str, limit: int) -> None:
    command = [
        "sh",
        "-c",
        'ulimit -S -n 700; exec "$@"',
        "sh",
        *COMMAND,
        str(home),
        "--sandbox=none",
    ]
    command += ["--socket", f"{home}/s", "--rlimit-nofile", wanted]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        assert b"listening" in process.stderr.readline()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    assert re.search(rf"^Max open files +{limit} ", limits, re.MULTILINE)
    room = re.search(r"^FDSize:\s*(\d+)$", status, re.MULTILINE)
    assert room
    assert int(room[1]) >= limit


def test_socket_is_private(home: Path) -> None:
    with daemon(str(home), "--socket", f"{home}/s"):
        assert (home / "s").stat().st_mode & 0o077 == 0


def test_stale_socket_is_replaced(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{home}/s")
    with daemon(str(home), "--socket", f"{home}/s"), connect(home / "s") as guest:
        guest.handshake()


@pytest.mark.slow
def test_a_killed_daemon_can_be_started_again(home: Path) -> None:
    for _ in range(2):
        with daemon(str(home), "--socket", f"{home}/s"), connect(home / "s") as guest:
            guest.handshake()
    assert (home / "s").exists()


def test_another_daemons_socket_is_left_alone(home: Path) -> None:
    with daemon(str(home), "--socket", f"{home}/s") as process:
        (home / "s").unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(f"{home}/s")
            process.terminate()
            assert process.wait(DEADLINE) == 0
            assert (home / "s").exists()


def test_inherited_socket(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{home}/s")
        listener.listen()
        with (
            daemon(str(home), "--fd", str(listener.fileno()), fds=(listener.fileno(),)) as process,
            connect(home / "s") as guest,
        ):
            guest.handshake()
            process.terminate()
            assert process.wait(DEADLINE) == 0
    assert (home / "s").exists(), "its file is not ours"


@pytest.mark.slow
def test_once(home: Path) -> None:
    with daemon(str(home), "--socket", f"{home}/s", "--once") as process:
        with connect(home / "s") as guest:
            guest.handshake()
        assert process.wait(DEADLINE) == 0
    assert not (home / "s").exists()


@pytest.mark.slow
def test_guests_come_and_go_and_descriptors_with_them(home: Path) -> None:
    (home / "dir").mkdir()
    for number in range(30):
        (home / "dir" / str(number)).touch()
    with daemon(str(home), "--socket", f"{home}/s") as process:
        folder = Path(f"/proc/{process.pid}/fd")
        before = len(list(folder.iterdir()))
        for _ in range(3):
            with connect(home / "s") as one, connect(home / "s") as two:
                for guest in (one, two):
                    guest.handshake()
                    guest.init()
                    guest.readdirplus(guest.opendir(guest.walk("dir")), size=32768)
                assert len(list(folder.iterdir())) > before + 60
            wait_until(
                lambda: len(list(folder.iterdir())) == before, DEADLINE, "descriptors to be closed"
            )


def test_a_broken_guest_is_one_line_in_the_log(home: Path) -> None:
    with daemon(str(home), "--socket", f"{home}/s") as process:
        with connect(home / "s") as guest:
            guest.send_raw(b"\xff" * 12)
            assert guest.is_disconnected()
        with connect(home / "s") as guest:
            guest.handshake()
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert log == (
        "vfsmount serve: WARNING: guest 1: vhost-user version 3, expected 1; "
        "closing its connection\n"
    )


@pytest.mark.slow
def test_it_starts_without_an_event_loop() -> None:
    code = (
        "import sys, vfsmount.hostd.cli\n"
        "heavy = {'trio', 'pyfuse3', 'asyncio', 'argparse', 'vfsmount.client'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY, check=True
    )
    assert found.stdout == b"[]\n"
