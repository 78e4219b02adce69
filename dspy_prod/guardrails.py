"""The guardrails that calls of an experiment tell by themselves, to be changed and given again.

`dspy_prod.Experiment(...)` has all four unless it is told otherwise (`guardrails=`). They go by each user's first call,
which can be compared at once. With a window, the same for all four, they go by the mean of all calls within it:

    from dspy_prod.guardrails import cost, error_rate, fallback_rate, latency

    guardrails = [each(window="1d") for each in (error_rate, fallback_rate, cost, latency)]
    exp = dspy_prod.Experiment("triage-cot", ..., guardrails=guardrails)
"""

from __future__ import annotations

from dspy_prod.options.metrics import cost, error_rate, fallback_rate, latency

__all__ = ["cost", "error_rate", "fallback_rate", "latency"]
