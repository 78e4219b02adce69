"""How long calls over HTTP take with many at once, beside bare DSPy: a real server in a process of its own."""

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

from benchmarks.common import bare, call, guarded, messages
from dspy_prod.testing import Provider

LATENCY = 0.1
"""Seconds the provider takes to answer."""


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


def tails(rounds: int = 10, callers: int = 128, each: int = 8) -> dict[str, float]:
    """Seconds of bare calls (median, p99), and the guarded ones' p99 by theirs; the cache misses.

    Args:
        rounds: of each subject, in turn. callers: threads. each: calls of a thread in a round.
    """
    with provider() as url, tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(callers) as pool:
        where = {"engine": "lm15", "async_engine": None, "api_base": url, "api_key": "none"}
        lms: dict[str, dspy.LM] = {
            "bare": bare(**where),
            "memory": guarded(store="memory://", **where),
            "sqlite": guarded(store=f"sqlite:///{folder}/state.db", **where),
        }

        def make(lm: dspy.LM) -> list[float]:
            spent = []
            for _ in range(each):
                prompt, began = messages(), time.perf_counter()
                call(lm, prompt)
                spent.append(time.perf_counter() - began)
            return spent

        found: dict[str, list[list[float]]] = {name: [] for name in lms}
        for lm in lms.values():  # connections are made
            list(pool.map(make, [lm] * callers))
        for _ in range(rounds):
            for name, lm in lms.items():
                found[name].append([one for spent in pool.map(make, [lm] * callers) for one in spent])
    p99 = {name: [statistics.quantiles(times, n=100)[98] for times in each] for name, each in found.items()}
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(p99[name], p99["bare"], strict=True))
        for name in ("memory", "sqlite")
    }
    middle = statistics.median(one for times in found["bare"] for one in times)
    return {"bare_p50_ms": middle * 1e3, "bare_p99_ms": statistics.median(p99["bare"]) * 1e3, **ratios}
