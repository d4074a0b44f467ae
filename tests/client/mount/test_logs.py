"""The shape of lines, and where they go."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import TYPE_CHECKING

import pytest

from vfsmount.client.mount import logs
from vfsmount.errors import MountError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    logging.raiseExceptions = True


def speak() -> None:
    logger = logging.getLogger("vfsmount.some.place")
    logger.debug("d %d", 1)
    logger.info("i")
    logger.warning("w")
    logger.error("e")


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("error", ["vfsmount: error: e"]),
        ("info", ["vfsmount: i", "vfsmount: warning: w", "vfsmount: error: e"]),
        (
            "debug",
            [
                "vfsmount: debug: [vfsmount.some.place] d 1",
                "vfsmount: i",
                "vfsmount: warning: w",
                "vfsmount: error: e",
            ],
        ),
    ],
)
def test_lines_on_stderr(level: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logs.start_logging(level)
    speak()
    assert capsys.readouterr().err.splitlines() == lines


def test_replies_that_come_after_the_end_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    logs.start_logging("info")
    log, text = logging.getLogger("pyfuse3"), "fuse_release(): fuse_reply_* failed with %s"
    log.error(text, os.strerror(errno.ENOENT))
    log.error(text, os.strerror(errno.EINVAL))
    log.removeFilter(logs._is_news)
    assert capsys.readouterr().err == f"vfsmount: error: {text % 'Invalid argument'}\n"


def test_file_has_the_time_as_well(tmp_path: Path) -> None:
    logs.start_logging("info", str(tmp_path / "log"))
    logs.to_background()  # keeps the file
    speak()
    first, *_ = (tmp_path / "log").read_text().splitlines()
    assert first.endswith(" vfsmount: i")
    assert first[:2] == "20"


def test_file_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--log-file .*/no/log: No such file or directory"):
        logs.start_logging("info", str(tmp_path / "no" / "log"))


def test_background_without_syslog_drops_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "SYSLOG_SOCKET", str(tmp_path / "none"))
    logs.start_logging("info")
    logs.to_background()
    speak()
    assert capsys.readouterr().err == ""


def test_background_speaks_to_syslog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(path))
        syslog.settimeout(5)
        monkeypatch.setattr(logs, "SYSLOG_SOCKET", str(path))
        logs.start_logging("error")
        logs.to_background()
        speak()
        assert syslog.recv(1000).rstrip(b"\0") == b"<27>vfsmount: error: e"


def test_error_line_is_one_line_with_the_cure() -> None:
    assert logs.error_line(MountError("no\n mount")) == "vfsmount: error: no mount"
    error = MountError("no mount", "do this")
    assert logs.error_line(error) == "vfsmount: error: no mount; do this"


def test_last_error_is_told_once_where_stderr_is_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.start_logging("info")
    logs.tell(MountError("no mount"))
    assert capsys.readouterr().err == "vfsmount: error: no mount\n"


def test_last_error_is_told_in_the_log_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.start_logging("info", str(tmp_path / "log"))
    logs.tell(MountError("no mount", "do this"))
    assert capsys.readouterr().err == "vfsmount: error: no mount; do this\n"
    assert (tmp_path / "log").read_text().endswith(" vfsmount: error: no mount; do this\n")


def test_before_logging_starts_errors_reach_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.tell(MountError("no mount"))
    assert capsys.readouterr().err == "vfsmount: error: no mount\n"
    assert sys.stderr is not None
