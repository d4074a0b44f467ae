"""The system calls that the daemon may make, kept to by the kernel (seccomp(2)).

The filter is built by libseccomp, which knows each machine's numbers; it is called directly because
its Python bindings look for it with ``ldconfig``, and the 30 ms of that count in every mount's
start. Where it is not installed there is no filter, and the log says so.

Three lists. What the interpreter, its threads and files need is allowed. What nobody calls by
mistake, because it executes a program, connects, traces, mounts, loads or changes the machine,
ends the daemon. All else is as on a kernel without it (ENOSYS), which the C library can live with:
a list is made on one machine, and a newer library on another must not be the daemon's end.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

#: SCMP_ACT_*, as in seccomp.h.
_ACTIONS: Final = {"kill": 0x80000000, "trap": 0x00030000, "log": 0x7FFC0000}
_ALLOW: Final = 0x7FFF0000

# fmt: off
_FILES: Final = (
    "open", "openat", "openat2", "close", "close_range", "read", "pread64", "readv", "preadv",
    "preadv2", "write", "pwrite64", "writev", "pwritev", "pwritev2", "lseek", "_llseek",
    "fstat", "fstat64", "stat", "stat64", "lstat", "lstat64", "newfstatat", "fstatat64", "statx",
    "statfs", "statfs64", "fstatfs", "fstatfs64", "getdents", "getdents64", "access", "faccessat",
    "faccessat2", "readlink", "readlinkat", "mkdirat", "mknodat", "symlinkat", "linkat", "unlinkat",
    "renameat", "renameat2", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "utimensat",
    "utimensat_time64", "truncate", "ftruncate", "ftruncate64", "fallocate", "fadvise64", "fsync",
    "fdatasync", "syncfs", "sync_file_range", "copy_file_range", "sendfile", "sendfile64", "splice",
    "mkdir", "rmdir", "mknod", "symlink", "link", "unlink", "rename", "chmod", "chown", "lchown",
    "flock", "fcntl", "fcntl64", "ioctl", "getcwd", "chdir", "fchdir", "umask",
    "getxattr", "lgetxattr", "fgetxattr", "setxattr", "lsetxattr", "fsetxattr",
    "listxattr", "llistxattr", "flistxattr", "removexattr", "lremovexattr", "fremovexattr",
    "getxattrat", "setxattrat", "listxattrat", "removexattrat",
    "name_to_handle_at", "open_by_handle_at",
)
_MEMORY: Final = (
    "brk", "mmap", "mmap2", "munmap", "mremap", "mprotect", "madvise", "mlock", "mlock2", "munlock",
    "memfd_create", "membarrier", "msync", "mincore",
)
_WAITING: Final = (
    "poll", "ppoll", "ppoll_time64", "select", "_newselect", "pselect6", "epoll_create1",
    "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "eventfd2", "pipe2", "dup", "dup2",
    "dup3", "futex", "futex_time64", "futex_waitv", "nanosleep", "clock_nanosleep",
    "clock_nanosleep_time64", "restart_syscall", "sched_yield", "pause",
    "timerfd_create", "timerfd_settime", "signalfd4",
)
_SOCKETS: Final = (
    "accept", "accept4", "recvmsg", "recvfrom", "sendmsg", "sendto", "shutdown", "getsockopt",
    "setsockopt", "getsockname", "getpeername", "listen", "socketcall",
)
_PROCESS: Final = (
    "exit", "exit_group", "set_robust_list", "get_robust_list", "rseq",
    "set_tid_address", "gettid", "getpid", "getppid", "tgkill", "kill",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigtimedwait",
    "sigaltstack", "sigreturn", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getresuid",
    "getresgid", "setresuid", "setresuid32", "setresgid", "setresgid32", "setgroups", "setgroups32",
    "setfsuid", "setfsgid", "capget", "capset", "prctl", "getrlimit", "ugetrlimit", "prlimit64",
    "getrusage", "times", "sysinfo", "uname", "sched_getaffinity", "sched_getparam",
    "sched_getscheduler", "getcpu", "getrandom", "clock_gettime", "clock_gettime64",
    "clock_getres", "gettimeofday", "time", "arch_prctl", "riscv_flush_icache",
)
_FORBIDDEN: Final = (
    "execve", "execveat", "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev",
    "pidfd_getfd", "connect", "bind", "mount", "umount", "umount2", "pivot_root", "chroot", "setns",
    "fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree", "open_tree_attr",
    "mount_setattr", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "seccomp",
    "add_key", "request_key", "keyctl", "init_module", "finit_module", "delete_module",
    "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "quotactl",
    "quotactl_fd", "syslog", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex",
    "sethostname", "setdomainname", "iopl", "ioperm", "modify_ldt",
)
# fmt: on
#: What starts a thread may start a process too, but no user namespace, which would bring back the
#: capabilities that the daemon has given up.
_THREADS: Final = ("clone", "unshare")
_NEW_USER_NAMESPACE: Final = 0x10000000
_ERRNO: Final = 0x00050000
_UNKNOWN: Final = _ERRNO | errno.ENOSYS
#: Threads are started with clone, whose flags can be seen here, and a syslog that has gone costs
#: its lines.
_REFUSED: Final = (("clone3", _UNKNOWN), ("socket", _ERRNO | errno.EPERM))
_MASKED_EQUAL: Final = 7
#: What libseccomp says to a rule that changes nothing.
_IS_DEFAULT: Final = -errno.EACCES


#: ``struct scmp_arg_cmp``, 24 bytes: argument, comparison, mask, value.
_COMPARE = struct.Struct("@IiQQ")


def prepare(action: str) -> Callable[[], None]:
    """Make the filter, while its library can still be reached.

    Args:
        action: What a forbidden call does: ``kill`` the process, ``trap`` (SIGSYS), only ``log`` in
            the kernel's log, with whatever is on no list, or ``none`` for no filter at all.

    Returns:
        What sets it up, for this process and for good; no-new-privs must be set. It raises OSError
        where the kernel does not take it.
    """
    if action == "none":
        return lambda: None
    library = _load()
    if library is None:
        logger.warning("no filter of system calls: libseccomp is not installed")
        return lambda: None
    context = library.seccomp_init(_ACTIONS["log"] if action == "log" else _UNKNOWN)
    for name, act, bits, wanted in _rules(_ACTIONS[action]):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else this machine has no such call, or its library does not know it
            compare = _COMPARE.pack(0, _MASKED_EQUAL, bits, wanted)
            result = library.seccomp_rule_add_array(context, act, number, bool(bits), compare)
            _check(0 if result == _IS_DEFAULT else result)

    def restrict() -> None:
        _check(library.seccomp_load(context))
        library.seccomp_release(context)

    return restrict


def _load() -> Any:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_char_p,
    )
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_release.restype = None
    return library


def _rules(forbidden: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield call, action, and what the bits of its first argument must be, as mask and value."""
    for name in _FILES + _MEMORY + _WAITING + _SOCKETS + _PROCESS:
        yield name, _ALLOW, 0, 0
    for name in _FORBIDDEN:
        yield name, forbidden, 0, 0
    for name in _THREADS:
        yield name, _ALLOW, _NEW_USER_NAMESPACE, 0
        yield name, forbidden, _NEW_USER_NAMESPACE, _NEW_USER_NAMESPACE
    for name, action in _REFUSED:
        yield name, action, 0, 0


def _check(result: int) -> None:
    if result < 0:  # a negative errno
        raise OSError(-result, os.strerror(-result))
