"""Many rows in few statements.

`executemany` gives the interpreter's lock up for every row, and beside a thread that never waits for anything each
time may cost the writer five milliseconds until it has it again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final, TypeVar

T = TypeVar("T")

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
        self._sized = {size: self.statement(size) for size in _SIZES}

    def statement(self, rows: int) -> str:
        """The statement for so many rows."""
        return self._head + ", ".join([self._marks] * rows) + self._conflict

    def run(self, connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert the rows in their order.

        Raises:
            sqlite3.Error: those of earlier statements are inserted.
        """
        for some in portions(rows):
            connection.execute(self._sized[len(some)], tuple(chain.from_iterable(some)))


def portions(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """The rows in as few parts as have one of the few sizes."""
    done = 0
    for size in _SIZES:
        while len(rows) - done >= size:
            yield rows[done : done + size]
            done += size


def among(head: str, count: int) -> str:
    """A statement that ends with a list of so many values, as in `WHERE id IN (?, ?)`."""
    return f"{head} IN ({', '.join('?' * count)})"


def each_of(table: str, columns: str, column: str, count: int, where: str) -> str:
    """A statement that looks up the rows of so many values, one after another, by an index that begins with `where`.

    Given a list instead (`IN`), SQLite knows no better than that `where` leaves ten rows, and reads all that it leaves.

    Args:
        table: its name. columns: what to tell of its rows. column: whose values are given, before those of `where`.
        where: what else holds of the rows.
    """
    asked = ", ".join(["(?)"] * count)
    return (
        f"WITH asked (value) AS (VALUES {asked}) SELECT {columns} "
        f"FROM asked CROSS JOIN {table} WHERE {where} AND {column} = asked.value"
    )


def _quoted(name: str) -> str:
    return f'"{name}"'
