"""Random operations on one file, and the obvious model of it: a bytearray.

    python -m benchmarks.fsx EMPTY_MOUNTED_FOLDER --steps 1000000 --seed 7

The idea is that of fsx, the file system exerciser: every read, by message or by memory map, must
give what the model says, and after fsync or close the host's copy must be the model, byte for byte,
if there is a host to look at. Two handles are open all the time.
A run is decided by its seed and the number of steps alone.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Exerciser"]

#: Bytes; large enough for several messages and for read-ahead, small enough to compare often.
LARGEST = 256 << 10
PAGE = mmap.PAGESIZE
#: Steps that a failure shows.
SHOWN = 30

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Exerciser:
    """A file under test and its model.

    Args:
        folder: The mounted folder.
        host: The same folder at the host; None where nobody can look there.
        seed: Decides everything.
        through: A write is at the host when write(2) returns; that is looked at, too.

    Attributes:
        counts: How often each operation was done.
        refused: Operations that the mount does not have; they are left out from then on.
    """

    def __init__(
        self, folder: Path, host: Path | None, seed: int, *, through: bool = False
    ) -> None:
        self.seed = seed
        self.through = through
        self.counts: dict[str, int] = {}
        self.refused: set[str] = set()
        self._random = random.Random(seed)
        self._folder, self._host = folder, host
        self._name = "a"
        self._model = bytearray()
        self._fd = self._open(os.O_CREAT | os.O_EXCL)
        self._other = self._open()
        self._done: deque[str] = deque(maxlen=SHOWN)
        self._steps: dict[str, tuple[int, Callable[[], str]]] = {
            "read": (20, self.read),
            "write": (20, self.write),
            "append": (6, self.append),
            "truncate": (8, self.truncate),
            "empty": (1, self.empty),
            "map read": (8, self.map_read),
            "map write": (8, self.map_write),
            "punch hole": (4, self.punch_hole),
            "rename": (2, self.rename),
            "reopen": (3, self.reopen),
            "fsync": (2, self.fsync),
            "stat": (4, self.stat),
        }

    def run(self, steps: int) -> None:
        """Do that many steps.

        Raises:
            AssertionError: The file is not as the model; with the last steps and how to repeat.
        """
        names = list(self._steps)
        weights = [weight for weight, _ in self._steps.values()]
        for number in range(steps):
            (name,) = self._random.choices(names, weights)
            if name in self.refused:
                continue
            self.counts[name] = self.counts.get(name, 0) + 1
            try:
                self._done.append(f"{number}: {name} {self._steps[name][1]()}")
            except (AssertionError, OSError) as error:
                raise AssertionError(self._report(number, name, error)) from error
        self.reopen()

    def close(self) -> None:
        """Close the file."""
        open_now, self._fd, self._other = (self._fd, self._other), -1, -1
        for fd in open_now:
            if fd >= 0:
                os.close(fd)

    def _report(self, number: int, name: str, error: Exception) -> str:
        lines = [f"step {number}, {name}, of seed {self.seed}: {error}", "before that:"]
        return "\n  ".join([*lines, *self._done])

    def _open(self, flags: int = 0) -> int:
        return os.open(self._folder / self._name, os.O_RDWR | flags, 0o600)

    def _either(self) -> int:
        return self._random.choice((self._fd, self._fd, self._other))

    # --- steps; each returns what it did, for the report ---

    def read(self) -> str:
        at, size = self._range(len(self._model) + PAGE)
        self._same(os.pread(self._either(), size, at), at, size)
        return f"{size} at {at}"

    def write(self) -> str:
        at, size = self._range(LARGEST)
        data = self._random.randbytes(size)
        assert os.pwrite(self._either(), data, at) == size
        self._extend(at)
        self._model[at : at + size] = data
        self._written(at, size)
        return f"{size} at {at}, now {len(self._model)}"

    def append(self) -> str:
        size = min(self._random.randint(1, 3 * PAGE), LARGEST - len(self._model))
        data = self._random.randbytes(size)
        fd = self._open(os.O_APPEND)
        try:
            assert os.write(fd, data) == size
        finally:
            os.close(fd)
        self._model += data
        self._written(len(self._model) - size, size)
        return f"{size}, now {len(self._model)}"

    def truncate(self) -> str:
        size = self._random.choice((0, len(self._model) // 2, self._random.randint(0, LARGEST)))
        if self._random.random() < 0.5:
            os.ftruncate(self._either(), size)
        else:
            os.truncate(self._folder / self._name, size)
        del self._model[size:]
        self._extend(size)
        return f"to {size}"

    def empty(self) -> str:
        os.close(self._open(os.O_TRUNC))
        self._model.clear()
        return ""

    def map_read(self) -> str:
        if not self._model:
            return "of nothing"
        at, size = self._range(len(self._model))
        with mmap.mmap(self._fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
            self._same(view[at : at + size], at, size)
        return f"{size} at {at}"

    def map_write(self) -> str:
        if not self._model:
            return "of nothing"
        at, size = self._range(len(self._model))
        size = min(size, len(self._model) - at)
        data = self._random.randbytes(size)
        try:
            view = mmap.mmap(self._fd, 0)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            self.refused.add("map write")
            return "refused"
        with view:
            view[at : at + size] = data
        self._model[at : at + size] = data
        return f"{size} at {at}"

    def punch_hole(self) -> str:
        at, size = self._range(LARGEST)
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        if _libc.fallocate(self._fd, mode, at, size):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(number, os.strerror(number))
            self.refused.add("punch hole")
            return "refused"
        end = min(at + size, len(self._model))
        if at < end:
            self._model[at:end] = bytes(end - at)
        return f"{size} at {at}"

    def rename(self) -> str:
        old, self._name = self._name, self._random.choice("abc")
        os.rename(self._folder / old, self._folder / self._name)
        assert os.listdir(self._folder) == [self._name]
        return f"{old} to {self._name}"

    def reopen(self) -> str:
        self.close()
        self._at_host()
        self._fd, self._other = self._open(), self._open()
        return ""

    def fsync(self) -> str:
        os.fsync(self._either())
        self._at_host()
        return ""

    def stat(self) -> str:
        assert os.fstat(self._either()).st_size == len(self._model)
        assert os.stat(self._folder / self._name).st_size == len(self._model)
        return ""

    # --- the model ---

    def _range(self, end: int) -> tuple[int, int]:
        """A random range below ``end``: often small, sometimes at pages' borders."""
        at = self._random.randrange(end)
        if self._random.random() < 0.3:
            at -= at % PAGE
        size = self._random.choice((1, 100, PAGE, 5 * PAGE, 40 * PAGE))
        return at, self._random.randint(1, min(size, end - at))

    def _extend(self, size: int) -> None:
        if size > len(self._model):
            self._model += bytes(size - len(self._model))

    def _same(self, found: bytes, at: int, size: int) -> None:
        check_same(found, bytes(self._model[at : at + size]), at)

    def _written(self, at: int, size: int) -> None:
        if self.through and self._host is not None:
            with (self._host / self._name).open("rb") as file:
                file.seek(at)
                self._same(file.read(size), at, size)

    def _at_host(self) -> None:
        if self._host is not None:
            check_same((self._host / self._name).read_bytes(), bytes(self._model), 0)


def check_same(found: bytes, expected: bytes, at: int) -> None:
    """Compare, and tell where the first difference is instead of what both are."""
    if found == expected:
        return
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((n for n, (one, two) in pairs if one != two), min(len(found), len(expected)))
    raise AssertionError(
        f"{len(found)} bytes for {len(expected)}, different from position {at + first}: "
        f"{found[first : first + 8]!r} for {expected[first : first + 8]!r}"
    )


def main() -> None:
    """Run it in a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    exerciser = Exerciser(given.folder, None, given.seed)
    exerciser.run(given.steps)
    exerciser.close()
    print(f"{given.steps} steps with seed {given.seed}: no difference")


if __name__ == "__main__":
    main()
