"""Whole mounts: real kernel, real daemons, one process; how they begin, answer and end."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.client.mount.conftest import Outcome
from tests.client.mount.running import ENVIRONMENT, RunningMount, running_mount
from tests.support.daemons import REPOSITORY, Daemon, start_daemon
from tests.support.environment import unavailable
from tests.support.other_user import NOBODY, run_as_other_user
from tests.support.wait import wait_until
from vfsmount.client.mount.control import folders
from vfsmount.client.mount.mountinfo import MountEntry, locate, read_mountinfo
from vfsmount.errors import ExitCode

Command = Callable[..., Outcome]

# What users get of a mount that has lost its daemon or its process: ENOTCONN or EIO; ECONNABORTED
# after an abort.
LOST = re.compile("not connected|Input/output|connection abort")

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory worth sharing."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "hello").write_text("hello, world\n")
    (path / "folder").mkdir()
    return path


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


@pytest.fixture
def mount(mnt: Path, source: Path) -> Iterator[RunningMount]:
    """The plainest mount: ``vfsmount MNT --source DIR``."""
    with running_mount(mnt, "--source", source) as running:
        yield running


@pytest.fixture
def daemon(source: Path, daemon_kind: str) -> Iterator[Daemon]:
    with start_daemon(daemon_kind, source) as running:
        yield running


def entry_of(path: Path) -> MountEntry:
    entry = locate(str(path))[1]
    assert entry is not None
    return entry


@contextmanager
def held_open(path: Path, flags: int) -> Iterator[int]:
    """A descriptor whose close may fail, as it does on a mount that is gone."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class TestAnyDaemon:
    def test_mount_use_and_end(self, daemon: Daemon, mnt: Path, source: Path) -> None:
        with running_mount(mnt, "--socket", daemon.socket) as mount:
            assert sorted(os.listdir(mnt)) == ["folder", "hello"]
            assert (mnt / "hello").read_text() == "hello, world\n"
            (mnt / "new").write_bytes(b"x" * 300_000)
            entry = entry_of(mnt)
            assert (entry.fstype, entry.source) == ("fuse.vfsmount", str(daemon.socket))
            assert "default_permissions" in entry.super_options
            assert mount.stop() == ExitCode.OK
        assert not mount.is_mounted
        assert (source / "new").read_bytes() == b"x" * 300_000

    def test_status(self, daemon: Daemon, mnt: Path, command: Command) -> None:
        words = ["--cache", "none", "--dax", "off"]
        with running_mount(mnt, "--socket", daemon.socket, *words) as mount:
            (mnt / "hello").read_text()
            status = mount.status()
            table = command("status", mnt).stdout
        assert status["engine"] == "relay"
        assert status["state"] == "serving"
        assert status["pid"] == mount.process.pid
        assert status["cache"]["mode"] == "none"
        assert status["origin"]["socket"] == str(daemon.socket)
        assert "VERSION_1" in status["daemon"]["virtio_features"]["acked"]
        assert "ASYNC_READ" in status["daemon"]["init_flags"]
        assert status["in_flight"] == 0
        assert status["uptime_s"] > 0
        lookup = status["requests"]["LOOKUP"]
        assert set(lookup) == {"count", "errors", "mean_us", "p50_us", "p99_us"}
        assert lookup["count"] >= 1
        assert status["requests"]["READ"]["p99_us"] > 0
        assert f"{daemon.socket} on {mnt}" in table
        assert "LOOKUP" in table

    def test_probe(self, daemon: Daemon, command: Command) -> None:
        done = command("probe", "--socket", daemon.socket, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        import json

        facts = json.loads(done.stdout)["daemon"]
        assert "VERSION_1" in facts["virtio_features"]["offered"]
        assert facts["num_request_queues"] >= 1
        assert facts["fuse_version"].startswith("7.")
        assert facts["max_write"] >= 4096

    def test_killed_daemon(self, daemon: Daemon, mnt: Path) -> None:
        with running_mount(mnt, "--socket", daemon.socket) as mount:
            (mnt / "hello").read_text()
            daemon.kill()
            began = time.monotonic()
            with pytest.raises(OSError, match=LOST) as caught:
                os.stat(mnt / "other")
            assert caught.value.errno in (errno.ENOTCONN, errno.EIO)
            assert time.monotonic() - began < 2
            wait_until(lambda: mount.status()["state"] == "daemon lost", 10, "the loss to be seen")
            assert mount.is_mounted
            subprocess.run(["umount", str(mnt)], check=True)
            assert mount.wait() == ExitCode.DAEMON_LOST
            assert mount.log.count("the daemon is lost") == 1


class TestSource:
    def test_daemon_lives_as_long_as_the_mount(self, mount: RunningMount, mnt: Path) -> None:
        assert (mnt / "hello").read_text() == "hello, world\n"
        daemon = mount.status()["origin"]["daemon_pid"]
        assert not has_ended(daemon)
        assert mount.stop() == ExitCode.OK
        assert has_ended(daemon)

    def test_killed_daemon_is_named(self, mount: RunningMount, mnt: Path) -> None:
        os.kill(mount.status()["origin"]["daemon_pid"], signal.SIGKILL)
        with pytest.raises(OSError, match=LOST):
            os.stat(mnt / "other")
        wait_until(lambda: "the daemon is lost" in mount.log, 10, "the loss to be logged")
        assert "its process ended with signal SIGKILL" in mount.log
        assert mount.status()["state"] == "daemon lost"
        assert mount.stop() == ExitCode.DAEMON_LOST
        assert not mount.is_mounted

    def test_idle_mount_notices_the_loss(self, mount: RunningMount) -> None:
        os.kill(mount.status()["origin"]["daemon_pid"], signal.SIGKILL)
        wait_until(lambda: "the daemon is lost" in mount.log, 10, "the loss to be logged")
        assert mount.stop() == ExitCode.DAEMON_LOST

    def test_killed_command_takes_the_daemon_along(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        daemon = mount.status()["origin"]["daemon_pid"]
        mount.kill(signal.SIGKILL)
        mount.wait()
        wait_until(lambda: has_ended(daemon), 10, "the daemon to end")
        with pytest.raises(OSError, match="not connected"):
            os.listdir(mnt)
        assert "is a dead mount" in command(mnt, "--source", "/tmp").error
        device = entry_of(mnt).device
        assert command("umount", mnt).returncode == 0
        assert not mount.is_mounted
        assert not any(os.path.exists(f"{place}/{device}.sock") for place in folders(os.geteuid()))

    def test_ctrl_c_in_a_terminal(self, mnt: Path, source: Path) -> None:
        # A terminal signals the whole foreground group: the daemon must survive until the flush.
        with running_mount(mnt, "--source", source) as mount:
            (mnt / "new").write_text("written before Ctrl-C")
            os.killpg(mount.process.pid, signal.SIGINT)
            assert mount.wait() == ExitCode.OK
        assert (source / "new").read_text() == "written before Ctrl-C"


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals(self, mount: RunningMount, number: int) -> None:
        assert mount.stop(number) == ExitCode.OK
        assert not mount.is_mounted

    def test_unmounted_by_others(self, mount: RunningMount, mnt: Path) -> None:
        subprocess.run(["umount", str(mnt)], check=True)
        assert mount.wait() == ExitCode.OK

    def test_umount_waits_for_the_process(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        done = command("umount", mnt)
        assert (done.returncode, done.stderr) == (0, "")
        assert has_ended(mount.process.pid)
        assert mount.wait() == ExitCode.OK

    def test_umount_of_a_busy_mount_names_the_user(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        with (mnt / "hello").open():
            done = command("umount", mnt)
            assert done.returncode == ExitCode.MOUNT
            assert f"{mnt} is busy, used by {os.getpid()} (" in done.error
            assert f"vfsmount umount --lazy {mnt}" in done.error
            assert mount.is_mounted
        assert command("umount", mnt).returncode == 0

    def test_lazy_umount_lets_users_finish(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        with (mnt / "hello").open() as file:
            assert command("umount", "--lazy", mnt).returncode == 0
            assert not mount.is_mounted
            assert file.read() == "hello, world\n"
            assert mount.process.poll() is None
        assert mount.wait() == ExitCode.OK

    def test_forced_umount_cuts_users_off(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        with held_open(mnt / "hello", os.O_RDONLY) as held:
            done = command("umount", "--force", mnt)
            assert (done.returncode, done.stderr) == (0, "")
            with pytest.raises(OSError, match=LOST):
                os.fsync(held)
        assert not mount.is_mounted
        assert mount.process.poll() is not None

    def test_signal_while_busy_flushes_and_cuts_off(
        self, mount: RunningMount, mnt: Path, source: Path
    ) -> None:
        with held_open(mnt / "new", os.O_WRONLY | os.O_CREAT) as held:
            os.write(held, b"data")
            assert mount.stop() == ExitCode.OK
            assert not mount.is_mounted
            with pytest.raises(OSError, match=LOST):
                os.fstat(held)
        assert (source / "new").read_bytes() == b"data"
        assert f"{mnt} is busy, used by {os.getpid()} (" in mount.log

    def test_second_signal_ends_a_mount_that_hangs(self, mount: RunningMount, mnt: Path) -> None:
        daemon = mount.status()["origin"]["daemon_pid"]
        os.kill(daemon, signal.SIGSTOP)
        child = subprocess.Popen(["stat", str(mnt / "other")], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: mount.status()["in_flight"] > 0, 10, "a request to hang")
            mount.kill(signal.SIGTERM)
            wait_until(lambda: "SIGTERM: unmounting" in mount.log, 10, "the first signal")
            mount.kill(signal.SIGTERM)
            mount.wait()
            assert not mount.is_mounted
            assert child.wait(10) != 0
        finally:
            child.kill()
            child.wait()

    def test_status_and_forced_umount_of_a_mount_that_hangs(
        self, mount: RunningMount, mnt: Path, command: Command
    ) -> None:
        os.kill(mount.status()["origin"]["daemon_pid"], signal.SIGSTOP)
        child = subprocess.Popen(["stat", str(mnt / "other")], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: mount.status()["in_flight"] > 0, 10, "a request to hang")
            (pending,) = mount.status()["pending"]
            assert pending["opcode"] in ("LOOKUP", "GETATTR")
            assert "is a vfsmount mount already" in command(mnt, "--source", "/tmp").error
            refused = command("umount", mnt)
            assert refused.error.endswith(f"if it hangs: vfsmount umount --force {mnt}")
            assert command("umount", "--force", mnt).returncode == 0
            assert not mount.is_mounted
            assert child.wait(10) != 0
        finally:
            child.kill()
            child.wait()


class TestReadiness:
    def test_background(self, mnt: Path, source: Path, command: Command, tmp_path: Path) -> None:
        mnt.mkdir()
        words = ["--source", source, "--pid-file", tmp_path / "pid", "--log-file", tmp_path / "log"]
        done = command(mnt, "--daemonize", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(os.listdir(mnt)) == ["folder", "hello"]
        pid = int((tmp_path / "pid").read_text())
        assert command("umount", mnt).returncode == 0
        assert has_ended(pid)
        assert not (tmp_path / "pid").exists()
        assert f"{source} is mounted on {mnt}" in (tmp_path / "log").read_text()

    def test_mount_helper(self, mnt: Path, source: Path, tmp_path: Path, command: Command) -> None:
        """As /sbin/mount.fuse3 calls us for a line of fstab."""
        if not Path("/sbin/mount.fuse3").exists() or os.geteuid() != 0:
            unavailable("mount.fuse3 is not installed, or this is not root")
        mnt.mkdir()
        program = tmp_path / "vfsmount"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfsmount "$@"\n')
        program.chmod(0o755)
        done = subprocess.run(
            [
                "/sbin/mount.fuse3",
                str(source),
                str(mnt),
                "-t",
                "fuse.vfsmount",
                "-o",
                "cache=none,nosuid,_netdev,nofail,x-systemd.automount",
            ],
            env=ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        entry = entry_of(mnt)
        assert (entry.fstype, entry.source) == ("fuse.vfsmount", str(source))
        assert "nosuid" in entry.options
        assert command("umount", mnt).returncode == 0

    def test_root_of_a_user_namespace(self, mnt: Path, source: Path) -> None:
        mnt.mkdir()
        done = subprocess.run(
            [
                *("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"),
                '$0 -m vfsmount "$1" "$2"; cat "$2/hello"; $0 -m vfsmount umount "$2"',
                *(sys.executable, source, mnt),
            ],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (0, "hello, world\n"), done.stderr

    def test_systemd(self, mnt: Path, source: Path, tmp_path: Path) -> None:
        address = tmp_path / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(address))
            manager.settimeout(10)
            environment = {"NOTIFY_SOCKET": str(address)}
            with running_mount(mnt, "--source", source, environment=environment) as mount:
                ready = manager.recv(1000).decode().splitlines()
                assert ready[:2] == ["READY=1", f"MAINPID={mount.process.pid}"]
                mount.kill(signal.SIGTERM)
                assert manager.recv(1000) == b"STOPPING=1"
                assert mount.wait() == ExitCode.OK

    def test_pid_file_that_cannot_be_written_leaves_nothing(
        self, mnt: Path, source: Path, command: Command, tmp_path: Path
    ) -> None:
        mnt.mkdir()
        folder = tmp_path / "pids"
        folder.mkdir()
        # A directory in the place of the new file: only the last step can find out.
        first = 'mkdir "$1/pid.$$" && shift && exec "$@"'
        words = [mnt, "--source", source, "--pid-file", folder / "pid"]
        done = command(*words, by=["sh", "-c", first, "sh", str(folder)])
        assert done.returncode == ExitCode.USAGE
        assert done.stderr.splitlines()[-1].startswith("vfsmount: error: --pid-file ")
        assert locate(str(mnt))[1] is None


class TestOptions:
    def test_read_only_and_labels(self, mnt: Path, source: Path) -> None:
        words = ["-o", r"ro,noexec,fsname=my\,data,subtype=mine"]
        with running_mount(mnt, "--source", source, *words) as mount:
            entry = entry_of(mnt)
            assert (entry.fstype, entry.source) == ("fuse.mine", "my,data")
            assert {"ro", "noexec"} <= set(entry.options)
            with pytest.raises(OSError, match="Read-only"):
                (mnt / "new").touch()
            assert mount.status()["mountpoint"] == str(mnt)
            assert mount.stop() == ExitCode.OK

    @pytest.mark.parametrize("engine", ["relay", "pyfuse3"])
    def test_debug_shows_each_request(self, mnt: Path, source: Path, engine: str) -> None:
        with running_mount(mnt, "--source", source, "--engine", engine, "-d") as running:
            for name in ("absent", "missing"):
                assert not (mnt / name).exists()
        refusals = re.findall(r"LOOKUP on node 1: ENOENT, [0-9]+ us\n", running.log)
        assert len(refusals) == 2
        assert "debug: [vfsmount.channel.trace] SET_OWNER\n" in running.log

    def test_cpus_count_for_both_processes(self, mnt: Path, source: Path) -> None:
        cpu = min(os.sched_getaffinity(0))
        with running_mount(mnt, "--source", source, "--cpus", str(cpu)) as mount:
            assert os.sched_getaffinity(mount.process.pid) == {cpu}
            assert os.sched_getaffinity(mount.status()["origin"]["daemon_pid"]) == {cpu}

    def test_every_kernel_flag_is_known_to_libfuse(self, mnt: Path, source: Path) -> None:
        words = "ro,suid,dev,noexec,sync,dirsync,noatime"
        with running_mount(mnt, "--source", source, "-o", words) as mount:
            options = set(entry_of(mnt).options)
            assert {"ro", "noexec", "noatime"} <= options
            assert not {"nosuid", "nodev"} & options
            assert mount.stop() == ExitCode.OK
        words = "rw,nosuid,nodev,exec,async,atime"
        with running_mount(mnt, "--source", source, "-o", words) as mount:
            assert {"rw", "nosuid", "nodev"} <= set(entry_of(mnt).options)
            assert mount.stop() == ExitCode.OK

    def test_strange_paths(self, tmp_path: Path) -> None:
        source = tmp_path / os.fsdecode(b"s, \\ \xff")
        source.mkdir()
        (source / "file").touch()
        mnt = tmp_path / os.fsdecode(b"m \t\\ \xff")
        with running_mount(mnt, "--source", source) as mount:
            assert os.listdir(mnt) == ["file"]
            assert mount.status()["state"] == "serving"
            assert mount.stop() == ExitCode.OK

    def test_mount_point_behind_a_link(self, tmp_path: Path, source: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with running_mount(tmp_path / "link", "--source", source) as mount:
            assert mount.status()["mountpoint"] == str(tmp_path / "real")
            assert os.listdir(tmp_path / "real")
            assert mount.stop() == ExitCode.OK

    def test_second_mount_on_the_same_place_is_refused(
        self, mount: RunningMount, mnt: Path, command: Command, source: Path
    ) -> None:
        done = command(mnt, "--source", source)
        assert done.returncode == ExitCode.MOUNT
        assert done.error == (
            f"{mnt} is a vfsmount mount already; unmount it first: vfsmount umount {mnt}"
        )

    def test_refusal_of_the_kernel_is_one_line(
        self, mnt: Path, source: Path, command: Command
    ) -> None:
        if os.geteuid() != 0:
            unavailable("taking away the right to mount needs root")
        mnt.mkdir()
        caps = ["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
        done = command(mnt, "--source", source, by=["setpriv", *caps, "--no-new-privs"])
        assert done.returncode == ExitCode.MOUNT
        assert done.error.startswith(f"cannot mount on {mnt}: ")
        assert "ermitted" in done.error or "ermission" in done.error


AS_USER = """
vfsmount() { "$PYTHON" -m vfsmount "$@"; echo "status $?"; }
vfsmount "$MNT" --source "$SOURCE" --daemonize --cache none
cat "$MNT/hello"
cd "$MNT" && vfsmount umount "$MNT"
cd / && vfsmount umount "$MNT"
vfsmount "$MNT" --source "$SOURCE" --daemonize -o allow_other
"""


class TestUnprivileged:
    def test_life_of_a_mount_by_fusermount3(self, open_folder: Path) -> None:
        """Another user, who may read our code, in a namespace where all may open /dev/fuse."""
        mnt, source = open_folder / "mnt", open_folder / "source"
        for path in (mnt, source):
            path.mkdir()
            os.chown(path, NOBODY, NOBODY)
        (source / "hello").write_text("hello, world\n")
        places = {"MNT": str(mnt), "SOURCE": str(source)}
        done = run_as_other_user(open_folder, AS_USER, ENVIRONMENT | places)
        busy, other = (line for line in done.stderr.splitlines() if ": error: " in line)
        assert done.stdout.splitlines() == [
            "status 0",
            "hello, world",
            "status 32",
            "status 0",
            "status 32",
        ]
        assert busy.startswith(f"vfsmount: error: {mnt} is busy, used by ")
        assert "option allow_other only allowed if 'user_allow_other' is set" in other


class TestBeginning:
    """What goes wrong or is ended before the mount is ready."""

    def start(self, mnt: Path, *words: str | Path) -> subprocess.Popen[str]:
        mnt.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "vfsmount", str(mnt), *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=ENVIRONMENT,
        )

    def test_signal_during_the_handshake(self, mnt: Path, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "silent"))
            listener.listen()
            process = self.start(mnt, "--socket", tmp_path / "silent", "-d")
            link, _ = listener.accept()
            with link:
                link.recv(100)  # it speaks: so it listens for signals, too
                process.terminate()
                _, printed = process.communicate(timeout=20)
        assert process.returncode == ExitCode.MOUNT
        last = printed.splitlines()[-1]
        assert last == "vfsmount: error: ended by a signal before the mount was ready"

    def test_mute_daemon(self, mnt: Path, source: Path) -> None:
        with start_daemon("bundled", source) as daemon:
            daemon.pause()
            process = self.start(mnt, "--socket", daemon.socket)
            _, printed = process.communicate(timeout=40)
            assert process.returncode == ExitCode.HANDSHAKE
            (line,) = printed.splitlines()
            assert "10 s" in line
            daemon.resume()


def test_nothing_of_ours_is_mounted_in_the_end(tmp_path: Path) -> None:
    assert not [e for e in read_mountinfo() if e.mountpoint.startswith(str(tmp_path.parent))]
