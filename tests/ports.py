"""Ports that stay free until they are used, or for ever."""

from __future__ import annotations

import secrets
import socket
from typing import Final

_BELOW: Final = 32_768
"""From here on systems give ports away by themselves; one that was free a moment ago may be another test's by now."""


def free_port() -> int:
    """A port of loopback that nobody listens on, and that nobody is given by chance."""
    while True:
        port = _BELOW - 1 - secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
