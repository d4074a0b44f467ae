"""Every FUSE constant and struct is compared with the kernel's own header, by a compiler.

A small C program includes ``linux/fuse.h`` of this machine and prints what the compiler thinks: one
line ``name value`` per constant, size and field offset. Headers are often older than our tables, so
macros are asked for with ``#ifdef``; an enumerator or a struct cannot be asked for, so ``SINCE``
says which protocol minor brought those that may be missing. Everything older must be there, hence
a test that compares nothing is red.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from vfsmount.wire import fuse, fuse_flags, fuse_structs
from vfsmount.wire._codec import Codec, NestedCodec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from enum import IntEnum, IntFlag
    from pathlib import Path

#: Oldest header that a supported distribution ships (Debian 12: Linux 6.1, protocol 7.38).
OLDEST_MINOR = 38

#: Enumerators, structs and fields younger than OLDEST_MINOR, and the minor that brought them. The
#: extension headers came *during* 7.38: Linux 6.1 and 6.2 call themselves that and lack them.
SINCE = {
    "FUSE_MAX_NR_SECCTX": 39,
    "FUSE_EXT_GROUPS": 39,
    "struct fuse_ext_header": 39,
    "fuse_in_header.total_extlen": 39,
    "FUSE_STATX": 39,
    "FUSE_NOTIFY_RESEND": 40,
    "FUSE_NOTIFY_INC_EPOCH": 44,
    "FUSE_COPY_FILE_RANGE_64": 45,
    "FUSE_NOTIFY_PRUNE": 45,
    "struct fuse_statx": 39,
    "struct fuse_statx_in": 39,
    "struct fuse_statx_out": 39,
    "struct fuse_copy_file_range_out": 45,
    "struct fuse_notify_prune_out": 45,
    "fuse_open_out.backing_id": 40,
    "fuse_init_out.max_stack_depth": 40,
    "fuse_init_out.request_timeout": 43,
}

#: Constant classes that hold macros, and the prefix of their names in C.
MACROS: dict[type[IntFlag], str] = {
    fuse_flags.InitFlag: "FUSE_",
    fuse_flags.OpenOutFlag: "FOPEN_",
    fuse_flags.OpenInFlag: "FUSE_OPEN_",
    fuse_flags.SetattrValid: "FATTR_",
    fuse_flags.GetattrFlag: "FUSE_GETATTR_",
    fuse_flags.ReadFlag: "FUSE_READ_",
    fuse_flags.WriteFlag: "FUSE_WRITE_",
    fuse_flags.ReleaseFlag: "FUSE_RELEASE_",
    fuse_flags.FsyncFlag: "FUSE_FSYNC_",
    fuse_flags.SetxattrFlag: "FUSE_SETXATTR_",
    fuse_flags.LockFlag: "FUSE_LK_",
    fuse_flags.IoctlFlag: "FUSE_IOCTL_",
    fuse_flags.AttrFlag: "FUSE_ATTR_",
    fuse_flags.SetupmappingFlag: "FUSE_SETUPMAPPING_FLAG_",
    fuse_flags.RenameFlag: "RENAME_",
}
ENUMS: dict[type[IntEnum], str] = {
    fuse_flags.Opcode: "FUSE_",
    fuse_flags.NotifyCode: "FUSE_NOTIFY_",
}
SINGLE_MACROS = {
    "FUSE_KERNEL_VERSION": fuse.KERNEL_VERSION,
    "FUSE_ROOT_ID": fuse.ROOT_ID,
    "NAME_MAX": fuse.NAME_MAX,
    "XATTR_NAME_MAX": fuse.XATTR_NAME_MAX,
    "XATTR_SIZE_MAX": fuse.XATTR_SIZE_MAX,
    "PATH_MAX": fuse.PATH_MAX,
    "FUSE_COMPAT_SETXATTR_IN_SIZE": fuse.SETXATTR_IN_COMPAT.size,
    "F_RDLCK": fuse.LockType.READ,
    "F_WRLCK": fuse.LockType.WRITE,
    "F_UNLCK": fuse.LockType.UNLOCK,
}
SINGLE_ENUMERATORS = {
    "FUSE_MAX_NR_SECCTX": fuse.EXT_MAX_NR_SECCTX,
    "FUSE_EXT_GROUPS": fuse.EXT_GROUPS,
}

#: Names that do not follow from ours.
C_NAMES = {"IOCTL_32BIT": "32BIT"}
C_STRUCTS = {"NotifyPollOut": "fuse_notify_poll_wakeup_out"}
#: Records that are no struct of today's header; tested by their sizes only.
COMPAT = {"SetxattrInCompat", "InitInCompat"}
#: Fields whose C name or path differs: (record, our name) to C.
C_FIELDS = {
    **{("LkIn", name): f"lk.{name}" for name in ("start", "end", "type", "pid")},
    **{("LkOut", name): f"lk.{name}" for name in ("start", "end", "type", "pid")},
    **{
        ("Statx", f"{kind}{ours}"): f"{kind}.{theirs}"
        for kind in ("atime", "btime", "ctime", "mtime")
        for ours, theirs in (("", "tv_sec"), ("nsec", "tv_nsec"))
    },
}

PROGRAM = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/fuse.h>
#include <linux/limits.h>
/* FUSE_INIT_RESERVED is (1 << 31), a negative int: print words of 4 bytes as unsigned. */
#define WORD(value) (sizeof(value) == 4 ? (uint32_t)(value) : (unsigned long long)(value))
#define SHOW(name, value) printf("%s %llu\\n", name, WORD(value))
#define MEMBER(type, field) \\
    SHOW(#type "." #field " offset", offsetof(struct type, field)); \\
    SHOW(#type "." #field " size", sizeof(((struct type *)0)->field))
int main(void)
{
@BODY@
    return 0;
}
"""


@dataclass
class Expected:
    """What our tables say, and the C statements that print the compiler's view of it."""

    values: dict[str, int] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    statements: list[str] = field(default_factory=list)

    def macro(self, name: str, value: int) -> None:
        """Compare a macro where the header has it."""
        self.optional.add(name)
        self.values[name] = value
        self.statements += [f"#ifdef {name}", f'    SHOW("{name}", {name});', "#endif"]

    def enumerator(self, name: str, value: int, minor: int) -> None:
        """Compare an enumerator that the header must have."""
        if SINCE.get(name, 0) <= minor:
            self.values[name] = value
            self.statements.append(f'    SHOW("{name}", {name});')

    def layout(self, codec: Codec[Any], minor: int) -> None:
        """Compare a struct's size and the place and width of each of its fields."""
        name = c_struct(codec.name)
        if SINCE.get(f"struct {name}", 0) > minor:
            return
        self.values[f"{name} size"] = codec.size
        self.statements.append(f'    SHOW("{name} size", sizeof(struct {name}));')
        for ours, offset, size in fields_of(codec):
            member = f"{name}.{C_FIELDS.get((codec.name, ours), ours)}"
            if SINCE.get(member, 0) <= minor:
                self.values[f"{member} offset"] = offset
                self.values[f"{member} size"] = size
                self.statements.append(f"    MEMBER({member.replace('.', ', ', 1)});")


def c_struct(record: str) -> str:
    """Return the C name of a record: InHeader is fuse_in_header."""
    if record in C_STRUCTS:
        return C_STRUCTS[record]
    return "fuse" + re.sub(r"(?<![A-Z])[A-Z]", lambda found: "_" + found[0].lower(), record)


def fields_of(codec: Codec[Any]) -> Iterator[tuple[str, int, int]]:
    """Yield (field, offset, bytes) from the codec's format; a nested record is one field."""
    names = codec._make.__self__._fields
    layout = codec._struct.format.lstrip("<")
    places = []
    offset = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout):
        size = struct.calcsize("<" + code)
        for _ in range(int(count or 1)):
            if code != "x":
                places.append((offset, size))
            offset += size
    if isinstance(codec, NestedCodec):
        start = places[len(names) - 1][0]
        places[len(names) - 1 :] = [(start, codec.size - start)]
    assert len(places) == len(names), codec
    for name, (at, size) in zip(names, places, strict=True):
        yield name, at, size


def codecs() -> list[Codec[Any]]:
    """Return every codec of the module."""
    return [value for value in vars(fuse_structs).values() if isinstance(value, Codec)]


def expectations(minor: int) -> Expected:
    """Collect everything that a header of this minor can be asked."""
    expected = Expected()
    for flags, prefix in MACROS.items():
        for flag in flags:
            expected.macro(prefix + C_NAMES.get(flag.name or "", flag.name or ""), int(flag))
    for name, value in SINGLE_MACROS.items():
        expected.macro(name, int(value))
    for enum, prefix in ENUMS.items():
        for member in enum:
            expected.enumerator(prefix + member.name, int(member), minor)
    for name, value in SINGLE_ENUMERATORS.items():
        expected.enumerator(name, value, minor)
    for codec in codecs():
        if codec.name not in COMPAT:
            expected.layout(codec, minor)
    return expected


def compile_and_run(folder: Path, statements: Iterable[str]) -> dict[str, int]:
    """Return what the C program prints, as name to value."""
    source, binary = folder / "header.c", folder / "header"
    source.write_text(PROGRAM.replace("@BODY@", "\n".join(statements)))
    done = subprocess.run(
        [compiler(), "-o", binary, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    lines = (line.rpartition(" ") for line in printed.splitlines())
    return {name: int(value) for name, _, value in lines}


def compiler() -> str:
    """Return the C compiler; without one the test is skipped, but never in CI."""
    found = shutil.which("cc")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler (cc)")
        pytest.skip("no C compiler (cc)")
    return found


@pytest.fixture
def minor(tmp_path: Path) -> int:
    """FUSE_KERNEL_MINOR_VERSION of the header on this machine."""
    show = '    SHOW("minor", FUSE_KERNEL_MINOR_VERSION);'
    return compile_and_run(tmp_path, [show])["minor"]


def test_constants_and_structs_agree_with_the_header(minor: int, tmp_path: Path) -> None:
    assert minor >= OLDEST_MINOR
    expected = expectations(minor)

    found = compile_and_run(tmp_path, expected.statements)

    wrong = {name: (expected.values[name], value) for name, value in found.items()
             if expected.values[name] != value}  # fmt: skip
    assert not wrong, "ours, the header's"
    absent = set(expected.values) - set(found)
    assert absent <= expected.optional
    print(f"header 7.{minor}: compared {len(found)}; too old for {sorted(absent)}")
    # Linux 6.1's 7.38 can be asked for 604 of them, 7.45 for all 704.
    assert len(found) >= 600


def test_header_has_no_macro_that_we_lack(minor: int) -> None:
    """A header that is not younger than our tables holds no flag that they do not."""
    if minor > fuse.KERNEL_MINOR_VERSION:
        pytest.skip(f"header 7.{minor} is younger than our 7.{fuse.KERNEL_MINOR_VERSION}")
    done = subprocess.run(
        [compiler(), "-dM", "-E", "-"],
        input="#include <linux/fuse.h>",
        capture_output=True,
        text=True,
        check=True,
    )
    pattern = r"#define ((?:FUSE|FOPEN|FATTR)_\w+) \(?1(?:ULL)? *<< *\d+\)?"
    defined = set(re.findall(pattern, done.stdout))

    assert len(defined) >= 60
    unknown = defined - set(expectations(minor).values) - KNOWN_ABSENT
    assert not unknown


#: Flags that this project has no use for, so far.
KNOWN_ABSENT = {"FUSE_POLL_SCHEDULE_NOTIFY", "FUSE_EXPIRE_ONLY", "FUSE_UNIQUE_RESEND"}


def test_compatible_sizes() -> None:
    """The two records of older minors are the beginnings of today's."""
    assert fuse.INIT_IN_COMPAT.size == 16
    assert fuse.SETXATTR_IN_COMPAT.size == 8
    init = {name: at for name, at, _ in fields_of(fuse.INIT_IN)}
    assert init["flags2"] == fuse.INIT_IN_COMPAT.size
