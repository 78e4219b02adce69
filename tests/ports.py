"""Ports that stay free until they are used, or for ever."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack
from typing import Final

_BELOW: Final = 32_768
"""From here on systems give ports away by themselves; one that was free a moment ago may be another test's by now."""


def free_port(count: int = 1) -> int:
    """A port of loopback that nobody listens on, and that nobody is given by chance; or the first of neighbours."""
    while True:
        port = _BELOW - count - secrets.randbelow(12_000)
        with ExitStack() as held:
            try:
                for each in range(port, port + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", each))
            except OSError:
                continue
            return port
