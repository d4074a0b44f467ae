"""A virtual machine whose only program is ours: built, booted on a vhost-user socket, listened to.

    report = boot(initramfs, socket, log)
    report.cases["rename"]          # "ok", or what failed

Software emulation, so that it runs anywhere; the memory is a memfd that QEMU shares with the
daemon. The initial root file system holds the guest program as ``/init`` and nothing else.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.support.daemons import REPOSITORY

__all__ = ["QUEUES", "Report", "boot", "build_initramfs", "machine_problem"]

HERE = Path(__file__).parent
KERNEL_FOLDER = REPOSITORY / ".cache" / "guest"
KERNEL = KERNEL_FOLDER / "vmlinuz"
QEMU = "qemu-system-x86_64"

#: Request queues, and CPUs to use them.
QUEUES = 2
#: Seconds that a boot with all cases may take; 15 on an idle machine.
DEADLINE = 150.0

MEMORY = "256M"
CONSOLE_DEVICE = (5, 1)


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


def boot(initramfs: Path, socket: Path, *, queues: int = QUEUES) -> Report:
    """Boot a machine with a device on ``socket`` and wait until it has powered itself off."""
    command = [QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-machine", "q35,accel=tcg,memory-backend=memory", "-cpu", "max"]
    command += ["-m", MEMORY, "-smp", str(QUEUES)]
    command += ["-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on"]
    command += ["-chardev", f"socket,id=share,path={socket}", "-device"]
    command += [f"vhost-user-fs-pci,chardev=share,tag=share,num-request-queues={queues}"]
    command += ["-kernel", str(KERNEL), "-initrd", str(initramfs), "-serial", "stdio"]
    command += ["-append", "console=ttyS0 quiet panic=-1"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
            check=False,
        )
        console = done.stdout
    except subprocess.TimeoutExpired as error:
        console = (error.stdout or b"") + b"\n(ended by us: it took too long)\n"
    return _understand(console.decode(errors="replace").replace("\r", ""))


def _understand(console: str) -> Report:
    cases = re.findall(r"guest: case (\S+) (.*)", console)
    interrupts = re.findall(r"guest: interrupts (\S+) (\d+)", console)
    return Report(
        cases=dict(cases),
        interrupts={name: int(count) for name, count in interrupts},
        ended="guest: end" in console,
        console=console,
    )
