"""A virtual machine whose only program is ours: built, booted on a vhost-user socket, listened to.

    report = boot(initramfs, socket, log)
    report.cases["rename"]          # "ok", or what failed

Software emulation, so that it runs anywhere; the memory is a memfd that QEMU shares with the
daemon. The initial root file system holds the guest program as ``/init`` and nothing else.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket as socket_module
import stat
import subprocess
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.daemons import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["QUEUES", "Monitor", "Report", "boot", "build_initramfs", "machine_problem"]

HERE = Path(__file__).parent
KERNEL_FOLDER = REPOSITORY / ".cache" / "guest"
KERNEL = KERNEL_FOLDER / "vmlinuz"
QEMU = "qemu-system-x86_64"

#: Request queues, and CPUs to use them.
QUEUES = 2
#: Seconds that a boot with all cases may take; 15 on an idle machine.
DEADLINE = 200.0

MEMORY = "256M"
CONSOLE_DEVICE = (5, 1)
_CASE = re.compile(r"guest: case (\S+) (.*)")


class Report(NamedTuple):
    """What a guest has told.

    Attributes:
        cases: Name to ``ok`` or to what failed.
        interrupts: Name of a queue to how often it has called.
        ended: The guest came to its end.
        console: All that came over the serial line.
    """

    cases: dict[str, str]
    interrupts: dict[str, int]
    ended: bool
    console: str


def machine_problem() -> str:
    """Why no guest can be booted here; empty when one can."""
    if os.geteuid() != 0:
        return "guests act as several users: needs root"
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: run make test-guest"
    if not KERNEL.exists():
        missing = KERNEL_FOLDER / "missing"
        reason = missing.read_text().strip() if missing.exists() else "run make test-guest"
        return f"no kernel for guests: {reason}"
    return ""


def build_initramfs(folder: Path) -> Path:
    """Compile the guest program and pack it; returns the archive."""
    program = folder / "init"
    sources = [str(path) for path in sorted(HERE.glob("*.c"))]
    subprocess.run(
        ["cc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), *sources],
        check=True,
        timeout=60,
    )
    archive = folder / "initramfs"
    members = [
        *(_member(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "share")),
        _member("dev/console", stat.S_IFCHR | 0o600, device=CONSOLE_DEVICE),
        _member("init", stat.S_IFREG | 0o755, program.read_bytes()),
        _member("TRAILER!!!", 0),
    ]
    archive.write_bytes(gzip.compress(b"".join(members), 1))
    return archive


def _member(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a cpio archive in the format that the kernel unpacks ("newc")."""
    path = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdev, rdev, namesize, check
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def boot(
    initramfs: Path,
    socket: Path,
    *,
    queues: int = QUEUES,
    disturb: Mapping[str, Callable[[Monitor], None]] | None = None,
) -> Report:
    """Boot a machine with a device on ``socket`` and wait until it has powered itself off.

    Args:
        initramfs: From `build_initramfs`.
        socket: Of the daemon.
        queues: Request queues of the device.
        disturb: What to do to the machine when the guest has told of a case, once each, by case.
    """
    todo = dict(disturb or {})
    console = ""
    with TemporaryDirectory(prefix="vfsmount-guest-") as folder:
        control = Path(folder, "control")
        machine = subprocess.Popen(
            _command(initramfs, socket, queues, control),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        killer = threading.Timer(DEADLINE, machine.kill)
        killer.start()
        with machine:
            try:
                for line in machine.stdout or ():
                    console += line
                    if (found := _CASE.match(line)) and (action := todo.pop(found[1], None)):
                        with Monitor(control) as monitor:
                            action(monitor)
            finally:
                killer.cancel()
                machine.kill()
    assert not todo, f"never came to {', '.join(todo)}:\n{console[-2000:]}"
    return _understand(console)


def _command(initramfs: Path, socket: Path, queues: int, control: Path) -> list[str]:
    command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none"]
    # One thread for both CPUs: with one each, a kernel that patches its own code while the other
    # CPU runs it can meet a breakpoint that is gone already ("Oops: int3", 1 boot of hundreds).
    # It takes no longer: the daemon keeps a core for itself.
    command += ["-accel", "tcg,thread=single"]
    command += ["-machine", "q35,memory-backend=memory", "-cpu", "max"]
    command += ["-m", f"{MEMORY},slots=2,maxmem=1G", "-smp", str(QUEUES)]
    command += ["-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"]
    command += ["-chardev", f"socket,id=share,path={socket}", "-device"]
    command += [f"vhost-user-fs-pci,chardev=share,tag=share,num-request-queues={queues}"]
    command += ["-kernel", str(KERNEL), "-initrd", str(initramfs), "-serial", "stdio"]
    # A kernel that panics halts, and is killed at the deadline.
    command += ["-append", "console=ttyS0 quiet"]
    return [*command, "-qmp", f"unix:{control},server=on,wait=off"]


class Monitor:
    """The machine's control socket: QEMU's monitor protocol, one command at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self.say("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def say(self, command: str, **arguments: Any) -> None:
        """Give a command that must succeed; events that come meanwhile are nobody's business."""
        message = json.dumps({"execute": command, "arguments": arguments})
        self._socket.sendall(message.encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return
        raise AssertionError(f"the machine went away at {command}")


def _understand(console: str) -> Report:
    console = console.replace("\r", "")
    cases = _CASE.findall(console)
    interrupts = re.findall(r"guest: interrupts (\S+) (\d+)", console)
    return Report(
        cases=dict(cases),
        interrupts={name: int(count) for name, count in interrupts},
        ended="guest: end" in console,
        console=console,
    )
