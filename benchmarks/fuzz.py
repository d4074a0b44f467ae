"""Fuzz what reads a guest's bytes in the bundled daemon, guided by coverage (atheris).

    python -m benchmarks.fuzz                          # every target, a minute each
    python -m benchmarks.fuzz requests --seconds 600

Targets: ``chains`` (descriptors and rings → buffers), ``requests`` (FUSE messages → a folder with a
canary outside), ``messages`` (vhost-user → the back-end's state). A target fails by any exception
that is no refusal, by an error that the log calls ours, and by what its own checks find. The input
that did it is left in the corpus folder, and run again by giving its path behind ``--``.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import atheris

from tests.support.namespace import enter_mount_namespace

with atheris.instrument_imports(include=["vfsmount"]):
    from vfsmount.errors import WireError
    from vfsmount.hostd.backend import Backend
    from vfsmount.hostd.faults import GuestFault, Refused, RingFault
    from vfsmount.hostd.fs.call import Deferred
    from vfsmount.hostd.fs.dispatch import FuseServer
    from vfsmount.hostd.fs.session import Session
    from vfsmount.hostd.fs.share import Share, ShareOptions
    from vfsmount.hostd.vring import DeviceRing
    from vfsmount.wire import fuse, vhost_user, vring
    from vfsmount.wire.virtio_fs import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORPUS = Path("build/fuzz")
CANARY = b"untouched"
#: Bytes of a file: who allocates more gets EFBIG instead of our memory.
FILE_LIMIT = 1 << 20


class OurFault(AssertionError):
    """Something that no guest may bring about."""


# --- chains ---------------------------------------------------------------------------------------

QUEUE = 8
BASE = 0x1000
MEMORY = 4096
LAYOUT = vring.vring_layout(QUEUE, 0)


def chains(data: bytes) -> None:
    """The input is the guest's memory, ring first; two bytes say what was negotiated."""
    if len(data) < 2:
        return
    memory = bytearray(MEMORY)
    content = data[2 : 2 + MEMORY]
    memory[: len(content)] = content
    view = memoryview(memory)

    def translate(guest_addr: int, length: int) -> memoryview:
        start = guest_addr - BASE
        if not 0 <= start <= MEMORY - length:
            raise RingFault("outside")
        return view[start : start + length]

    ring = DeviceRing(
        QUEUE,
        view[LAYOUT.desc : LAYOUT.desc + vring.desc_table_size(QUEUE)],
        view[LAYOUT.avail : LAYOUT.avail + vring.avail_ring_size(QUEUE)],
        view[LAYOUT.used : LAYOUT.used + vring.used_ring_size(QUEUE)],
        next_avail=0,
        translate=translate,
        event_idx=bool(data[0] & 1),
        indirect=bool(data[0] & 2),
    )
    with suppress(RingFault):
        for _ in range(3 * QUEUE):
            chain = ring.pop()
            if chain is None:
                ring.enable_kicks()
                break
            buffers = chain.readable + chain.writable
            if not all(buffer.nbytes for buffer in buffers) or len(buffers) > QUEUE + 1024:
                raise OurFault(f"chain of {len(buffers)} buffers")
            ring.push(chain.head, sum(buffer.nbytes for buffer in chain.writable) & 0xFFFF)
            ring.must_call()


def chain_seeds() -> Iterator[bytes]:
    """A sound chain in the ring and in a table, and one that loops."""
    request, reply, table = BASE + 2048, BASE + 3072, BASE + 1024
    pair = vring.DESC.values(request, 40, 1, 1) + vring.DESC.values(reply, 100, 2, 0)
    avail = struct.pack("<HHH", 0, 1, 0)
    for options, desc in (
        (b"\x01\0", pair),
        (b"\x03\0", vring.DESC.values(table, 32, 4, 0)),
        (b"\x02\0", vring.DESC.values(request, 40, 1, 0)),
    ):
        memory = bytearray(MEMORY)
        memory[: len(desc)] = desc
        memory[LAYOUT.avail : LAYOUT.avail + len(avail)] = avail
        memory[1024 : 1024 + len(pair)] = pair
        yield options + bytes(memory)


# --- requests -------------------------------------------------------------------------------------

OPCODES = sorted(int(opcode) for opcode in fuse.Opcode)
#: One request of an input: opcode (by its place), node, pieces, room, length of the body.
REQUEST = struct.Struct("<BBBHH")


class Requests:
    """Requests to a server on a small file system of their own, made anew now and then."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="vfsmount-fuzz-"))
        _small_file_system(self._home)
        (self._home / "canary").write_bytes(CANARY)
        self._folder = self._home / "share"
        self._folder.mkdir()
        self._share = Share(self._folder, ShareOptions())
        self._runs = 0
        os.umask(0)

    def __call__(self, data: bytes) -> None:
        self._make_tree()
        session = Session(self._share)
        server = FuseServer(session)
        server._complaints = 100  # no log of malformed requests
        try:
            _exchange(server, fuse.encode_request(fuse.Opcode.INIT, 2, 0, _INIT), 100, 0)
            for name in (b"dir", b"file", b"fifo", b"out"):
                _exchange(
                    server, fuse.encode_request(fuse.Opcode.LOOKUP, 2, 1, name + b"\0"), 200, 0
                )
            _exchange(server, fuse.encode_request(fuse.Opcode.OPEN, 2, 3, _OPEN), 100, 0)
            _exchange(server, fuse.encode_request(fuse.Opcode.OPENDIR, 2, 1, _OPEN), 100, 0)
            self._play(server, data)
        finally:
            session.close()
        if (self._home / "canary").read_bytes() != CANARY or len(os.listdir(self._home)) != 2:
            raise OurFault("the canary")

    def _play(self, server: FuseServer, data: bytes) -> None:
        at = 0
        while at + REQUEST.size <= len(data):
            opcode, nodeid, pieces, room, length = REQUEST.unpack_from(data, at)
            at += REQUEST.size
            body = data[at : at + length]
            at += length
            message = fuse.encode_request(OPCODES[opcode % len(OPCODES)], 2, nodeid, body)
            if length & 0x8000:  # the header is the input's as well
                message = body
            with suppress(GuestFault, Deferred):
                _exchange(server, message, room, pieces)
            server.session.inodes.check_invariants()
            if os.geteuid() != os.getuid():
                raise OurFault("still somebody else")

    def _make_tree(self) -> None:
        """Not for every run: most of them change nothing."""
        self._runs += 1
        if self._runs % 200 != 1:
            return
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self._folder / "dir").mkdir()
        (self._folder / "file").write_bytes(b"text")
        os.mkfifo(self._folder / "fifo")
        (self._folder / "out").symlink_to("../canary")


_INIT = fuse.INIT_IN.values(7, 45, 131072, 0xFFFFFFFF, 0xFFFFFFFF)
_OPEN = fuse.OPEN_IN.values(2, 0)


def _exchange(server: FuseServer, message: bytes, room: int, pieces: int) -> None:
    reply = bytearray(room)
    used = server.serve(_cut(bytearray(message), pieces), _cut(reply, pieces))
    if not used:
        return
    header = fuse.OUT_HEADER.unpack(reply[:16])
    if not 16 <= header.len == used <= room or not -512 < header.error <= 0:
        raise OurFault(f"{header} in {used} bytes")


def _cut(data: bytearray, pieces: int) -> list[memoryview]:
    view = memoryview(data)
    step = pieces or len(data)
    return [view[at : at + step] for at in range(0, len(data), step or 1)]


def request_seeds() -> Iterator[bytes]:
    """Each opcode once, with a body of the right size."""
    for place, opcode in enumerate(OPCODES):
        operation = fuse.OPERATIONS[fuse.Opcode(opcode)]
        size = operation.args.size if operation.args is not None else 0
        for first in (1, 2):
            body = (first.to_bytes(8, "little") + bytes(size))[:size] + b"name\0" * operation.names
            for nodeid in (1, 3):
                yield REQUEST.pack(place, nodeid, 0, 4096, len(body)) + body


def _small_file_system(folder: Path) -> None:
    """As root: memory of a few megabytes, so that nobody's disk is filled."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    options = b"size=8m,nr_inodes=4k"
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "cannot mount a tmpfs to fuzz on")


# --- messages -------------------------------------------------------------------------------------


def messages(data: bytes) -> None:
    """The input is a stream of vhost-user messages; those that want descriptors get them."""
    backend = Backend(Config(b"fuzz", 1), lambda: None)
    at = 0
    try:
        while at + 12 <= len(data):
            header = vhost_user.decode_header(data[at : at + 12])
            kind = vhost_user.kind_of(vhost_user.FRONTEND_MESSAGES, header.request)
            request = vhost_user.FrontendRequest(header.request)
            payload = data[at + 12 : at + 12 + header.size]
            at += 12 + header.size
            record = vhost_user.decode_payload(request, payload)
            _obey(backend, kind, request, record)
    except (WireError, GuestFault):
        pass
    finally:
        backend.close()


def _obey(backend: Backend, kind: Any, request: Any, record: Any) -> None:
    for count in (0, 1, 2):
        fds = [_descriptor(request) for _ in range(count)]
        try:
            vhost_user.check_fds(request, record, count)
            with suppress(Refused):
                reply = backend.handle(kind, record, fds)
                if kind.reply is not None:
                    vhost_user.encode_reply(request, reply)
            return
        except WireError:
            continue
        finally:
            for fd in fds:
                os.close(fd)


def _descriptor(request: Any) -> int:
    if "MEM" not in request.name:
        return os.eventfd(0)
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 16)
    return fd


def message_seeds() -> Iterator[bytes]:
    """A handshake, whole."""
    R = vhost_user.FrontendRequest  # short, as where it is used
    region = vhost_user.MemoryRegion(0x1000, 1 << 16, 0x1000, 0)
    script: list[tuple[Any, Any]] = [
        (R.SET_OWNER, None), (R.GET_FEATURES, None), (R.SET_FEATURES, 0x170000000),
        (R.GET_PROTOCOL_FEATURES, None), (R.SET_PROTOCOL_FEATURES, 0x1),
        (R.SET_MEM_TABLE, vhost_user.MemoryTable((region,))),
    ]  # fmt: skip
    for ring in (0, 1):
        script += [
            (R.SET_VRING_NUM, vhost_user.VringState(ring, QUEUE)),
            (R.SET_VRING_BASE, vhost_user.VringState(ring, 0)),
            (R.SET_VRING_ADDR, vhost_user.VringAddr(ring, 0, 0x1000, 0x3000, 0x2000, 0)),
            (R.SET_VRING_CALL, vhost_user.FdWord(ring)),
            (R.SET_VRING_KICK, vhost_user.FdWord(ring)),
            (R.SET_VRING_ENABLE, vhost_user.VringState(ring, 1)),
        ]
    script.append((R.GET_VRING_BASE, vhost_user.VringState(1, 0)))
    encoded = [vhost_user.encode_message(request, record) for request, record in script]
    yield b"".join(encoded)
    yield from encoded


# --- running --------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Callable[[], Callable[[bytes], None]], Callable[[], Iterator[bytes]]]] = {
    "chains": (lambda: chains, chain_seeds),
    "requests": (Requests, request_seeds),
    "messages": (lambda: messages, message_seeds),
}


class _Strict(logging.Handler):
    """What the daemon logs as its own error is one; what it says of guests is dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            raise OurFault(record.getMessage()) from error


def fuzz(target: str, seconds: int, rest: list[str]) -> None:
    """Run one target; does not return."""
    enter_mount_namespace()
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
    logging.basicConfig(handlers=[_Strict()], level=logging.WARNING)
    logging.raiseExceptions = True
    make, seeds = TARGETS[target]
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    arguments = [
        f"-max_total_time={seconds}", "-timeout=20", "-max_len=8192", "-handle_xfsz=0",
        f"-artifact_prefix={CORPUS}/{target}-",
    ]  # fmt: skip
    inputs = rest or [str(corpus)]
    atheris.Setup([sys.argv[0], *arguments, *inputs], make())
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="of each target (default: 60)")
    parser.add_argument("rest", nargs="*", help="for libFuzzer, or inputs to run again")
    arguments = parser.parse_args()
    if arguments.target:
        fuzz(arguments.target, arguments.seconds, arguments.rest)
    failed = 0
    for target in TARGETS:
        command = [sys.executable, "-m", "benchmarks.fuzz", target]
        failed += bool(subprocess.run([*command, "--seconds", str(arguments.seconds)]).returncode)
    return failed


if __name__ == "__main__":
    sys.exit(main())
