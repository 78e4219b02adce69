"""Reading says when it is behind: what cannot be written at the moment is in no sum, and that is told."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dspy_prod
from dspy_prod import StoreUnavailableError
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.costs import Place, costs_by, summary
from dspy_prod.status.ledger import Ledger
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import ScriptedEngine
from tests.stores.support import CENT, record, until


def fill(store: SqliteStore) -> None:
    """Take the room from a store's file, and post until nothing more goes in."""
    with store._writer.io:
        connection = store._writer.tables.connection
        assert connection is not None
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")

    def full() -> bool:
        store.append(record(user="x" * 3_000, started_at=store.now()))
        return not store.flush(1)

    until(full, what="a full disk")


def make_room(store: SqliteStore) -> None:
    connection = store._writer.tables.connection
    assert connection is not None
    with store._writer.io:
        connection.execute("PRAGMA max_page_count=1000000")
    until(lambda: store.flush(1), what="a write")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "state" / "state.db"))
    store.append(record(cost_nano=CENT, started_at=store.now()))
    store.flush(10)
    yield store
    store.close()


QUESTIONS: list[Callable[[SqliteStore], object]] = [
    lambda store: Ledger(store).records(),
    lambda store: Ledger(store).unconfirmed(),
    lambda store: Ledger(store).total(since=dt.date(2020, 1, 1)),
    lambda store: Ledger(store).resolve("x", 1.0),
    lambda store: costs_by(store, "model"),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_would_be_too_little_is_refused(store: SqliteStore, question: Callable[[SqliteStore], object]) -> None:
    """The disk was full, and the ledger answered with the rows of an hour ago, without a word."""
    fill(store)
    with pytest.raises(StoreUnavailableError, match="records that are not written yet"):
        question(store)
    make_room(store)
    assert Ledger(store).total().usd == 0.01


def test_costs_say_how_many_records_are_not_in_them(store: SqliteStore) -> None:
    place = Place(store, SYSTEM_CLOCK)
    assert summary([place], []).unwritten == 0
    fill(store)
    for _ in range(10):
        store.append(record(cost_nano=CENT, started_at=store.now()))
    store.flush(1)
    behind = summary([place], [])
    assert behind.today_usd == pytest.approx(0.01)
    assert 11 <= behind.unwritten <= 13  # with those of questions
    make_room(store)
    assert summary([place], []).unwritten == 0
    assert summary([place], []).today_usd == pytest.approx(0.11)


def test_a_store_that_only_is_slow_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health said "check its disk" of one whose callers were faster than it."""
    lm = dspy_prod.LM(
        "unit/m", engine=ScriptedEngine("x"), store=f"sqlite:///{tmp_path}/state/state.db", max_tokens=5, cache=False
    )
    lm("q")
    store = lm.pipeline.store
    assert isinstance(store, SqliteStore)
    store.flush(10)
    monkeypatch.setattr("dspy_prod.status.health.FLUSH_TIMEOUT", 0.05)
    with store._writer.io:
        store.append(record())
        store.append(record())
        until(lambda: store.unwritten() >= 2)
        reasons = lm.health().reasons
    assert any("wait to be written; costs are behind" in reason for reason in reasons)
    assert not any("disk" in reason for reason in reasons)
