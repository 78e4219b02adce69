"""A connection for reading, shared by threads, opened when first used and never in the writer's way."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import TypeVar

from dspy_prod.runtime.forking import Stage, hold_while_forking
from dspy_prod.stores.sqlite.file import File

T = TypeVar("T")


class Reader(File):
    """One namespace of one file, read by any thread.

    Args:
        look_every: seconds after which it is looked again whether the file is still there.
    """

    def __init__(self, path: str, namespace: str, *, look_every: float = 0.0) -> None:
        super().__init__(path, namespace)
        self._lock = threading.Lock()
        self._look_every, self._look_at = look_every, -inf
        hold_while_forking(self, Stage.FILES)

    def read(self, question: Callable[[sqlite3.Connection, int], T]) -> T:
        """What `question(connection, namespace's number)` finds; one thread at a time.

        Raises:
            sqlite3.Error, OSError: the file cannot be read.
        """
        with self._lock:
            if self.connection is None or self._looked_and_lost():
                self.open().execute("PRAGMA query_only=1")
            connection = self.open()
            if connection.in_transaction:  # of a read that was interrupted: it would show for ever what was there then
                connection.rollback()
            return question(connection, self.ns)

    def _looked_and_lost(self) -> bool:
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + self._look_every
        return self.lost()

    def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        with self._lock:
            super().close()

    def leave(self) -> None:
        """`close`, unless the process is forking: then it is closed already."""
        if self._lock.acquire(blocking=False):
            try:
                super().close()
            finally:
                self._lock.release()

    def before_fork(self) -> None:
        """Close, and keep others from opening until the process has forked."""
        self._lock.acquire()
        super().close()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self.lose()


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """What is read inside was there at one moment."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:  # SQLite has ended it where the file cannot be read
            connection.execute("COMMIT")
