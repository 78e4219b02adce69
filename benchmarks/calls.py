"""What a call costs beside bare DSPy: CPU, the slowest in a thousand, cache hits, and calls per second.

Every policy is on, in memory and in a SQLite file; all subjects of a measurement take turns in one run.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import dspy

import dspy_prod
from benchmarks.common import bare, call, guarded, interleaved, messages, paired

STORES: Final = ("memory", "sqlite")
Calls = Callable[[int], None]


@contextmanager
def _guarded(**options: Any) -> Iterator[dict[str, dspy.LM]]:
    """A guarded LM for each store."""
    with tempfile.TemporaryDirectory() as folder:
        lms = {
            "memory": guarded(store="memory://", **options),
            "sqlite": guarded(store=f"sqlite:///{folder}/state.db", **options),
        }
        yield lms
        for lm in lms.values():
            lm.close()
            lm.pipeline.store.close()


def written(lm: dspy.LM) -> None:
    """What a store was told is written: it belongs to the calls that told it."""
    if isinstance(lm, dspy_prod.LM):
        lm.pipeline.store.flush(10)


def _fresh(lm: dspy.LM) -> Calls:
    """Calls of which each is like no other."""

    def make(number: int) -> None:
        for _ in range(number):
            call(lm, messages())
        written(lm)

    return make


def _same(lm: dspy.LM) -> Calls:
    """The same call again and again, as an adapter makes it."""
    prompt = messages(fresh=False)

    def make(number: int) -> None:
        for _ in range(number):
            call(lm, prompt)
        written(lm)

    return make


def _predicts(lm: dspy.LM) -> Calls:
    """The same through `dspy.Predict` with ChatAdapter."""
    program = dspy.Predict("question -> answer")

    def make(number: int) -> None:
        with dspy.context(lm=lm):
            for _ in range(number):
                program(question="the same")
        written(lm)

    return make


def overhead(rounds: int = 40, count: int = 200) -> dict[str, Any]:
    """CPU of the process that a guarded call adds to a bare one, in µs, with the cache off and with a miss."""
    with _guarded(cache=False) as off, _guarded() as miss:
        subjects = {"bare": _fresh(bare())}
        subjects |= {f"{store}_off": _fresh(lm) for store, lm in off.items()}
        subjects |= {f"{store}_miss": _fresh(lm) for store, lm in miss.items()}
        times = interleaved(subjects, rounds=rounds, count=count)
    added = {f"{name}_us": paired(times, name, "bare")[0] * 1e6 for name in subjects if name != "bare"}
    return {"bare_us": statistics.median(times["bare"]) * 1e6, **added}


def slowest(rounds: int = 40, count: int = 500) -> dict[str, Any]:
    """CPU of the slowest call in a thousand (p99.9) on its caller's thread, in µs, with a miss.

    The garbage collector is in it, and what a call does for those before it; what a busy machine does meanwhile is not.
    """
    with _guarded() as guards:
        lms = {"bare": bare(), **guards}
        spent: dict[str, list[float]] = {name: [] for name in lms}
        for _ in range(rounds):
            for name, lm in lms.items():
                for _ in range(count):
                    prompt = messages()
                    began = time.thread_time()
                    call(lm, prompt)
                    spent[name].append(time.thread_time() - began)
    return {f"{name}_us": sorted(values)[int(len(values) * 0.999)] * 1e6 for name, values in spent.items()}


def hits(rounds: int = 40, count: int = 200) -> dict[str, Any]:
    """A cache hit of an LM against DSPy's own memory-cache hit."""
    return _hits(_same, rounds, count)


def predict_hits(rounds: int = 16, count: int = 1_200) -> dict[str, Any]:
    """The same of a `Predict`, as many in a row as make a SQLite file write five of its usual batches."""
    return _hits(_predicts, rounds, count)


def _hits(calls: Callable[[dspy.LM], Calls], rounds: int, count: int) -> dict[str, Any]:
    with _guarded() as lms:
        subjects = {"dspy": calls(bare(cache=True)), **{store: calls(lm) for store, lm in lms.items()}}
        times = interleaved(subjects, rounds=rounds, count=count)
    shares = {store: paired(times, store, "dspy")[1] for store in STORES}
    return {"dspy_us": statistics.median(times["dspy"]) * 1e6, **shares}


def throughput(rounds: int = 8, count: int = 5120) -> dict[str, Any]:
    """Calls per second of 64 threads, and of 64 tasks, as a share of bare DSPy's; the cache misses."""
    result: dict[str, Any] = {}

    def threads(lm: dspy.LM) -> Calls:
        def work(number: int) -> None:
            for _ in range(number):
                call(lm, messages())

        def make(number: int) -> None:  # threads of their own: in an executor all queue at one lock of its, after each
            crowd = [threading.Thread(target=work, args=(max(1, number // 64),)) for _ in range(64)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()

        return make

    def tasks(lm: dspy.LM) -> Calls:
        async def worker(number: int) -> None:
            for _ in range(number):
                await lm.acall(prompt=messages()[1]["content"])

        async def all_of(number: int) -> None:
            await asyncio.gather(*(worker(number // 64) for _ in range(64)))

        return lambda number: asyncio.run(all_of(max(64, number)))

    for kind, calls in (("threads", threads), ("tasks", tasks)):
        with _guarded() as lms:
            subjects = {"bare": calls(bare()), **{store: calls(lm) for store, lm in lms.items()}}
            times = interleaved(subjects, rounds=rounds, count=count, clock=time.perf_counter)
        result[f"{kind}_bare_per_s"] = 1 / statistics.median(times["bare"])
        result |= {f"{kind}_{store}": paired(times, "bare", store)[1] for store in STORES}
    return result
