"""Many rows in few statements.

`executemany` gives the interpreter's lock up for every row, and beside a thread that never waits for anything each
time may cost the writer five milliseconds until it has it again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

_LARGEST: Final = 256 if sqlite3.sqlite_version_info >= (3, 32) else 16
_SIZES: Final = tuple(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if size <= _LARGEST)
"""Rows of one statement: few sizes, so that SQLite's cache holds them all. Before 3.32 it took 999 values."""


class Inserting:
    """An INSERT into some columns of a table.

    Args:
        table: its name. columns: in the order of a row's values.
        conflict: what follows the values.
    """

    def __init__(self, table: str, columns: Sequence[str], conflict: str = "") -> None:
        self._head = f"INSERT INTO {table} ({', '.join(map(_quoted, columns))}) VALUES "
        self._marks = f"({', '.join('?' * len(columns))})"
        self._conflict = conflict
        self._sized = [(size, self.statement(size)) for size in _SIZES]

    def statement(self, rows: int) -> str:
        """The statement for so many rows."""
        return self._head + ", ".join([self._marks] * rows) + self._conflict

    def run(self, connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert the rows in their order.

        Raises:
            sqlite3.Error: those of earlier statements are inserted.
        """
        done = 0
        for size, statement in self._sized:
            while len(rows) - done >= size:
                connection.execute(statement, tuple(chain.from_iterable(rows[done : done + size])))
                done += size


def _quoted(name: str) -> str:
    return f'"{name}"'
