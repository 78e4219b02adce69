"""What the users of an LM may read, over a SQLite store of any size, while many of its calls are in flight."""

from __future__ import annotations

import asyncio
import datetime as dt
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dspy_prod
from dspy_prod.context.current import CallContext
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/gpt-4o-mini"
BUDGET = dspy_prod.Budget(usd=50, per="month", scope="tenant", name="tenants")
IN_FLIGHT = 1_024


def fill_tenants(path: str, namespace: str, count: int) -> None:
    """An account of this month for each tenant."""
    rule, now = BudgetRule(BUDGET), time.time()
    ends_at = rule.window(now)[1]
    keys = [rule.account(CallContext(tenant=f"t{number}"), MODEL, now).key for number in range(count)]
    with sqlite3.connect(path) as connection:
        (ns,) = connection.execute("SELECT id FROM namespaces WHERE name = ?", (namespace,)).fetchone()
        rows = ((ns, key, number * 1_000, 0, 0, ends_at) for number, key in enumerate(keys))
        connection.executemany("INSERT INTO accounts VALUES (?, ?, ?, ?, ?, ?)", rows)


class Hanging(ScriptedEngine):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.asynchronous.complete = self._hang  # type: ignore[method-assign]
        self.asked = 0

    async def _hang(self, request: object) -> object:
        self.asked += 1
        await self.go.wait()
        return self.complete(request)  # type: ignore[arg-type]


@contextmanager
def in_flight(lm: dspy_prod.LM, engine: Hanging, count: int) -> Iterator[None]:
    """So many calls of as many tenants that have been sent and are not answered."""
    loop = asyncio.new_event_loop()

    async def call(number: int) -> None:
        with dspy_prod.call_context(tenant=f"t{number}", user=f"u{number % 1000}"):
            await lm.acall(f"question {number}", cache=False)

    async def calls() -> None:
        await asyncio.gather(*map(call, range(count)))

    def work() -> None:
        loop.run_until_complete(calls())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    until = time.monotonic() + 120
    while engine.asked < count and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.asked == count, f"{engine.asked} of {count} calls are in flight"
    try:
        yield
    finally:
        loop.call_soon_threadsafe(engine.go.set)
        thread.join()


def lm_of(path: str, namespace: str, engine: Hanging) -> dspy_prod.LM:
    """An LM with a limit and a budget for each tenant, over a file."""
    return dspy_prod.LM(
        MODEL, engine=engine, async_engine=engine.asynchronous, max_tokens=100, budget=BUDGET,
        limit=dspy_prod.RateLimit(rpm=1_000_000, tpm=1_000_000_000, concurrency=10_000), store=f"sqlite:///{path}",
        namespace=namespace,
    )  # fmt: skip


def reads_of(lm: dspy_prod.LM) -> dict[str, Callable[[], object]]:
    """By what is asked."""
    today = dt.datetime.now(dt.timezone.utc).date()
    week, long = today - dt.timedelta(days=6), today - dt.timedelta(days=79)
    ledger = lm.ledger
    return {
        "costs()": lm.costs,
        "costs(by day)": lambda: lm.costs(by="day"),
        "costs(by tenant)": lambda: lm.costs(by="tenant"),
        "costs(by user)": lambda: lm.costs(by="user"),
        "costs(by user, today)": lambda: lm.costs(by="user", since=today),
        "costs(by user, a week)": lambda: lm.costs(by="user", since=week),
        "costs(by user, 80 days)": lambda: lm.costs(by="user", since=long),
        "costs(by user, a week, limit=10)": lambda: lm.costs(by="user", since=week, limit=10),
        "health()": lm.health,
        "preview()": lambda: lm.preview("hello"),
        "ledger.records(limit=50)": lambda: ledger.records(limit=50),
        "ledger.records(user, limit=50)": lambda: ledger.records(user="u7", limit=50),
        "ledger.total(user)": lambda: ledger.total(by="user", value="u7"),
        "ledger.unconfirmed()": ledger.unconfirmed,
        "ledger.programs()": ledger.programs,
    }
