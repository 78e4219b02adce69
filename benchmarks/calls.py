"""Overhead per call, calls per second, and cache hits, against bare DSPy."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy

from benchmarks.common import AsyncConstantEngine, ConstantEngine, bare, call, guarded, interleaved, messages, paired


def overhead(rounds: int = 40, count: int = 200) -> dict[str, Any]:
    """CPU that a guarded call adds to a bare one, every policy on, memory store."""
    lms = {"bare": bare(), "guarded": guarded()}

    def calls(lm: dspy.LM) -> Callable[[int], None]:
        def make(number: int) -> None:
            for _ in range(number):
                call(lm, messages())

        return make

    times = interleaved({name: calls(lm) for name, lm in lms.items()}, rounds=rounds, count=count)
    added, ratio = paired(times, "guarded", "bare")
    return {
        "bare_us": statistics.median(times["bare"]) * 1e6,
        "added_us": added * 1e6,
        "ratio": ratio,
    }


def hits(rounds: int = 40, count: int = 200) -> dict[str, Any]:
    """A cache hit against DSPy's own memory-cache hit."""
    lms = {"dspy": bare(cache=True), "guarded": guarded()}
    prompt = messages(fresh=False)

    def calls(lm: dspy.LM) -> Callable[[int], None]:
        def make(number: int) -> None:
            for _ in range(number):
                call(lm, prompt)

        return make

    times = interleaved({name: calls(lm) for name, lm in lms.items()}, rounds=rounds, count=count)
    _, ratio = paired(times, "guarded", "dspy")
    return {
        "dspy_us": statistics.median(times["dspy"]) * 1e6,
        "guarded_us": statistics.median(times["guarded"]) * 1e6,
        "ratio": ratio,
    }


def predict_hits(rounds: int = 30, count: int = 100) -> dict[str, Any]:
    """The same through `dspy.Predict` with ChatAdapter."""
    program = dspy.Predict("question -> answer")
    lms = {"dspy": bare(cache=True), "guarded": guarded()}

    def calls(lm: dspy.LM) -> Callable[[int], None]:
        def make(number: int) -> None:
            with dspy.context(lm=lm):
                for _ in range(number):
                    program(question="the same")

        return make

    times = interleaved({name: calls(lm) for name, lm in lms.items()}, rounds=rounds, count=count)
    _, ratio = paired(times, "guarded", "dspy")
    return {"dspy_us": statistics.median(times["dspy"]) * 1e6, "ratio": ratio}


def throughput(rounds: int = 8, count: int = 1280) -> dict[str, Any]:
    """Calls per second of 64 threads, and of 64 tasks, as a share of bare DSPy's."""
    result: dict[str, Any] = {}
    with ThreadPoolExecutor(64) as pool:

        def threaded(lm: dspy.LM) -> Callable[[int], None]:
            def one(_: int) -> None:
                call(lm, messages())

            def make(number: int) -> None:
                list(pool.map(one, range(number)))

            return make

        subjects = {"bare": threaded(bare()), "guarded": threaded(guarded())}
        times = interleaved(subjects, rounds=rounds, count=count, clock=time.perf_counter)
    _, ratio = paired(times, "bare", "guarded")
    result["threads_share"] = ratio
    result["threads_bare_per_s"] = 1 / statistics.median(times["bare"])

    def tasks(lm: dspy.LM) -> Callable[[int], None]:
        async def worker(number: int) -> None:
            for _ in range(number):
                await lm.acall(prompt=messages()[1]["content"])

        async def all_of(number: int) -> None:
            await asyncio.gather(*(worker(number // 64) for _ in range(64)))

        return lambda number: asyncio.run(all_of(max(64, number)))

    subjects = {"bare": tasks(bare()), "guarded": tasks(guarded())}
    times = interleaved(subjects, rounds=rounds, count=count, clock=time.perf_counter)
    _, ratio = paired(times, "bare", "guarded")
    result["tasks_share"] = ratio
    result["tasks_bare_per_s"] = 1 / statistics.median(times["bare"])
    return result


__all__ = ["AsyncConstantEngine", "ConstantEngine", "hits", "overhead", "predict_hits", "throughput"]
