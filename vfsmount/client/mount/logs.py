"""Where log lines go, and what they look like.

One line per event, ``vfsmount: LEVEL: text``; the level is left out for information. In the
foreground they go to stderr, in the background to syslog, with ``--log-file`` always to that file.
Error lines of the command have the same shape, so that a script needs one pattern.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import TYPE_CHECKING

from vfsmount.errors import UsageError

if TYPE_CHECKING:
    from vfsmount.errors import VfsmountError

__all__ = ["LineFormatter", "error_line", "start_logging", "tell", "to_background"]

SYSLOG_SOCKET = "/dev/log"

logger = logging.getLogger("vfsmount")


class LineFormatter(logging.Formatter):
    """``vfsmount: warning: text``; debug lines also name the module that speaks."""

    def __init__(self, *, timed: bool = False) -> None:
        super().__init__("%(asctime)s %(message)s" if timed else "%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Put program name and level before the text."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        source = f"[{record.name}] " if record.levelno <= logging.DEBUG else ""
        record.message = f"vfsmount: {level}{source}{record.message}"
        return super().formatMessage(record)


def error_line(error: VfsmountError) -> str:
    """Return the one line, without newline, that tells the user of an error and its cure."""
    text = f"{error}; {error.cure}" if error.cure else str(error)
    return "vfsmount: error: " + " ".join(text.split())


def tell(error: VfsmountError) -> None:
    """Show the error that ends the command: on stderr, and in the log where that is elsewhere."""
    line = error_line(error)
    sys.stderr.write(line + "\n")
    handlers = logging.getLogger().handlers
    if handlers and not any(getattr(handler, "stream", None) is sys.stderr for handler in handlers):
        logger.error("%s", line.removeprefix("vfsmount: error: "))


def start_logging(level: str, log_file: str | None = None) -> None:
    """Send the log to stderr or to a file.

    Raises:
        UsageError: The file cannot be written.
    """
    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter())
    else:
        try:
            handler = logging.FileHandler(log_file)
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: {error.strerror}", "name another") from error
        handler.setFormatter(LineFormatter(timed=True))
    _use(handler)
    logging.getLogger().setLevel(level.upper())
    # Both tell of every request at debug level, which buries what a reader looks for.
    logging.getLogger("pyfuse3").setLevel(logging.INFO)
    logging.getLogger("pyfuse3").addFilter(_is_news)
    logging.captureWarnings(capture=True)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether pyfuse3 has something to tell. A reply that nobody waits for is no error.

    The kernel says ENOENT to those. Last closes that are with us when it unmounts are such.
    """
    return record.args != (os.strerror(errno.ENOENT),) or "fuse_reply_" not in str(record.msg)


def to_background() -> None:
    """Send to syslog what went to stderr, which is about to be closed; a log file stays.

    Where no syslog listens (a container), the lines are dropped: ``status`` still tells the state.
    """
    from logging.handlers import SysLogHandler

    if any(isinstance(handler, logging.FileHandler) for handler in logging.getLogger().handlers):
        return
    handler: logging.Handler = logging.NullHandler()
    if os.path.exists(SYSLOG_SOCKET):
        handler = SysLogHandler(SYSLOG_SOCKET, SysLogHandler.LOG_DAEMON)
        handler.setFormatter(LineFormatter())
    logging.raiseExceptions = False  # a syslog that goes away is nobody's traceback
    _use(handler)


def _use(handler: logging.Handler) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
