"""One guest: its socket, its rings, and the thread that serves both.

The thread has three things to do and takes them in this order:

1. serve what its rings hold;
2. look at the rings a little longer, yielding the CPU in between (``polling``);
3. sleep until a kick or a message comes.

Kicks are asked for only on the way from 2 to 3, so a busy guest sends none. While the rings are
busy the socket is still looked at, every ``_BURST`` requests. Used chains are published one by one,
and the guest is called once for up to ``_BATCH`` of them.

A request that waits for a lock is put aside (``aside``), and tried again each time that the thread
comes by when it is time to: the eventfd of the guest's locks wakes it.

Whatever goes wrong with a guest ends its own connection, with one line in the log.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfsmount.closer import discard
from vfsmount.errors import WireError
from vfsmount.hostd.aside import Aside
from vfsmount.hostd.backend import Backend
from vfsmount.hostd.barrier import RECHECK
from vfsmount.hostd.faults import GuestFault, Refused, RingFault
from vfsmount.hostd.fs.call import Deferred
from vfsmount.hostd.fs.dispatch import FuseServer
from vfsmount.hostd.fs.session import Session
from vfsmount.hostd.messages import close_all, receive, send_reply
from vfsmount.hostd.polling import ONE_LOOK, PollWindow
from vfsmount.wire.vhost_user import (
    FRONTEND_MESSAGES,
    FrontendRequest,
    check_fds,
    decode_payload,
    encode_ack,
    encode_reply,
    kind_of,
)
from vfsmount.wire.virtio_fs import Config

if TYPE_CHECKING:
    from vfsmount.hostd.fs.share import Share
    from vfsmount.hostd.messages import Message
    from vfsmount.hostd.queues import Queue
    from vfsmount.hostd.vring import DeviceRing
    from vfsmount.wire.vhost_user import Header

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

#: Requests between two looks at the socket: a few milliseconds.
_BURST: Final = 256
#: Used chains before the guest is called, if more are waiting. It may be asleep meanwhile.
_BATCH: Final = 16
#: Seconds that a front-end may take to finish a message, or to take a reply.
_MESSAGE_TIMEOUT: Final = 10.0
#: Refused messages that a front-end gets away with: each is a line in the log.
_MAX_REFUSALS: Final = 100
#: Seconds between looks at a ring whose front-end will not kick.
_KICKLESS: Final = 0.001
#: Events taken at once; room for them is made at each look.
_EVENTS: Final = 8
_FAILURE: Final = 1


class Connection:
    """A connected guest.

    Args:
        sock: The connection; owned from here on.
        share: What the guest sees.
        name: For the log.
        poll_ns: Longest time to look at the rings before sleeping.
        alone: The guest is the only one that this process will have.
    """

    def __init__(
        self,
        sock: socket.socket,
        share: Share,
        *,
        name: str,
        poll_ns: int,
        alone: bool = False,
    ) -> None:
        sock.settimeout(_MESSAGE_TIMEOUT)
        self.name = name
        self._sock = sock
        # Before the session, because it closes itself if there is no descriptor left for that.
        self._poll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._session = Session(share)
        self._locks = self._session.locks
        self._fuse = FuseServer(self._session)
        self._aside = Aside(self._fuse)
        options = share.options
        config = Config(options.tag, options.request_queues)
        backend = Backend(config, self._session.reset_device, self._session.window, alone=alone)
        self._backend = backend
        self._window = PollWindow(poll_ns)
        self._rings: list[tuple[Queue, DeviceRing]] = []
        self._kicks: frozenset[int] = frozenset()
        self._hinted: list[DeviceRing] = []
        self._kickless = False
        self._idle_since = 0
        self._refusals = 0

    def run(self) -> None:
        """Serve the guest until it leaves; everything it held is let go. Raises nothing."""
        logger.info("%s connected", self.name)
        try:
            self._session.credentials.settle()
            for fd in (self._sock.fileno(), self._locks.wake_fd):
                self._poll.register(fd, select.EPOLLIN)
            self._watch()
            self._converse()
        # Logged as text: an error in a log record would keep guest memory alive with its traceback.
        except (GuestFault, WireError) as fault:
            logger.warning("%s: %s; closing its connection", self.name, str(fault))
        except OSError as error:  # of the socket: the front-end is gone, or stuck
            logger.warning("%s: connection failed: %s", self.name, str(error))
        except Exception:  # top of the thread: a bug must not take the other guests along
            logger.exception("%s: internal error; closing its connection", self.name)
        else:
            logger.info("%s left", self.name)
        finally:
            self.close()

    def stop(self) -> None:
        """Make ``run`` return soon; callable from any thread."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of everything, once ``run`` has ended or was never called."""
        self._rings = []
        self._hinted = []
        self._kicks = frozenset()
        self._poll.close()
        self._backend.close()
        self._session.close()
        self._sock.close()
        # Not for cycles: this empties the interpreter's lists of free tuples and the like, a few of
        # which keep every megabyte occupied that the guest's nodes were in.
        gc.collect()

    # --- the loop --------------------------------------------------------------------------------

    def _converse(self) -> None:
        """Serve rings and messages until the front-end leaves."""
        locks, aside, poll, kicks = self._locks, self._aside, self._poll.poll, self._kicks
        while True:
            busy = self._serve_rings() or self._ask_for_kicks()
            ready = poll(0 if busy else self._patience(), _EVENTS)
            for ring in self._hinted:
                ring.disable_kicks()
            for fd, _ in ready:
                if fd in kicks:
                    self._window.waited(time.monotonic_ns() - self._idle_since)
                elif fd == locks.wake_fd:
                    locks.wake()
                    aside.answer(locks.retry())
                else:
                    self._unwatch()
                    if not self._obey_message():
                        return
                    self._watch()
                    kicks = self._kicks
                    break  # other descriptors are watched now
            if aside.places:
                aside.answer(locks.retry())

    def _watch(self) -> None:
        """Serve the rings that run now, and watch their kicks.

        A kick is an edge: its eventfd is never read, which saves a system call for each (1 us).
        """
        self._aside.follow(self._rings)
        running = self._backend.running
        self._rings = [(queue, queue.ring) for queue in running if queue.ring is not None]
        self._hinted = [ring for _, ring in self._rings if ring.hints]
        self._kickless = any(queue.kickless for queue, _ in self._rings)
        self._kicks = frozenset(queue.kick for queue in running if queue.kick >= 0)
        for fd in self._kicks:
            self._poll.register(fd, select.EPOLLIN | select.EPOLLET)

    def _unwatch(self) -> None:
        """A message may have kicks closed; the front-end's end would keep them in the set."""
        for fd in self._kicks:
            self._poll.unregister(fd)
        self._kicks = frozenset()

    def _patience(self) -> float | None:
        """How long to sleep at most, in seconds."""
        if self._kickless:
            return _KICKLESS
        retry = self._locks.patience()
        if retry is None:
            return RECHECK
        return retry if RECHECK is None else min(retry, RECHECK)

    # --- rings -----------------------------------------------------------------------------------

    def _serve_rings(self) -> bool:
        """Serve until the rings stay empty for a while; True when there was no end to it."""
        if self._window.length <= ONE_LOOK:
            return self._serve_burst()
        begin, spent = time.monotonic_ns(), time.thread_time_ns()
        busy = self._serve_burst()
        self._window.worked(time.monotonic_ns() - begin, time.thread_time_ns() - spent)
        return busy

    def _serve_burst(self) -> bool:
        rings, left = self._rings, _BURST
        while left > 0:
            idle = True
            for queue, ring in rings:
                if ring.pending():
                    idle = False
                    left -= self._drain(queue, ring)
            if idle and not self._linger():
                return False
        return True

    def _drain(self, queue: Queue, ring: DeviceRing) -> int:
        """Serve what one ring holds, up to a batch; returns how many requests that were."""
        served = 0
        serve = self._fuse.serve
        try:
            while served < _BATCH and (chain := ring.pop()) is not None:
                head, readable, writable = chain
                served += 1
                try:
                    ring.push(head, serve(readable, writable))
                except Deferred as deferred:
                    self._aside.put(deferred.unique, queue, head)
        except RingFault:
            queue.fail()
            raise
        if ring.must_call():
            queue.call()
        return served

    def _linger(self) -> bool:
        """Look at the rings for the length of the window; True when one has something."""
        now = self._idle_since = time.monotonic_ns()
        end = now + self._window.length
        while now < end:
            os.sched_yield()
            for _, ring in self._rings:
                if ring.pending():
                    return True
            now = time.monotonic_ns()
        return False

    def _ask_for_kicks(self) -> bool:
        """Ask every ring for a kick; True when one has something already."""
        busy = False
        for _, ring in self._rings:  # all of them
            if ring.enable_kicks():
                busy = True
        return busy

    # --- messages --------------------------------------------------------------------------------

    def _obey_message(self) -> bool:
        """Receive and obey one message; False when the front-end has left."""
        message = receive(self._sock)
        if message is None:
            return False
        try:
            is_obeyed = self._obey(message)
        except BaseException:
            discard(message.fds)
            raise
        # What was obeyed has been looked at: memory, eventfds, a socket.
        (close_all if is_obeyed else discard)(message.fds)
        return True

    def _obey(self, message: Message) -> bool:
        """Decode, hand to the state machine, and answer; False when it was refused.

        Raises:
            WireError: The message does not decode.
            GuestFault: It may not come, or was refused with no way to say so.
        """
        header = message.header
        kind = kind_of(FRONTEND_MESSAGES, header.request)
        request = FrontendRequest(header.request)
        record = decode_payload(request, message.payload)
        check_fds(request, record, len(message.fds))
        try:
            reply = self._backend.handle(kind, record, message.fds)
        except Refused as refusal:
            self._refusals += 1
            hopeless = self._refusals > _MAX_REFUSALS
            if hopeless or kind.reply is not None or not self._wants_ack(header):
                raise GuestFault(f"{request.name}: {refusal}") from None
            logger.warning("%s: refused %s: %s", self.name, request.name, str(refusal))
            send_reply(self._sock, header.request, encode_ack(_FAILURE))
            return False
        logger.debug("%s: %s %s", self.name, request.name, record)
        if kind.reply is not None:
            fds = message.fds if kind.reply_fds[1] else ()
            send_reply(self._sock, header.request, encode_reply(request, reply), fds)
        elif self._wants_ack(header):
            send_reply(self._sock, header.request, encode_ack())
        return True

    def _wants_ack(self, header: Header) -> bool:
        return header.needs_reply and self._backend.acknowledges
