"""The virtio-fs device: its number, its queues and its config space.

Source: VIRTIO specification, "File System Device". Config space is little-endian and read-only to
the driver:

* ``tag`` 36 bytes, UTF-8, padded with NUL; without a terminator when all 36 are used
* ``num_request_queues`` u32
* ``notify_buf_size`` u32, only with the feature VIRTIO_FS_F_NOTIFICATION
"""

from __future__ import annotations

from typing import NamedTuple

from vfsmount.errors import WireError
from vfsmount.wire._codec import Codec

__all__ = [
    "CONFIG_SIZE",
    "CONFIG_SIZE_NOTIFY",
    "DAX_SHMID",
    "DEVICE_ID",
    "HIPRIO_QUEUE",
    "MAX_REQUEST_QUEUES",
    "TAG_SIZE",
    "Config",
    "decode_config",
    "encode_config",
    "first_request_queue",
]

#: VIRTIO device id of a file system device.
DEVICE_ID = 26
#: Bytes of the tag field.
TAG_SIZE = 36
#: Index of the queue for FORGET, BATCH_FORGET and INTERRUPT.
HIPRIO_QUEUE = 0
#: Shared memory region that is the DAX window.
DAX_SHMID = 0
#: vhost-user names a ring by 8 bits, and one of the 256 is the hiprio queue.
MAX_REQUEST_QUEUES = 255


class Config(NamedTuple):
    """Config space.

    Attributes:
        tag: Name of the shared tree, without padding; 1 to 36 bytes.
        num_request_queues: At least 1.
        notify_buf_size: Fewest bytes of a notification buffer; None without that feature.
    """

    tag: bytes
    num_request_queues: int = 1
    notify_buf_size: int | None = None


class _Fields(NamedTuple):
    tag: bytes
    num_request_queues: int


class _NotifyFields(NamedTuple):
    tag: bytes
    num_request_queues: int
    notify_buf_size: int


_FIELDS = Codec(_Fields, "<36sI")
_NOTIFY_FIELDS = Codec(_NotifyFields, "<36sII")

#: Bytes of config space without and with the notification queue.
CONFIG_SIZE = _FIELDS.size
CONFIG_SIZE_NOTIFY = _NOTIFY_FIELDS.size


def first_request_queue(notification: bool) -> int:
    """Return the index of request queue 0: 1, or 2 behind the notification queue."""
    return 2 if notification else 1


def decode_config(data: bytes) -> Config:
    """Decode the whole config space.

    Args:
        data: 40 bytes, or 44 with the notification feature.

    Raises:
        WireError: Another length, an empty tag, NUL inside the tag, no request queue or too many.
    """
    if len(data) == CONFIG_SIZE_NOTIFY:
        config = Config(*_NOTIFY_FIELDS.unpack(data))
    elif len(data) == CONFIG_SIZE:
        config = Config(*_FIELDS.unpack(data))
    else:
        raise WireError(f"virtio-fs config of {len(data)} bytes, expected {CONFIG_SIZE}")
    config = config._replace(tag=config.tag.rstrip(b"\0"))
    if not config.tag or b"\0" in config.tag:
        raise WireError(f"virtio-fs tag {config.tag!r} is empty or has a NUL inside")
    if not 1 <= config.num_request_queues <= MAX_REQUEST_QUEUES:
        raise WireError(f"virtio-fs config with {config.num_request_queues} request queues")
    return config


def encode_config(config: Config) -> bytes:
    """Return the config space: 40 bytes, or 44 when ``notify_buf_size`` is given.

    Raises:
        ValueError: The tag is empty, has a NUL inside or is longer than 36 bytes.
    """
    if not 1 <= len(config.tag) <= TAG_SIZE or b"\0" in config.tag:
        raise ValueError(f"virtio-fs tag {config.tag!r} is not 1 to {TAG_SIZE} bytes without NUL")
    if config.notify_buf_size is None:
        return _FIELDS.values(config.tag, config.num_request_queues)
    return _NOTIFY_FIELDS.values(config.tag, config.num_request_queues, config.notify_buf_size)
