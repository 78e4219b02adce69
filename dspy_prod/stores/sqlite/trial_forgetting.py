"""Forgets the rows of experiments that were removed, some at a time."""

from __future__ import annotations

import sqlite3
from typing import Final

from dspy_prod.stores.sqlite.trial_tables import PARTS

_FORGET: Final = 10_000
"""Rows that are forgotten in one transaction: who calls meanwhile waits for it."""


def forget_some(connection: sqlite3.Connection) -> bool:
    """Delete rows of experiments that are not there any more; whether there may be more of them."""
    for table, key in PARTS.items():
        trial = _orphan(connection, table)
        if trial is not None:
            some = f"SELECT {key} FROM {table} WHERE trial = ? LIMIT {_FORGET}"
            connection.execute(f"DELETE FROM {table} WHERE ({key}) IN ({some})", (trial,))
            return True
    return False


def _orphan(connection: sqlite3.Connection, table: str) -> int | None:
    """An experiment that has rows in a table and is not there any more; a look for each that has."""
    known = {id for (id,) in connection.execute("SELECT id FROM trials")}
    sql, trial = f"SELECT min(trial) FROM {table} WHERE trial > ?", -1
    while (found := connection.execute(sql, (trial,)).fetchone()[0]) is not None:
        trial = int(found)
        if trial not in known:
            return trial
    return None
