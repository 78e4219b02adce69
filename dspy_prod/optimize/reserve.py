"""What a run keeps back while the optimizer searches, so that finalists can be evaluated completely afterwards."""

from __future__ import annotations

import time
from typing import Final

from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.sums import Sum, Sums
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run

_LONGER: Final = 1.6
"""By how much a candidate's prompts, with demonstrations and rules, are taken to be longer than the given program's."""

_MOST: Final = 0.5
"""Share of what the baseline has left that is kept at most."""


class Reserve:
    """Measures what the baseline took, and keeps back as much for each complete evaluation to come.

    Args:
        terms: the caps. task: tells how many evaluations are to come. sums: what was used. camera: what was answered.
    """

    def __init__(self, terms: Terms, task: Task, sums: Sums, camera: Camera) -> None:
        self._terms, self._task, self._sums, self._camera = terms, task, sums, camera
        self._began = time.monotonic()
        self._measured: dict[str, tuple[float, float, float]] | None = None

    def keep(self, run: Run, ends: float | None, finalists: float | None, *, final: bool = False) -> float | None:
        """Lower the caps by the reserve, and tell when the search has to end, on the monotonic clock.

        Args:
            run: whose caps. ends: when all has to end.
            finalists: how many whole evaluations are to come, as far as is known; None: none yet, but there may be.
            final: only the test set is left to be thought of.
        """
        if self._measured is None:  # right after the baseline
            self._measured = self._measure(run, ends)
        found, evaluations = self._measured, self._evaluations(finalists)
        if finalists is None:  # none is seen yet, but one may come: half of what is left by then is for it
            found = self._measure(run, ends)
        kept = {}
        for name, (cap, left, _) in found.items():
            kept[name] = cap - self._part(left, evaluations * self._measured[name][2], final)
        seconds = kept.pop("seconds", None)
        if kept:
            run.allow(
                usd=kept.get("usd"), calls=max(1, int(kept["calls"])) if "calls" in kept else None,
                tokens=max(1, int(kept["tokens"])) if "tokens" in kept else None,
            )  # fmt: skip
        return seconds

    def _measure(self, run: Run, ends: float | None) -> dict[str, tuple[float, float, float]]:
        """By dimension: its cap, how much of it is left, and what an evaluation of the selection set takes of it."""
        base, used, terms = self._sums.snapshot()[2].get("baseline", Sum()), run.used(), self._terms
        found: dict[str, tuple[float, float, float]] = {}
        for name, cap, spent, one in (
            ("usd", terms.budget_usd, used.usd, _scaled(base.usd, base) * _LONGER),
            ("calls", terms.max_calls, used.calls, _scaled(base.calls, base)),
            ("tokens", terms.max_tokens, used.tokens, _scaled(base.tokens, base) * _LONGER),
        ):
            if cap is not None:
                found[name] = cap, max(0.0, cap - (spent or 0)), one
        if ends is not None:
            now = time.monotonic()
            found["seconds"] = ends, max(0.0, ends - now), now - self._began
        return found

    def free(self, run: Run) -> None:
        """Give the reserve to whoever calls now."""
        terms = self._terms
        if terms.budget_usd is not None or terms.max_calls is not None or terms.max_tokens is not None:
            run.allow(usd=terms.budget_usd, calls=terms.max_calls, tokens=terms.max_tokens)

    def _part(self, left: float, needed: float, final: bool) -> float:
        if self._terms.reserve != "auto" and not final:
            return left * self._terms.reserve
        return min(needed, left * _MOST)

    def _evaluations(self, finalists: float | None) -> float:
        """How many evaluations of the selection set are to come, those of the test set among them."""
        examples = len(self._task.selection[0])
        return (1.0 if finalists is None else finalists) + 2 * len(self._task.testset) / max(1, examples)


def _scaled(used: float, sum_: Sum) -> float:
    """What the whole would have taken, had no answer of it been known before."""
    known = sum_.cached + sum_.replayed
    return used * (sum_.answers + known) / sum_.answers if sum_.answers else used
