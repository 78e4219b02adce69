"""Calls per second of several processes that share one SQLite file, every policy on, and the engine constant."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common import call, guarded, messages


def _work(url: str, threads: int, calls: int, ready: Any, go: Any, done: Any) -> None:
    lm = guarded(store=url, namespace="benchmark")

    def make(number: int) -> None:
        for _ in range(number):
            call(lm, messages())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(make, [50] * threads))
        lm.pipeline.store.flush(60)
        ready.release()
        go.wait()
        began = time.time()
        list(pool.map(make, [calls // threads] * threads))
        assert lm.pipeline.store.flush(60)
        done.put((began, time.time()))
    lm.close()


def calls_per_second(processes: int, threads: int, calls: int) -> float:
    """All of them together, `calls` in each, everything written at the end."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/state.db"
        ready, go, done = context.Semaphore(0), context.Event(), context.Queue()
        workers = [context.Process(target=_work, args=(url, threads, calls, ready, go, done)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        for _ in workers:
            ready.acquire()
        go.set()
        times = [done.get(timeout=300) for _ in workers]
        for worker in workers:
            worker.join()
    return processes * (calls // threads) * threads / (max(end for _, end in times) - min(began for began, _ in times))


def measure(rounds: int = 3, calls: int = 6_400) -> dict[str, float]:
    """Calls per second (median), by processes × callers in each; one round of each after the other."""
    shapes = ((1, 1), (4, 1), (1, 16), (4, 16))
    found: dict[str, list[float]] = {f"{processes} x {threads}": [] for processes, threads in shapes}
    for _ in range(rounds):
        for processes, threads in shapes:
            found[f"{processes} x {threads}"].append(calls_per_second(processes, threads, calls))
    return {name: sorted(rates)[len(rates) // 2] for name, rates in found.items()}
