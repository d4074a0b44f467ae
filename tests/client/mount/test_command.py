"""The command as a process: help, and every mistake in one line with its own exit status."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

import vfsmount
from tests.client.mount.conftest import Outcome
from tests.support.daemons import REPOSITORY
from vfsmount import cli
from vfsmount.client.mount.options import MOUNT_GROUPS
from vfsmount.errors import ExitCode

if TYPE_CHECKING:
    from pathlib import Path

Command = Callable[..., Outcome]


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    """An empty directory to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


class TestHelp:
    def test_shows_all_options_commands_and_exit_codes(self, command: Command) -> None:
        done = command("--help")
        assert (done.returncode, done.stderr) == (0, "")
        for option in (option for group in MOUNT_GROUPS for option in group.options):
            assert option.spelling in done.stdout
        for name in cli.COMMANDS:
            assert f"vfsmount {name} " in done.stdout
        status = done.stdout.partition("Exit status:")[2]
        listed = {int(line.split()[0]) for line in status.splitlines() if line.strip()}
        assert listed == set(ExitCode)
        assert max(map(len, done.stdout.splitlines())) <= 100

    @pytest.mark.parametrize("name", ["umount", "status", "probe"])
    def test_of_a_command(self, command: Command, name: str) -> None:
        done = command(name, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Usage: vfsmount {name} ")

    def test_wins_over_what_is_missing(self, command: Command) -> None:
        assert command("-h", "--cache", "none").returncode == 0

    def test_version(self, command: Command) -> None:
        assert command("--version").stdout == f"vfsmount {vfsmount.__version__}\n"

    @pytest.mark.parametrize(
        ("words", "heavy"),
        [
            (["--help"], {"trio", "pyfuse3", "argparse", "vfsmount.channel", "vfsmount.hostd"}),
            (["status", "/"], {"trio", "pyfuse3", "vfsmount.channel"}),
            (["umount", "/"], {"trio", "pyfuse3", "vfsmount.channel"}),
            (
                ["serve", "--help"],
                {"trio", "pyfuse3", "vfsmount.channel", "vfsmount.client.session"},
            ),
        ],
    )
    def test_loads_little(self, words: list[str], heavy: set[str]) -> None:
        script = "import sys; from vfsmount.cli import main; main(sys.argv[1:]); "
        script += "print(*sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=True,
        )
        assert not heavy & set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the mount point is missing; write vfsmount MNT --socket PATH, or vfsmount MNT"),
        (["MNT"], "neither --socket nor --source is given; give --socket PATH of a running"),
        (["MNT", "--socket", "a", "--source", "b"], "--socket and --source exclude each other;"),
        (["MNT", "--socket", "a", "--cache", "some"], "--cache: 'some' is not one of none, auto,"),
        (["MNT", "--socket", "a", "--timeout", "x"], "--timeout: 'x' is not a number of seconds"),
        (["MNT", "--soket", "a"], "unknown option --soket; did you mean --socket?"),
        (["MNT", "--socket", "a", "-o", "nosiud"], "unknown mount option 'nosiud'; did you mean "),
        (["MNT", "--socket", "a", "--ready-fd", "77"], "--ready-fd 77 is not a descriptor open"),
        (["MNT", "--socket", "a", "--cpus", "4095"], "--cpus: there is no CPU 4095 to run on; "),
        (
            ["MNT", "--socket", "a", "--pid-file", "/no/p"],
            "--pid-file: there is no directory /no; make it first",
        ),
        (
            ["MNT", "--socket", "a", "--log-file", "/no/l"],
            "--log-file /no/l: No such file or directory; name another",
        ),
        (["MNT", "--source", "/no/folder"], "--source /no/folder does not exist; name a directory"),
        (
            ["MNT", "--source", "/dev/null"],
            "--source /dev/null is not a directory; name a directory",
        ),
        (["MNT", "--source", "MNT"], "--source and mount point are the same directory"),
        (["status"], "exactly one mount point is needed"),
        (["status", "a", "b"], "exactly one mount point is needed"),
        (["status", "MNT", "--jason"], "unknown option --jason; did you mean --json?"),
        (["umount"], "exactly one mount point is needed"),
        (["umount", "--farce", "MNT"], "unknown option --farce; did you mean --force?"),
        (["unmount", "-l", "MNT"], "unknown command unmount; did you mean 'vfsmount umount'?"),
        (["statu", "MNT"], "unknown command statu; did you mean 'vfsmount status'?"),
        (["mount", "a", "MNT"], "unknown command mount; did you mean 'vfsmount DIR MNT'?"),
        (["a", "MNT", "-o", "remount,ro"], "what is mounted cannot be changed (remount); unmount"),
        (["MNT", "--socket", "a", "--dax", "65T"], "--dax: '65T' is neither off nor a size from"),
        (["probe"], "probe needs a socket; write vfsmount probe --socket PATH"),
        (["probe", "--socket"], "--socket needs a value; write --socket PATH"),
    ],
)
def test_wrong_use(command: Command, mnt: Path, words: list[str], line: str) -> None:
    done = command(*(str(mnt) if word == "MNT" else word for word in words))
    assert done.returncode == ExitCode.USAGE
    assert done.error.startswith(line)
    assert done.stdout == ""


class TestMountPoint:
    def test_missing(self, command: Command, mnt: Path) -> None:
        done = command(mnt / "no", "--socket", "a")
        assert (done.returncode, done.error) == (
            32,
            f"mount point {mnt}/no does not exist; create it: mkdir -p {mnt}/no",
        )

    def test_not_a_directory(self, command: Command, mnt: Path) -> None:
        (mnt / "file").touch()
        done = command(mnt / "file", "--socket", "a")
        assert (done.returncode, done.error) == (
            32,
            f"mount point {mnt}/file is not a directory; name a directory that you may enter",
        )

    def test_not_empty_is_a_warning(self, command: Command, mnt: Path) -> None:
        (mnt / "file").touch()
        done = command(mnt, "--socket", mnt / "none")
        warning, error = done.stderr.splitlines()
        assert warning == (
            f"vfsmount: warning: {mnt} is not empty; its files are hidden while mounted"
        )
        assert error.startswith("vfsmount: error: ")
        assert done.returncode == ExitCode.CONNECT

    def test_named_like_a_command(self, command: Command, mnt: Path) -> None:
        done = command("./serve", "--socket", "a")
        assert "mount point" in done.error
        assert done.returncode == ExitCode.MOUNT

    @pytest.mark.skipif(os.geteuid() != 0, reason="hiding /dev/fuse needs root")
    @pytest.mark.parametrize("words", [["MNT", "--socket", "a"], ["umount", "MNT"]])
    def test_no_mount_table(self, mnt: Path, words: list[str]) -> None:
        called = [str(mnt) if word == "MNT" else word for word in words]
        script = 'umount -l /proc && exec "$0" -m vfsmount "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, sys.executable, *called],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert done.returncode == ExitCode.MOUNT
        assert done.stderr == (
            "vfsmount: error: cannot read the mount table, /proc/self/mountinfo: No such file or"
            " directory; mount proc on /proc\n"
        )

    def test_no_device(self, mnt: Path) -> None:
        words = f"{sys.executable} -m vfsmount {mnt} --socket a"
        script = f"mount -t tmpfs none /dev && exec {words}"
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )
        assert done.returncode == ExitCode.MOUNT, done.stderr
        assert done.stderr == (
            "vfsmount: error: /dev/fuse does not exist; load it with 'modprobe fuse'; "
            "a container must be given it: --device /dev/fuse\n"
        )


class Peer(threading.Thread):
    """Somebody at the other end of a socket who is no daemon."""

    def __init__(self, path: Path, behave: Callable[[socket.socket], None]) -> None:
        super().__init__(daemon=True)
        self.path = path
        self._behave = behave
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()

    def run(self) -> None:
        link, _ = self._listener.accept()
        with link, suppress(ConnectionResetError):
            self._behave(link)

    @classmethod
    @contextmanager
    def at(cls, path: Path, behave: Callable[[socket.socket], None]) -> Iterator[Path]:
        peer = cls(path, behave)
        peer.start()
        yield path
        peer.join(20)
        peer._listener.close()
        assert not peer.is_alive()


def hang_up(link: socket.socket) -> None:
    """Close at once."""


def hang_up_later(link: socket.socket) -> None:
    """Close after the first message."""
    link.recv(100)


def speak_http(link: socket.socket) -> None:
    """Answer as something else would."""
    link.recv(100)
    link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    while link.recv(1000):
        pass


def stay_silent(link: socket.socket) -> None:
    """Never answer."""
    while link.recv(1000):
        pass


@pytest.mark.parametrize("way", ["mount", "probe", "daemonize"])
class TestConnection:
    """Each of these leaves nothing behind, which every test is checked for."""

    def attempt(self, command: Command, way: str, path: Path, mnt: Path) -> Outcome:
        if way == "probe":
            return command("probe", "--socket", path)
        return command(mnt, "--socket", path, *(["--daemonize"] if way == "daemonize" else []))

    def test_no_such_socket(self, command: Command, way: str, mnt: Path) -> None:
        done = self.attempt(command, way, mnt / "none", mnt)
        assert done.returncode == ExitCode.CONNECT
        assert f"{mnt}/none" in done.error

    def test_not_a_socket(self, command: Command, way: str, mnt: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        done = self.attempt(command, way, tmp_path / "file", mnt)
        assert done.returncode == ExitCode.CONNECT
        assert "not a socket" in done.error

    def test_nobody_listens(self, command: Command, way: str, mnt: Path, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "dead"))
        done = self.attempt(command, way, tmp_path / "dead", mnt)
        assert done.returncode == ExitCode.CONNECT
        assert str(tmp_path / "dead") in done.error

    @pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
    def test_permission_denied(self, way: str, open_folder: Path) -> None:
        (open_folder / "mnt").mkdir()
        (open_folder / "closed").mkdir(mode=0o700)
        words = [str(open_folder / "mnt"), "--socket", str(open_folder / "closed" / "s")]
        if way == "probe":
            words = ["probe", *words[1:]]
        done = run_as_nobody(words + ["--daemonize"] * (way == "daemonize"))
        assert "ermission denied" in done.error
        assert done.returncode == ExitCode.CONNECT

    @pytest.mark.parametrize("behave", [hang_up, hang_up_later, speak_http])
    def test_something_else(
        self,
        command: Command,
        way: str,
        mnt: Path,
        tmp_path: Path,
        behave: Callable[[socket.socket], None],
    ) -> None:
        with Peer.at(tmp_path / "peer", behave) as path:
            done = self.attempt(command, way, path, mnt)
        assert done.returncode == ExitCode.HANDSHAKE
        assert done.error


@pytest.mark.slow
def test_no_answer(command: Command, mnt: Path, tmp_path: Path) -> None:
    with Peer.at(tmp_path / "peer", stay_silent) as path:
        done = command(mnt, "--socket", path)
    assert done.returncode == ExitCode.HANDSHAKE
    assert "10 s" in done.error


def run_as_nobody(words: list[str]) -> Outcome:
    """Run the command as another user, who may be unable to reach the code: it is loaded before."""
    script = """
import os, sys
import vfsmount.cli, vfsmount.client.mount.logs
import vfsmount.client.mount.launch, vfsmount.client.mount.life, vfsmount.client.mount.probe
vfsmount.client.mount.mountpoint.FUSE_DEVICE = "/dev/null"  # the real one may be closed to others
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(vfsmount.cli.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=30,
    )
    return Outcome(done.args, done.returncode, done.stdout, done.stderr)


class TestMain:
    """The outermost function, in this process."""

    def test_bug_shows_a_traceback_and_has_its_own_status(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(words: list[str]) -> int:
            raise ZeroDivisionError

        monkeypatch.setitem(cli.COMMANDS, "status", broken)
        assert cli.main(["status"]) == ExitCode.INTERNAL
        assert "Traceback" in capsys.readouterr().err

    def test_ctrl_c(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(words: list[str]) -> int:
            raise KeyboardInterrupt

        monkeypatch.setitem(cli.COMMANDS, "status", interrupted)
        assert cli.main(["status"]) == 130

    @pytest.mark.parametrize("words", [["--help"], ["--version"], ["umount", "--help"]])
    def test_output_that_cannot_be_written(self, words: list[str]) -> None:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "vfsmount", *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                check=False,
            )
        line = "vfsmount: error: cannot write to stdout: No space left on device\n"
        assert (done.returncode, done.stderr) == (ExitCode.USAGE, line)

    def test_started_without_standard_streams(self) -> None:
        shell = '"$@" <&- >&- 2>&-'
        code = "import os, sys, vfsmount.cli as c; s = c.main(['umount', '/']); "
        code += "os._exit(s + os.open('/dev/null', 0))"  # the lowest descriptor that is free
        done = subprocess.run(
            ["sh", "-c", shell, "sh", sys.executable, "-c", code], cwd=REPOSITORY, check=False
        )
        assert done.returncode == ExitCode.MOUNT + 3

    def test_reader_that_leaves(self) -> None:
        script = "import vfsmount.cli as c; raise SystemExit(c.main(['--help']))"
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-u", "-c", script],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            check=False,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")
