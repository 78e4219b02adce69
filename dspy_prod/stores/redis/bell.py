"""How a process hears that a board has changed: a message, a look every half a second, and every commit's answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.redis.connection import Connection

_log = logging.getLogger("dspy_prod")

LOOK: Final = 0.5
"""Seconds between two looks where no message comes."""
IDLE: Final = 60.0
"""Seconds after which nobody looks any more where nobody has asked."""


class Bell:
    """The revision of one board, as far as this process has heard.

    Args:
        connection: used by nobody else.

    Attributes:
        said: another one than before once the board may have changed.
        closed: nobody asks any more.
    """

    def __init__(self, connection: Connection) -> None:
        self.said: object = b""
        self.closed = False
        self.channel = connection.key("board") + ":bell"
        self.meta = connection.key("meta")
        self._connection = connection
        self._asked_at = 0.0
        self._watcher: threading.Thread | None = None
        self._starting = threading.Lock()

    def ask(self) -> object:
        """`said`; from now on somebody listens."""
        self._asked_at = time.monotonic()
        if self._watcher is None and not self.closed:
            with self._starting:
                if self._watcher is None:
                    self._watcher = begin("dspy_prod-redis-board", self._watch)
        return self.said

    def heard(self, revision: bytes) -> None:
        """The server told the revision."""
        if revision != self.said:
            self.said = revision

    def ring(self) -> None:
        """This process has changed the board."""
        self.said = object()  # equal to no other

    def _watch(self) -> None:
        """Body of the thread; ends when nobody has asked for long."""
        listening: Any = None
        failures: tuple[type[BaseException], ...] = (*Connection.failures(), StoreUnavailableError, ValueError)
        while not self.closed and time.monotonic() < self._asked_at + IDLE:
            try:
                if listening is None:
                    client: Any = self._connection.client()
                    listening = client.pubsub(ignore_subscribe_messages=True)
                    listening.subscribe(self.channel)
                listening.get_message(timeout=LOOK)
                (revision,) = self._connection.read([("HGET", self.meta, "board")])
                self.heard(revision or b"0")
            except failures as error:
                _log.debug("The board of %s cannot be looked at: %s", self._connection.shown, type(error).__name__)
                _close(listening)
                listening = None
                time.sleep(LOOK)
        _close(listening)
        self._connection.close()
        self._watcher = None


def _close(listening: Any) -> None:
    if listening is not None:
        with contextlib.suppress(Exception):
            listening.close()
