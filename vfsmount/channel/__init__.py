"""The way to the device: one request to the host daemon and its reply back, over real virtqueues.

    async with open_channel("/run/vfsd.sock") as channel:
        body = await channel.request(Opcode.GETATTR, 1, bytes(16), reply_size=104)

Pure parts (``virtqueue``, ``arena``, ``inflight``, ``negotiation``, ``statistics``) know nothing of
waiting. ``rings`` joins them with eventfds and may be driven by any one thread. ``device`` is the
trio shell, ``opening`` builds it all.
"""

from vfsmount.channel.backend_requests import BackendHandler
from vfsmount.channel.device import Channel
from vfsmount.channel.frontend import DeviceOffer
from vfsmount.channel.opening import open_channel, probe
from vfsmount.channel.options import ChannelOptions
from vfsmount.channel.statistics import (
    ChannelStatistics,
    InFlightRequest,
    NotificationStatistics,
    OpcodeStatistics,
)

__all__ = [
    "BackendHandler",
    "Channel",
    "ChannelOptions",
    "ChannelStatistics",
    "DeviceOffer",
    "InFlightRequest",
    "NotificationStatistics",
    "OpcodeStatistics",
    "open_channel",
    "probe",
]
