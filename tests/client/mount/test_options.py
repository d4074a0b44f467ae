"""What a mount command asks for, by words alone."""

from __future__ import annotations

import os
import string
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmount.client.mount.options import (
    IGNORED,
    KERNEL_FLAGS,
    MOUNT_GROUPS,
    MountSettings,
    cpu_list,
    parse_mount,
    split_options,
)
from vfsmount.errors import UsageError

SOCKET = ["--socket", "/s"]


def settings(*words: str) -> MountSettings:
    return parse_mount(words, is_directory=lambda path: path.endswith("dir"))


def changed(found: MountSettings) -> dict[str, Any]:
    """The fields that differ from those of the plainest command."""
    plain = MountSettings(mountpoint="/m", socket="/s", source=None)
    names = MountSettings.__dataclass_fields__
    return {
        name: getattr(found, name) for name in names if getattr(found, name) != getattr(plain, name)
    }


@pytest.mark.parametrize(
    ("words", "differences"),
    [
        (["/m", "--socket", "/s"], {}),
        (["--socket=/s", "/m"], {}),
        (["/m", "--source", "/d"], {"socket": None, "source": "/d"}),
        (["/m", *SOCKET, "--cache", "none"], {"cache": "none"}),
        (["/m", *SOCKET, "--cache=always"], {"cache": "always"}),
        (["/m", *SOCKET, "--timeout", "0.25"], {"timeout": 0.25}),
        (["/m", *SOCKET, "--timeout", "0"], {"timeout": 0.0}),
        (["/m", *SOCKET, "--writeback"], {"writeback": True}),
        (["/m", *SOCKET, "--writeback", "--no-writeback"], {}),
        (["/m", *SOCKET, "--readonly"], {"kernel_flags": ("ro",)}),
        (["/m", *SOCKET, "--cpus", "0,2-3"], {"cpus": frozenset({0, 2, 3})}),
        (["/m", *SOCKET, "-f"], {}),
        (["/m", *SOCKET, "--daemonize"], {"daemonize": True}),
        (["/m", *SOCKET, "-d"], {"log_level": "debug"}),
        (["/m", *SOCKET, "-fd"], {"log_level": "debug"}),
        (["/m", *SOCKET, "--log-level", "error"], {"log_level": "error"}),
        (["/m", *SOCKET, "--log-file", "/l"], {"log_file": "/l"}),
        (["/m", *SOCKET, "--pid-file", "/p"], {"pid_file": "/p"}),
        (["/m", *SOCKET, "--ready-fd", "5"], {"ready_fd": 5}),
        (["/m", *SOCKET, "--request-timeout", "2.5"], {"request_timeout": 2.5}),
        (["/m", *SOCKET, "--shm-file", "/x"], {"shm_file": "/x"}),
        (["/m", *SOCKET, "--queue-size", "256"], {"queue_size": 256}),
        (["/m", *SOCKET, "--poll-us", "0"], {"poll_us": 0}),
        (["--socket", "/s", "--", "/m"], {}),
        # the list of mount(8)
        (["/m", "-o", "socket=/s"], {}),
        (["/m", "-osocket=/s,cache=none"], {"cache": "none"}),
        (["/m", "-o", "source=/d"], {"socket": None, "source": "/d"}),
        (["/m", *SOCKET, "-o", "ro"], {"kernel_flags": ("ro",)}),
        (["/m", *SOCKET, "-o", "ro,rw"], {"kernel_flags": ("rw",)}),
        (["/m", *SOCKET, "-o", "rw", "-o", "ro"], {"kernel_flags": ("ro",)}),
        (["/m", *SOCKET, "-o", "nosuid,suid,nodev"], {"kernel_flags": ("suid", "nodev")}),
        (["/m", *SOCKET, "-o", "noexec,noatime"], {"kernel_flags": ("noexec", "noatime")}),
        (["/m", *SOCKET, "-o", "allow_other"], {"allow_other": True}),
        (["/m", *SOCKET, "-o", "fsname=x y,subtype=z"], {"fsname": "x y", "subtype": "z"}),
        (["/m", *SOCKET, "-o", r"fsname=a\,b"], {"fsname": "a,b"}),
        (["/m", *SOCKET, "-o", "_netdev,nofail,noauto,auto,user,users,defaults"], {}),
        (["/m", *SOCKET, "-o", "x-systemd.automount,x-gvfs-hide,X-mount.mkdir,comment=hi"], {}),
        (["/m", *SOCKET, "-o", "default_permissions,,"], {}),
        (["/m", *SOCKET, "-o", "writeback"], {"writeback": True}),
        (["/m", *SOCKET, "-o", "writeback,nowriteback"], {}),
        (["/m", *SOCKET, "-o", "no_writeback"], {}),
        (["/m", *SOCKET, "-o", "request_timeout=3"], {"request_timeout": 3.0}),
        (["/m", *SOCKET, "-o", "request-timeout=3"], {"request_timeout": 3.0}),
        (["/m", *SOCKET, "-o", r"cpus=0\,1"], {"cpus": frozenset({0, 1})}),
        (["/m", *SOCKET, "-o", "daemonize"], {"daemonize": True}),
        (["/m", *SOCKET, "-o", "readonly"], {"kernel_flags": ("ro",)}),
        (["/m", *SOCKET, "-o", "cache=none", "--cache", "always"], {"cache": "always"}),
        # as mount(8) calls a helper
        (["/s", "/m"], {"daemonize": True}),
        (
            ["/s", "/m", "-o", "rw,dev,suid"],
            {"daemonize": True, "kernel_flags": ("rw", "dev", "suid")},
        ),
        (["/dir", "/m"], {"daemonize": True, "socket": None, "source": "/dir"}),
        (["/s", "/m", "-f"], {}),
        (["/s", "/m", "-d"], {"log_level": "debug"}),
        (["name", "/m", "-o", "socket=/s"], {"daemonize": True, "fsname": "name"}),
    ],
)
def test_words_become_settings(words: list[str], differences: dict[str, Any]) -> None:
    assert changed(settings(*words)) == differences


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the mount point is missing"),
        (SOCKET, "the mount point is missing"),
        (["/m"], "neither --socket nor --source is given"),
        (["/m", *SOCKET, "--source", "/d"], "--socket and --source exclude each other"),
        (["/m", "-o", "socket=/s,source=/d"], "--socket and --source exclude each other"),
        (["/a", "/b", "/c"], "too many words: /c"),
        (["", *SOCKET], "mount point: '' is not a path"),
        (["/m", "--socket", ""], "--socket: '' is not a path"),
        (
            ["/m", *SOCKET, "--cache", "sometimes"],
            "--cache: 'sometimes' is not one of none, auto, always",
        ),
        (["/m", *SOCKET, "--cache="], "--cache: '' is not one of none, auto, always"),
        (["/m", *SOCKET, "--timeout", "soon"], "--timeout: 'soon' is not a number of seconds"),
        (["/m", *SOCKET, "--timeout", "-1"], "--timeout: '-1' is not a number of seconds"),
        (["/m", *SOCKET, "--timeout", "nan"], "--timeout: 'nan' is not a number of seconds"),
        (["/m", *SOCKET, "--timeout", "inf"], "--timeout: 'inf' is not a number of seconds"),
        (["/m", *SOCKET, "--cpus", "3-1"], "--cpus: '3-1' is not a list of CPUs"),
        (["/m", *SOCKET, "--cpus", "0,"], "--cpus: '0,' is not a list of CPUs"),
        (["/m", *SOCKET, "--ready-fd", "-1"], "--ready-fd: '-1' is not a whole number"),
        (["/m", *SOCKET, "--ready-fd", "1x"], "--ready-fd: '1x' is not a whole number"),
        (["/m", *SOCKET, "--queue-size", "100"], "--queue-size: '100' is not a power of two"),
        (["/m", *SOCKET, "--queue-size", "65536"], "--queue-size: '65536' is not a power of two"),
        (["/m", *SOCKET, "--poll-us", "1e3"], "--poll-us: '1e3' is not a whole number"),
        (["/m", *SOCKET, "--log-level", "loud"], "--log-level: 'loud' is not one of error,"),
        (["/m", *SOCKET, "-f", "--daemonize"], "--daemonize and --foreground (or -d) exclude"),
        (["/m", *SOCKET, "--cahce", "none"], "unknown option --cahce"),
        (["/m", *SOCKET, "-o", "nosiud"], "unknown mount option 'nosiud'"),
        (["/m", *SOCKET, "-o", "ro=1"], "unknown mount option 'ro=1'"),
        (["/m", *SOCKET, "-o", "o=ro"], "unknown mount option 'o=ro'"),
        (["/m", *SOCKET, "-o", "cache"], "-o cache needs a value"),
        (["/m", *SOCKET, "-o", "cache=x"], "-o cache: 'x' is not one of none, auto, always"),
        (["/m", *SOCKET, "-o", "writeback=1"], "-o writeback takes no value"),
        (["/m", *SOCKET, "-o", "fsname=é"], "-o fsname: 'é' is not printable ASCII text"),
        (["/m", *SOCKET, "-o", "subtype="], "-o subtype: '' is not printable ASCII text"),
    ],
)
def test_mistakes_are_told_in_one_line(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(*words)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value) + caught.value.cure


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("nosiud", "nosuid"),
        ("allow-other", "allow_other"),
        ("netdev", "_netdev"),
        ("cahce=none", "cache"),
        ("fs_name=x", "fsname"),
        ("read_only", "readonly"),
    ],
)
def test_unknown_mount_option_names_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings("/m", *SOCKET, "-o", word)
    assert caught.value.cure == f"did you mean {near}?"


def test_relative_paths_become_absolute() -> None:
    found = settings("m", "--socket", "s", "--pid-file", "p", "--shm-file", "x", "--log-file", "l")
    folder = os.getcwd()
    paths = (found.mountpoint, found.socket, found.pid_file, found.shm_file, found.log_file)
    assert paths == tuple(os.path.join(folder, name) for name in "mspxl")


def test_mount_point_named_like_a_command() -> None:
    assert settings("./serve", *SOCKET).mountpoint == os.path.abspath("serve")


@pytest.mark.parametrize(
    ("words", "as_root", "options"),
    [
        ([], True, ["fsname=/s", "subtype=vfsmount", "default_permissions", "allow_other"]),
        ([], False, ["fsname=/s", "subtype=vfsmount", "default_permissions"]),
        (
            ["-o", "ro,allow_other,subtype=x"],
            False,
            ["fsname=/s", "subtype=x", "default_permissions", "ro", "allow_other"],
        ),
        (
            ["-o", r"fsname=a\,b\\c"],
            False,
            [r"fsname=a\,b\\c", "subtype=vfsmount", "default_permissions"],
        ),
        (
            ["--socket", "/tmp/s\u00fc\n,x"],
            False,
            [r"fsname=/tmp/s??\,x", "subtype=vfsmount", "default_permissions"],
        ),
    ],
)
def test_options_for_libfuse(words: list[str], as_root: bool, options: list[str]) -> None:
    assert settings("/m", *SOCKET, *words).libfuse_options(as_root=as_root) == options


@given(st.lists(st.text(alphabet=string.printable, min_size=1)))
def test_split_options_undoes_escaping(words: list[str]) -> None:
    escaped = ",".join(word.replace("\\", r"\\").replace(",", r"\,") for word in words)
    assert list(split_options(escaped)) == words


@given(st.sets(st.integers(min_value=0, max_value=300), min_size=1))
def test_cpu_list_reads_what_taskset_prints(cpus: set[int]) -> None:
    assert cpu_list(",".join(map(str, sorted(cpus)))) == cpus


@given(st.lists(st.text(alphabet="-=,\\ oasocket/d09", max_size=12), max_size=6))
def test_any_words_give_settings_or_a_usage_error(words: list[str]) -> None:
    with suppress(UsageError):
        assert os.path.isabs(settings(*words).mountpoint)


def test_no_word_means_two_things() -> None:
    options = {option.name for group in MOUNT_GROUPS for option in group.options}
    assert not KERNEL_FLAGS & IGNORED
    assert not options & (KERNEL_FLAGS | IGNORED)
