"""The store fails while calls are made: who goes on, who is refused, and what the books say afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import dspy
import pytest
import redis

from dspy_prod import Budget, BudgetExceededError, RateLimit, StoreUnavailableError, call_context
from dspy_prod.stores.sqlite import schema
from dspy_prod.telemetry.events import BUS, Event
from tests.e2e.children import A_CENT
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CENT, account, assert_equals_bill, assert_nothing_held, outcome, until
from tests.stores.redis.servers import free_port, started_valkey

Fail = Callable[[Any], Any]


class Locked:
    """A SQLite file that another program has locked, until `end`."""

    def __init__(self, lm: Any) -> None:
        self.store = lm.pipeline.store
        self.store.flush(10)
        self._other = sqlite3.connect(self.store._path, isolation_level=None, check_same_thread=False)
        self._other.execute("BEGIN IMMEDIATE")
        (record, *_) = self.store.records(limit=1)
        self.store.append(record._replace(id="to write", cost_nano=0, outcome="cached", cached=True))
        until(lambda: self.store.problems.get("failing"))

    def end(self) -> None:
        with suppress(sqlite3.Error):
            self._other.execute("ROLLBACK")
        self._other.close()


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fail]:
    """Lock an LM's file."""
    monkeypatch.setattr(schema, "BUSY_LIMIT", 0.1)
    made: list[Locked] = []

    def begin(lm: Any) -> Locked:
        made.append(Locked(lm))
        return made[-1]

    yield begin
    for each in made:
        each.end()


@pytest.fixture
def events() -> Iterator[list[str]]:
    """The names of what happens."""
    names: list[str] = []

    def listen(event: Event) -> None:
        names.append(event.name)

    remove = BUS.add(listen)
    yield names
    remove()


def three_ways(lm: Any, say: str) -> list[Any]:
    """One call on this thread, one in a task, one as a stream."""

    async def in_task() -> Any:
        try:
            return await lm.acall(f"{say} async")
        finally:
            await lm.pipeline.aclose()

    def streamed() -> Any:
        with dspy.context(lm=lm):
            program = dspy.streamify(dspy.Predict("question -> answer"), async_streaming=False)
            return list(program(question=f"{say} stream"))

    return [outcome(lambda: lm(f"{say} sync")), outcome(lambda: asyncio.run(in_task())), outcome(streamed)]


def test_a_budget_refuses_while_the_store_cannot_decide(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, lock: Fail, events: list[str]
) -> None:
    """By default nothing is spent that cannot be written; calls are refused at once, and pass again by themselves."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, budget=Budget(usd=1.0), store=sqlite_url)
    lm("before")
    locked = lock(lm)
    began = time.monotonic()
    for each in (outcome(lambda: lm("sync")), outcome(lambda: asyncio.run(lm.acall("async")))):
        assert isinstance(each, StoreUnavailableError), each
        assert "on_store_failure" in str(each)
    assert time.monotonic() - began < 2.0
    assert len(provider.calls) == 1
    locked.end()
    until(lambda: not lm.pipeline.store.problems)
    lm("after")
    assert account(lm).spent == provider.bill.nano == 2 * CENT
    assert [name for name in events if name.startswith("store_")] == ["store_degraded", "store_recovered"]


def test_a_limited_call_goes_on_within_its_process_s_part(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, lock: Fail
) -> None:
    """A limit goes on with a part of itself, in every way of calling; all of it is in the ledger afterwards."""
    provider = serve()
    limit = RateLimit(rpm=600, concurrency=4, workers=2)
    lm = connect(provider, limit=limit, store=sqlite_url)
    lm("before")
    locked = lock(lm)
    for each in three_ways(lm, "during"):
        assert not isinstance(each, BaseException), each
    assert len(provider.calls) == 4
    key = lm.pipeline.primary.limit_key
    part = lm.pipeline.store._alone.lane.limiter(key)
    assert (part.requests_max, part.concurrency_max, part.in_flight) == (300, 2, 0)
    locked.end()
    until(lambda: not lm.pipeline.store.problems)
    lm("after")
    whole = lm.pipeline.store.limiter(key)
    assert whole.requests_max == 600
    assert whole.requests_available <= 600 - 4
    assert_nothing_held(lm.pipeline.store)
    assert_equals_bill(lm, provider)


def test_a_limit_may_refuse_too(serve: MakeProvider, connect: MakeLM, sqlite_url: str, lock: Fail) -> None:
    provider = serve()
    lm = connect(provider, limit=RateLimit(rpm=600, on_store_failure="refuse"), store=sqlite_url)
    lm("before")
    lock(lm)
    assert isinstance(outcome(lambda: lm("during")), StoreUnavailableError)
    assert len(provider.calls) == 1


def test_a_budget_may_go_on_within_a_tenth_of_what_was_left(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, lock: Fail
) -> None:
    """Of 95 cents that were left, 9 may be spent; they are in the books once the store is back."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    budget = Budget(usd=1.0, on_store_failure="local")
    lm = connect(provider, prices=A_CENT, budget=budget, store=sqlite_url)
    for number in range(5):
        lm(f"before {number}")
    locked = lock(lm)
    outcomes = [outcome(lambda: lm(f"during {number}")) for number in range(12)]  # noqa: B023
    assert [isinstance(each, BudgetExceededError) for each in outcomes] == [False] * 9 + [True] * 3
    assert len(provider.calls) == 14
    locked.end()
    until(lambda: not lm.pipeline.store.problems)
    assert account(lm) == (14 * CENT, 0, 0)
    assert_equals_bill(lm, provider)
    assert_nothing_held(lm.pipeline.store)


def test_a_store_that_answers_nothing_keeps_nobody_past_his_deadline(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is known that the store has failed, a call waits for two seconds, or until its deadline."""
    provider = serve()
    lm = connect(provider, prices=A_CENT, budget=Budget(usd=1.0), limit=RateLimit(rpm=600), store=sqlite_url)
    limited = connect(provider, limit=RateLimit(rpm=600), store=sqlite_url)
    lm.pipeline.store.flush(10)
    monkeypatch.setattr(schema, "BUSY_LIMIT", 30.0)
    with closing(sqlite3.connect(lm.pipeline.store._path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with call_context(deadline=0.3):
            assert outcome(lambda: lm("late")).reason == "deadline_exceeded"
        assert time.monotonic() - began < 1.5
        assert isinstance(outcome(lambda: lm("refused")), StoreUnavailableError)
        assert not isinstance(outcome(lambda: limited("goes on")), BaseException)
        assert time.monotonic() - began < 8.0
        other.execute("ROLLBACK")
    until(lambda: limited.pipeline.store.flush(1))
    assert len(provider.calls) == 1
    assert_nothing_held(lm.pipeline.store)


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["paused", "killed"])
def test_a_server_that_is_away_for_ten_seconds(
    serve: MakeProvider, connect: MakeLM, tmp_path: Path, way: str, events: list[str]
) -> None:
    """Limited calls go on, budgeted ones are refused or go on within their part; nothing hangs; the books are right."""
    options = {"port": free_port(), "data_dir": tmp_path, "config": {"appendonly": "yes", "appendfsync": "always"}}
    server = started_valkey(**options)
    url = f"redis://127.0.0.1:{server.port}/0"
    with closing(redis.Redis(port=server.port)) as client:
        pid = int(client.info("server")["process_id"])
    provider = serve(prices=A_CENT, usage=(20, 100))
    limited = connect(provider, prices=A_CENT, limit=RateLimit(rpm=6_000, workers=2), cache=True, store=url)
    capped = connect(provider, prices=A_CENT, budget=Budget(usd=5.0, name="hard"), store=url)
    local = connect(provider, prices=A_CENT, budget=Budget(usd=5.0, on_store_failure="local"), store=url)
    store = limited.pipeline.store
    for lm in (limited, capped, local):
        lm(f"before {lm.pipeline.budgets}")
    assert store.flush(10)
    os.kill(pid, signal.SIGSTOP if way == "paused" else signal.SIGKILL)
    began, longest, number = time.monotonic(), 0.0, 0
    kinds: dict[str, set[str]] = {"limited": set(), "capped": set(), "local": set()}
    while time.monotonic() - began < 10:
        for name, lm in (("limited", limited), ("capped", capped), ("local", local)):
            number += 1
            start = time.monotonic()
            kinds[name].add(type(outcome(lambda: lm(f"during {number}"))).__name__)  # noqa: B023
            longest = max(longest, time.monotonic() - start)
        start = time.monotonic()
        with call_context(deadline=1.0):
            outcome(lambda: limited(f"in time {number}"))  # noqa: B023
        assert time.monotonic() - start < 2.0
        for ask in (limited.health, limited.costs, lambda: store.flush(1.0)):
            start = time.monotonic()
            outcome(ask)
            assert time.monotonic() - start < 8.0
        time.sleep(0.3)
    assert longest < 5.0
    assert kinds["limited"] == {"list"}
    assert kinds["capped"] == {"StoreUnavailableError"}
    assert "list" in kinds["local"]
    if way == "paused":
        os.kill(pid, signal.SIGCONT)
    else:
        server.stop()
        server = started_valkey(**options)
    until(lambda: store.flush(1) and not store.problems)
    assert not isinstance(outcome(lambda: capped("after")), BaseException)
    assert account(capped).spent == 2 * CENT
    assert_nothing_held(store)
    assert_equals_bill(limited, provider)
    assert [name for name in events if name.startswith("store_")] == ["store_degraded", "store_recovered"]
    server.stop()
