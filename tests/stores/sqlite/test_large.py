"""Large files and many accounts: questions use an index, and housekeeping goes in small steps."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from dspy_prod.stores.admission.accounts import PRUNE_AFTER, PRUNED_AT_ONCE, AccountBook
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.durable.transactions import SWEEP_BATCH
from dspy_prod.stores.sqlite.finding import read_records
from dspy_prod.stores.sqlite.indices import SELECTIVE
from dspy_prod.stores.sqlite.leases import SWEEP_ABANDONED, SWEEP_ACCOUNTS
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, DAY, FakeClock, ask, granted, record, settlement

LATER = (
    *(f"records_{name}" for name in SELECTIVE if name not in ("id", "user", "tenant")),
    *("cache_ends", "accounts_ends", "accounts_dearest", "abandoned_at"),
)
"""Indices that the files of the first release have not."""


def plan(connection: sqlite3.Connection, sql: str) -> str:
    """How SQLite would answer; the values are in the text."""
    return " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}"))


def asked(path: str, **equals: str) -> str:
    """The plan of the question that `records` asks."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        sent: list[str] = []
        connection.set_trace_callback(sent.append)
        read_records(connection, 1, None, None, None, equals)
        connection.set_trace_callback(None)
        return plan(connection, next(sql for sql in sent if sql.startswith('SELECT "id"')))


@pytest.mark.parametrize("name", SELECTIVE)
def test_records_are_found_by_an_index(path: str, name: str) -> None:
    """`records(trace_id=...)`, like that of a session, a prompt version or a model, read a million rows: 326 ms.

    That of a call had an index, and SQLite did not use it.
    """
    SqliteStore(path).close()
    found = asked(path, **{name: "x"})
    assert "USING INDEX records_" in found
    assert f"AND {name}=?" in found.replace('"', "")
    assert "SCAN" not in found
    if name != "id":
        assert "TEMP B-TREE FOR ORDER BY" not in found or "LAST TERM" in found


@pytest.mark.parametrize("names", [("model", "session"), ("session", "model"), ("outcome", "user"), ("model", "id")])
def test_of_several_fields_the_one_with_the_fewest_records_is_looked_up(path: str, names: tuple[str, str]) -> None:
    """SQLite took any of them: a session's records were looked for among all those of the model."""
    SqliteStore(path).close()
    best = min(names, key=SELECTIVE.index)
    assert f"records_{best} " in asked(path, **dict.fromkeys(names, "x"))


@pytest.mark.parametrize(("rare", "common"), [("outcome", "tenant"), ("model", "session"), ("user", "outcome")])
def test_of_two_fields_the_value_with_fewer_records_is_looked_up(path: str, rare: str, common: str) -> None:
    """All records of a tenant were read to find that none was a time-out, of which the ledger had three."""
    with contextlib.closing(SqliteStore(path)) as store:
        for number in range(10):
            store.append(record(**{common: "x", rare: "x" if number == 7 else "other"}))
        store.flush(10)
    assert f"records_{rare} " in asked(path, **{common: "x", rare: "x"})
    assert f"records_{rare} " in asked(path, **{common: "x", rare: "absent"})


def test_a_field_without_an_index_is_compared_as_before(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(record("r", user="u", route="primary"))
        assert [row.id for row in store.records(route="primary", attempt="1", user="u", model="openai/m")] == ["r"]


def test_a_file_of_the_first_release_gets_the_indices_and_keeps_its_rows(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(record("r", trace_id="t"))
        store.flush(10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for name in LATER:
            connection.execute(f"DROP INDEX {name}")
        connection.execute("CREATE INDEX records_call ON records (ns, call_id)")
    assert "records_trace_id" not in asked(path, trace_id="t")
    with contextlib.closing(SqliteStore(path)) as store:
        assert [row.id for row in store.records(trace_id="t")] == ["r"]
    assert "records_trace_id" in asked(path, trace_id="t")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        assert names >= set(LATER)
        assert "records_call" not in names
        assert dict(connection.execute("SELECT key, value FROM meta"))["schema"] == 1  # older releases still read it


def test_sweeping_is_by_index(path: str) -> None:
    SqliteStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for sql, index in ((SWEEP_ACCOUNTS, "accounts_ends"), (SWEEP_ABANDONED, "abandoned_at")):
            found = plan(connection, sql.replace("?1", "1").replace("?2", "2.0").replace("?3", "3"))
            assert index in found
            assert "SCAN" not in found
        dead = "SELECT id, size FROM cache WHERE ns = 1 AND max(expires_at, stale_until) < 2.0 LIMIT 3"
        assert "cache_ends" in plan(connection, dead)


def test_the_dearest_accounts_are_found_by_index(path: str) -> None:
    """Health looked at every tenant that a budget ever had, to show the ten that spent most."""
    store = SqliteStore(path)
    statements: list[str] = []
    store._ledger_reader.read(lambda connection, _: connection.set_trace_callback(statements.append))
    assert store.accounts("month/tenant|", "|now", 10) == []
    store._ledger_reader.read(lambda connection, _: connection.set_trace_callback(None))
    store.close()
    [sql] = [statement for statement in statements if "FROM accounts" in statement]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = plan(connection, sql)
    assert "accounts_dearest" in found
    assert "SCAN" not in found
    assert "B-TREE" not in found


def test_a_sweep_deletes_a_few_at_a_time_until_nothing_is_left(path: str) -> None:
    """A million answers that nobody can use any more were deleted at once, every hour, and calls waited."""
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    for number in range(450):
        answer = CachedAnswer(b"hello", DAY + 10.0, DAY + 10.0)
        store.cache_put(f"k{number}".encode(), answer, max_entries=1_000, max_bytes=10_000)
    wanted = ask()
    wanted.accounts = (wanted.accounts[0]._replace(ends_in=10.0),)
    reservation = granted(store, wanted)
    store.settle(reservation, settlement(reservation, CENT))
    store.flush(10)
    clock.advance(8_000.0)
    with store._writer.io:
        tables = store._writer.tables
        left, more = [], True
        while more:
            tables.begin()
            more = tables.sweep(clock.time(), SWEEP_BATCH)
            tables.commit()
            left.append(tables.cache._sizes()[0])
    assert left == [max(0, 450 - step * SWEEP_BATCH) for step in range(1, 6)]
    assert store.cache_size() == (0, 0)
    store.close()


def test_the_hourly_sweep_goes_on_by_itself(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one step leaves is swept soon after, not an hour later."""
    monkeypatch.setattr("dspy_prod.stores.durable.transactions.SWEEP_BATCH", 2)
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    for number in range(5):
        answer = CachedAnswer(b"hello", DAY + 10.0, DAY + 10.0)
        store.cache_put(f"k{number}".encode(), answer, max_entries=1_000, max_bytes=10_000)
    store.flush(10)
    clock.advance(8_000.0)
    transactions = store._writer._transactions
    transactions._sweep_at = transactions._reap_at = 0.0
    for left in (3, 1, 0):
        transactions._sweep_at = transactions._reap_at = 0.0
        store.append(record())
        store.flush(10)
        assert store.cache_size()[0] <= left
    store.close()


def test_many_accounts_are_pruned_in_steps_that_come_round_to_all() -> None:
    """With 100,000 tenants every lease tick looked at all their accounts while calls waited: 10 ms."""
    book = AccountBook(None)
    for number in range(3 * PRUNED_AT_ONCE):
        book.get(f"k{number}").ends_at = DAY if number % 2 else 1e18
    now, steps = DAY + PRUNE_AFTER + 1.0, 0
    more = True
    while more:
        before = len(book.entries)
        more = book.prune(now, ())
        steps += 1
        assert before - len(book.entries) <= PRUNED_AT_ONCE
    assert steps == 3
    assert len(book.entries) == 3 * PRUNED_AT_ONCE // 2
