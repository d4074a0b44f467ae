"""The vhost-user back-end as a state machine: one front-end, one device.

Messages go in decoded, with their descriptors; replies come out as records. There is no socket
here and nothing waits, so every state can be reached by a list of calls.

A ring *runs* while it is enabled, has a size and addresses, and a kick descriptor (or the front-end
said that it will not kick). That is decided anew after each message, in ``_reconcile``, and a ring
that starts to run is looked at without waiting for a kick: one that came while the ring was not
enabled is not lost. Addresses are resolved again whenever the memory table changes.

Rules for what may come when:
* A message whose feature was not negotiated ends the connection.
* A message that cannot be obeyed raises ``Refused`` and changes nothing.
* Size and base of a ring are fixed while it runs.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from vfsmount.hostd.faults import GuestFault, Refused, RingFault
from vfsmount.hostd.inflight import TrackedRing, area_size, create_region, split_region
from vfsmount.hostd.memory import MAX_MEM_SLOTS, GuestMemory, map_shared
from vfsmount.hostd.queues import NO_FD, Queue, take_eventfd
from vfsmount.hostd.requests import RequestChannel
from vfsmount.hostd.vring import DeviceRing
from vfsmount.wire.vhost_user import (
    MAX_CONFIG_SIZE,
    ConfigRange,
    FrontendRequest,
    InflightDescription,
    ProtocolFeature,
    ShmemConfig,
    VirtioFeature,
    VringState,
    feature_names,
    missing_features,
)
from vfsmount.wire.virtio_fs import DAX_SHMID, encode_config
from vfsmount.wire.vring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    INDEX_MASK,
    USED_ALIGN,
    avail_ring_size,
    desc_table_size,
    is_queue_size,
    used_ring_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vfsmount.hostd.window import DaxWindow
    from vfsmount.wire.vhost_user import FdWord, MemoryRegion, MemoryTable, MessageKind, VringAddr
    from vfsmount.wire.virtio_fs import Config

__all__ = ["FEATURES", "PROTOCOL_FEATURES", "Backend", "Queue"]

logger = logging.getLogger(__name__)

#: What the device offers. Everything else is about other transports, legacy, or migration.
FEATURES: Final = int(
    VirtioFeature.RING_INDIRECT_DESC
    | VirtioFeature.RING_EVENT_IDX
    | VirtioFeature.PROTOCOL_FEATURES
    | VirtioFeature.VERSION_1
)
PROTOCOL_FEATURES: Final = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

_BIT_30: Final = int(VirtioFeature.PROTOCOL_FEATURES)
_EVENT_IDX: Final = int(VirtioFeature.RING_EVENT_IDX)
_INDIRECT: Final = int(VirtioFeature.RING_INDIRECT_DESC)
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)
_SHMEM: Final = int(ProtocolFeature.SHMEM)
_MAPPING: Final = _SHMEM | _REPLY_ACK | int(ProtocolFeature.BACKEND_SEND_FD)


class Backend:
    """State of one device.

    Args:
        config: Its config space.
        on_reset: Called when the driver's state is to be forgotten.
        window: The DAX window to offer, which is told how to ask the front-end; None for none.
        alone: See ``GuestMemory``.

    Attributes:
        features: Virtio features acknowledged.
        protocol_features: Protocol features acknowledged.
        memory: The guest's memory.
        queues: All queues, hiprio first.
        running: Those that run.
    """

    def __init__(
        self,
        config: Config,
        on_reset: Callable[[], None],
        window: DaxWindow | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self.features = 0
        self.protocol_features = 0
        self.memory = GuestMemory(alone=alone)
        self.queues = [Queue(index) for index in range(1 + config.num_request_queues)]
        self.running: list[Queue] = []
        self._config = encode_config(config)
        self._on_reset = on_reset
        self._window = window
        self._offered = PROTOCOL_FEATURES | (_SHMEM if window is not None else 0)
        self._requests: RequestChannel | None = None
        self._status = 0
        self._alone = alone

    @property
    def acknowledges(self) -> bool:
        """Whether NEED_REPLY is to be answered."""
        return bool(self.protocol_features & _REPLY_ACK)

    def close(self) -> None:
        """The front-end has gone: let go of memory and descriptors."""
        self._forget_queues()
        self.memory.close()
        self._set_requests(None)

    def handle(self, kind: MessageKind, record: Any, fds: list[int]) -> Any:
        """Obey one message.

        Args:
            kind: Its row in the table of messages.
            record: Its payload, decoded.
            fds: Its descriptors. Those that are kept are taken out; the rest stay the caller's, and
                so do those of the reply, which are put in.

        Returns:
            Payload of the reply, for a message that has one; else None.

        Raises:
            Refused: It cannot be obeyed; nothing has changed.
            GuestFault: The message may not come now, or not at all.
        """
        request = FrontendRequest(kind.request)
        negotiating = request in _NEGOTIATION
        features = self.features | (_BIT_30 if negotiating else 0)
        missing = missing_features(kind, self.protocol_features, features)
        if missing:
            raise GuestFault(f"{request.name} without {' and '.join(missing)}")
        handler = _HANDLERS.get(request)
        if handler is None:
            raise GuestFault(f"{request.name} is not for this device")
        reply = handler(self, record, fds)
        self._reconcile()
        return reply

    # --- negotiation -----------------------------------------------------------------------------

    def _get_features(self, _record: None, _fds: list[int]) -> int:
        return FEATURES

    def _set_features(self, bits: int, _fds: list[int]) -> None:
        if bits & ~FEATURES:
            names = " ".join(feature_names(VirtioFeature, bits & ~FEATURES))
            raise Refused(f"features that were not offered: {names}")
        if bits != self.features and self.running:
            raise Refused("other features while rings run")
        self.features = bits
        if not bits & _BIT_30:  # then there is no SET_VRING_ENABLE, and all are
            for queue in self.queues:
                queue.enabled = True

    def _get_protocol_features(self, _record: None, _fds: list[int]) -> int:
        return self._offered

    def _set_protocol_features(self, bits: int, _fds: list[int]) -> None:
        if bits & ~self._offered:
            names = " ".join(feature_names(ProtocolFeature, bits & ~self._offered))
            raise Refused(f"protocol features that were not offered: {names}")
        self.protocol_features = bits
        self._tell_window()

    def _set_owner(self, _record: None, _fds: list[int]) -> None:
        """The connection is the owner; saying so twice harms nobody."""

    def _get_queue_num(self, _record: None, _fds: list[int]) -> int:
        return len(self.queues)

    def _get_max_mem_slots(self, _record: None, _fds: list[int]) -> int:
        return MAX_MEM_SLOTS

    def _get_config(self, wanted: ConfigRange, _fds: list[int]) -> ConfigRange:
        """Bytes beyond what the device has are zero: front-ends ask for the largest there is."""
        space = self._config.ljust(MAX_CONFIG_SIZE, b"\0")
        data = space[wanted.offset : wanted.offset + len(wanted.data)]
        return ConfigRange(wanted.offset, wanted.flags, data)

    def _set_config(self, _record: ConfigRange, _fds: list[int]) -> None:
        raise Refused("the config space of a virtio-fs device is read-only")

    def _set_backend_req_fd(self, _record: None, fds: list[int]) -> None:
        requests = RequestChannel(fds[0])
        del fds[0]
        self._set_requests(requests)

    def _set_requests(self, requests: RequestChannel | None) -> None:
        if self._requests is not None:
            self._requests.close()
        self._requests = requests
        self._tell_window()

    def _tell_window(self) -> None:
        """Mappings take all of it: the region, descriptors, and answers, to see failures."""
        if self._window is not None:
            able = self.protocol_features & _MAPPING == _MAPPING
            self._window.channel = self._requests if able else None

    def _get_shmem_config(self, _record: None, _fds: list[int]) -> ShmemConfig:
        return ShmemConfig({} if self._window is None else {DAX_SHMID: self._window.size})

    # --- memory ----------------------------------------------------------------------------------

    def _set_mem_table(self, table: MemoryTable, fds: list[int]) -> None:
        self.memory.replace(table.regions, fds)
        self._suspend()

    def _add_mem_reg(self, region: MemoryRegion, fds: list[int]) -> None:
        self.memory.add(region, fds[0])

    def _rem_mem_reg(self, region: MemoryRegion, _fds: list[int]) -> None:
        self.memory.remove(region)
        self._suspend()

    def _suspend(self) -> None:
        """Stop all rings for ``_reconcile`` to start again on the memory as it is now."""
        for queue in self.running:
            queue.stop()

    # --- rings -----------------------------------------------------------------------------------

    def _queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise Refused(f"ring {index} of a device with {len(self.queues)}")
        return self.queues[index]

    def _stopped(self, index: int) -> Queue:
        queue = self._queue(index)
        if queue.ring is not None:
            raise Refused(f"ring {index} runs")
        return queue

    def _set_vring_num(self, state: VringState, _fds: list[int]) -> None:
        if not is_queue_size(state.num):
            raise Refused(f"ring of {state.num} entries")
        self._stopped(state.ring).size = state.num

    def _set_vring_base(self, state: VringState, _fds: list[int]) -> None:
        if state.num > INDEX_MASK:
            raise Refused(f"ring index {state.num}")
        queue = self._stopped(state.ring)
        if state.num != queue.base:  # a driver that begins anew
            queue.held = set()
        queue.base = state.num

    def _set_vring_addr(self, addresses: VringAddr, _fds: list[int]) -> None:
        queue = self._queue(addresses.ring)
        if not queue.size:
            raise Refused(f"address of ring {queue.index} before its size")
        try:
            self._parts(addresses, queue.size)
        except RingFault as fault:
            raise Refused(str(fault)) from None
        queue.stop()
        queue.addresses = addresses

    def _get_vring_base(self, state: VringState, _fds: list[int]) -> VringState:
        """Stop a ring. Requests are served one after the other, so none is left half done."""
        queue = self._queue(state.ring)
        queue.stop()
        queue.set_kick(NO_FD, kickless=False)
        return VringState(queue.index, queue.base)

    def _set_vring_kick(self, word: FdWord, fds: list[int]) -> None:
        queue = self._queue(word.ring)
        queue.set_kick(take_eventfd(fds), kickless=word.no_fd)

    def _set_vring_call(self, word: FdWord, fds: list[int]) -> None:
        self._queue(word.ring).set_call(take_eventfd(fds))

    def _set_vring_err(self, word: FdWord, fds: list[int]) -> None:
        self._queue(word.ring).set_err(take_eventfd(fds))

    def _set_vring_enable(self, state: VringState, _fds: list[int]) -> None:
        if state.num > 1:
            raise Refused(f"ring enabled with {state.num}")
        self._queue(state.ring).enabled = state.num == 1

    # --- what is in flight -----------------------------------------------------------------------

    def _get_inflight_fd(self, wanted: InflightDescription, fds: list[int]) -> InflightDescription:
        self._check_inflight(wanted)
        fd, size = create_region(wanted.num_queues, wanted.queue_size)
        fds.append(fd)
        return InflightDescription(size, 0, wanted.num_queues, wanted.queue_size)

    def _set_inflight_fd(self, region: InflightDescription, fds: list[int]) -> None:
        self._check_inflight(region)
        if self.running:
            raise Refused("another in-flight region while rings run")
        size = region.num_queues * area_size(region.queue_size)
        if region.mmap_size < size:
            raise Refused(f"in-flight region of {region.mmap_size} bytes, expected {size}")
        view = map_shared(fds[0], region.mmap_offset, size, alone=self._alone)
        areas = split_region(view, region.queue_size)
        for queue, area in zip(self.queues, areas, strict=False):
            queue.area = area

    def _check_inflight(self, region: InflightDescription) -> None:
        if not 1 <= region.num_queues <= len(self.queues) or not is_queue_size(region.queue_size):
            raise Refused(
                f"in-flight region for {region.num_queues} rings of {region.queue_size} entries"
            )

    # --- reset -----------------------------------------------------------------------------------

    def _set_status(self, status: int, _fds: list[int]) -> None:
        """Status 0 resets the rings, not the FUSE session.

        QEMU sends it when a machine is merely paused, and then the guest must find its nodes again.
        A driver that starts afresh says INIT, which starts the session over as well.
        """
        self._status = status & 0xFF
        if not self._status:
            self._forget_queues()

    def _get_status(self, _record: None, _fds: list[int]) -> int:
        return self._status

    def _reset_device(self, _record: None, _fds: list[int]) -> None:
        """As after power-on; memory table, owner and what was negotiated remain."""
        self._status = 0
        self._forget_queues()
        self._on_reset()

    def _forget_queues(self) -> None:
        for queue in self.queues:
            queue.reset()
        self.running = []

    # --- running ---------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Start and stop rings as the state now wants.

        Raises:
            RingFault: A ring's memory has been taken away under it.
        """
        for queue in self.queues:
            if not queue.may_run:
                queue.stop()
            elif queue.ring is None:
                queue.ring = self._start(queue)
        self.running = [queue for queue in self.queues if queue.ring is not None]

    def _start(self, queue: Queue) -> DeviceRing:
        assert queue.addresses is not None
        desc, avail, used = self._parts(queue.addresses, queue.size)
        logger.debug("ring %d runs, %d entries from %d", queue.index, queue.size, queue.base)
        make: Callable[..., DeviceRing] = DeviceRing
        if queue.area is not None:
            make = partial(TrackedRing, area=queue.area, held=queue.held)
        return make(
            queue.size,
            desc,
            avail,
            used,
            next_avail=queue.base,
            translate=self.memory.at_guest,
            event_idx=bool(self.features & _EVENT_IDX),
            indirect=bool(self.features & _INDIRECT),
        )

    def _parts(self, addresses: VringAddr, size: int) -> tuple[memoryview, memoryview, memoryview]:
        """Resolve a ring's three parts.

        Raises:
            RingFault: One is not aligned, or not inside one memory region.
        """
        parts = (
            (addresses.desc_user_addr, DESC_ALIGN, desc_table_size(size)),
            (addresses.avail_user_addr, AVAIL_ALIGN, avail_ring_size(size)),
            (addresses.used_user_addr, USED_ALIGN, used_ring_size(size)),
        )
        for user_addr, alignment, _ in parts:
            if user_addr % alignment:
                raise RingFault(f"ring part at {user_addr:#x} is not aligned to {alignment}")
        desc, avail, used = (self.memory.at_user(addr, length) for addr, _, length in parts)
        return desc, avail, used


#: Needing bit 30, these two only need it offered.
_NEGOTIATION: Final = frozenset(
    (FrontendRequest.GET_PROTOCOL_FEATURES, FrontendRequest.SET_PROTOCOL_FEATURES)
)

_R = FrontendRequest
_HANDLERS: Final[Mapping[FrontendRequest, Callable[[Backend, Any, list[int]], Any]]] = {
    _R.GET_FEATURES: Backend._get_features,
    _R.SET_FEATURES: Backend._set_features,
    _R.GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    _R.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    _R.SET_OWNER: Backend._set_owner,
    _R.RESET_OWNER: Backend._reset_device,
    _R.GET_QUEUE_NUM: Backend._get_queue_num,
    _R.GET_MAX_MEM_SLOTS: Backend._get_max_mem_slots,
    _R.GET_CONFIG: Backend._get_config,
    _R.SET_CONFIG: Backend._set_config,
    _R.SET_BACKEND_REQ_FD: Backend._set_backend_req_fd,
    _R.GET_SHMEM_CONFIG: Backend._get_shmem_config,
    _R.SET_MEM_TABLE: Backend._set_mem_table,
    _R.ADD_MEM_REG: Backend._add_mem_reg,
    _R.REM_MEM_REG: Backend._rem_mem_reg,
    _R.SET_VRING_NUM: Backend._set_vring_num,
    _R.SET_VRING_BASE: Backend._set_vring_base,
    _R.SET_VRING_ADDR: Backend._set_vring_addr,
    _R.GET_VRING_BASE: Backend._get_vring_base,
    _R.SET_VRING_KICK: Backend._set_vring_kick,
    _R.SET_VRING_CALL: Backend._set_vring_call,
    _R.SET_VRING_ERR: Backend._set_vring_err,
    _R.SET_VRING_ENABLE: Backend._set_vring_enable,
    _R.GET_INFLIGHT_FD: Backend._get_inflight_fd,
    _R.SET_INFLIGHT_FD: Backend._set_inflight_fd,
    _R.SET_STATUS: Backend._set_status,
    _R.GET_STATUS: Backend._get_status,
    _R.RESET_DEVICE: Backend._reset_device,
}
