"""What the benchmark measures is what is used: the form for many runs agrees with the one for one unit at a time."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import experiments_batch as batch
from dspy_prod.experiments.kinds import compared
from dspy_prod.options.metrics import Metric, cost, error_rate, latency

METRICS = [
    Metric("score", margin=0.02),
    Metric("rating", bounds=(1, 5), missing=1.0, margin=0.1),
    Metric("wrong", direction="lower", margin=0.05),
    error_rate(),
    Metric("kept", role="guardrail", margin=0.03),
    cost(),
    cost(cap=0.5),
    Metric("cheap", direction="lower", relative=True, margin=0.1),
    Metric("income", relative=True, margin=0.1),
    Metric("income", relative=True, role="guardrail", margin=0.1),
    Metric("bought", relative=True),
    latency(missing=0.0),
    Metric("quick", direction="lower", tail=0.9, margin=0.02),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: f"{metric.name}-{metric.role}")
def test_many_runs_at_once_are_the_same_as_one_by_one(metric: Metric) -> None:
    """Wealth of every part and every peak, under changing shares, caps that close an arm, and a true difference."""
    rng, runs, units = np.random.default_rng(7), 3, 700
    shares = np.array([0.5, 0.01, 0.9, 0.0, 1.0, 0.25])[rng.integers(6, size=(units, runs))]
    candidate = rng.random((units, runs)) < shares
    amounts = metric.relative or metric.tail is not None
    values = rng.lognormal(-1, 0.8, (units, runs)) if amounts else (rng.random((units, runs)) < 0.8).astype(float)
    values = (
        values * np.where(candidate, 1.3, 1.0)
        if amounts
        else metric.bounds[0] + 3 * values * (metric.bounds[1] > 1) + values * (metric.bounds[1] == 1)
    )
    whole, single = batch.compared(metric, runs), [compared(metric) for _ in range(runs)]
    for place in range(units):
        whole.unit(candidate[place], shares[place], values[place])
        for run, comparison in enumerate(single):
            comparison.unit(bool(candidate[place, run]), float(shares[place, run]), float(values[place, run]))
    for run, comparison in enumerate(single):
        for name, claim in comparison.claims.items():
            many = getattr(whole, name)
            assert many.peak[run] == pytest.approx(claim.peak, rel=1e-12)
            assert claim.peak >= 1
            for bet, other in zip(claim.bets, many.bets, strict=True):
                assert list(other.wealths[:, run]) == pytest.approx(bet.wealths, rel=1e-12, abs=1e-300)
