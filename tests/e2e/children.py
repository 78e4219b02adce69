"""Bodies of child processes (started with `spawn`): each makes an LM of its own on a store that others share."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dspy

from dspy_prod import Budget, RateLimit, RejectedError, Retry, Run, call_context
from tests.e2e.runs import crowd
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

    _on_threads(work, callers)


def spend_a_dollar_of_a_run(url: str, store: str, callers: int, calls: int, barrier: Any, results: Any) -> None:
    """Spend a run's dollar with a crowd of threads, beside other processes; tell how the calls ended."""
    lm = make_lm(url, prices=A_CENT)
    run = Run("it", usd=1.0, calls=1_000, store=store, namespace="e2e")
    barrier.wait(60)
    outcomes = crowd(run, [lm], callers, calls)
    run.store.close()
    results.put(dict(Counter(_kind(each) for each in outcomes)))


def spend_of_run(url: str, store: str, prices: dict[str, tuple[float, float]], usd: float, callers: int) -> None:
    """Call without end inside a run that others share."""
    lm = make_lm(url, prices=prices)
    run = Run("it", usd=usd, store=store, namespace="e2e")

    def work(caller: int) -> None:
        number = 0
        with call_context(run=run):
            while not isinstance(outcome(lambda: lm(f"child {caller}.{number}")), BaseException):  # noqa: B023
                number += 1

    _on_threads(work, callers)


def evaluate_in_a_run(url: str, limited: bool, deadline: float, begun: Any, stop: Any) -> None:
    """Evaluate on four threads that would wait for minutes, and stop when told to."""
    lm = make_lm(url, limit=RateLimit(rpm=1) if limited else None, retry=Retry(attempts=9))
    run = Run("it", usd=1e6, store="memory://", namespace="e2e")

    def stopping() -> None:
        stop.wait(60)
        run.stop("told to")

    threading.Thread(target=stopping, daemon=True).start()
    devset = [dspy.Example(question=str(number)).with_inputs("question") for number in range(40)]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda *_: 1.0, num_threads=4, max_errors=99)
    begun.set()
    with dspy.context(lm=lm), call_context(run=run, deadline=deadline), suppress(RejectedError):
        evaluate(dspy.Predict("question -> answer"))


def _on_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kind(outcome: Any) -> str:
    return type(outcome).__name__ if isinstance(outcome, BaseException) else "answer"
