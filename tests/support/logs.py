"""Unexpected log output fails a test: warnings and errors must be declared by the test."""

from __future__ import annotations

import logging
import re

import pytest

__all__ = ["LogWatch"]


class LogWatch(logging.Handler):
    """Collects log records of level WARNING and above, and judges them at the end.

    Only this process's log is seen; what a command or daemon prints is its test's business.
    """

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self._expected: list[re.Pattern[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def expect(self, pattern: str) -> None:
        """Declare that records whose text ``pattern`` is found in must appear, once or more."""
        self._expected.append(re.compile(pattern))

    def check(self) -> None:
        """Compare what was declared with what came.

        Fails the test when a record was not declared, or a declared one never came.
        """
        texts = [f"{r.levelname} {r.name}: {r.getMessage()}" for r in self.records]
        unexpected = [t for t in texts if not any(p.search(t) for p in self._expected)]
        absent = [p.pattern for p in self._expected if not any(p.search(t) for t in texts)]
        if unexpected:
            pytest.fail("\n  ".join(["unexpected in the log:", *unexpected]), pytrace=False)
        if absent:
            pytest.fail("\n  ".join(["expected in the log, but absent:", *absent]), pytrace=False)
