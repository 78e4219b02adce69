"""Bodies of child processes (started with `spawn`): each makes an LM of its own on a store that others share."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from dspy_prod import Budget, RateLimit, Run, call_context
from tests.e2e.support import make_lm, outcome, together

A_CENT: dict[str, tuple[float, float]] = {"openai/e2e": (0.0, 100.0)}


def spend(url: str, store: str, callers: int, calls: int, barrier: Any, results: Any) -> None:
    """Spend a shared dollar with a crowd of threads; tell how the calls ended."""
    lm = make_lm(url, prices=A_CENT, budget=Budget(usd=1.0), store=store)
    barrier.wait(60)
    outcomes = together("threads", lm, callers, calls=calls)
    lm.close()
    lm.pipeline.store.close()
    results.put(dict(Counter(_kind(each) for each in outcomes)))


def send(url: str, store: str, limit: dict[str, Any], callers: int, calls: int, barrier: Any, results: Any) -> None:
    """Send through a shared rate limit; tell how the calls ended."""
    lm = make_lm(url, limit=RateLimit(**limit), store=store)
    barrier.wait(60)
    outcomes = together("threads", lm, callers, calls=calls)
    lm.close()
    lm.pipeline.store.close()
    results.put(dict(Counter(_kind(each) for each in outcomes)))


def call_until_killed(url: str, store: str, callers: int) -> None:
    """Call without end."""
    lm = make_lm(url, prices=A_CENT, budget=Budget(usd=1.0), store=store)

    def work(caller: int) -> None:
        number = 0
        while not isinstance(outcome(lambda: lm(f"child {caller}.{number}")), BaseException):  # noqa: B023
            number += 1

    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def spend_of_run(url: str, store: str, prices: dict[str, tuple[float, float]], usd: float, callers: int) -> None:
    """Call without end inside a run that others share."""
    lm = make_lm(url, prices=prices)
    run = Run("it", usd=usd, store=store, namespace="e2e")

    def work(caller: int) -> None:
        number = 0
        with call_context(run=run):
            while not isinstance(outcome(lambda: lm(f"child {caller}.{number}")), BaseException):  # noqa: B023
                number += 1

    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kind(outcome: Any) -> str:
    return type(outcome).__name__ if isinstance(outcome, BaseException) else "answer"
