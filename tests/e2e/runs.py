"""What the tests of runs share: a cent a call, and a crowd inside a run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy_prod
from dspy_prod import Run
from tests.e2e.support import CHEAP, MODEL, outcome

A_CENT: dict[str, tuple[float, float]] = {MODEL: (0.0, 100.0), CHEAP: (0.0, 100.0)}
"""Prices at which 100 output tokens cost exactly one cent and the input nothing: bound and cost are equal."""


def crowd(run: Run, lms: list[Any], callers: int, calls: int) -> list[Any]:
    """What many threads are answered, who take the LMs in turn, all inside the run."""

    def caller(number: int) -> list[Any]:
        with dspy_prod.call_context(run=run):
            return [outcome(lambda: lms[(number + n) % len(lms)](f"{number}.{n}")) for n in range(calls)]  # noqa: B023

    with ThreadPoolExecutor(callers) as pool:
        return [each for made in pool.map(caller, range(callers)) for each in made]


def inside(run: Run, lm: Any, text: str) -> Any:
    """What one call is answered inside the run."""
    with dspy_prod.call_context(run=run):
        return outcome(lambda: lm(text))
