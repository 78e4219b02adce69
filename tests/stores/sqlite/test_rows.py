"""Rows are written and read by position; each column must hold what its name says."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import REFUSED
from dspy_prod.stores.sqlite.leases import HOLD_COLUMNS
from dspy_prod.stores.sqlite.rows import RECORD_COLUMNS, hold_of, hold_row, record_of, record_row, stub_json
from dspy_prod.stores.sqlite.schema import _TABLES
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import PUT_HOLD
from tests.stores.support import CENT, ask, decided, granted, settlement
from tests.test_records import FACTS

RECORD = CallRecord(**FACTS)  # type: ignore[arg-type]
TAKEN = [1, 10, 0]


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(_TABLES)
    yield connection
    connection.close()


def test_a_record_is_kept_under_the_names_of_its_fields(database: sqlite3.Connection) -> None:
    """A new field must not move the others into their neighbours' columns."""
    marks = ", ".join("?" * (1 + len(RECORD)))
    database.execute(f"INSERT INTO records (ns, {RECORD_COLUMNS}) VALUES ({marks})", record_row(9, RECORD))
    database.row_factory = sqlite3.Row
    (row,) = database.execute("SELECT * FROM records")
    kept = {name: row[name] for name in row.keys() if name != "seq"}  # noqa: SIM118  (a Row iterates over its values)
    assert kept == {
        **RECORD._asdict(), "ns": 9, "tags": '{"a":"b"}', "accounts": '["acc"]', "estimated": 1, "cached": 0,
    }  # fmt: skip
    database.row_factory = None
    assert record_of(database.execute(f"SELECT {RECORD_COLUMNS} FROM records").fetchone()) == RECORD


def test_a_hold_is_kept_under_the_names_of_its_columns(database: sqlite3.Connection) -> None:
    """The heirs of a process that died read what it held: whose money, how much, until when."""
    hold = Hold("the id", ("one", "two"), 5, "the key", TAKEN, 7.5, RECORD)  # type: ignore[arg-type]
    database.execute(PUT_HOLD, hold_row(9, "the owner", hold))
    (row,) = database.execute("SELECT ns, id, owner, ends_at, amount, accounts, limit_key, debit, stub FROM holds")
    assert row == (
        *(9, "the id", "the owner", 7.5, 5, '["one","two"]', "the key", b"[1,10,0]"),
        stub_json(RECORD),
    )
    found = hold_of(database.execute(f"SELECT {HOLD_COLUMNS} FROM holds").fetchone())
    assert {
        name: getattr(found, name) for name in ("id", "accounts", "amount", "limit_key", "lease_until", "stub")
    } == {
        "id": "the id",
        "accounts": ("one", "two"),
        "amount": 5,
        "limit_key": "the key",
        "lease_until": 7.5,
        "stub": RECORD,
    }
    assert found.debit == TAKEN


@pytest.mark.parametrize("damaged", ["{", "7", '"x"', "[[", '{"no": "field"}', b"\xff"])
def test_a_damaged_row_stops_nobody(open_sqlite: Callable[..., SqliteStore], path: str, damaged: str | bytes) -> None:
    """The hold of a process that died could not be read: every other call was refused, as long as the row was there."""
    first = open_sqlite()
    told = granted(first, ask(CENT))
    first.settle(told, settlement(told, CENT))
    first.close()
    with closing(sqlite3.connect(path)) as file, file:
        (ns,) = file.execute("SELECT id FROM namespaces").fetchone()
        file.execute("INSERT INTO owners VALUES (?, 'dead', 0, 1)", (ns,))
        file.execute(
            "INSERT INTO holds VALUES (?, 'lost', 'dead', 0, 5, ?, NULL, ?, ?)", (ns, damaged, damaged, damaged)
        )
        file.execute("UPDATE records SET tags = ?, accounts = ?", (damaged, damaged))
    store = open_sqlite()
    asked = granted(store, ask(CENT))
    store.settle(asked, settlement(asked, CENT))
    assert {record.id for record in store.records()} >= {told.id, asked.id}
    assert store.holds() == 0
    assert store.account("day").spent == 2 * CENT
    assert not store.problems


@pytest.mark.parametrize("damaged", ["text", b"bytes", 0.5, "9e99"])
def test_an_account_that_holds_no_number_is_said_to(
    open_sqlite: Callable[..., SqliteStore], path: str, damaged: str | bytes | float
) -> None:
    """Whoever asked for costs got a bare `TypeError`. What is spent is not known then: it is not taken for nothing."""
    first = open_sqlite()
    told = granted(first, ask(CENT))
    first.settle(told, settlement(told, CENT))
    first.close()
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE accounts SET spent = ?", (damaged,))
        file.execute("INSERT INTO accounts SELECT ns, 'day|x|now', spent, 0, 0, NULL FROM accounts")
    store = open_sqlite()
    for read in (lambda: store.account("day"), lambda: store.accounts("day|", "|now", 5)):
        with pytest.raises(StoreUnavailableError, match="holds what is no number"):
            read()
    assert decided(store.admit(ask(CENT))).state == REFUSED


def test_what_a_damaged_record_still_tells_is_shown(open_sqlite: Callable[..., SqliteStore], path: str) -> None:
    """One field that was no number ended in a `TypeError` for whoever asked for any record."""
    first = open_sqlite()
    told = granted(first, ask(CENT))
    first.settle(told, settlement(told, CENT))
    first.close()
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(
            "UPDATE records SET started_at = ?, cost_nano = 'dear', attempt = ?, model = ?", (b"x", b"y", b"m\xff")
        )
        file.execute("UPDATE rollups SET value = ?", (b"\xed\xa0\x80",))
    store = open_sqlite()
    [record] = store.records()
    assert (record.id, record.started_at, record.cost_nano, record.attempt) == (told.id, 0.0, None, 0)
    assert record.model == "m\ufffd"
    assert [value for value, _ in store.sums(dimension="all")] == ["\ufffd" * 3]
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE rollups SET attempts = 1.5")
    for read in (lambda: store.sums(dimension="all"), lambda: store.totals()):
        with pytest.raises(StoreUnavailableError, match="hold what is no number"):
            read()
