"""Bodies of child processes that share a server, each with a store of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.support import CENT, DOLLAR, ask, decided, granted, settlement, until


def spend(url: str, namespace: str, callers: int, cost: int, barrier: Any, results: Any) -> None:
    """Spend a dollar together with others, until refused; what was spent here, and why it ended."""
    store = RedisStore(url, namespace)
    spent, reasons = [0] * callers, [""] * callers

    def work(number: int) -> None:
        while True:
            reservation = decided(store.admit(ask(CENT)), 60)
            if reservation.state != GRANTED:
                reasons[number] = reservation.refusal.reason if reservation.refusal else ""
                return
            time.sleep(0.001)
            spent[number] += cost
            store.settle(reservation, settlement(reservation, cost))

    barrier.wait(60)
    together(work, callers)
    store.flush(10)
    results.put((sum(spent), sorted(set(reasons))))
    store.close()


def send(url: str, namespace: str, limit: dict[str, Any], callers: int, seconds: float, barrier: Any, out: Any) -> None:
    """Send as much as a shared limit lets through for a while: when what was sent, and when it ended."""
    store = RedisStore(url, namespace)
    sent: list[tuple[float, float]] = []

    def work(_: int) -> None:
        until_then = store.now() + seconds
        while store.now() < until_then:
            wanted = ask(budget=None, limit=RateLimit(**limit), horizon=until_then)
            if decided(store.admit(wanted), 60).state != GRANTED:
                return
            at = store.now()
            time.sleep(0.005)
            sent.append((at, store.now()))
            store.settle(wanted, settlement(wanted, 0))

    barrier.wait(60)
    together(work, callers)
    out.put(sent)
    store.close()


def wait_for_money(url: str, namespace: str, ready: Any, results: Any) -> None:
    """Ask for money that another process holds, and tell when it came, by the server's time."""
    store = RedisStore(url, namespace, lease=3_000.0)  # its timer does not help: it has to look for changes
    reservation = store.admit(ask(DOLLAR))
    until(lambda: store.waiting() == 1)
    ready.put("waiting")
    decided(reservation, 30)
    results.put((reservation.state, store.now()))
    store.settle(reservation, settlement(reservation, DOLLAR))
    store.close()


def hold_and_hang(url: str, namespace: str, lease: float, calls: int, ready: Any) -> None:
    """Make some calls, hold one cent, and never settle it."""
    store = RedisStore(url, namespace, lease=lease)
    for _ in range(calls):
        each = granted(store, ask(CENT, user="dead"))
        store.settle(each, settlement(each, CENT // 2))
    last = granted(store, ask(CENT, user="dead"))
    store.flush(10)
    ready.put(last.id)
    time.sleep(600)


def storm(url: str, namespace: str, callers: int, ready: Any) -> None:
    """Spend until killed; what is known to be written is told."""
    store = RedisStore(url, namespace, lease=1.0)
    told: list[int] = []

    def work(_: int) -> None:
        while True:
            reservation = decided(store.admit(ask(CENT // 10, budget=100 * DOLLAR)), 60)
            if reservation.state != GRANTED:
                return
            time.sleep(0.002)
            store.settle(reservation, settlement(reservation, CENT // 20))
            told.append(1)
            if len(told) % 50 == 0 and store.flush(5):
                ready.put(len(told) // 2)

    together(work, callers)


def together(work: Any, count: int) -> None:
    """Run `work(0)`, `work(1)`, ... in threads of their own."""
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
