"""Out of reach: namespaces, a root that is the shared directory, and no rights beyond files.

In this order, each step being the last that could be done with the rights that the next gives up:

1. a user namespace, for mere users and with ``--uid-map`` (``enter_user_namespace``);
2. mount and net namespaces, and the shared directory as root (``enter_namespaces``), or that alone
   (``enter_chroot``); the pid namespace takes a child, see ``supervisor``;
3. capabilities, no-new-privs, and the filter of system calls (``give_up_rights``).

What the daemon needs from outside is opened before: its socket, its log, and ``/proc/self/fd``,
which becomes the working directory, because there is no ``/proc`` any more.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from vfsmount.errors import UsageError, VfsmountError
from vfsmount.hostd import capabilities, procfd, syscalls
from vfsmount.hostd.isolation import UserMap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfsmount.hostd.isolation import Isolation

__all__ = [
    "begin_pid_namespace",
    "enter_chroot",
    "enter_namespaces",
    "enter_user_namespace",
    "give_up_rights",
    "step",
]

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWPID: Final = 0x20000000
_CLONE_NEWNET: Final = 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000

_PLACE: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
#: Where the shared directory is mounted until it is the root: what is there in any case.
_STAGE: Final = "/proc"
_MAP_TOOLS: Final = ("newuidmap", "newgidmap")
#: They may ask a directory service of users; nobody waits for that without end.
_MAP_SECONDS: Final = 10.0


@contextmanager
def step(what: str, cure: str) -> Iterator[None]:
    """Turn what the system refuses in the body into a ``UsageError``: one line with a cure."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot isolate the daemon: {what}: {error.strerror}", cure) from None


_NO_NAMESPACES: Final = "take --sandbox chroot or, with nothing kept out of reach, --sandbox none"


def begin_pid_namespace() -> None:
    """Make the next child the first process of a pid namespace.

    Raises:
        UsageError: The host does not allow it.
    """
    with step("pid namespace", _NO_NAMESPACES):
        syscalls.unshare(_CLONE_NEWPID)


def enter_namespaces(directory: int, *, or_return: bool = False) -> None:
    """Make a directory the root of a mount namespace, which has no network either.

    Mounts that the host makes or removes below the directory follow as far as its own are shared.

    Args:
        directory: Descriptor of the directory. It leads to what lies around it, so close it then.
        or_return: The caller goes on without where the host does not allow it.

    Raises:
        UsageError: The host does not allow it. With ``or_return``, root and mounts are as before.
        VfsmountError: They cannot be.
    """
    with ExitStack() as places:
        with step("/proc/self/fd", "mount proc on /proc"):
            host_proc = _held(procfd.open_folder(), places)
            host_root = _held(os.open("/", _PLACE), places)
            host_mounts = _held(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), places)
        with step("mount and net namespaces", _NO_NAMESPACES):
            os.fchdir(directory)  # which moves along, unlike descriptors
            syscalls.unshare(_CLONE_NEWNS | _CLONE_NEWNET)
        try:
            with step("shared directory as root", _NO_NAMESPACES):
                _make_root(host_proc, places)
        except UsageError as error:
            # Half of it would be worse than nothing: /proc may be a folder of the guest's by now.
            if or_return:
                _return_to(host_mounts, host_root, error)
            raise


def _make_root(host_proc: int, places: ExitStack) -> None:
    """Make the working directory the root of this mount namespace, and leave nothing else."""
    syscalls.mount("none", "/", None, _MS_REC | _MS_SLAVE)
    syscalls.mount(".", _STAGE, None, _MS_BIND | _MS_REC)
    root = _held(os.open(_STAGE, _PLACE), places)
    proc_fd = _own_proc(host_proc)
    if proc_fd != host_proc:
        _held(proc_fd, places)
    syscalls.pivot_root(_STAGE, _STAGE)
    os.fchdir(root)
    syscalls.detach(".")  # the old root, which lies on top of the new one
    _live_in(proc_fd)


def _return_to(mounts: int, root: int, cause: UsageError) -> None:
    """Go back to a mount namespace, and to what the root was there.

    Raises:
        VfsmountError: The host does not allow that either.
    """
    try:
        syscalls.enter_mount_namespace(mounts)
        os.fchdir(root)
        os.chroot(".")
    except OSError as error:
        raise VfsmountError(f"{cause}; no way back: {error.strerror}", cause.cure) from None


def _held(fd: int, places: ExitStack) -> int:
    """Have a descriptor closed at the end of a block, however it ends."""
    places.callback(os.close, fd)
    return fd


def _own_proc(host_proc: int) -> int:
    """Return ``/proc/self/fd`` of a proc that shows this pid namespace, and no way out of it.

    In a container that hides parts of its proc a mere user may not mount one: then the host's.
    """
    try:
        syscalls.mount("proc", _STAGE, "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    except OSError:
        return host_proc
    syscalls.mount("/proc/self/fd", _STAGE, None, _MS_BIND)
    proc_fd = os.open(_STAGE, _PLACE)
    for _ in range(2):
        syscalls.detach(_STAGE)
    return proc_fd


def enter_chroot(directory: int) -> None:
    """Make a directory the root of this process; argument and error as ``enter_namespaces``."""
    with ExitStack() as places:
        with step("/proc/self/fd", "mount proc on /proc"):
            proc_fd = _held(procfd.open_folder(), places)
        with step("chroot", "run as root, or take --sandbox none"):
            os.fchdir(directory)
            os.chroot(".")
            _live_in(proc_fd)


def _live_in(proc_fd: int) -> None:
    os.fchdir(proc_fd)
    procfd.use_working_directory()


# --- users ---------------------------------------------------------------------------------------


def enter_user_namespace(isolation: Isolation) -> None:
    """Enter a user namespace with the users and groups asked for; without any, ourselves alone.

    Raises:
        UsageError: The host does not allow it, or not these users.
    """
    maps = (
        isolation.uid_map or (UserMap(os.geteuid(), os.geteuid(), 1),),
        isolation.gid_map or (UserMap(os.getegid(), os.getegid(), 1),),
    )
    with step("helper outside the user namespace", "allow more processes (ulimit -u)"):
        helper, go = _start_map_helper(maps)
    try:
        with step("user namespace", _NO_NAMESPACES):
            syscalls.unshare(_CLONE_NEWUSER)
    except UsageError:
        os.close(go)
        os.waitpid(helper, 0)
        raise
    os.write(go, b"\n")
    os.close(go)
    if os.waitpid(helper, 0)[1]:
        raise UsageError(
            "cannot map these users and groups",
            "see subuid(5) for those that you may use, and install newuidmap (package uidmap)",
        )
    _become_root_inside(maps)


def _start_map_helper(maps: tuple[tuple[UserMap, ...], ...]) -> tuple[int, int]:
    """Fork a process that stays outside, where alone more than ourselves can be mapped.

    Returns:
        Its pid, and a descriptor: it begins when that is written to.
    """
    target = os.getpid()
    begin, go = os.pipe()
    helper = os.fork()
    if helper:
        os.close(begin)
        return helper, go
    os.close(go)
    status = 1
    try:
        if os.read(begin, 1):
            _write_maps(target, maps)
            status = 0
    except OSError as error:
        with suppress(OSError):
            os.write(2, f"vfsmount serve: WARNING: user namespace: {error}\n".encode())
    finally:
        os._exit(status)


def _write_maps(target: int, maps: tuple[tuple[UserMap, ...], ...]) -> None:
    if os.geteuid() == 0:
        for name, lines in zip(("uid_map", "gid_map"), maps, strict=True):
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in lines)
            _write(f"/proc/{target}/{name}", text)
        return
    for tool, name, own, lines in zip(
        _MAP_TOOLS, ("uid_map", "gid_map"), (os.geteuid(), os.getegid()), maps, strict=True
    ):
        if [line[1:] for line in lines] == [(own, 1)]:
            if name == "gid_map":
                _write(f"/proc/{target}/setgroups", "deny")
            _write(f"/proc/{target}/{name}", f"{lines[0].inside} {own} 1\n")
        else:
            import subprocess  # 8 ms that no other start needs

            words = [str(number) for line in lines for number in line]
            try:
                refused = subprocess.call([tool, str(target), *words], timeout=_MAP_SECONDS)
            except subprocess.TimeoutExpired:
                raise OSError(f"{tool} does not end") from None
            if refused:
                raise OSError(f"{tool} refused")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _become_root_inside(maps: tuple[tuple[UserMap, ...], ...]) -> None:
    """Act as the namespace's root where our own user is not in it: nobody else can do anything."""
    if not all(any(line.inside == 0 for line in lines) for lines in maps):
        return
    with suppress(OSError):  # denied where mere users made the namespace
        os.setgroups([])
    with step("root of the user namespace", _NO_NAMESPACES):
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)


# --- rights --------------------------------------------------------------------------------------


def give_up_rights(
    isolation: Isolation, restrict: Callable[[], None], *, file_handles: bool
) -> None:
    """Keep the capabilities and system calls that serving takes; to be called before any thread.

    Args:
        isolation: What was asked for.
        restrict: From ``seccomp.prepare``.
        file_handles: Keep what opening those takes.

    Raises:
        UsageError: The host does not allow it.
    """
    kept = set(capabilities.KEPT)
    if file_handles:
        kept.add(capabilities.DAC_READ_SEARCH)
    with step("capabilities", "leave --modcaps out"):
        capabilities.reduce_to((kept | isolation.added) - isolation.dropped)
    with step("filter of system calls", "take --seccomp none"):
        syscalls.set_no_new_privs()
        restrict()
