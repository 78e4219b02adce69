"""A connection for reading, shared by threads, opened when first used and never in the writer's way."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import TypeVar

from dspy_prod.stores.sqlite.rows import clean_text
from dspy_prod.stores.sqlite.schema import connect, leave_open, namespace_id
from dspy_prod.stores.sqlite.tables import identity

T = TypeVar("T")


class Reader:
    """One namespace of one file, read through a connection of its own."""

    def __init__(self, path: str, namespace: str) -> None:
        self._path = path
        self._namespace = namespace
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._ns = 0

    def read(self, question: Callable[[sqlite3.Connection, int], T]) -> T:
        """What `question(connection, namespace's number)` finds; one thread at a time.

        Raises:
            sqlite3.Error, OSError: the file cannot be read.
        """
        with self._lock:
            return question(self._open(), self._ns)

    def _open(self) -> sqlite3.Connection:
        now = identity(self._path)
        if self._connection is not None and now != self._identity:
            self.lose()
        if self._connection is None:
            connection = connect(self._path)
            self._ns = namespace_id(connection, clean_text(self._namespace))
            connection.execute("PRAGMA query_only=1")
            self._connection, self._identity = connection, now
        return self._connection

    def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if identity(self._path) != self._identity:
            leave_open(connection)
        else:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def lose(self) -> None:
        """Give the connection up: its file was replaced, or it is the parent process's."""
        connection, self._connection = self._connection, None
        if connection is not None:
            leave_open(connection)

    def before_fork(self) -> None:
        """Close, and keep others from opening until `after_fork`."""
        self._lock.acquire()
        self._close()

    def after_fork(self) -> None:
        """In the parent."""
        self._lock.release()
