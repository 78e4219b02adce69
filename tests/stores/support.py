"""What the store tests share: asks, settlements, waiting with a deadline, and bodies of child processes."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Any

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, Account, Ask, CachedAnswer, Refusal, Settlement, Store, Ticket
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore

CENT = 10_000_000
DOLLAR = 100 * CENT
DAY = 1_763_900_000.0
"""A moment on 2025-11-23, UTC."""

_ids = itertools.count()


class FakeClock:
    """Both clocks of `dspy_prod.runtime.clock.Clock`; they move together, and only by `advance`."""

    def __init__(self) -> None:
        self._passed = 0.0

    def monotonic(self) -> float:
        return 1_000.0 + self._passed

    def time(self) -> float:
        return DAY + self._passed

    def advance(self, seconds: float) -> None:
        self._passed += seconds


def new_id() -> str:
    return f"{os.getpid()}-{next(_ids)}"


def record(id: str | None = None, **fields: Any) -> CallRecord:
    id = id or new_id()
    base: dict[str, Any] = {
        "call_id": id,
        "started_at": DAY,
        "model": "openai/m",
        "route": "primary",
        "attempt": 1,
        "outcome": "ok",
        "cost_nano": 0,
    }
    return CallRecord(id, **{**base, **fields})


def ask(
    amount: int = CENT,
    *,
    budget: int | None = DOLLAR,
    accounts: tuple[str, ...] = ("day",),
    limit: RateLimit | None = None,
    key: str = "provider",
    tokens: int = 10,
    priority: int = 1,
    fair: str = "",
    horizon: float = inf,
    lease: float = 600.0,
    id: str | None = None,
    **fields: Any,
) -> Ask:
    """An ask on `accounts`, each limited to `budget` nano-USD (None: no accounts)."""
    id = id or new_id()
    drawn = () if budget is None else tuple(Account(name, budget, f"budget {name}") for name in accounts)
    return Ask(
        id,
        limit_key=None if limit is None else key,
        limit=limit,
        tokens=tokens,
        accounts=drawn,
        amount=amount if drawn else 0,
        priority=priority,
        fair=fair,
        horizon=horizon,
        lease=lease,
        stub=record(id, cost_nano=amount, accounts=tuple(account.key for account in drawn), **fields),
    )


def settlement(
    asked: Ask | Ticket, cost: int | None, *, tokens: int | None = 10, sent: bool = True, estimated: bool = False
) -> Settlement:
    """What really happened, with its record."""
    asked = asked.ask if isinstance(asked, Ticket) else asked
    assert isinstance(asked.stub, CallRecord)
    told = asked.stub._replace(cost_nano=cost, estimated=estimated, input_tokens=tokens)
    return Settlement(asked.id, cost, tokens, sent, estimated, told)


def until(condition: Callable[[], bool], timeout: float = 30.0, what: str = "the condition") -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout} s"
        time.sleep(0.002)


def decided(ticket: Ticket, timeout: float = 30.0) -> Ticket:
    """Wait until a ticket is decided, as a caller does."""
    done = threading.Event()
    if ticket.attach(done.set):
        assert done.wait(timeout), f"undecided after {timeout} s, blocked on {ticket.blocked_on!r}"
    return ticket


def granted(store: Store, wanted: Ask) -> Ticket:
    ticket = decided(store.admit(wanted))
    assert ticket.state == GRANTED, ticket.refusal
    return ticket


def refused(store: Store, wanted: Ask) -> Refusal:
    ticket = decided(store.admit(wanted))
    assert ticket.refusal is not None, ticket.state
    return ticket.refusal


def turn(store: Store) -> None:
    """Let the store notice that a fake clock moved."""
    if isinstance(store, MemoryStore):
        store._tick()
    store.flush(10)


def check_books(store: Store, accounts: tuple[str, ...] = ("day",)) -> None:
    """Every account is the sum of its records; nothing is held when no reservation is open."""
    records = store.records()
    for key in accounts:
        mine = [row for row in records if key in row.accounts]
        state = store.account(key)
        assert state.spent == sum(row.cost_nano or 0 for row in mine)
        assert state.unconfirmed == sum(row.cost_nano or 0 for row in mine if row.estimated)
        if store.holds() == 0:
            assert state.held == 0
    total = sum(row.cost_nano or 0 for row in records)
    assert sum(sums.cost_nano for _, _, sums in store.totals()) == total


class Problems(list[tuple[str, dict[str, Any]]]):
    """Collects what a store reports."""

    def __call__(self, name: str, details: dict[str, Any]) -> None:
        self.append((name, details))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


# -- bodies of child processes ---------------------------------------------------------------------------------------
def spend_all(path: str, barrier: Any, results: Any) -> None:
    """Spend a dollar in cents together with others, until refused."""
    store = SqliteStore(path)
    barrier.wait(30)
    spent = 0
    while True:
        ticket = decided(store.admit(ask(CENT)), 30)
        if ticket.state != GRANTED:
            break
        spent += CENT
        store.settle(ticket, settlement(ticket, CENT))
    results.put((spent, ticket.refusal.reason if ticket.refusal else "granted"))
    store.close()


def spend_less(path: str, barrier: Any, results: Any) -> None:
    """As `spend_all`, but each call costs a third of its bound, and four are in flight."""
    store = SqliteStore(path)
    barrier.wait(30)
    total = [0] * 4

    def work(index: int) -> None:
        while True:
            ticket = decided(store.admit(ask(CENT)), 30)
            if ticket.state != GRANTED:
                return
            total[index] += CENT // 3
            store.settle(ticket, settlement(ticket, CENT // 3))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush(10)
    results.put(sum(total))
    store.close()


def send_all(path: str, rpm: int, barrier: Any, results: Any) -> None:
    """Send as many requests as the shared limit allows in one go."""
    store = SqliteStore(path)
    limit = RateLimit(rpm=rpm, burst=rpm)
    barrier.wait(30)
    sent = []
    for _ in range(rpm):
        now = store.now()
        ticket = decided(store.admit(ask(budget=None, limit=limit, horizon=now + 2.0)), 30)
        if ticket.state != GRANTED:
            break
        sent.append(now)
        store.settle(ticket, settlement(ticket, 0))
    store.close()
    results.put(sent)


def hold_and_hang(path: str, lease: float, amount: int, ready: Any) -> None:
    """Reserve, tell the id, and never settle."""
    store = SqliteStore(path, lease=lease)
    ticket = granted(store, ask(amount, user="dead"))
    ready.put(ticket.ask.id)
    time.sleep(600)


def storm(path: str, ready: Any) -> None:
    """Reserve and settle without end; tell what is known to be durable."""
    store = SqliteStore(path, lease=0.5)
    for number in itertools.count():
        tickets = [granted(store, ask(10, budget=10**15)) for _ in range(5)]
        for ticket in tickets[:4]:
            store.settle(ticket, settlement(ticket, 7))
        if number % 5 == 4:
            store.flush(10)
            ready.put([ticket.ask.id for ticket in tickets[:4]])


def settle_and_return(path: str) -> None:
    """End without closing: what is posted must be written all the same."""
    store = SqliteStore(path)
    for _ in range(20):
        ticket = granted(store, ask())
        store.settle(ticket, settlement(ticket, CENT))


def wait_for_money(path: str, ready: Any, results: Any) -> None:
    """Ask for money that another process holds, and tell when it came."""
    store = SqliteStore(path, lease=3_000.0)  # its timer does not help: it has to look for changes
    ticket = store.admit(ask(DOLLAR))
    until(lambda: store.waiting() == 1)
    ready.put("waiting")
    decided(ticket, 20)
    results.put(ticket.state)
    store.settle(ticket, settlement(ticket, DOLLAR))
    store.close()


def churn(path: str) -> None:
    """Calls of all kinds until killed: waiting, refused, late, corrected, cached."""
    store = SqliteStore(path, lease=0.5)
    chance = random.Random(os.getpid())

    def work() -> None:
        while True:
            limit = chance.choice([None, RateLimit(concurrency=8), RateLimit(rpm=1_000_000, burst=1000)])
            accounts = chance.choice([("day",), ("day", "other")])
            wanted = ask(chance.randrange(1, 30 * DOLLAR), budget=1000 * DOLLAR, accounts=accounts, limit=limit)
            wanted.limit_key = wanted.limit_key and f"{limit}"
            ticket = store.admit(wanted)
            if chance.random() < 0.1 and store.withdraw(ticket):
                continue
            if decided(ticket, 60).state != GRANTED:
                time.sleep(0.01)
                continue
            time.sleep(chance.random() * 0.01)
            cost = chance.randrange(min(wanted.amount, CENT) + 1)
            store.settle(ticket, settlement(ticket, cost, estimated=chance.random() < 0.2))
            if chance.random() < 0.05:
                store.correct(wanted.id, cost // 2)
            store.cache_put(wanted.id.encode(), CachedAnswer(b"x" * 50, inf, inf), max_entries=50, max_bytes=2_000)

    for _ in range(6):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(600)
