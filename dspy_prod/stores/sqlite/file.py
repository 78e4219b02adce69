"""A store's file while it is in use: opened when needed, noticed when it is deleted or replaced."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.sqlite.schema import check, connect, namespace_id, restrict


def leave_open(connection: sqlite3.Connection) -> None:
    """Give a connection up without closing it.

    SQLite deletes the `-wal` file by name when the last connection closes. If the database file was replaced
    meanwhile, or the connection belongs to the parent of a forked process, that file is somebody else's.
    """
    _LEFT_OPEN.append(connection)
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # survives the interpreter's own cleaning up


_LEFT_OPEN: list[sqlite3.Connection] = []


class File:
    """One namespace of one file, through a connection that is opened when first used. Not thread-safe.

    Attributes:
        connection: None while it is closed.
        ns: the namespace's number.
    """

    def __init__(self, path: str, namespace: str, *, synchronous: str = "NORMAL") -> None:
        self.path = path
        self.connection: sqlite3.Connection | None = None
        self.ns = 0
        self._namespace = carried(namespace)
        self._synchronous = synchronous
        self._identity: tuple[int, int] | None = None

    def open(self) -> sqlite3.Connection:
        """The connection, opened when needed."""
        if self.connection is None:
            check(self.path)
            restrict(self.path)
            self._identity = identity(self.path)
            connection = connect(self.path, synchronous=self._synchronous)
            try:
                self.ns = namespace_id(connection, self._namespace)
            except BaseException:
                connection.close()
                raise
            self.connection = connection
        return self.connection

    def lost(self) -> bool:
        """Whether the file was deleted or replaced while in use; then its connection is given up."""
        gone = self.connection is not None and identity(self.path) != self._identity
        if gone:
            self.lose()
        return gone

    def lose(self) -> None:
        """Give up a connection to a file that was deleted, or that the parent process uses."""
        connection, self.connection = self.connection, None
        if connection is not None:
            leave_open(connection)

    def close(self) -> None:
        """Close the connection; `open` makes a new one."""
        if not self.lost() and self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            self.connection = None


def identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one at the same place; None while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
