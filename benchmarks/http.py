"""How long calls over HTTP take with many at once, beside bare DSPy: a real server in a process of its own.

Each subject has a process of its own too. Python's collector stops all threads for a moment once in some thousand
calls; where subjects share a process, it falls to one of them, in every round to the same, for what all have left.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import dspy

from benchmarks.calls import written
from benchmarks.common import bare, call, guarded, messages
from dspy_prod.testing import Provider

LATENCY = 0.1
"""Seconds the provider takes to answer."""
SUBJECTS = ("bare", "memory", "sqlite")


def _serve(latency: float, told: Any, ended: Any) -> None:
    with Provider(latency=latency) as provider:
        told.put(provider.url)
        ended.wait()


@contextmanager
def provider(latency: float = LATENCY) -> Iterator[str]:
    """The URL of a provider in a process of its own that takes so many seconds to answer."""
    context = multiprocessing.get_context("spawn")
    told, ended = context.Queue(), context.Event()
    process = context.Process(target=_serve, args=(latency, told, ended))
    process.start()
    try:
        yield told.get(timeout=60)
    finally:
        ended.set()
        process.join()


def _subject(name: str, url: str, folder: str, callers: int, each: int, turns: Any) -> None:
    """Body of a subject's process: in each turn, the seconds of all its calls."""
    where = {"engine": "lm15", "async_engine": None, "api_base": url, "api_key": "none"}
    stores = {"memory": "memory://", "sqlite": f"sqlite:///{folder}/state.db"}
    lm: dspy.LM = bare(**where) if name == "bare" else guarded(store=stores[name], **where)

    def make(number: int) -> list[float]:
        spent = []
        for _ in range(number):
            prompt, began = messages(), time.perf_counter()
            call(lm, prompt)
            spent.append(time.perf_counter() - began)
        return spent

    with ThreadPoolExecutor(callers) as pool:
        while turns.recv():
            spent = [one for some in pool.map(make, [each] * callers) for one in some]
            written(lm)
            turns.send(spent)


@contextmanager
def _subjects(url: str, folder: str, callers: int, each: int) -> Iterator[dict[str, Any]]:
    """A connection to the process of each subject."""
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in SUBJECTS}
    processes = [
        context.Process(target=_subject, args=(name, url, folder, callers, each, theirs), daemon=True)
        for name, (_, theirs) in pipes.items()
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes.values():
        theirs.close()
    try:
        yield {name: ours for name, (ours, _) in pipes.items()}
        for ours, _ in pipes.values():
            ours.send(False)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def tails(rounds: int = 40, callers: int = 128, each: int = 8) -> dict[str, float]:
    """Milliseconds of bare calls (median, p99), and the guarded ones' p99 by theirs; the cache misses.

    Args:
        rounds: of each subject, in turn. callers: threads. each: calls of a thread in a round.
    """
    found: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    with provider() as url, tempfile.TemporaryDirectory() as folder:
        with _subjects(url, folder, callers, each) as turns:
            for number in range(rounds + 1):
                for name, turn in turns.items():
                    turn.send(True)
                    spent = turn.recv()
                    if number:  # in the first one, connections are made
                        found[name] += spent
    p99 = {name: statistics.quantiles(times, n=100)[98] for name, times in found.items()}
    ratios = {name: p99[name] / p99["bare"] for name in SUBJECTS if name != "bare"}
    return {"bare_p50_ms": statistics.median(found["bare"]) * 1e3, "bare_p99_ms": p99["bare"] * 1e3, **ratios}
