"""The SQLite store's response cache."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable

from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import (
    CENT,
    DAY,
    FakeClock,
    ask,
    granted,
    record,
    settlement,
)


def answer(text: str = "hello", expires_at: float = 1e18) -> CachedAnswer:
    return CachedAnswer(text.encode(), expires_at, expires_at)


def put(sqlite_store: SqliteStore, key: str, value: CachedAnswer, entries: int = 100, size: int = 10_000) -> None:
    sqlite_store.cache_put(key.encode(), value, max_entries=entries, max_bytes=size)


def test_an_answer_is_found_at_once_and_after_a_restart(path: str) -> None:
    store = SqliteStore(path)
    put(store, "k", answer())
    assert store.cache_get(b"k") == answer()
    store.flush(10)
    assert store.cache_get(b"k") == answer()
    assert store.cache_get(b"other") is None
    store.close()
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.cache_get(b"k") == answer()
        assert again.cache_size() == (1, 5)


def test_the_cache_is_bounded_and_evicts_what_was_not_used_for_longest(path: str) -> None:
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    for number in range(5):
        put(store, f"k{number}", answer(), entries=5)
        store.flush(10)
        clock.advance(100.0)
    assert store.cache_get(b"k0") == answer()
    put(store, "k5", answer(), entries=5)
    store.flush(10)
    assert store.cache_size() == (5, 25)
    assert store.cache_get(b"k0") is not None
    assert store.cache_get(b"k1") is None
    put(store, "k6", answer("x" * 20), entries=5, size=30)
    store.flush(10)
    entries, size = store.cache_size()
    assert size <= 30
    assert store.cache_get(b"k6") is not None
    put(store, "huge", answer("x" * 31), entries=5, size=30)
    store.flush(10)
    assert store.cache_get(b"huge") is None
    assert store.cache_size() == (entries, size)
    put(store, "k6", answer("x"), entries=5, size=30)
    store.flush(10)
    assert store.cache_size() == (entries, size - 19)
    store.close()


def test_two_processes_keep_the_bounds_together(open_sqlite: Callable[..., SqliteStore]) -> None:
    one, other = open_sqlite(), open_sqlite()
    for number in range(20):
        put(one if number % 2 else other, f"k{number}", answer(), entries=7)
        one.flush(10)
        other.flush(10)
    assert one.cache_size() == other.cache_size() == (7, 35)
    connection = one._writer.tables.connection
    assert connection is not None
    assert connection.execute("SELECT count(*), sum(size) FROM cache").fetchone() == (7, 35)


def test_a_corrupt_row_is_a_miss(sqlite_store: SqliteStore, path: str) -> None:
    put(sqlite_store, "short", answer())
    put(sqlite_store, "text", answer())
    put(sqlite_store, "time", answer())
    sqlite_store.flush(10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE cache SET value = x'00' WHERE key = CAST('short' AS BLOB)")
        connection.execute("UPDATE cache SET value = 'hello' WHERE key = CAST('text' AS BLOB)")
        connection.execute("UPDATE cache SET expires_at = 'soon' WHERE key = CAST('time' AS BLOB)")
    assert [sqlite_store.cache_get(key) for key in (b"short", b"text", b"time")] == [None, None, None]


def test_clearing_the_cache_clears_this_namespace_only(open_sqlite: Callable[..., SqliteStore]) -> None:
    one, other = open_sqlite(namespace="one"), open_sqlite(namespace="other")
    for each in (one, other):
        put(each, "k", answer())
        each.flush(10)
    put(one, "posted", answer())
    one.cache_clear()
    assert (one.cache_get(b"k"), one.cache_get(b"posted"), one.cache_size()) == (None, None, (0, 0))
    assert other.cache_get(b"k") == answer()


def test_what_can_never_be_served_again_is_swept(path: str) -> None:
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    put(store, "old", answer(expires_at=DAY + 10.0))
    put(store, "new", answer())
    wanted = ask()
    wanted.accounts = (wanted.accounts[0]._replace(ends_in=10.0),)
    reservation = granted(store, wanted)
    store.settle(reservation, settlement(reservation, CENT))
    store.flush(10)
    clock.advance(8_000.0)
    transactions = store._writer._transactions
    transactions._sweep_at = transactions._reap_at = 0.0
    store.append(record())
    store.flush(10)
    assert store.cache_size() == (1, 5)
    assert store.cache_get(b"new") is not None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM accounts").fetchone() == (0,)
    store.close()
