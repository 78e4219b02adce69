"""A store that cannot be written for a while, on SQLite and on Redis: nobody waits in vain, nothing settled is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from math import inf
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.durable import failing
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import Problems, record, until


class Away:
    """What the store writes to: it takes `left` more transactions."""

    def __init__(self, store: Any) -> None:
        self.left: float = inf
        self.tries = 0
        self._begin = store._writer.tables.begin
        store._writer.tables.begin = self.begin

    def begin(self) -> None:
        if self.left <= 0:
            self.tries += 1
            raise OSError("away")
        self.left -= 1
        self._begin()


@pytest.fixture
def problems() -> Problems:
    return Problems()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, problems: Problems) -> Iterator[Any]:
    if request.param == "redis":
        opened: Any = RedisStore(request.getfixturevalue("valkey"), tmp_path.name, on_problem=problems)
    else:
        opened = SqliteStore(str(tmp_path / "state.db"), "n", on_problem=problems)
    opened.append(record())
    assert opened.flush(10)
    yield opened
    opened.close()


@pytest.fixture
def away(store: Any) -> Away:
    return Away(store)


def fail(store: Any, away: Away) -> None:
    """From now on nothing can be written, and one record is kept."""
    away.left = 0
    store.append(record(cost_nano=5))
    until(lambda: bool(store._writer._kept) and "failing" in store.problems)


def post(store: Any, count: int) -> None:
    """Records with money in them, in one go."""
    for number in range(count):
        store._mailbox.post((Transactions.append, record(f"r{number:05}", cost_nano=1), True))


def test_what_is_posted_while_nothing_can_be_written_is_taken_at_once(
    store: Any, away: Away, problems: Problems
) -> None:
    """It was one operation a second: closing took as many seconds as there were."""
    fail(store, away)
    post(store, 40)
    begun = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="away"):
        store.waiting()
    assert time.monotonic() - begun < 2.0
    assert store.problems["kept"] == 41
    store.close()
    assert time.monotonic() - begun < 4.0
    assert problems[-1][0] == "operation_dropped"
    assert problems[-1][1]["dropped"] == 41


def test_an_answer_that_comes_while_nothing_can_be_written_lets_go_who_follows(store: Any, away: Away) -> None:
    fail(store, away)
    told = threading.Event()
    post(store, 20)
    store._mailbox.post((Transactions.put_answer, b"key", (None, 9, 999, told.set)))
    assert told.wait(3.0)


def test_who_looks_while_nothing_can_be_written_takes_no_room_from_settlements(
    store: Any, away: Away, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look of a probe or a dashboard was kept among them, until they found no room."""
    monkeypatch.setattr(failing, "MAX_KEPT", 30)
    fail(store, away)
    for _ in range(40):
        assert not store.flush(0.0)
    post(store, 29)
    until(lambda: store.problems["kept"] == 30)
    assert "dropped" not in store.problems
    away.left = inf
    until(lambda: store.flush(1))
    assert len(store.records()) == 31


@pytest.mark.parametrize("back", [True, False])
def test_who_looks_is_told_after_one_more_try(store: Any, away: Away, back: bool) -> None:
    """That all is written, once it is, even what takes several transactions; or that it is not."""
    fail(store, away)
    post(store, 1_100)
    until(lambda: store.problems["kept"] == 1_101)
    told: Future[bool] = Future()
    seen: list[int] = []
    told.add_done_callback(lambda _: seen.append(len(store._writer._kept)))
    store._mailbox.post((Transactions.flush, told, None))
    away.left = inf if back else 0
    assert told.result(10) is back
    assert (seen == [0]) is back
