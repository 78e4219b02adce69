"""A connection for reading, shared by threads, opened when first used and never in the writer's way."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from types import TracebackType

from dspy_prod.stores.sqlite_rows import clean_text
from dspy_prod.stores.sqlite_schema import connect, leave_open, namespace_id
from dspy_prod.stores.sqlite_tables import identity


class Reader:
    """`with reader as (connection, ns):` holds a lock, so that one thread reads at a time.

    Raises:
        sqlite3.Error, OSError: the file cannot be read.
    """

    def __init__(self, path: str, namespace: str) -> None:
        self._path = path
        self._namespace = namespace
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._ns = 0

    def __enter__(self) -> tuple[sqlite3.Connection, int]:
        self._lock.acquire()
        try:
            now = identity(self._path)
            if self._connection is not None and now != self._identity:
                self.lose_connection()
            if self._connection is None:
                connection = connect(self._path)
                self._ns = namespace_id(connection, clean_text(self._namespace))
                connection.execute("PRAGMA query_only=1")
                self._connection, self._identity = connection, now
            return self._connection, self._ns
        except BaseException:
            self._lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

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

    def lose_connection(self) -> None:
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

    lose = lose_connection
