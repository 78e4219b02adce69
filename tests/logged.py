"""What this library logged during a test; threads that other packages left from tests before log on."""

from __future__ import annotations

import logging

import pytest


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The records of this library's loggers."""
    return [record for record in caplog.records if record.name.partition(".")[0] == "dspy_prod"]
