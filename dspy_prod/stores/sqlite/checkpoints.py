"""What is in the write-ahead log is copied into the file beside the writer: who waits for it waits for no disk.

SQLite's own way is that the commit which finds the log long copies it, and everybody behind that commit waits.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from typing import Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.sqlite.reader import Reader

_log = logging.getLogger("dspy_prod")

EVERY: Final = 128
"""Commits from one copying to the next."""
PATIENCE: Final = 5.0
"""Seconds for which a store that is closed waits for its log to be copied."""


class Checkpoints:
    """Copies now and then, in a thread that ends with it; where that fails, the writer's commits do (`connect`).

    Args:
        reader: a connection for nothing else.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._commits = 0
        self._at_work = False
        self._thread: threading.Thread | None = None

    def committed(self) -> None:
        """Another commit is in the log; the writer's. Waits for nothing."""
        self._commits += 1
        if self._commits >= EVERY and not self._at_work:
            self._commits = 0
            self._at_work = True
            self._thread = begin("dspy_prod-sqlite-checkpoint", self._copy)
            if self._thread is None:
                self._at_work = False

    def end(self) -> None:
        """Wait for who copies, within reason: it would open again what is closed just now. The writer's last."""
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def _copy(self) -> None:
        try:
            self._reader.read(lambda connection, _: connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone())
        except (sqlite3.Error, OSError, StoreUnavailableError) as error:
            _log.info("The log of %s was not copied into it (%s); a commit will", self._reader.path, error)
        finally:
            self._at_work = False
