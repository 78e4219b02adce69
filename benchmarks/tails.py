"""How long the slowest reads and writes of a large SQLite store take, while it is written to.

    python -m benchmarks.tails [--rows N] [--tenants N] [--in-flight N] [--seconds S]

A million attempts and a million cached answers over ninety days, an account for each of 100,000 tenants, 1,024 calls in
flight under one limit. A thread reserves and settles money one by one, the main thread reads, and the sweeps that
usually come once an hour come without a pause.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

from rich.console import Console
from rich.table import Table

from benchmarks.ledger import reserve, settle
from benchmarks.ledger_reads import days_ago, fill, fill_hits
from dspy_prod.options import RateLimit
from dspy_prod.status.costs import costs_by
from dspy_prod.stores.base import GRANTED, Reservation
from dspy_prod.stores.sqlite.store import SqliteStore


def _tenants(store: SqliteStore, count: int) -> None:
    """An account of this month for each tenant, and as many of a month that can be swept."""
    store.close()
    with sqlite3.connect(store.url.removeprefix("sqlite:///")) as connection:
        (ns,) = connection.execute("SELECT id FROM namespaces WHERE name = ?", (store.namespace,)).fetchone()
        for month, ends_at in (("now", time.time() + 86_400.0), ("old", time.time() - 100 * 86_400.0)):
            connection.executemany(
                "INSERT INTO accounts VALUES (?, ?, 1000, 0, 0, ?)",
                ((ns, f"month/tenant|t{number}|{month}", ends_at) for number in range(count)),
            )


def _hold(store: SqliteStore, count: int) -> list[Reservation]:
    """Calls in flight under one limit."""
    limit = RateLimit(rpm=60_000_000, tpm=6e12, concurrency=2 * count)
    held = []
    for _ in range(count):
        reservation = reserve(store.now())
        reservation.limit_key, reservation.limit = "openai|key|held", limit
        held.append(store.admit(reservation))
    store.flush(60)
    assert all(reservation.state == GRANTED for reservation in held)
    return held


@contextmanager
def _writing(store: SqliteStore, found: dict[str, list[float]]) -> Iterator[None]:
    """Somebody reserves and settles, one by one; the sweeps are always due."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            granted = threading.Event()
            reservation = store.admit(reserve(store.now()))
            if reservation.attach(granted.set):
                granted.wait()
            found["reserve (write)"].append(time.perf_counter() - began)
            settle(store, reservation)
            store._writer._transactions._sweep_at = 0.0
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def measure(rows: int, tenants: int, in_flight: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each read and write, by what it was."""
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "state.db")
        fill(SqliteStore(path), rows)
        fill_hits(SqliteStore(path), rows)
        _tenants(SqliteStore(path), tenants)
        store = SqliteStore(path)
        held = _hold(store, in_flight)
        month = "month/tenant|"
        reads: dict[str, Callable[[], object]] = {
            "costs today": lambda: store.totals(since_day=str(days_ago(0))),
            "costs by user today": lambda: costs_by(store, "user", days_ago(0)),
            "costs by user, a week": lambda: costs_by(store, "user", days_ago(6)),
            "costs by user, 80 days": lambda: costs_by(store, "user", days_ago(79)),
            "the dearest ten, a week": lambda: costs_by(store, "user", days_ago(6), 10),
            "an account": lambda: store.account("month/tenant|t5|now"),
            "the dearest ten tenants": lambda: store.accounts(month, "|now", 10),
            "reservations": store.holds,
            "newest 50 records": lambda: store.records(limit=50),
            "50 of a user": lambda: store.records(limit=50, user="u7"),
            "of a trace": lambda: store.records(limit=50, trace_id=f"tr-{rows // 2}"),
            "of a session": lambda: store.records(limit=50, session=f"s{rows // 20}"),
            "of nobody": lambda: store.records(limit=50, user="nobody"),
        }
        for read in reads.values():
            read()
        until = time.monotonic() + seconds
        with _writing(store, found):
            for name, read in cycle(reads.items()):
                began = time.perf_counter()
                read()
                found[name].append(time.perf_counter() - began)
                if time.monotonic() > until:
                    break
        for reservation in held:
            settle(store, reservation)
        store.close()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=100_000)
    parser.add_argument("--in-flight", type=int, default=1_024)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.tenants, arguments.in_flight, arguments.seconds)
    table = Table(
        "what, ms", "times", "median", "p99", "slowest", title=f"{arguments.rows:,} rows, while it is written to"
    )
    for name, times in found.items():
        times.sort()
        shown = [times[len(times) // 2], times[int(len(times) * 0.99)], times[-1]]
        table.add_row(name, f"{len(times):,}", *[f"{each * 1e3:.2f}" for each in shown])
    Console().print(table)


if __name__ == "__main__":
    main()
