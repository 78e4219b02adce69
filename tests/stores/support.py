"""What the store tests share: asks, settlements, waiting with a deadline, and bodies of child processes."""

from __future__ import annotations

import faulthandler
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from math import floor, inf
from typing import Any

from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, Account, CachedAnswer, Refusal, Reservation, Settlement, Store
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


class Put:
    """An answer on its way to a store: `written` is called when others can read it, or never will."""

    max_entries, max_bytes = 9, 999

    def __init__(self, answer: CachedAnswer | None, written: Callable[[], object]) -> None:
        self.answer, self.written = answer, written


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
) -> Reservation:
    """A reservation on `accounts`, each limited to `budget` nano-USD (None: no accounts)."""
    id = id or new_id()
    drawn = () if budget is None else tuple(Account(name, budget, f"budget {name}") for name in accounts)
    return Reservation(
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


def fitting(limit: RateLimit, tokens: int) -> int:
    """As many tokens as a minute of the limit can hold."""
    return tokens if limit.tpm is None else min(tokens, floor(limit.tpm))


def settlement(
    asked: Reservation, cost: int | None, *, tokens: int | None = 10, sent: bool = True, estimated: bool = False
) -> Settlement:
    """What really happened, with its record."""
    assert isinstance(asked.stub, CallRecord)
    told = asked.stub._replace(cost_nano=cost, estimated=estimated, input_tokens=tokens)
    return Settlement(asked.id, cost, tokens, sent, estimated, told)


def until(condition: Callable[[], bool], timeout: float = 30.0, what: str = "the condition") -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout} s"
        time.sleep(0.002)


def decided(reservation: Reservation, timeout: float = 30.0) -> Reservation:
    """Wait until a reservation is decided, as a caller does."""
    done = threading.Event()
    if reservation.attach(done.set):
        assert done.wait(timeout), f"undecided after {timeout} s, blocked on {reservation.blocked_on!r}"
    return reservation


def granted(store: Store, wanted: Reservation) -> Reservation:
    reservation = decided(store.admit(wanted))
    assert reservation.state == GRANTED, reservation.refusal
    return reservation


def refused(store: Store, wanted: Reservation) -> Refusal:
    reservation = decided(store.admit(wanted))
    assert reservation.refusal is not None, reservation.state
    return reservation.refusal


def turn(store: Store) -> None:
    """Let the store notice that a fake clock moved."""
    if isinstance(store, MemoryStore):
        store.tick()
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
        reservation = decided(store.admit(ask(CENT)), 30)
        if reservation.state != GRANTED:
            break
        spent += CENT
        store.settle(reservation, settlement(reservation, CENT))
    results.put((spent, reservation.refusal.reason if reservation.refusal else "granted"))
    store.close()


def spend_less(path: str, barrier: Any, results: Any) -> None:
    """As `spend_all`, but each call costs a third of its bound, and four are in flight."""
    store = SqliteStore(path)
    barrier.wait(30)
    total = [0] * 4

    def work(index: int) -> None:
        while True:
            reservation = decided(store.admit(ask(CENT)), 30)
            if reservation.state != GRANTED:
                return
            total[index] += CENT // 3
            store.settle(reservation, settlement(reservation, CENT // 3))

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
        reservation = decided(store.admit(ask(budget=None, limit=limit, horizon=now + 2.0)), 30)
        if reservation.state != GRANTED:
            break
        sent.append(now)
        store.settle(reservation, settlement(reservation, 0))
    store.close()
    results.put(sent)


def hold_and_hang(path: str, lease: float, amount: int, ready: Any) -> None:
    """Reserve, tell the id, and never settle."""
    store = SqliteStore(path, lease=lease)
    reservation = granted(store, ask(amount, user="dead"))
    ready.put(reservation.id)
    time.sleep(600)


def storm(path: str, ready: Any) -> None:
    """Reserve and settle without end; tell what is known to be durable."""
    store = SqliteStore(path, lease=0.5)
    for number in itertools.count():
        reservations = [granted(store, ask(10, budget=10**15)) for _ in range(5)]
        for reservation in reservations[:4]:
            store.settle(reservation, settlement(reservation, 7))
        if number % 5 == 4:
            store.flush(10)
            ready.put([reservation.id for reservation in reservations[:4]])


def settle_and_return(path: str) -> None:
    """End without closing: what is posted must be written all the same."""
    faulthandler.dump_traceback_later(50, file=sys.__stderr__)  # of a process that hangs
    store = SqliteStore(path)
    for _ in range(20):
        reservation = granted(store, ask())
        store.settle(reservation, settlement(reservation, CENT))


def wait_for_money(path: str, ready: Any, results: Any) -> None:
    """Ask for money that another process holds, and tell when it came."""
    store = SqliteStore(path, lease=3_000.0)  # its timer does not help: it has to look for changes
    reservation = store.admit(ask(DOLLAR))
    until(lambda: store.waiting() == 1)
    ready.put("waiting")
    decided(reservation, 20)
    results.put(reservation.state)
    store.settle(reservation, settlement(reservation, DOLLAR))
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
            reservation = store.admit(wanted)
            if chance.random() < 0.1 and store.withdraw(reservation):
                continue
            if decided(reservation, 60).state != GRANTED:
                time.sleep(0.01)
                continue
            time.sleep(chance.random() * 0.01)
            cost = chance.randrange(min(wanted.amount, CENT) + 1)
            store.settle(reservation, settlement(reservation, cost, estimated=chance.random() < 0.2))
            if chance.random() < 0.05:
                store.correct(wanted.id, cost // 2)
            for _ in range(chance.randrange(3)):
                store.append(record(cached=True, outcome="cached", user="cached"))
            store.cache_put(wanted.id.encode(), CachedAnswer(b"x" * 50, inf, inf), max_entries=50, max_bytes=2_000)

    for _ in range(6):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(600)
