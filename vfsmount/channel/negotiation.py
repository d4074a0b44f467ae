"""Which features are taken of those that are offered, and what is refused.

Virtio features and protocol features are two sets. *Offered* is what the back-end has, *acked* what
we accept; a message or mechanism that belongs to a feature is used only when the feature is acked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfsmount.errors import HandshakeError
from vfsmount.wire.vhost_user import ProtocolFeature, VirtioFeature

if TYPE_CHECKING:
    from vfsmount.channel.options import ChannelOptions

__all__ = ["WANTED_PROTOCOL_FEATURES", "ack_protocol_features", "ack_virtio_features"]

_PF = ProtocolFeature
_VF = VirtioFeature

#: What we have a use for. SHMEM joins when there is a window to map things into. INFLIGHT_SHMFD is
#: for those who connect to a successor, and costs the daemon a microsecond per request.
WANTED_PROTOCOL_FEATURES = (
    _PF.MQ
    | _PF.REPLY_ACK
    | _PF.BACKEND_REQ
    | _PF.CONFIG
    | _PF.BACKEND_SEND_FD
    | _PF.RESET_DEVICE
    | _PF.CONFIGURE_MEM_SLOTS
    | _PF.STATUS
)

#: What it takes to map: the back-end asks, sends a descriptor, and learns whether it worked.
_MAPPING = _PF.BACKEND_REQ | _PF.BACKEND_SEND_FD | _PF.REPLY_ACK


def ack_virtio_features(offered: int, options: ChannelOptions) -> int:
    """Return the virtio features to accept.

    Raises:
        HandshakeError: The device is from before VIRTIO 1.0.
    """
    if not offered & _VF.VERSION_1:
        raise HandshakeError("the daemon does not offer VERSION_1, so it is no virtio 1.0 device")
    wanted = _VF.VERSION_1 | _VF.PROTOCOL_FEATURES
    if options.event_idx:
        wanted |= _VF.RING_EVENT_IDX
    if options.indirect:
        wanted |= _VF.RING_INDIRECT_DESC
    return offered & wanted


def ack_protocol_features(offered: int, window: bool = False) -> int:
    """Return the protocol features to accept; one that depends on another comes only with it.

    Args:
        offered: What the back-end has.
        window: Whether we have a window for what it maps.
    """
    acked = offered & (WANTED_PROTOCOL_FEATURES | (_PF.SHMEM if window else 0))
    if not acked & _PF.BACKEND_REQ:
        acked &= ~int(_PF.BACKEND_SEND_FD)
    if acked & _MAPPING != _MAPPING:
        acked &= ~int(_PF.SHMEM)
    return int(acked)
