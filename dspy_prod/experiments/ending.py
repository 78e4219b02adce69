"""How all calls ended, by variant: what a guardrail that sees a part of them may not see. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import Final

from dspy_prod.experiments.decisions import CandidateDecision
from dspy_prod.options.metrics import Metric
from dspy_prod.stores.trials import Ended

FEWEST: Final = 100
"""Calls of both variants, before a difference is spoken of."""
SURE: Final = 5.0
"""Standard errors of a difference that is spoken of; those of calls, of which one user may have made many."""
LEFT: Final = 0.02
"""By how much larger a share of abandoned calls is spoken of."""

GUARDED: Final = {"error_rate": ("failed", "failed"), "fallback_rate": ("fell_back", "were answered by a fallback")}
"""Guardrails of how calls end: the count, and what it is of, in words."""


def unseen(
    control: Ended, calls: Mapping[str, Ended], candidates: Mapping[str, CandidateDecision],
    declared: Callable[[str], Metric],
) -> Iterator[str]:  # fmt: skip
    """Where all calls say clearly what the guardrails do not, in words.

    Args:
        control: how its calls ended. calls: those of each variant. candidates: what is known of each.
        declared: a metric by name.
    """
    for name, candidate in candidates.items():
        ours = calls.get(name, Ended(name))
        for found in candidate.metrics:
            if found.metric not in GUARDED or found.status == "worse":
                continue
            count, words = GUARDED[found.metric]
            metric = declared(found.metric)
            if _clearly(getattr(control, count), control.calls, getattr(ours, count), ours.calls, metric.margin or 0.0):
                yield (
                    f"{_share(getattr(ours, count), ours.calls)} of all calls of {name} {words}, and "
                    f"{_share(getattr(control, count), control.calls)} of those of {control.arm}, which "
                    f"{found.metric} does not show: {_sees(metric)}"
                )
        if _clearly(control.abandoned, control.calls, ours.abandoned, ours.calls, LEFT):
            yield (
                f"{_share(ours.abandoned, ours.calls)} of all calls of {name} were left by their callers before they "
                f"had ended, and {_share(control.abandoned, control.calls)} of those of {control.arm}; they count as "
                "no failures. Does it hang? Calls that are given a deadline fail instead"
            )


def _sees(metric: Metric) -> str:
    if metric.window:
        return f"it goes by calls of the first {metric.window:g} seconds of each user"
    return f"it goes by each user's first call. A window has it see more, as guardrails.{metric.name}(window='1d')"


def _clearly(theirs: int, of: int, ours: int, of_ours: int, margin: float) -> bool:
    if min(of, of_ours) < FEWEST:
        return False
    pooled = (theirs + ours) / (of + of_ours)
    error = sqrt(pooled * (1.0 - pooled) * (1.0 / of + 1.0 / of_ours))
    return ours / of_ours - theirs / of > margin + SURE * error


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %"
