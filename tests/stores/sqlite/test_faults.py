"""The SQLite store on a broken disk: nothing raises, nothing settled is lost in silence."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import GRANTED, REFUSED, AccountState
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import (
    CENT,
    DOLLAR,
    Problems,
    ask,
    check_books,
    decided,
    granted,
    record,
    refused,
    settlement,
    until,
)


def test_a_full_disk_refuses_admissions_and_loses_no_settlement(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    reservations = [granted(store, ask(CENT)) for _ in range(20)]
    store.flush(10)
    connection = store._writer.tables.connection
    assert connection is not None
    with store._writer.io:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
    big = "x" * 3_000
    while not problems:
        store.append(record(user=big))
        store.flush(1)
    assert problems.names == ["store_degraded"]
    refusal = refused(store, ask(CENT))
    assert refusal.reason == "store_unavailable"
    assert "full" in refusal.detail
    for reservation in reservations:
        store.settle(reservation, settlement(reservation, CENT))
    assert not store.flush(0.2)
    assert refused(store, ask(CENT)).reason == "store_unavailable"
    with store._writer.io:
        connection.execute("PRAGMA max_page_count=1000000")
    until(lambda: store.flush(1) and store.account("day") == AccountState(20 * CENT, 0, 0))
    granted(store, ask(CENT, accounts=("other",)))
    assert problems.names == ["store_degraded", "store_recovered"]
    assert len(store.records(user=big)) > 0
    check_books(store)
    store.close()


def test_a_store_that_cannot_write_says_so_until_a_write_succeeds(path: str) -> None:
    """Every call was refused and health was "healthy": looking at it began and ended an empty transaction, which a full
    disk allows, and took that for a recovery."""
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    store.flush(10)
    assert store.problems == {}
    granted(store, ask(CENT))
    connection = store._writer.tables.connection
    assert connection is not None
    with store._writer.io:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
    while not problems:
        decided(store.admit(ask(1, id="x" * 3_000 + str(os.urandom(8)))))
    for _ in range(3):
        until(lambda: store._writer._retry_at < time.monotonic())
        assert not store.flush(1)
        assert "full" in store.problems["failing"]
    with store._writer.io:
        connection.execute("PRAGMA max_page_count=1000000")
    until(lambda: store.flush(1))
    assert store.problems == {}
    assert problems.names == ["store_degraded", "store_recovered"]
    store.close()


def test_what_waits_is_refused_when_the_disk_breaks(path: str) -> None:
    store = SqliteStore(path)
    granted(store, ask(DOLLAR))
    waiting = store.admit(ask(CENT))
    store.flush(10)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    from dspy_prod.stores.sqlite import schema

    limit, schema.BUSY_LIMIT = schema.BUSY_LIMIT, 0.1  # type: ignore[misc]
    try:
        refusal = refused(store, ask(CENT, accounts=("other",)))
    finally:
        schema.BUSY_LIMIT = limit  # type: ignore[misc]
    assert "locked" in refusal.detail
    assert decided(waiting).state == REFUSED
    blocker.execute("ROLLBACK")
    blocker.close()
    until(lambda: store.flush(1) and decided(store.admit(ask(CENT, accounts=("other",)))).state == GRANTED)
    assert store.account("day").held == DOLLAR
    store.close()


def test_a_short_lock_of_another_program_is_waited_out(path: str) -> None:
    store = SqliteStore(path)
    store.flush(10)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    reservation = store.admit(ask())
    store.flush(0.1)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert decided(reservation).state == GRANTED
    store.close()


def test_a_deleted_file_is_made_again_with_what_is_known(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    reservation = granted(store, ask(30 * CENT))
    store.settle(reservation, settlement(reservation, 30 * CENT))
    held = granted(store, ask(20 * CENT))
    store.flush(10)
    for suffix in ("", "-wal", "-shm"):
        os.unlink(path + suffix)
    assert refused(store, ask(71 * CENT)).spent == 30 * CENT
    assert store.account("day") == AccountState(30 * CENT, 20 * CENT, 0)
    store.settle(held, settlement(held, 5 * CENT))
    assert store.account("day") == AccountState(35 * CENT, 0, 0)
    assert problems.names == ["store_degraded"]
    store.close()
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.account("day").spent == 35 * CENT


def test_an_older_copy_of_the_file_brings_back_no_hold_that_has_ended(path: str) -> None:
    """It was held as long as its process lived, and one that goes on counted twice."""
    store = SqliteStore(path)
    ended, held = granted(store, ask(30 * CENT)), granted(store, ask(20 * CENT))
    store.flush(10)
    with contextlib.closing(sqlite3.connect(path)) as file, contextlib.closing(sqlite3.connect(f"{path}.old")) as older:
        file.backup(older)
    store.settle(ended, settlement(ended, 10 * CENT))
    store.flush(10)
    for suffix in ("", "-wal", "-shm"):
        os.unlink(path + suffix)
    os.replace(f"{path}.old", path)
    assert refused(store, ask(91 * CENT)).spent == 10 * CENT
    assert store.account("day") == AccountState(10 * CENT, 20 * CENT, 0)
    store.settle(held, settlement(held, 5 * CENT))
    assert store.account("day") == AccountState(15 * CENT, 0, 0)
    assert store.holds() == 0
    store.close()


def test_a_file_that_is_deleted_without_its_log_does_not_get_the_old_log(path: str) -> None:
    store = SqliteStore(path)
    reservation = granted(store, ask(30 * CENT))
    store.settle(reservation, settlement(reservation, 30 * CENT))
    store.append(record("old"))
    store.flush(10)
    os.unlink(path)
    granted(store, ask(20 * CENT))
    assert store.account("day") == AccountState(30 * CENT, 20 * CENT, 0)
    assert store.records() == []
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.account("day").spent == 30 * CENT


def test_a_deleted_directory_that_cannot_be_made_again_refuses(path: str) -> None:
    store = SqliteStore(path)
    reservation = granted(store, ask())
    directory = Path(path).parent
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    directory.write_text("a file is in the way")
    refusal = refused(store, ask())
    assert refusal.reason == "store_unavailable"
    assert path in refusal.detail
    store.settle(reservation, settlement(reservation, CENT))
    with pytest.raises(StoreUnavailableError):
        store.account("day")
    directory.unlink()
    until(lambda: store.flush(1))
    granted(store, ask())
    store.close()


def test_a_file_that_gets_corrupt_refuses_and_does_not_raise(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    reservation = granted(store, ask())
    store.flush(10)
    with store._writer.io:
        store._writer.tables.close()
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
        with open(path, "r+b") as file:
            file.write(b"this is not a database" * 100)
    assert refused(store, ask()).reason == "store_unavailable"
    store.settle(reservation, settlement(reservation, CENT))
    until(lambda: "store_degraded" in problems.names)
    assert store.cache_get(b"k") is None
    store.close()
    assert "operation_dropped" in problems.names
