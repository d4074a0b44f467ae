"""Public fakes, for tests of this package and for those who write guests and host daemons."""

from vfsmount.testing.device_ring import Chain, DeviceRing
from vfsmount.testing.fake_device import DeviceRequest, FakeDevice, Reaction

__all__ = ["Chain", "DeviceRequest", "DeviceRing", "FakeDevice", "Reaction"]
