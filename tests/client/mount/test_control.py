"""The control socket, both ends, without a mount: the device number is made up."""

from __future__ import annotations

import json
import os
import socket
import stat
from typing import TYPE_CHECKING, Any

import pytest
import trio

from vfsmount.client.mount import control
from vfsmount.client.mount.control import ask, folders, prepare_folder, serving_pid
from vfsmount.client.mount.control_server import control_socket
from vfsmount.client.mount.mountinfo import MountEntry
from vfsmount.errors import MountError

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = "0:987654"


def entry(uid: int | None = None) -> MountEntry:
    owner = () if uid is None else (f"user_id={uid}",)
    return MountEntry(DEVICE, "/", "/mnt/x", (), "fuse.vfsmount", "s", owner)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for control sockets of this test alone."""
    place = tmp_path / "control"
    monkeypatch.setattr(control, "folders", lambda uid: [str(place)])
    return place


async def status(request: dict[str, Any]) -> dict[str, Any]:
    return {"state": "serving", "detail": request.get("detail")}


async def in_thread(function: Any, *args: Any) -> Any:
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(function, *args)


class TestFolders:
    def test_root(self) -> None:
        assert folders(0, {"XDG_RUNTIME_DIR": "/x"}) == ["/run/vfsmount", "/tmp/vfsmount-0"]

    def test_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 7)
        assert folders(7, {"XDG_RUNTIME_DIR": "/x"}) == [
            "/x/vfsmount",
            "/run/user/7/vfsmount",
            "/tmp/vfsmount-7",
        ]
        assert folders(7, {"XDG_RUNTIME_DIR": "relative"})[0] == "/run/user/7/vfsmount"

    def test_root_looks_for_a_users_mount(self) -> None:
        assert folders(8, {"XDG_RUNTIME_DIR": "/x"})[0] == "/run/user/8/vfsmount"

    def test_folder_is_private(self, folder: Path) -> None:
        assert prepare_folder() == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert prepare_folder() == str(folder)

    def test_folder_of_others_is_not_used(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder.mkdir(mode=0o755)
        with pytest.raises(PermissionError, match="is not a folder that only uid"):
            prepare_folder()
        other = tmp_path / "other"
        monkeypatch.setattr(control, "folders", lambda uid: [str(folder), str(other)])
        assert prepare_folder() == str(other)

    def test_link_is_not_followed(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        folder.symlink_to("real")
        with pytest.raises(PermissionError):
            prepare_folder()


class TestServing:
    async def test_question_and_answer(self, folder: Path) -> None:
        async with control_socket(DEVICE, {"status": status}):
            assert await in_thread(ask, entry(), "status") == {"state": "serving", "detail": None}
            assert await in_thread(serving_pid, entry()) == os.getpid()
            path = folder / f"{DEVICE}.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(folder.iterdir()) == []

    async def test_unknown_command_is_refused_by_name(self, folder: Path) -> None:
        async with control_socket(DEVICE, {"status": status}):
            with pytest.raises(
                MountError, match="refuses 'dance': no such command; there are: status"
            ):
                await in_thread(ask, entry(), "dance")

    @pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{\n", b"\xff\n", b'{"command": []}\n'])
    async def test_nonsense_is_answered(self, folder: Path, line: bytes) -> None:
        async with control_socket(DEVICE, {"status": status}):
            stream = await trio.open_unix_socket(str(folder / f"{DEVICE}.sock"))
            await stream.send_all(line)
            answer = json.loads(await stream.receive_some())
            assert answer["ok"] is False
            await stream.aclose()

    async def test_several_questions_in_one_packet(self, folder: Path) -> None:
        async with control_socket(DEVICE, {"status": status}):
            stream = await trio.open_unix_socket(str(folder / f"{DEVICE}.sock"))
            await stream.send_all(b'{"command": "status", "detail": 1}\n' * 3)
            data = b""
            while data.count(b"\n") < 3:
                data += await stream.receive_some()
            assert {json.loads(line)["result"]["detail"] for line in data.splitlines()} == {1}
            await stream.aclose()

    async def test_endless_line_is_cut_off(self, folder: Path) -> None:
        async with control_socket(DEVICE, {"status": status}):
            stream = await trio.open_unix_socket(str(folder / f"{DEVICE}.sock"))
            with pytest.raises(trio.BrokenResourceError):  # it waits for a reader, who leaves
                await stream.send_all(b"x" * (16 << 20))
            await stream.aclose()

    async def test_silent_client_is_cut_off(
        self, folder: Path, autojump_clock: trio.testing.MockClock
    ) -> None:
        async with control_socket(DEVICE, {"status": status}):
            stream = await trio.open_unix_socket(str(folder / f"{DEVICE}.sock"))
            assert await stream.receive_some() == b""
            await stream.aclose()

    async def test_mount_goes_on_without_a_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
    ) -> None:
        monkeypatch.setattr(control, "folders", lambda uid: [str(tmp_path / "no" / "where")])
        expect_log("no status for this mount: .*No such file")
        async with control_socket(DEVICE, {"status": status}):
            pass

    async def test_stale_sockets_are_removed_and_live_ones_kept(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / "0:1.sock"))
        with socket.socket(socket.AF_UNIX) as alive:
            alive.bind(str(folder / "0:2.sock"))
            alive.listen()
            (folder / "note").touch()
            async with control_socket(DEVICE, {"status": status}):
                assert {path.name for path in folder.iterdir()} == {
                    "0:2.sock",
                    "note",
                    f"{DEVICE}.sock",
                }


class TestAsking:
    def test_nobody_serves(self, folder: Path) -> None:
        assert serving_pid(entry()) is None
        with pytest.raises(MountError, match="no vfsmount process serves /mnt/x") as caught:
            ask(entry(), "status")
        assert caught.value.cure == "clean it up: vfsmount umount /mnt/x"

    def test_process_that_does_not_answer(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control, "ANSWER_SECONDS", 0.05)
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / f"{DEVICE}.sock"))
            listener.listen()
            with pytest.raises(MountError, match=f"process {os.getpid()} does not answer"):
                ask(entry(), "status")
            assert serving_pid(entry()) == os.getpid()

    @pytest.mark.parametrize("answer", [b"", b"1\n", b"null\n", b"{}\n", b"hello\n"])
    async def test_answer_that_is_none(self, folder: Path, answer: bytes) -> None:
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as plain:
            plain.bind(str(folder / f"{DEVICE}.sock"))
            plain.listen()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain))

            async def answerer() -> None:
                async with await listener.accept() as stream:
                    await stream.receive_some()
                    await stream.send_all(answer)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answerer)
                with pytest.raises(MountError):
                    await in_thread(ask, entry(), "status")

    def test_socket_of_another_user_is_not_believed(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        assert serving_pid(entry(uid=os.geteuid() + 1)) is None
