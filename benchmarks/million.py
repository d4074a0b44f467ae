"""A million names and attributes: the memory of who remembers them, after all were listed.

    python -m benchmarks --series million            (--quick: 200,000)

Files without contents, a thousand in each folder, shared by the bundled daemon. Every folder is
listed with the attributes of its entries, as ``find -size`` does: by a mount of each engine in mode
``always``, and by a cached view of a session. The bar is 400 MiB for each process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import trio

import vfsmount
from tests.support.daemons import start_daemon
from tests.support.mounts import start_mount

__all__ = ["measure"]

BAR_MIB = 400
_PER_FOLDER = 1000


def measure(count: int, work: Path) -> dict[str, int]:
    """Return the resident memory of each subject, MiB; print them.

    Args:
        count: Files.
        work: Where they are made, on a tmpfs.
    """
    home = Path(tempfile.mkdtemp(prefix="vfsmount-million-", dir=work))
    host = home / "host"
    found = {}
    try:
        _make(host, count)
        print(f"\n{count:,} names and attributes, resident memory (bar: {BAR_MIB} MiB)")
        with start_daemon("bundled", host) as daemon:
            for engine in ("relay", "pyfuse3"):
                path = home / engine
                path.mkdir()
                with start_mount(path, daemon.socket, cache="always", engine=engine) as mount:
                    assert _list(path) == count
                    found[engine] = mount.rss >> 20
                print(f"{engine:12}{found[engine]:6} MiB", flush=True)
            found["cached"] = trio.run(_list_cached, daemon.socket, count) >> 20
            print(f"{'cached view':12}{found['cached']:6} MiB", flush=True)
    finally:
        shutil.rmtree(home)
    return found


def _make(host: Path, count: int) -> None:
    for number in range(0, count, _PER_FOLDER):
        folder = host / f"folder-{number // _PER_FOLDER:04}"
        folder.mkdir(parents=True)
        for entry in range(min(_PER_FOLDER, count - number)):
            os.mknod(folder / f"file-{entry:04}")


def _list(path: Path) -> int:
    total = 0
    with os.scandir(path) as folders:
        for folder in folders:
            with os.scandir(folder) as entries:
                total += sum(entry.stat(follow_symlinks=False).st_nlink for entry in entries)
    return total


async def _list_cached(socket: Path, count: int) -> int:
    """Return what the view adds to this process, bytes."""
    before = _resident()
    policy = vfsmount.CachePolicy.for_mode("always")
    async with vfsmount.connect(socket) as guest:
        with guest.cached(policy, names=count + count // _PER_FOLDER + 1) as view:
            total = 0
            for folder in await view.listdir():
                total += len(await view.scandir(folder))
            assert total == count
            return _resident() - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
