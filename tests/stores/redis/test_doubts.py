"""Whether a commit was written is not known, and more waits than one takes: it stays in order, nobody waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import pytest

from dspy_prod.stores.base import REFUSED
from dspy_prod.stores.durable import failing
from dspy_prod.stores.durable.tables import DoubtError
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.support import Put, ask, decided, record, until

MANY = 1_100
"""Records that are kept: three commits."""


@pytest.fixture
def store(valkey: str, namespace: str) -> Iterator[Any]:
    with closing(RedisStore(valkey, namespace)) as opened:
        assert opened.append(record("first")) is None
        assert opened.flush(10)
        yield opened


class Commits:
    """The commits of a store, none of which ends well at present; then, perhaps, none is answered."""

    def __init__(self, store: Any) -> None:
        self.error: Exception | None = OSError("away")
        self._commit = store._writer.tables.commit
        store._writer.tables.commit = self

    def __call__(self) -> None:
        if self.error is not None:
            raise self.error
        self._commit()


@pytest.fixture
def commits(store: Any) -> Commits:
    """As many records are kept; `corrected` comes with the first and is corrected with the last."""
    found = Commits(store)
    for number in range(MANY):
        is_new = number < MANY - 1
        name = f"r{number:05}" if 0 < number < MANY - 1 else "corrected"
        store._mailbox.post((Transactions.append, record(name, cost_nano=1 if is_new else 7), is_new))
    until(lambda: store.problems.get("kept") == MANY)
    return found


def test_what_comes_after_a_carrying_over_in_doubt_stays_in_order(store: Any, commits: Commits) -> None:
    """The first of what was kept came behind the rest: the correction of a record before the record."""
    writer = store._writer
    kept = list(writer._kept)
    with writer.io:
        commits.error = DoubtError("no answer")
        writer._transactions._lost = True
    until(lambda: writer._transactions.in_doubt and writer._retry_at > 0)
    until(lambda: len(writer._kept) == MANY)
    assert list(writer._kept) == kept
    commits.error = None
    until(lambda: store.flush(1), 20)
    found = {each.id: each.cost_nano for each in store.records()}
    assert len(found) == MANY
    assert found["corrected"] == 7


def test_who_is_taken_as_a_commit_is_in_doubt_is_told(
    store: Any, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken just before the next try, they stand behind what is kept, and are no part of the commit."""
    writer = store._writer
    collect, begun = writer._collect, threading.Event()

    def just_then() -> Any:
        begun.set()
        operations = collect()
        if any(kind is Transactions.admit for kind, _, _ in operations):
            commits.error = DoubtError("no answer")
            writer._retry_at = 0.0
        return operations

    monkeypatch.setattr(writer, "_collect", just_then)
    monkeypatch.setattr(failing, "_BACK_OFF", (30.0, 30.0))
    store._mailbox.post((Transactions.nudge, None, None))
    assert begun.wait(5)
    until(lambda: writer._retry_at > 0.0)
    waiting, asked, told = ask(), Future[Any](), threading.Event()
    for operation in (
        (Transactions.put_answer, b"key", Put(None, told.set)),
        (Transactions.answer, asked, lambda *_: None),
        (Transactions.admit, waiting, None),
    ):
        store._mailbox.post(operation)
    until(lambda: writer._transactions.in_doubt, 5)
    assert decided(waiting, 5).state == REFUSED
    assert isinstance(asked.exception(5), OSError)
    assert told.wait(5)
    commits.error = None
