"""Many rows go into the file in few statements."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from dspy_prod.stores.sqlite.inserting import Inserting
from dspy_prod.stores.sqlite.ledger import LedgerTables
from dspy_prod.stores.sqlite.schema import connect, create
from tests.stores.support import record


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 128, 300])
def test_every_row_is_there_in_its_order(count: int) -> None:
    rows = [(number, f"row {number}") for number in range(count)]
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (number, name)")
        Inserting("t", ("number", "name")).run(connection, rows)
        assert connection.execute("SELECT number, name FROM t ORDER BY rowid").fetchall() == rows


def test_a_full_batch_of_records_takes_few_statements(path: str) -> None:
    """Each row was a statement, after which the writer had to get the interpreter back from callers: up to 5 ms."""
    create(path)
    with contextlib.closing(connect(path)) as connection:
        ledger = LedgerTables(None)
        ledger.attach(connection, 1)
        run: list[str] = []
        connection.set_trace_callback(run.append)
        ledger.write([record(f"r{number}", user=f"u{number}") for number in range(512)], ())
        assert 4 <= len(set(run)) <= 16  # a trigger within one is told as the same again
        connection.set_trace_callback(None)
        assert connection.execute(
            "SELECT count(*), sum(attempts) FROM records, rollups WHERE value = 'u7'"
        ).fetchone() == (512, 512)
