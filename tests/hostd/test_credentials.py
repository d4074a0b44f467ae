"""Who owns what is created. Each test runs in a thread of its own, which is what a guest gets."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, TypeVar

import pytest

from tests.hostd.guest import OFFER, ROOT, DirectGuest, expect_errno
from vfsmount.hostd import syscalls
from vfsmount.hostd.credentials import Credentials
from vfsmount.wire import fuse
from vfsmount.wire.fuse import Extensions, InitFlag, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vfsmount.hostd.fs.share import Share

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as others takes root")

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> T:
    """Run a function as a guest's thread does: settled, and gone afterwards."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        Credentials().settle()
        try:
            results.append(function())
        except BaseException as error:  # handed to the test's own thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def groups_ext(*groups: int) -> bytes:
    return fuse.encode_extensions(Extensions(groups=groups))


@pytest.fixture
def open_folder(folder: Path) -> Path:
    """A share in which everybody may create."""
    folder.chmod(0o777)
    return folder


@pytest.fixture
def user(share: Share, open_folder: Path) -> Iterator[DirectGuest]:
    with DirectGuest(share) as guest:
        guest.init()
        guest.uid, guest.gid = 1234, 5678
        yield guest


def test_everything_created_belongs_to_the_caller(user: DirectGuest, open_folder: Path) -> None:
    def create() -> None:
        user.mkdir(ROOT, b"dir")
        user.mknod(ROOT, b"fifo", 0o010644)
        user.symlink(ROOT, b"link", b"x")
        user.create(ROOT, b"file")
        body = fuse.CREATE_IN.values(os.O_RDWR, 0o640, 0, 0) + b"/\0"
        entry, _ = user.call(Opcode.TMPFILE, ROOT, body).records
        user.uid = user.gid = 0
        user.link(entry.nodeid, ROOT, b"tmpfile")

    in_thread(create)

    for path in open_folder.iterdir():
        info = path.lstat()
        assert (path.name, info.st_uid, info.st_gid) == (path.name, 1234, 5678)
    assert len(list(open_folder.iterdir())) == 5


def test_root_creates_as_root_and_others_change_nothing_else(user: DirectGuest) -> None:
    def create() -> tuple[int, int, list[int]]:
        user.mkdir(ROOT, b"dir")
        user.uid = user.gid = 0
        entry = user.mkdir(ROOT, b"roots")
        return os.geteuid(), entry.attr.uid, syscalls.thread_capabilities()

    before = in_thread(syscalls.thread_capabilities)

    assert in_thread(create) == (0, 0, before)
    assert os.geteuid() == 0


def test_the_identity_comes_back_after_an_error(user: DirectGuest, open_folder: Path) -> None:
    (open_folder / "dir").mkdir()

    def fail() -> tuple[int, int, list[int]]:
        with expect_errno("EEXIST"):
            user.mkdir(ROOT, b"dir")
        return os.geteuid(), os.getegid(), syscalls.thread_capabilities()

    assert in_thread(fail) == (0, 0, in_thread(syscalls.thread_capabilities))


def test_the_host_still_checks(user: DirectGuest, open_folder: Path) -> None:
    open_folder.chmod(0o755)

    def create() -> None:
        with expect_errno("EACCES"):
            user.mkdir(ROOT, b"dir")

    in_thread(create)


def test_without_groups_the_guest_is_believed(user: DirectGuest, open_folder: Path) -> None:
    """A guest that cannot send groups may be right that one of them opens the directory."""
    open_folder.chmod(0o755)

    def create() -> int:
        user.init(OFFER & ~InitFlag.CREATE_SUPP_GROUP)
        uid: int = user.mkdir(ROOT, b"dir").attr.uid
        return uid

    assert in_thread(create) == 1234


def test_supplementary_group(user: DirectGuest, open_folder: Path) -> None:
    os.chown(open_folder, 0, 4321)
    open_folder.chmod(0o2775)

    def create() -> tuple[int, int]:
        with expect_errno("EACCES"):
            user.mkdir(ROOT, b"dir")
        with expect_errno("EACCES"):
            user.mkdir(ROOT, b"dir", ext=groups_ext(99))
        entry = user.mkdir(ROOT, b"dir", ext=groups_ext(4321))
        with expect_errno("EACCES"):
            user.mkdir(ROOT, b"second")
        return entry.attr.gid, entry.attr.mode & 0o2000

    assert in_thread(create) == (4321, 0o2000)


@pytest.mark.parametrize("ids", [(2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1)])
def test_callers_without_identity_create_nothing(
    user: DirectGuest, open_folder: Path, ids: tuple[int, int]
) -> None:
    def create() -> None:
        user.uid, user.gid = ids
        with expect_errno("EINVAL"):
            user.mkdir(ROOT, b"dir")

    in_thread(create)
    assert list(open_folder.iterdir()) == []


def test_more_groups_than_the_kernel_takes(user: DirectGuest) -> None:
    def create() -> list[int]:
        with expect_errno("EINVAL"):
            user.mkdir(ROOT, b"dir", ext=groups_ext(*range(65537)))
        return syscalls.thread_capabilities()

    assert in_thread(create) == in_thread(syscalls.thread_capabilities)


def test_a_guests_thread_has_its_own_umask() -> None:
    umask = os.umask(0o027)
    try:
        assert in_thread(lambda: os.umask(0)) == 0
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(umask)


def test_other_threads_stay_who_they_are() -> None:
    credentials = Credentials()

    def look() -> tuple[int, int]:
        with credentials.acting_as(1, 2, None):
            inside = in_thread_of_its_own()
        return inside

    def in_thread_of_its_own() -> tuple[int, int]:
        seen: list[tuple[int, int]] = []
        # A thread started now inherits the identity; the main thread must not have it.
        main = threading.main_thread().native_id
        with open(f"/proc/self/task/{main}/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        seen.append((int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])))
        return seen[0]

    assert in_thread(look) == (0, 0)
