"""The daemon's sandbox, as real processes: what it can reach, what rights it has, how it ends."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hostd.frontend import Disconnected, Frontend
from tests.hostd.guest import ROOT, expect_errno
from tests.support.wait import wait_until
from vfsmount.errors import ExitCode
from vfsmount.hostd import seccomp
from vfsmount.wire.fuse import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
]

COMMAND = [sys.executable, "-m", "vfsmount.hostd"]
REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 20.0
NOBODY = 65534
#: chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap: as virtiofsd 1.13.
VIRTIOFSDS = 0x880000DB
DAC_READ_SEARCH = 1 << 2
SANDBOXES = ("namespace", "chroot", "none")


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder with a short path: ``share``, and next to it a canary."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "share").mkdir()
        (home / "share" / "file").write_bytes(b"inside")
        (home / "canary").write_bytes(b"outside")
        yield home
        assert (home / "canary").read_bytes() == b"outside"


class Running:
    """A daemon that listens at ``home/s``."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self.process = process
        self.path = home / "s"

    def rest_of_log(self) -> bytes:
        """What it prints from now on to its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    @property
    def served_by(self) -> int:
        """The process that serves: the parent's only child, or itself."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid

    @contextmanager
    def guest(self) -> Iterator[Frontend]:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(self.path))
        with Frontend(sock) as guest:
            guest.handshake()
            guest.init()
            yield guest

    def status(self, *names: str) -> list[str]:
        text = Path(f"/proc/{self.served_by}/status").read_text()
        found = (re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE) for name in names)
        return [match[1] for match in found if match]

    def capabilities(self) -> int:
        permitted, effective, bounding = self.status("CapPrm", "CapEff", "CapBnd")
        assert permitted == effective
        assert int(bounding, 16) == 0
        return int(effective, 16)

    def namespaces(self) -> set[str]:
        """Those that it does not share with us."""
        return {
            kind
            for kind in ("mnt", "net", "pid", "user")
            if os.readlink(f"/proc/{self.served_by}/ns/{kind}")
            != os.readlink(f"/proc/self/ns/{kind}")
        }


@contextmanager
def daemon(
    home: Path,
    *arguments: str,
    prefix: tuple[str, ...] = (),
    command: Sequence[str] = COMMAND,
    lines: int = 0,
) -> Iterator[Running]:
    """Run one; it is expected to print that many lines before it listens."""
    process = subprocess.Popen(
        [*prefix, *command, f"{home}/share", "--socket", f"{home}/s", *arguments],
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert process.stderr is not None
    try:
        for _ in range(lines):
            assert process.stderr.readline()
        line = process.stderr.readline()
        assert b"listening" in line, line + process.stderr.read()
        yield Running(process, home)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def with_statfs(what: str) -> list[str]:
    """The command of a daemon that does something else when it is asked for STATFS."""
    code = (
        "import os, sys\n"
        "from vfsmount.hostd import cli\n"
        "from vfsmount.hostd.fs import dispatch\n"
        "from vfsmount.wire.fuse import Opcode\n"
        f"dispatch._PLAIN[Opcode.STATFS] = lambda *_: {what}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code]


def failure(
    home: Path,
    *arguments: str,
    prefix: tuple[str, ...] = (),
    command: Sequence[str] = COMMAND,
    status: int = ExitCode.USAGE,
) -> str:
    words = [*prefix, *command, f"{home}/share", "--socket", f"{home}/s", *arguments]
    ended = subprocess.run(words, capture_output=True, cwd=REPOSITORY, timeout=DEADLINE)
    assert ended.returncode == status
    assert not (home / "s").exists()
    return ended.stderr.decode()


def with_code(code: str) -> list[str]:
    """The command of a daemon that runs something first."""
    start = "import sys\nfrom vfsmount.hostd import cli\n"
    return [sys.executable, "-c", f"{start}{code}\nsys.exit(cli.main(sys.argv[1:]))"]


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before open(2), or between that and read(2)
        return True


# --- what it can reach ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SANDBOXES)
def test_every_operation_works(home: Path, kind: str) -> None:
    (home / "share" / "sub").mkdir()
    with daemon(home, "--sandbox", kind) as running, running.guest() as guest:
        node = guest.walk("file")
        fh = guest.open(node, os.O_RDWR)
        assert guest.read(fh, 0, 100) == b"inside"
        guest.write(fh, 0, b"IN")
        guest.link(node, guest.walk("sub"), b"other")
        guest.setxattr(node, b"user.a", b"value")
        assert guest.listxattr(node) == b"user.a\0"
        guest.symlink(ROOT, b"out", b"../canary")
        guest.uid, guest.gid = 1000, 1000
        (home / "share").chmod(0o777)
        assert guest.mkdir(ROOT, b"mine").attr.uid == 1000
        names = {entry.name for entry in guest.readdirplus(guest.opendir())}
    assert names == {b".", b"..", b"file", b"sub", b"out", b"mine"}
    assert (home / "share" / "sub" / "other").read_bytes() == b"INside"


def test_nothing_outside_has_a_name(home: Path) -> None:
    with daemon(home) as running:
        assert running.namespaces() == {"mnt", "net", "pid"}
        root = Path(f"/proc/{running.served_by}/root")
        assert sorted(path.name for path in root.iterdir()) == ["file"]
        assert sorted(os.listdir(f"{root}/..")) == ["file"]
        # One mount is left, and the working directory leads nowhere but back to itself.
        mounts = Path(f"/proc/{running.served_by}/mountinfo").read_text().splitlines()
        assert [line.split()[4] for line in mounts] == ["/"]
        cwd = os.stat(f"/proc/{running.served_by}/cwd")
        assert os.path.samestat(cwd, os.stat(f"/proc/{running.served_by}/cwd/.."))
        assert not _leads_outside(running.served_by, home)


def test_chroot_has_the_share_as_its_root(home: Path) -> None:
    with daemon(home, "--sandbox", "chroot") as running:
        assert running.namespaces() == set()
        assert os.listdir(f"/proc/{running.served_by}/root") == ["file"]


def _leads_outside(pid: int, home: Path) -> list[str]:
    """Descriptors of folders through which the canary could be opened."""
    folder = Path(f"/proc/{pid}/fd")
    ways = [
        f"{folder}/{entry}{up}/{name}"
        for entry in os.listdir(folder)
        for up in ("", "/..", "/../..")
        for name in ("canary", os.fspath(home / "canary")[1:])
    ]
    return [way for way in ways if os.path.exists(way)]


def test_mounts_below_the_share_come_along(home: Path) -> None:
    (home / "share" / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", home / "share" / "sub"], check=True)
    try:
        (home / "share" / "sub" / "there").touch()
        with daemon(home) as running, running.guest() as guest:
            assert guest.lookup(ROOT, b"sub").attr.flags == 1  # FUSE_ATTR_SUBMOUNT
            guest.walk("sub/there")
            guest.mkdir(guest.walk("sub"), b"new")
    finally:
        subprocess.run(["umount", home / "share" / "sub"], check=True)


def test_the_root_itself_can_be_shared(home: Path) -> None:
    command = [*COMMAND, "/", "--socket", f"{home}/s"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stderr is not None
    with process, process.stderr:
        assert b"listening" in process.stderr.readline()
        with Running(process, home).guest() as guest:
            node = guest.walk(os.fspath(home / "canary")[1:])
            assert guest.read(guest.open(node), 0, 100) == b"outside"
        process.terminate()
        assert process.wait(DEADLINE) == 0
    assert not (home / "s").exists()


def test_an_internal_error_is_logged_from_inside(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its traceback, for which the interpreter may have to load something (Python 3.13)."""
    with daemon(home, command=with_statfs("1 / 0")) as running, running.guest() as guest:
        for _ in range(2):
            with expect_errno("EIO"):
                guest.call(Opcode.STATFS, ROOT)
        guest.walk("file")
        running.process.terminate()
        log = running.rest_of_log()
    assert log.count(b"ERROR: STATFS failed") == log.count(b"ZeroDivisionError") == 2
    assert b"ModuleNotFoundError" not in log


# --- rights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SANDBOXES)
def test_rights(home: Path, kind: str) -> None:
    with daemon(home, "--sandbox", kind, "--inode-file-handles=never") as running:
        assert running.capabilities() == VIRTIOFSDS
        assert running.status("NoNewPrivs", "Seccomp") == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), VIRTIOFSDS | DAC_READ_SEARCH),
        (("--modcaps=+sys_admin:-CAP_CHOWN:-dac_read_search",), VIRTIOFSDS - 1 | 1 << 21),
    ],
)
def test_capabilities_asked_for(home: Path, arguments: tuple[str, ...], expected: int) -> None:
    with daemon(home, *arguments) as running:
        assert running.capabilities() == expected


def test_mandatory_handles_take_their_capability(home: Path) -> None:
    line = failure(home, "--inode-file-handles=mandatory", "--modcaps=-dac_read_search")
    assert "no file handles" in line
    assert "--inode-file-handles prefer" in line


@pytest.mark.parametrize(("action", "mode"), [("none", "0"), ("log", "2"), ("trap", "2")])
def test_actions_of_the_filter(home: Path, action: str, mode: str) -> None:
    with daemon(home, "--seccomp", action) as running, running.guest() as guest:
        assert running.status("NoNewPrivs", "Seccomp") == ["1", mode]
        guest.walk("file")


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ("os.execv('/bin/true', ['true'])", -signal.SIGSYS),
        ("ctypes.CDLL(None).ptrace(0, 0, 0, 0)", -signal.SIGSYS),
        ("ctypes.CDLL(None).unshare(0x10000000)", -signal.SIGSYS),
        ("ctypes.CDLL(None).connect(0, 0, 0)", -signal.SIGSYS),
        ("socket.socket(socket.AF_UNIX)", 1),  # refused, for a syslog that restarts
        ("sys.exit(ctypes.CDLL(None).syscall(5000) != -1)", 0),  # of a kernel to come
        ("os.sched_setaffinity(0, [0])", 1),
        ("(lambda t: (t.start(), t.join()))(threading.Thread(target=print))", 0),
    ],
)
def test_what_the_filter_forbids(call: str, status: int) -> None:
    code = (
        "import ctypes, os, socket, sys, threading\n"
        "from vfsmount.hostd import seccomp, syscalls\n"
        "restrict = seccomp.prepare('kill')\n"
        f"syscalls.set_no_new_privs(); restrict(); {call}"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert ended.returncode == status, ended.stderr


def test_without_its_library_there_is_no_filter(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("libseccomp is not installed")
    monkeypatch.setattr("ctypes.CDLL", _raise_oserror)
    seccomp.prepare("kill")()
    assert "Seccomp:\t0" in Path("/proc/self/status").read_text()


def _raise_oserror(_name: str) -> None:
    raise OSError("no such library")


def test_a_call_that_is_forbidden_says_what_to_do(home: Path) -> None:
    command = with_statfs("os.execv('/file', ['file'])")
    with daemon(home, command=command) as running, running.guest() as guest:
        with pytest.raises(Disconnected):
            guest.call(Opcode.STATFS, ROOT)
        assert running.process.wait(DEADLINE) == -signal.SIGSYS
        assert b"--seccomp log" in running.rest_of_log()


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["namespace", "chroot"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_orderly_end(home: Path, kind: str, number: signal.Signals) -> None:
    with daemon(home, "--sandbox", kind) as running, running.guest() as guest:
        running.process.send_signal(number)
        assert running.process.wait(DEADLINE) == 0
        assert guest.is_disconnected()
        assert not running.path.exists()


def test_the_child_dies_with_its_parent(home: Path) -> None:
    with daemon(home) as running:
        child = running.served_by
        assert child != running.process.pid
        running.process.kill()
        wait_until(lambda: has_ended(child), DEADLINE, "the serving process to end")


@pytest.mark.parametrize("kind", SANDBOXES)
def test_the_table_of_descriptors_need_not_grow(home: Path, kind: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with daemon(home, "--sandbox", kind) as running:
        assert int(*running.status("FDSize")) >= min(4096, most)


def test_the_parent_ends_as_its_child(home: Path) -> None:
    with daemon(home) as running:
        os.kill(running.served_by, signal.SIGKILL)
        assert running.process.wait(DEADLINE) == -signal.SIGKILL
        assert not running.path.exists()


def test_once(home: Path) -> None:
    with daemon(home, "--once") as running:
        with running.guest():
            pass
        assert running.process.wait(DEADLINE) == 0
        assert not running.path.exists()


def test_the_parent_keeps_no_rights(home: Path) -> None:
    with daemon(home) as running:
        text = Path(f"/proc/{running.process.pid}/status").read_text()
    assert "CapEff:\t0000000000000002" in text  # dac_override, to remove the socket's file
    assert "CapBnd:\t0000000000000000" in text


def test_failing_inside_is_told_outside(home: Path) -> None:
    shutil.rmtree(home / "share")
    assert "cannot share" in failure(home)


# --- mere users ----------------------------------------------------------------------------------

AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
CANNOT = (*AS_NOBODY, "--bounding-set=-all", "--no-new-privs")


@pytest.fixture
def homely(home: Path) -> Path:
    """The same, and it belongs to nobody."""
    for path in (home, home / "share", home / "share" / "file"):
        os.chown(path, NOBODY, NOBODY)
    reachable = subprocess.run(
        [*AS_NOBODY, *COMMAND, "--help"], cwd=REPOSITORY, capture_output=True
    )
    if reachable.returncode:
        pytest.skip("our interpreter is out of reach of other users")
    return home


def test_mere_users_get_a_user_namespace(homely: Path) -> None:
    with daemon(homely, prefix=AS_NOBODY) as running, running.guest() as guest:
        assert running.namespaces() == {"mnt", "net", "pid", "user"}
        assert running.status("Uid", "NoNewPrivs", "Seccomp") == [
            "\t".join(["65534"] * 4),
            "1",
            "2",
        ]
        assert running.capabilities() == VIRTIOFSDS | DAC_READ_SEARCH
        assert not _leads_outside(running.served_by, homely)
        guest.uid = 1000
        attr = guest.mkdir(ROOT, b"dir").attr
        assert (attr.uid, attr.gid) == (NOBODY, NOBODY)
        guest.setxattr(guest.walk("file"), b"user.a", b"value")
    assert (homely / "share" / "dir").stat().st_uid == NOBODY


def test_mere_users_may_go_without(homely: Path) -> None:
    with daemon(homely, "--sandbox", "none", prefix=AS_NOBODY) as running, running.guest() as guest:
        assert running.namespaces() == set()
        assert running.status("CapEff", "NoNewPrivs", "Seccomp") == ["0" * 16, "1", "2"]
        guest.mkdir(ROOT, b"dir")


def test_mere_users_cannot_chroot(homely: Path) -> None:
    line = failure(homely, "--sandbox", "chroot", prefix=AS_NOBODY)
    assert "chroot: Operation not permitted (run as root" in line


def test_users_of_a_user_namespace(home: Path) -> None:
    shutil.chown(home / "share", 100000, 100000)
    maps = ("--uid-map", ":0:100000:2000:", "--gid-map", ":0:100000:2000:")
    with daemon(home, *maps) as running, running.guest() as guest:
        assert running.status("Uid") == ["\t".join(["100000"] * 4)]
        assert "user" in running.namespaces()
        guest.uid, guest.gid = 1000, 1001
        (home / "share").chmod(0o777)
        attr = guest.mkdir(ROOT, b"dir").attr
        assert (attr.uid, attr.gid) == (1000, 1001)
        guest.uid = 5000
        with expect_errno("EINVAL"):
            guest.mkdir(ROOT, b"other")
    info = (home / "share" / "dir").stat()
    assert (info.st_uid, info.st_gid) == (101000, 101001)


def test_one_that_is_not_allowed_says_what_to_do(homely: Path) -> None:
    line = failure(homely, "--uid-map", ":0:0:10:", prefix=AS_NOBODY)
    assert "cannot map these users and groups" in line
    assert "subuid(5)" in line


def test_a_host_without_namespaces(home: Path) -> None:
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    line = failure(home, prefix=without)
    assert "cannot isolate the daemon: pid namespace: Operation not permitted" in line
    assert "--sandbox none" in line
    words = [*without, *COMMAND, f"{home}/share", "--socket", f"{home}/s", "--sandbox", "auto"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        assert b"Operation not permitted; going on without" in process.stderr.readline()
        assert b"listening" in process.stderr.readline()
        process.terminate()
        assert process.wait(DEADLINE) == 0


RAISES = "def refuse(*_):\n raise OSError({error}, 'out of it')\n"


@pytest.mark.parametrize(
    ("what", "cure"),
    [
        ("os.fork", "--sandbox none"),
        ("os.pidfd_open", "--sandbox none"),
        ("seccomp._check", "--seccomp none"),
    ],
)
def test_what_the_system_refuses_is_one_line(home: Path, what: str, cure: str) -> None:
    code = (
        f"import os\nfrom vfsmount.hostd import seccomp\n{RAISES.format(error=11)}{what} = refuse"
    )
    line = failure(home, command=with_code(code))
    assert line.count("\n") == 1
    assert "cannot isolate the daemon: " in line
    assert "out of it" in line
    assert cure in line


def test_no_helper_for_the_user_namespace_is_one_line(homely: Path) -> None:
    code = f"import os\n{RAISES.format(error=11)}os.fork = refuse"
    line = failure(homely, prefix=AS_NOBODY, command=with_code(code))
    assert "out of it" in line
    assert line.count("\n") == 1


def test_a_tool_for_users_that_does_not_end(homely: Path) -> None:
    tool = homely / "newuidmap"
    tool.write_text("#!/bin/sh\nexec sleep 100\n")
    tool.chmod(0o755)
    code = (
        "import os\nfrom vfsmount.hostd import sandbox\nsandbox._MAP_SECONDS = 0.1\n"
        f"os.environ['PATH'] = '{homely}:' + os.environ['PATH']"
    )
    line = failure(homely, "--uid-map", ":0:0:10:", prefix=AS_NOBODY, command=with_code(code))
    assert "newuidmap does not end" in line
    assert "cannot map these users and groups" in line


def test_without_namespaces_no_descriptor_is_left_over(home: Path) -> None:
    code = f"from vfsmount.hostd import syscalls\n{RAISES.format(error=1)}syscalls.mount = refuse"
    with daemon(home, "--sandbox", "auto", command=with_code(code), lines=1) as running:
        folder = Path(f"/proc/{running.served_by}/fd")
        places = [os.readlink(path) for path in folder.iterdir()]
        assert sum(place.startswith("/proc") for place in places) == 1  # the share's own


FAILS_AT = """
from vfsmount.hostd import syscalls
real, calls = syscalls.{call}, []
def refuse_once(*arguments):
    calls.append(1)
    if len(calls) == {number}:
        raise OSError(1, 'out of it')
    return real(*arguments)
syscalls.{call} = refuse_once
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [("mount", 1), ("mount", 2), ("mount", 4), ("pivot_root", 1), ("detach", 1), ("detach", 3)],
)
def test_a_sandbox_that_fails_half_way_is_none(home: Path, call: str, number: int) -> None:
    trap = home / "share" / "proc" / "self" / "fd"
    trap.mkdir(parents=True)
    command = with_code(FAILS_AT.format(call=call, number=number))
    assert "out of it" in failure(home, command=command)

    with daemon(home, "--sandbox", "auto", command=command, lines=1) as running:
        assert "mnt" not in running.namespaces()
        pid = running.served_by
        assert os.readlink(f"/proc/{pid}/root") == os.readlink("/proc/self/root")
        places = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert sum(place.startswith("/proc") for place in places) == 1  # the share's own
        assert os.fspath(trap) not in places
        with running.guest() as guest:
            nodeid = guest.walk("file")
            assert guest.read(guest.open(nodeid, os.O_RDONLY), 0, 100) == b"inside"


def test_no_way_back_from_half_a_sandbox_is_the_end(home: Path) -> None:
    code = FAILS_AT.format(call="pivot_root", number=1) + (
        "def stay(*_):\n raise OSError(1, 'here to stay')\nsyscalls.enter_mount_namespace = stay"
    )
    line = failure(home, "--sandbox", "auto", command=with_code(code), status=ExitCode.INTERNAL)
    assert "out of it; no way back: here to stay (" in line


# --- systemd -------------------------------------------------------------------------------------


def test_syslog_from_inside(home: Path) -> None:
    if os.path.lexists("/dev/log"):
        pytest.skip("there is a syslog here")
    assert "cannot log to syslog" in failure(home, "--syslog")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind("/dev/log")
        syslog.settimeout(DEADLINE)
        try:
            with daemon(home, "--syslog", "--log-level=info") as running, running.guest():
                assert b"guest 1 connected" in syslog.recv(1000)
        finally:
            os.unlink("/dev/log")


def test_socket_activation(home: Path) -> None:
    code = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ |= {'LISTEN_FDS': sys.argv[2], 'LISTEN_PID': str(os.getpid())}\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])"
    )
    words = ["-m", "vfsmount.hostd", "--shared-dir", f"{home}/share"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{home}/s")
        listener.listen()
        fd = listener.fileno()
        for count in ("1", "2"):
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(fd), count, *words],
                stderr=subprocess.PIPE,
                cwd=REPOSITORY,
                pass_fds=(fd,),
            )
            assert process.stderr is not None
            with process, process.stderr:
                line = process.stderr.readline()
                if count == "2":
                    assert b"systemd passes 2 sockets" in line
                    continue
                assert b"listening on descriptor 3" in line
                with Running(process, home).guest() as guest:
                    guest.walk("file")
                process.terminate()
                assert process.wait(DEADLINE) == 0
    assert (home / "s").exists(), "its file is not ours"
