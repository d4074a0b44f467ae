"""A tiny vhost-user front-end: blocking, one request at a time, and free to break every rule."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.hostd.driver import Buffer, DriverRing
from tests.hostd.guest import Guest
from vfsmount.hostd.connection import Connection
from vfsmount.wire import vhost_user
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import (
    FdWord,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    VirtioFeature,
    VringAddr,
    VringState,
)
from vfsmount.wire.vring import need_event

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfsmount.hostd.fs.share import Share

__all__ = ["FEATURES", "PROTOCOL", "Disconnected", "Frontend", "bit_30", "connected"]

R = FrontendRequest

GUEST_ADDR = 0x1_0000_0000
USER_ADDR = 0x7000_0000_0000
MEMORY_SIZE = 8 << 20
#: Rings lie at the start, one every 64 KiB; requests and replies behind.
RING_SPACE = 0x10000
REQUEST_AT = 1 << 20
REPLY_AT = 4 << 20
TABLE_AT = 0xF0000

FORGETS = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT)
bit_30 = VirtioFeature.PROTOCOL_FEATURES
FEATURES = int(
    bit_30
    | VirtioFeature.VERSION_1
    | VirtioFeature.RING_EVENT_IDX
    | VirtioFeature.RING_INDIRECT_DESC
)
PROTOCOL = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
#: Seconds for one answer; a sync of a busy disk is among the questions.
DEADLINE = 30.0


class Disconnected(Exception):
    """The back-end has closed the connection."""


class Frontend(Guest):
    """One connection with one memory region and ``rings`` rings.

    Args:
        sock: Connected to a back-end; owned.
        queue_size: Of each ring.
        features: To acknowledge.
        protocol: Protocol features to acknowledge.
        rings: How many, hiprio included.
        sealable: Whether the memory can be sealed against shrinking.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        queue_size: int = 16,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        rings: int = 2,
        sealable: bool = True,
    ) -> None:
        sock.settimeout(DEADLINE)
        self.sock = sock
        self.features = features
        self.protocol = protocol
        sealing = os.MFD_ALLOW_SEALING if sealable else 0
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC | sealing)
        os.ftruncate(self.memfd, MEMORY_SIZE)
        self._mmap = mmap.mmap(self.memfd, MEMORY_SIZE)
        self.memory = memoryview(self._mmap)
        self.region = MemoryRegion(GUEST_ADDR, MEMORY_SIZE, USER_ADDR, 0)
        self.rings = [
            DriverRing(self.memory, queue_size, base=RING_SPACE * index, addr=GUEST_ADDR)
            for index in range(rings)
        ]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in self.rings]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in self.rings]
        self.errs = [os.eventfd(0, os.EFD_NONBLOCK) for _ in self.rings]
        self.kicked = 0

    def close(self) -> None:
        self.sock.close()
        for fd in (self.memfd, *self.kicks, *self.calls, *self.errs):
            os.close(fd)
        for ring in self.rings:
            ring.memory = memoryview(b"")
        self.memory.release()
        self._mmap.close()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- messages --------------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            if fds:
                socket.send_fds(self.sock, [data], list(fds))
            else:
                self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise Disconnected from None

    def send(
        self,
        request: FrontendRequest,
        record: Any = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        self.send_raw(vhost_user.encode_message(request, record, need_reply=need_reply), fds)

    def receive(self) -> tuple[vhost_user.Header, bytes]:
        header = vhost_user.decode_header(self._exactly(12))
        return header, self._exactly(header.size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.sock.recv(size - len(data))
            except ConnectionResetError:
                raise Disconnected from None
            if not piece:
                raise Disconnected
            data += piece
        return data

    def ask(self, request: FrontendRequest, record: Any = None) -> Any:
        """Send a request that has a reply of its own; returns that decoded."""
        self.send(request, record)
        header, payload = self.receive()
        assert (header.request, header.flags) == (request, 0x5)
        return vhost_user.decode_reply(request, payload)

    def ack(self, request: FrontendRequest, record: Any = None, fds: Sequence[int] = ()) -> bool:
        """Send a request and wait for its acknowledgement; True when it succeeded."""
        self.send(request, record, fds, need_reply=True)
        header, payload = self.receive()
        assert (header.request, header.flags) == (request, 0x5)
        return vhost_user.decode_ack(payload)

    def is_disconnected(self) -> bool:
        """Wait for the back-end to close the connection."""
        try:
            self._exactly(1)
        except Disconnected:
            return True
        return False

    # --- set-up ----------------------------------------------------------------------------------

    def negotiate(self) -> None:
        self.send(R.SET_OWNER)
        assert self.ask(R.GET_FEATURES) & self.features == self.features
        assert self.ask(R.GET_PROTOCOL_FEATURES) & self.protocol == self.protocol
        self.send(R.SET_PROTOCOL_FEATURES, self.protocol)
        self.obey(R.SET_FEATURES, self.features)

    def obey(self, request: FrontendRequest, record: Any = None, fds: Sequence[int] = ()) -> None:
        """Send a request that must succeed."""
        if self.protocol & ProtocolFeature.REPLY_ACK:
            assert self.ack(request, record, fds)
        else:
            self.send(request, record, fds)

    def share_memory(self) -> None:
        self.obey(R.SET_MEM_TABLE, MemoryTable((self.region,)), [self.memfd])

    def addresses(self, index: int) -> VringAddr:
        ring, delta = self.rings[index], USER_ADDR - GUEST_ADDR
        return VringAddr(
            index, 0, ring.desc_addr + delta, ring.used_addr + delta, ring.avail_addr + delta, 0
        )

    def start_ring(self, index: int, *, enable: bool = True) -> None:
        ring = self.rings[index]
        self.obey(R.SET_VRING_NUM, VringState(index, ring.size))
        self.obey(R.SET_VRING_BASE, VringState(index, ring.avail_idx))
        self.obey(R.SET_VRING_ADDR, self.addresses(index))
        self.obey(R.SET_VRING_CALL, FdWord(index), [self.calls[index]])
        self.obey(R.SET_VRING_ERR, FdWord(index), [self.errs[index]])
        self.obey(R.SET_VRING_KICK, FdWord(index), [self.kicks[index]])
        if enable and self.features & bit_30:
            self.obey(R.SET_VRING_ENABLE, VringState(index, 1))

    def handshake(self) -> None:
        """All of it, up to a device that is ready for INIT."""
        self.negotiate()
        self.share_memory()
        for index in range(len(self.rings)):
            self.start_ring(index)

    # --- requests --------------------------------------------------------------------------------

    def submit(self, index: int, message: bytes, room: int) -> None:
        """Put one chain into a ring, and kick if the device wants that."""
        self.memory[REQUEST_AT : REQUEST_AT + len(message)] = message
        self.memory[REPLY_AT : REPLY_AT + room] = b"\xee" * room
        buffers = [Buffer(GUEST_ADDR + REQUEST_AT, len(message))]
        if room:
            buffers.append(Buffer(GUEST_ADDR + REPLY_AT, room, True))
        self.offer(index, buffers)

    def offer(self, index: int, buffers: list[Buffer]) -> None:
        ring = self.rings[index]
        if self.features & VirtioFeature.RING_INDIRECT_DESC:
            head = ring.put_indirect(0, GUEST_ADDR + TABLE_AT, buffers)
        else:
            head = ring.put_chain(buffers)
        self.publish(index, head)

    def publish(self, index: int, head: int) -> None:
        ring = self.rings[index]
        ring.set_used_event(ring.used_seen)
        old = ring.avail_idx
        ring.offer(head)
        if self.features & VirtioFeature.RING_EVENT_IDX:
            wanted = need_event(ring.avail_event, ring.avail_idx, old)
        else:
            wanted = not ring.used_flags & 1
        if wanted:
            self.kick(index)

    def kick(self, index: int) -> None:
        self.kicked += 1
        os.eventfd_write(self.kicks[index], 1)

    def wait_used(self, index: int) -> list[tuple[int, int]]:
        """Wait for chains to be used.

        Raises:
            Disconnected: The back-end has gone.
        """
        ring = self.rings[index]
        poll = select.poll()
        poll.register(self.calls[index], select.POLLIN)
        poll.register(self.sock, select.POLLIN)
        while not (used := ring.collect()):
            ready = poll.poll(DEADLINE * 1000)
            assert ready, "the device neither answered nor closed the connection"
            if (self.sock.fileno(), select.POLLIN) in ready or any(
                event & (select.POLLHUP | select.POLLERR) for _, event in ready
            ):
                raise Disconnected
            os.eventfd_read(self.calls[index])
        return used

    def exchange(self, message: bytes, room: int) -> bytes:
        opcode = struct.unpack_from("<I", message, 4)[0]
        index = 0 if opcode in FORGETS else 1
        self.submit(index, message, room)
        [(_, length)] = self.wait_used(index)
        return bytes(self.memory[REPLY_AT : REPLY_AT + length])


@contextmanager
def connected(share: Share, *, poll_us: int = 50, **options: Any) -> Iterator[Frontend]:
    """A front-end on a socketpair with a back-end in a thread, which must end with it.

    Args:
        share: What the back-end serves.
        poll_us: How long it looks at rings, in microseconds.
        options: Of the front-end.
    """
    ours, theirs = socket.socketpair()
    connection = Connection(theirs, share, name="guest", poll_ns=poll_us * 1000)
    thread = threading.Thread(target=connection.run)
    thread.start()
    try:
        with Frontend(ours, **options) as frontend:
            yield frontend
    finally:
        connection.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()
