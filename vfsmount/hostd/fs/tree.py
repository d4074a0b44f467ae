"""Operations on names: find, make, link, move and remove entries of directories.

Every name is checked, and used with the directory's own descriptor. What is made belongs to the
caller. The guest's kernel has applied the umask already, unless it heeds ACLs (DONT_MASK).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from vfsmount.hostd import syscalls
from vfsmount.hostd.fs.call import HEADER_SIZE
from vfsmount.hostd.fs.names import check_name
from vfsmount.wire.fuse import RenameFlag

if TYPE_CHECKING:
    from vfsmount.hostd.fs.call import Call
    from vfsmount.hostd.fs.session import Session
    from vfsmount.wire.fuse import Request

__all__ = [
    "link",
    "lookup",
    "mkdir",
    "mknod",
    "rename",
    "rename2",
    "rmdir",
    "symlink",
    "unlink",
]

_RENAME_FLAGS = int(RenameFlag.NOREPLACE | RenameFlag.EXCHANGE | RenameFlag.WHITEOUT)
_EXCHANGE = int(RenameFlag.EXCHANGE)


def lookup(session: Session, call: Call) -> bytes:
    """LOOKUP: find a name in a directory."""
    message = call.message
    if message.find(0, HEADER_SIZE) != len(message) - 1:
        raise OSError(errno.EINVAL, "not one name with its NUL")
    parent = session.inodes.get(call.nodeid)
    return session.look_up(parent, check_name(message[HEADER_SIZE:-1]))


def mkdir(session: Session, request: Request) -> bytes:
    """MKDIR: make a directory."""
    parent = session.inodes.get(request.header.nodeid)
    name = check_name(request.names[0])
    with session.acting_as_caller(request):
        os.mkdir(name, stat.S_IMODE(request.args.mode), dir_fd=parent.fd)
    return session.made(request, parent, name)


def mknod(session: Session, request: Request) -> bytes:
    """MKNOD: make a file, FIFO, socket or device node; ``rdev`` has the kernel's encoding.

    Device nodes work in no way here: they are made if the host allows, and never opened.
    """
    parent = session.inodes.get(request.header.nodeid)
    name = check_name(request.names[0])
    with session.acting_as_caller(request):
        os.mknod(name, request.args.mode, request.args.rdev, dir_fd=parent.fd)
    return session.made(request, parent, name)


def symlink(session: Session, request: Request) -> bytes:
    """SYMLINK: make a link. Its target is any text: it is the guest that will follow it."""
    parent = session.inodes.get(request.header.nodeid)
    name = check_name(request.names[0])
    with session.acting_as_caller(request):
        os.symlink(request.names[1], name, dir_fd=parent.fd)
    return session.made(request, parent, name)


def link(session: Session, request: Request) -> bytes:
    """LINK: give a node one more name. The node is named by its descriptor, not by a path."""
    inode = session.inodes.get(request.args.oldnodeid)
    parent = session.inodes.get(request.header.nodeid)
    name = check_name(request.names[0])
    proc_fd = session.share.proc_fd
    os.link(inode.proc_name, name, src_dir_fd=proc_fd, dst_dir_fd=parent.fd, follow_symlinks=True)
    return session.look_up(parent, name)


def unlink(session: Session, request: Request) -> bytes:
    """UNLINK: remove a name that is no directory."""
    parent = session.inodes.get(request.header.nodeid)
    os.unlink(check_name(request.names[0]), dir_fd=parent.fd)
    return b""


def rmdir(session: Session, request: Request) -> bytes:
    """RMDIR: remove an empty directory."""
    parent = session.inodes.get(request.header.nodeid)
    os.rmdir(check_name(request.names[0]), dir_fd=parent.fd)
    return b""


def rename(session: Session, request: Request) -> bytes:
    """RENAME: move a name, replacing what is there."""
    old_dir = session.inodes.get(request.header.nodeid)
    new_dir = session.inodes.get(request.args.newdir)
    old, new = map(check_name, request.names)
    session.inodes.about_to_move(old_dir.fd, old)
    os.rename(old, new, src_dir_fd=old_dir.fd, dst_dir_fd=new_dir.fd)
    return b""


def rename2(session: Session, request: Request) -> bytes:
    """RENAME2: the same with renameat2(2)'s flags."""
    flags = request.args.flags
    if flags & ~_RENAME_FLAGS:
        raise OSError(errno.EINVAL, "unknown rename flags")
    old_dir = session.inodes.get(request.header.nodeid)
    new_dir = session.inodes.get(request.args.newdir)
    old, new = map(check_name, request.names)
    session.inodes.about_to_move(old_dir.fd, old)
    if flags & _EXCHANGE:
        session.inodes.about_to_move(new_dir.fd, new)
    syscalls.renameat2(old_dir.fd, old, new_dir.fd, new, flags)
    return b""
