"""How fast the SQLite store reserves and settles money, and that reading it does not slow down with its age.

    python -m benchmarks.ledger [--pairs N] [--rows N] [--json FILE]

A pair is one admission (limiter and a daily budget together, durable before it is told) and its settlement with a
ledger record. All figures are of the file on disk, WAL, synchronous=NORMAL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.bars import exit_code, missed_by_the_ledger
from benchmarks.ledger_hits import hit_ratios
from benchmarks.ledger_reads import hit, read_times
from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, Account, Reservation, Settlement
from dspy_prod.stores.sqlite.store import SqliteStore

LIMIT = RateLimit(rpm=60_000_000, tpm=6e12)
BUDGET = 10**15
IN_FLIGHT = 256

_numbers = itertools.count()


def reserve(at: float) -> Reservation:
    """An admission as the pipeline makes it: a limiter, one account, a stub for the case of death."""
    number = next(_numbers)
    id = f"{time.time_ns():016x}{os.getpid() & 0xFFFF:04x}{number & 0xFFFFFFFF:08x}"
    stub = CallRecord(
        id, id, at, "openai/gpt-4o-mini", "primary", 1, "ok", 2_000, user=f"u{number % 100}", tenant=f"t{number % 10}",
        accounts=("day|-|2026-11-23",),
    )  # fmt: skip
    return Reservation(
        id, limit_key="openai|key|gpt-4o-mini", limit=LIMIT, tokens=800,
        accounts=(Account("day|-|2026-11-23", BUDGET, "day", 86_400.0),), amount=2_000, priority=1, fair="",
        horizon=at + 60.0, lease=600.0, stub=stub,
    )  # fmt: skip


def settle(store: SqliteStore, reservation: Reservation) -> None:
    """A known cost, as after an answer with its usage."""
    assert reservation.state == GRANTED, reservation.refusal
    stub = reservation.stub
    assert isinstance(stub, CallRecord)
    record = stub._replace(cost_nano=1_234, input_tokens=500, output_tokens=120, latency=0.8)
    store.settle(reservation, Settlement(reservation.id, 1_234, 620, True, False, record))


def one_by_one(store: SqliteStore, pairs: int) -> None:
    """A caller that waits for each admission, as a thread of a web server does."""
    for _ in range(pairs):
        granted = threading.Event()
        reservation = store.admit(reserve(store.now()))
        if reservation.attach(granted.set):
            granted.wait()
        settle(store, reservation)


def pipelined(store: SqliteStore, pairs: int) -> None:
    """Many calls in flight at once, as on an event loop."""
    waiting: deque[Reservation] = deque()
    for _ in range(pairs):
        waiting.append(store.admit(reserve(store.now())))
        if len(waiting) >= IN_FLIGHT:
            _settle_oldest(store, waiting)
    while waiting:
        _settle_oldest(store, waiting)


def _settle_oldest(store: SqliteStore, waiting: deque[Reservation]) -> None:
    granted = threading.Event()
    reservation = waiting.popleft()
    if reservation.attach(granted.set):
        granted.wait()
    settle(store, reservation)


def threads(store: SqliteStore, pairs: int, count: int = 16) -> None:
    """Several threads, each waiting for its own admissions."""
    workers = [threading.Thread(target=one_by_one, args=(store, pairs // count)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def rate(run: Callable[[SqliteStore, int], None], pairs: int) -> float:
    """Pairs per second of one process on a fresh file, everything written at the end.

    The process is new: in one that holds much else, Python's collector takes longer for it than the pairs do.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_rate, run, pairs).result()


def _rate(run: Callable[[SqliteStore, int], None], pairs: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        store = SqliteStore(os.path.join(directory, "state.db"))
        one_by_one(store, 50)
        started = time.perf_counter()
        run(store, pairs)
        assert store.flush(60)
        seconds = time.perf_counter() - started
        store.close()
    return pairs / seconds


def _process(path: str, pairs: int, ready: Any, go: Any, done: Any) -> None:
    store = SqliteStore(path)
    one_by_one(store, 20)
    store.flush()
    ready.release()
    go.wait()
    started = time.time()
    pipelined(store, pairs)
    assert store.flush(60)
    done.put((started, time.time()))
    store.close()


def processes_rate(count: int, pairs: int) -> tuple[float, float]:
    """(pairs per second of all processes together, slowest process's time by the fastest's)."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "state.db")
        ready, go, done = context.Semaphore(0), context.Event(), context.Queue()
        workers = [context.Process(target=_process, args=(path, pairs // count, ready, go, done)) for _ in range(count)]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        go.set()
        times = [done.get(timeout=300) for _ in workers]
        for worker in workers:
            worker.join()
        store = SqliteStore(path)
        expected = (pairs // count + 20) * count
        assert store.account("day|-|2026-11-23").spent == expected * 1_234
        store.close()
    first, last = min(start for start, _ in times), max(end for _, end in times)
    durations = [end - start for start, end in times]
    return pairs // count * count / (last - first), max(durations) / min(durations)


def appends(records: list[CallRecord], spinning: bool = False) -> tuple[float, float]:
    """(CPU microseconds a record, records a second) of appending until written, or of that beside a busy thread."""
    with tempfile.TemporaryDirectory() as directory:
        store = SqliteStore(os.path.join(directory, "state.db"))
        store.append(records[0])
        store.flush(60)
        stop = threading.Event()

        def spin() -> None:
            while not stop.is_set():
                sum(range(100))

        if spinning:
            threading.Thread(target=spin, daemon=True).start()
        cpu, wall = time.process_time(), time.perf_counter()
        for record in records[1:]:
            store.append(record)
        store.flush(60)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        stop.set()
        store.close()
    return cpu / len(records) * 1e6, len(records) / wall


def append_times(count: int = 20_000) -> dict[str, float]:
    """What a record costs, of an attempt and of a cached answer."""
    now = time.time()
    hits = [hit(number, now) for number in range(count)]
    attempts = [each._replace(outcome="ok", cached=False, cost_nano=1_234) for each in hits]
    result: dict[str, float] = {}
    for name, records in (("attempt", attempts), ("cached answer", hits)):
        result[f"CPU a record, {name}, us"] = round(appends(records)[0], 1)
        result[f"records/s beside a thread that never waits, {name}"] = round(appends(records, spinning=True)[1])
    return result


def measure(pairs: int = 20_000) -> dict[str, float]:
    """Pairs per second by how the callers work."""
    return {
        "one process, 256 in flight": round(rate(pipelined, pairs)),
        "one process, 16 threads": round(rate(threads, pairs)),
        "one process, one thread, one by one": round(rate(one_by_one, pairs)),
        "four processes, 256 in flight each": round(processes_rate(4, pairs)[0]),
    }


def run(pairs: int = 20_000, rows: int = 1_000_000) -> dict[str, Any]:
    """All figures."""
    return {
        "pairs": pairs,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "pairs_per_second": measure(pairs),
        "four_processes_slowest_by_fastest": round(processes_rate(4, pairs)[1], 2),
        "appends": append_times(pairs),
        "hits": hit_ratios(),
        "reads": {f"{count:,} rows": read_times(count, one_by_one) for count in sorted({1_000, rows})},
    }


def main() -> int:
    """Print a table, and JSON where asked; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = run(arguments.pairs, arguments.rows)
    print(f"SQLite store: durable reserve+settle pairs per second ({figures['pairs']} pairs, {figures['cpus']} CPUs)")
    print(f"  {'load of the machine when this began':<42}{figures['load']:>10.1f}")
    for name, value in figures["pairs_per_second"].items():
        print(f"  {name:<42}{value:>10,}")
    print(f"  {'four processes: slowest by fastest':<42}{figures['four_processes_slowest_by_fastest']:>10}")
    for title, part in (("A record of the ledger", "appends"), ("A cached answer on SQLite (CPU)", "hits")):
        print("\n" + title)
        for name, value in figures[part].items():
            print(f"  {name:<60}{value:>12,}")
    sizes = list(figures["reads"])
    print("\n" + f"{'Reading (median, microseconds)':<62}" + "".join(f"{size:>18}" for size in sizes))
    for name in figures["reads"][sizes[0]]:
        print(f"  {name:<60}" + "".join(f"{figures['reads'][size][name]:>18,}" for size in sizes))
    print("\n" + json.dumps(figures))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    return exit_code(missed_by_the_ledger(figures["pairs_per_second"], figures["reads"]))


if __name__ == "__main__":
    sys.exit(main())
