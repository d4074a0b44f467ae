"""Random operations on one file, compared after each step with a plain model of it in memory.

    python -m benchmarks.fsx MOUNTED_FILE --steps 1000000 --seed 7

Reads, writes, appends, truncations, memory maps, fsyncs, closes and re-opens, renames: what a
program does, in an order that no program would. The same seed gives the same steps. A difference
ends it with the last steps and where the first wrong byte is.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Mismatch", "Run"]

#: Bytes that the file may have; spans several messages and many pages.
LIMIT = 300_000
#: Most bytes of one operation.
LENGTH = 70_000


class Mismatch(AssertionError):
    """The file is not what it should be."""


class Run:
    """One file and its model.

    Args:
        path: The file; made anew.
        seed: Decides everything.
        maps: Use memory maps as well.
    """

    def __init__(self, path: str | os.PathLike[str], seed: int, *, maps: bool = True) -> None:
        self._path = os.fspath(path)
        self._random = random.Random(seed)
        self._model = bytearray()
        self._last: deque[str] = deque(maxlen=12)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._other = os.open(self._path, os.O_RDWR)
        steps: list[tuple[int, Callable[[], str]]] = [
            (30, self._read), (40, self._write), (6, self._append), (8, self._truncate),
            (3, self._fsync), (4, self._reopen), (4, self._size), (1, self._rename),
            (1, self._empty),
        ]  # fmt: skip
        if maps:
            steps += [(6, self._map_read), (6, self._map_write)]
        self._steps = [step for weight, step in steps for _ in range(weight)]

    def run(self, steps: int) -> None:
        """Do that many random steps.

        Raises:
            Mismatch: With what was done last.
        """
        for _ in range(steps):
            self._last.append(self._random.choice(self._steps)())

    def close(self) -> bytes:
        """Close the file and return what should be in it."""
        os.close(self._fd)
        os.close(self._other)
        return bytes(self._model)

    def _fd_to_use(self) -> int:
        return self._random.choice((self._fd, self._fd, self._other))

    def _range(self) -> tuple[int, int]:
        at = self._random.randrange(max(1, len(self._model)))
        if self._random.random() < 0.1:
            at = self._random.randrange(LIMIT - LENGTH)
        length = self._random.choice((1, 7, 100, 4096, 5000, LENGTH))
        return at, min(self._random.randint(1, length), LIMIT - at)

    def _compare(self, what: str, at: int, found: bytes) -> None:
        expected = self._model[at : at + len(found)]
        if found == expected:
            return
        wrong = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        steps = "\n  ".join(self._last)
        raise Mismatch(
            f"{what}: byte {at + wrong} of {len(self._model)} is wrong, after\n  {steps}"
        )

    def _read(self) -> str:
        at, length = self._range()
        found = os.pread(self._fd_to_use(), length, at)
        what = f"read {length} at {at}"
        if len(found) != len(self._model[at : at + length]):
            steps = "\n  ".join(self._last)
            raise Mismatch(f"{what}: {len(found)} bytes of {len(self._model)}, after\n  {steps}")
        self._compare(what, at, found)
        return what

    def _put(self, at: int, data: bytes) -> None:
        if at > len(self._model):
            self._model.extend(bytes(at - len(self._model)))
        self._model[at : at + len(data)] = data

    def _write(self) -> str:
        at, length = self._range()
        data = self._random.randbytes(length)
        assert os.pwrite(self._fd_to_use(), data, at) == length
        self._put(at, data)
        return f"write {length} at {at}"

    def _append(self) -> str:
        length = min(self._random.randint(1, 5000), LIMIT - len(self._model))
        data = self._random.randbytes(max(0, length))
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        self._put(len(self._model), data)
        return f"append {len(data)}"

    def _truncate(self) -> str:
        size = self._random.randrange(LIMIT)
        if self._random.random() < 0.7:
            size = self._random.randrange(len(self._model) + 1)
        os.ftruncate(self._fd_to_use(), size)
        del self._model[size:]
        self._model.extend(bytes(size - len(self._model)))
        return f"truncate to {size}"

    def _empty(self) -> str:
        os.close(os.open(self._path, os.O_WRONLY | os.O_TRUNC))
        self._model.clear()
        return "open with O_TRUNC"

    def _fsync(self) -> str:
        os.fsync(self._fd_to_use())
        return "fsync"

    def _reopen(self) -> str:
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)
        return "close and open"

    def _rename(self) -> str:
        other = self._path + ".other"
        os.rename(self._path, other)
        self._path, renamed = other, self._path
        os.rename(other, renamed)
        self._path = renamed
        return "rename there and back"

    def _size(self) -> str:
        found = os.fstat(self._fd_to_use()).st_size
        if found != len(self._model):
            steps = "\n  ".join(self._last)
            raise Mismatch(f"size {found}, not {len(self._model)}, after\n  {steps}")
        return "fstat"

    def _map_read(self) -> str:
        if not self._model:
            return "nothing to map"
        with mmap.mmap(self._fd, len(self._model), prot=mmap.PROT_READ) as mapped:
            at, length = self._range()
            self._compare(f"mapped read {length} at {at}", at, mapped[at : at + length])
        return f"mapped read {length} at {at}"

    def _map_write(self) -> str:
        if not self._model:
            return "nothing to map"
        with mmap.mmap(self._fd, len(self._model)) as mapped:
            at, length = self._range()
            length = min(length, len(self._model) - at)
            if length <= 0:
                return "nothing to map"
            data = self._random.randbytes(length)
            mapped[at : at + length] = data
            mapped.flush()
        self._put(at, data)
        return f"mapped write {length} at {at}"


def main() -> None:
    """Run it on a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=str)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-maps", action="store_true", help="without memory maps")
    given = parser.parse_args()
    run = Run(given.path, given.seed, maps=not given.no_maps)
    run.run(given.steps)
    run.close()
    print(f"{given.steps} steps with seed {given.seed}: no difference")


if __name__ == "__main__":
    main()
