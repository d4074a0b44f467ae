"""Opening a channel: what is said, in which order, and every way in which it can go wrong."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.channel.support import DEADLINE, getattr_request, opened, time_passes_after
from vfsmount.channel import ChannelOptions, open_channel, probe
from vfsmount.channel.frontend import Frontend
from vfsmount.channel.socket import MessageSocket
from vfsmount.errors import ConnectError, FeatureMissing, HandshakeError, UsageError
from vfsmount.testing import FakeDevice, Reaction
from vfsmount.testing.fake_device import ALL_FEATURES, ALL_PROTOCOL_FEATURES
from vfsmount.wire import virtio_fs
from vfsmount.wire.fuse import Opcode
from vfsmount.wire.vhost_user import (
    FrontendRequest,
    ProtocolFeature,
    VirtioFeature,
    VirtioStatus,
    VringState,
)

if TYPE_CHECKING:
    from pathlib import Path

PF = ProtocolFeature

INTRODUCTION = [
    "SET_OWNER",
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_MAX_MEM_SLOTS",
    "GET_CONFIG",
]
EACH_RING = [
    "SET_VRING_NUM",
    "SET_VRING_BASE",
    "SET_VRING_ADDR",
    "SET_VRING_CALL",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
]
FULL_HANDSHAKE = [
    *INTRODUCTION,
    "SET_BACKEND_REQ_FD",
    *("SET_STATUS", "SET_STATUS", "SET_FEATURES", "SET_STATUS", "GET_STATUS"),
    "ADD_MEM_REG",
    *EACH_RING,
    *EACH_RING,
    "SET_STATUS",
]


async def test_everything_in_its_order() -> None:
    device = FakeDevice()
    async with opened(device) as channel:
        assert device.requests == FULL_HANDSHAKE
        assert device.status == 15
        assert device.acked == ALL_FEATURES == channel.features
        assert device.acked_protocol == ALL_PROTOCOL_FEATURES == channel.protocol_features
        assert channel.config == virtio_fs.Config(b"fake", 1)
        assert channel.num_request_queues == 1
        assert channel.queue_size == 1024
        await getattr_request(channel)

    assert device.requests[len(FULL_HANDSHAKE) :] == [
        "GET_VRING_BASE",
        "GET_VRING_BASE",
        "RESET_DEVICE",
    ]


OWN_MESSAGES = {
    PF.MQ: {"GET_QUEUE_NUM"},
    PF.BACKEND_REQ: {"SET_BACKEND_REQ_FD"},
    PF.CONFIG: {"GET_CONFIG"},
    PF.RESET_DEVICE: {"RESET_DEVICE"},
    PF.CONFIGURE_MEM_SLOTS: {"GET_MAX_MEM_SLOTS", "ADD_MEM_REG"},
    PF.STATUS: {"SET_STATUS", "GET_STATUS"},
    PF.REPLY_ACK: set[str](),
}


@pytest.mark.parametrize("feature", OWN_MESSAGES, ids=lambda feature: feature.name)
async def test_no_message_without_its_feature(feature: ProtocolFeature) -> None:
    device = FakeDevice(protocol_features=ALL_PROTOCOL_FEATURES & ~int(feature))
    async with opened(device) as channel:
        await getattr_request(channel)
        assert not channel.protocol_features & feature

    assert not OWN_MESSAGES[feature] & set(device.requests)
    if feature == PF.CONFIGURE_MEM_SLOTS:
        assert "SET_MEM_TABLE" in device.requests
    if feature == PF.BACKEND_REQ:
        assert not device.acked_protocol & PF.BACKEND_SEND_FD


async def test_without_any_protocol_feature_a_question_is_the_barrier() -> None:
    device = FakeDevice(protocol_features=0, config=None)
    async with opened(device) as channel:
        assert device.requests[-1] == "GET_FEATURES"
        assert channel.config is None
        assert channel.num_request_queues == 1
        await getattr_request(channel)


async def test_without_protocol_features_at_all_rings_are_enabled_from_the_start() -> None:
    features = ALL_FEATURES & ~int(VirtioFeature.PROTOCOL_FEATURES)
    device = FakeDevice(features=features, protocol_features=0)
    async with opened(device) as channel:
        await getattr_request(channel)

    assert not {"GET_PROTOCOL_FEATURES", "SET_VRING_ENABLE"} & set(device.requests)


@pytest.mark.parametrize("missing", ["RING_EVENT_IDX", "RING_INDIRECT_DESC"])
async def test_rings_without(missing: str) -> None:
    device = FakeDevice(features=ALL_FEATURES & ~int(VirtioFeature[missing]))
    async with opened(device) as channel:
        for _ in range(5):
            await getattr_request(channel)
        assert not channel.features & VirtioFeature[missing]


@pytest.mark.parametrize("option", ["event_idx", "indirect"])
async def test_ring_features_can_be_declined(option: str) -> None:
    device = FakeDevice()
    options = ChannelOptions(**{option: False})  # type: ignore[arg-type]
    async with opened(device, options=options) as channel:
        await getattr_request(channel)
        assert channel.features != channel.offer.features


async def test_no_unwanted_feature_is_taken() -> None:
    everything = (1 << 64) - 1 & ~int(VirtioFeature.RING_PACKED)
    device = FakeDevice(features=everything, protocol_features=(1 << 64) - 1)
    async with opened(device) as channel:
        await getattr_request(channel)
        assert channel.offer.features == everything

    assert device.acked == ALL_FEATURES
    assert device.acked_protocol == ALL_PROTOCOL_FEATURES


async def test_calls_without_their_feature_are_our_bug_and_send_nothing() -> None:
    device = FakeDevice(protocol_features=0)
    with trio.fail_after(DEADLINE), device:
        messages = MessageSocket(trio.socket.from_stdlib_socket(device.guest_socket()))
        frontend = Frontend(messages, 1)
        with pytest.raises(FeatureMissing, match="GET_CONFIG needs CONFIG"):
            await frontend.call(FrontendRequest.GET_CONFIG)
        with pytest.raises(FeatureMissing, match="SET_VRING_ENABLE needs PROTOCOL_FEATURES"):
            await frontend.call(FrontendRequest.SET_VRING_ENABLE, VringState(0, 1))
        frontend.close()
    assert device.requests == []


async def test_config_that_is_empty_after_all() -> None:
    async with opened(FakeDevice(config=None)) as channel:
        assert channel.config is None


async def test_several_request_queues_are_reported() -> None:
    async with opened(FakeDevice(num_queues=5, config=None)) as channel:
        assert channel.num_request_queues == 4


# --- it goes wrong --------------------------------------------------------------------------------

EVERY_MESSAGE = [*dict.fromkeys(FULL_HANDSHAKE), "SET_MEM_TABLE"]
#: No acknowledgement is due before REPLY_ACK is negotiated, so the next question tells.
UNACKNOWLEDGED = {"SET_OWNER": "GET_FEATURES", "SET_PROTOCOL_FEATURES": "GET_QUEUE_NUM"}


def ill_at(name: str, reaction: Reaction) -> FakeDevice:
    """A device that does something else when it gets a certain message."""
    features = ALL_PROTOCOL_FEATURES
    if name == "SET_MEM_TABLE":
        features &= ~int(PF.CONFIGURE_MEM_SLOTS)
    return FakeDevice(reactions={FrontendRequest[name]: reaction}, protocol_features=features)


async def fail_at(name: str, reaction: Reaction) -> HandshakeError:
    return await failure(ill_at(name, reaction))


async def failure(device: FakeDevice, timeout: float = DEADLINE / 2) -> HandshakeError:
    """Return why a device could not be opened."""
    with pytest.raises(HandshakeError) as caught:
        async with opened(device, connect_timeout=timeout):
            raise AssertionError("it was opened")
    assert caught.value.cure
    return caught.value


@pytest.mark.parametrize("name", EVERY_MESSAGE)
@pytest.mark.parametrize("reaction", [Reaction.CLOSE, Reaction.CUT])
async def test_closes_during_each_message(name: str, reaction: Reaction) -> None:
    error = await fail_at(name, reaction)

    during = str(error).removeprefix("the daemon closed the connection during ")
    assert during in {name, UNACKNOWLEDGED.get(name)}


@pytest.mark.parametrize("name", [name for name in EVERY_MESSAGE if name not in UNACKNOWLEDGED])
async def test_never_answers_each_message(name: str, mock_clock: trio.testing.MockClock) -> None:
    """Time passes when all messages before it have been answered."""
    device = ill_at(name, Reaction.IGNORE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(time_passes_after, mock_clock, device, name)
        error = await failure(device, timeout=0.05)

    assert str(error) == f"the daemon did not answer {name} within 0.05 s"


@pytest.mark.parametrize("name", EVERY_MESSAGE)
async def test_speaks_something_else_at_each_message(name: str) -> None:
    error = await fail_at(name, Reaction.GARBAGE)

    assert "speaks something else than vhost-user" in str(error)


@pytest.mark.parametrize(
    "name", ["SET_STATUS", "SET_FEATURES", "ADD_MEM_REG", "SET_VRING_ADDR", "SET_VRING_ENABLE"]
)
async def test_refuses(name: str) -> None:
    error = await fail_at(name, Reaction.REFUSE)

    assert str(error) == f"the daemon refused {name} (error 1)"


async def test_answer_of_the_wrong_shape() -> None:
    error = await fail_at("GET_CONFIG", Reaction.REFUSE)

    assert "bad answer to GET_CONFIG" in str(error)


async def test_answer_that_nobody_asked_for() -> None:
    error = await fail_at("SET_OWNER", Reaction.REFUSE)

    assert "message 3" in str(error)


async def test_device_from_before_virtio_1() -> None:
    device = FakeDevice(features=ALL_FEATURES & ~int(VirtioFeature.VERSION_1))
    with pytest.raises(HandshakeError, match="VERSION_1"):
        async with opened(device):
            pass


async def test_device_that_does_not_keep_features_ok() -> None:
    class Forgetful(FakeDevice):
        @property
        def status(self) -> int:
            return int(VirtioStatus.ACKNOWLEDGE)

        @status.setter
        def status(self, value: int) -> None:
            pass

    with pytest.raises(HandshakeError, match="does not accept the features"):
        async with opened(Forgetful()):
            pass


async def test_device_with_one_queue_is_no_virtio_fs() -> None:
    with pytest.raises(HandshakeError, match="two at least"):
        async with opened(FakeDevice(num_queues=1)):
            pass


async def test_silent_peer() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(DEADLINE), pytest.raises(HandshakeError, match=r"within 0\.05 s"):
        async with open_channel(sock=ours, options=ChannelOptions(connect_timeout=0.05)):
            pass


async def test_peer_that_is_gone_already() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with trio.fail_after(DEADLINE), pytest.raises(HandshakeError, match="closed the connection"):
        async with open_channel(sock=ours):
            pass


async def test_cancelled_in_the_middle() -> None:
    device = FakeDevice(reactions={FrontendRequest.ADD_MEM_REG: Reaction.IGNORE})
    with trio.move_on_after(0.1) as scope:
        async with opened(device):
            pass
    assert scope.cancelled_caught


async def test_own_exceptions_pass_unchanged() -> None:
    with pytest.raises(KeyError) as caught:
        async with opened(FakeDevice()):
            raise KeyError("mine")
    assert caught.value.args == ("mine",)


async def test_own_exceptions_pass_unchanged_through_a_cancellation() -> None:
    device = FakeDevice()

    async def cancelled_caller() -> None:
        with trio.CancelScope() as scope:
            async with opened(device):
                scope.cancel()
                raise KeyError("mine")

    with pytest.raises(KeyError):
        await cancelled_caller()
    assert device.requests[-1] == "RESET_DEVICE", "the end was not in order"


async def test_cancelled_while_open() -> None:
    with trio.CancelScope() as scope:
        async with opened(FakeDevice()) as channel:
            await getattr_request(channel)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_cancelled_caller_can_still_say_goodbye() -> None:
    device = FakeDevice()
    with trio.CancelScope() as scope:
        async with opened(device, poll_us=0) as channel:
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await channel.request(Opcode.DESTROY, 0, b"", reply_size=0)
    assert scope.cancelled_caught
    assert device.served == 1


# --- nobody there ---------------------------------------------------------------------------------


async def refused(path: str | Path, timeout: float = DEADLINE / 2) -> ConnectError:
    with trio.fail_after(DEADLINE), pytest.raises(ConnectError) as caught:
        async with open_channel(path, ChannelOptions(connect_timeout=timeout)):
            pass
    assert "\n" not in str(caught.value)
    return caught.value


async def test_no_such_socket(tmp_path: Path) -> None:
    error = await refused(tmp_path / "absent")
    assert str(error) == f"no such socket: {tmp_path / 'absent'}"
    assert error.cure


async def test_not_even_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(await refused(tmp_path / "file" / "x")).startswith("no such socket")


async def test_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = await refused(tmp_path / "file")
    assert str(error) == f"not a socket: {tmp_path / 'file'}"
    assert error.cure


async def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
    assert stat.S_ISSOCK((tmp_path / "s").stat().st_mode)
    error = await refused(tmp_path / "s")
    assert str(error) == f"nobody listens on {tmp_path / 's'}"
    assert error.cure


async def test_datagram_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        assert str(await refused(tmp_path / "s")).startswith("not a stream socket")


async def test_listener_that_never_accepts(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as first:
        sock.bind(str(tmp_path / "s"))
        sock.listen(0)
        first.connect(str(tmp_path / "s"))
        assert "did not accept within 0.1 s" in str(await refused(tmp_path / "s", 0.1))


async def test_path_too_long(tmp_path: Path) -> None:
    error = await refused(tmp_path / ("x" * 110))
    assert "too long" in str(error)
    assert "107" in error.cure


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
async def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        path.chmod(0)
        os.seteuid(65534)
        try:
            error = await refused(path)
        finally:
            os.seteuid(0)
    assert str(error) == f"permission denied: {path}"
    assert error.cure


async def test_either_a_path_or_a_socket() -> None:
    with pytest.raises(ValueError, match="either"):
        async with open_channel():
            pass


# --- probe ----------------------------------------------------------------------------------------


async def test_probe_starts_no_ring() -> None:
    device = FakeDevice(config=virtio_fs.Config(b"tag", 3))
    with trio.fail_after(DEADLINE), device:
        offer = await probe(sock=device.guest_socket())

    assert (offer.features, offer.protocol_features) == (ALL_FEATURES, ALL_PROTOCOL_FEATURES)
    assert (offer.num_queues, offer.max_mem_slots) == (2, 32)
    assert offer.config == virtio_fs.Config(b"tag", 3)
    assert offer.num_request_queues == 3
    assert device.requests == INTRODUCTION


async def test_probe_of_the_least_device() -> None:
    device = FakeDevice(features=int(VirtioFeature.VERSION_1), protocol_features=0)
    with trio.fail_after(DEADLINE), device:
        offer = await probe(sock=device.guest_socket())

    assert offer.protocol_features == 0
    assert (offer.num_queues, offer.max_mem_slots, offer.config) == (None, None, None)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue_size": 1},
        {"queue_size": 1000},
        {"queue_size": 65536},
        {"connect_timeout": 0},
        {"mute_after": -1},
        {"request_timeout": -1},
        {"poll_us": -1},
    ],
    ids=str,
)
def test_options_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ChannelOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 128, 32768])
async def test_queue_sizes(size: int) -> None:
    async with opened(FakeDevice(), queue_size=size) as channel:
        assert channel.queue_size == size
        for _ in range(3):
            await getattr_request(channel)


async def test_shared_memory_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    async with opened(FakeDevice(), shm_file=str(path)) as channel:
        assert path.exists()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await getattr_request(channel)
    assert not path.exists()


async def test_shared_memory_file_that_is_somebody_elses(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        async with opened(FakeDevice(), shm_file=str(path)):
            pass
    assert path.read_text() == "mine"
