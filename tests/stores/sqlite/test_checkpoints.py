"""The write-ahead log is copied into the file beside the writer, and nobody who waits for the writer waits for that."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.stores.sqlite import checkpoints
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.e2e.support import until
from tests.logged import logged
from tests.stores.support import record


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every fourth commit."""
    monkeypatch.setattr(checkpoints, "EVERY", 4)


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path)) as store:
        yield store


def commit(store: SqliteStore, times: int = 4) -> None:
    """So many transactions, one after another."""
    for _ in range(times):
        store.append(record())
        assert store.flush(10)


def reaches_the_file(store: SqliteStore, path: str, tmp_path: Path, count: int) -> bool:
    """Commit once more; whether so many records are in the file alone by now."""
    commit(store, 1)
    return copied(path, tmp_path) >= count


def copied(path: str, tmp_path: Path) -> int:
    """Records in the file alone, without its log."""
    alone = str(tmp_path / "alone.db")
    shutil.copy(path, alone)
    with contextlib.closing(sqlite3.connect(alone)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM records").fetchone()
        return int(count)


def test_the_log_is_copied_now_and_then(
    store: SqliteStore, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, 8)
    until(lambda: reaches_the_file(store, path, tmp_path, 8))
    until(lambda: not store._writer._checkpoints._at_work)  # else the first one counted begins later
    begun: list[str] = []
    monkeypatch.setattr(checkpoints, "begin", lambda name, body: begun.append(name))
    commit(store, 40)
    assert 10 <= len(begun) <= 11, "a lease may make a commit of its own"


def slowly(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, Callable[[], None]]:
    """The next copying lasts until it is let go on; (it has begun, let it)."""
    begun, going_on = threading.Event(), threading.Event()
    reader = store._writer._checkpoints._reader
    read = reader.read

    def slow(question: Any) -> Any:
        def asked(connection: sqlite3.Connection, ns: int) -> Any:
            begun.set()
            assert going_on.wait(30)
            return question(connection, ns)

        return read(asked)

    monkeypatch.setattr(reader, "read", slow)
    return begun, going_on.set


def test_nobody_waits_for_a_slow_disk(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that found the log long copied it, and every call behind it waited for the disk."""
    begun, go_on = slowly(store, monkeypatch)
    commit(store)
    assert begun.wait(30)
    commit(store, 20)
    assert len(store.records()) == 24
    go_on()


def test_a_store_is_closed_once_its_log_is_copied(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = slowly(store, monkeypatch)
    commit(store)
    assert begun.wait(30)
    closing = threading.Thread(target=store.close)
    closing.start()
    go_on()
    closing.join(30)
    assert not closing.is_alive()
    assert not os.path.exists(store.url.removeprefix("sqlite:///") + "-wal"), "whoever closed last put all in the file"


def test_who_copies_late_opens_nothing_that_was_closed(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that came to its work after `close` opened the file once more, and nobody closed that."""
    reader = store._writer._checkpoints._reader
    read, close, closed = reader.read, reader.close, threading.Event()

    def late(question: Any) -> Any:
        closed.wait(0.5)  # if it is closed meanwhile, that was too early
        return read(question)

    def closing() -> None:
        close()
        closed.set()

    monkeypatch.setattr(reader, "read", late)
    monkeypatch.setattr(reader, "close", closing)
    commit(store, 5)
    store.close()
    until(lambda: not store._writer._checkpoints._at_work)
    assert reader.connection is None
    assert not os.path.exists(path + "-wal")


def test_what_cannot_be_copied_is_told_and_tried_again(
    store: SqliteStore, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = store._writer._checkpoints._reader

    def full(question: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    with caplog.at_level(logging.INFO, "dspy_prod"), monkeypatch.context() as patch:
        patch.setattr(reader, "read", full)
        commit(store, 5)
        until(lambda: ["was not copied" in line.getMessage() for line in logged(caplog)] == [True])
    until(lambda: reaches_the_file(store, path, tmp_path, 8))


def test_a_thread_that_cannot_be_had_is_asked_for_again(
    store: SqliteStore, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "begin", lambda *_: None)
        commit(store, 5)
    until(lambda: reaches_the_file(store, path, tmp_path, 5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_process_that_forks_while_its_log_is_copied(store: SqliteStore, path: str, tmp_path: Path) -> None:
    """A child would wait for ever for what the copying thread has locked."""
    for _ in range(10):
        commit(store)
        child = os.fork()
        if not child:
            code = 1
            try:
                commit(store)
                store.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    assert len(store.records()) == 80
