"""vfsmount: mount a virtio-fs share with no virtual machine.

The session API needs no mount: it speaks FUSE over the daemon's virtqueues, one method per opcode.

    async with vfsmount.connect("/run/vfsd.sock") as guest:
        entry = await guest.lookup(1, b"etc")
        with guest.cached(vfsmount.CachePolicy.for_mode("auto")) as view:
            await view.read("etc/hostname")

Names are loaded when they are first used, so that ``vfsmount serve`` starts without trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfsmount.cache.policy import CachePolicy
    from vfsmount.channel import ChannelOptions
    from vfsmount.client.session import Caller, Session, connect

__all__ = ["CachePolicy", "Caller", "ChannelOptions", "Session", "__version__", "connect"]

__version__ = "0.1.0"

_HOMES = {
    "CachePolicy": "vfsmount.cache.policy",
    "Caller": "vfsmount.client.session",
    "ChannelOptions": "vfsmount.channel",
    "Session": "vfsmount.client.session",
    "connect": "vfsmount.client.session",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value
