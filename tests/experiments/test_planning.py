"""What an experiment will need is told before it begins, and comes true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.experiments_measured import A_SIDE
from benchmarks.experiments_worlds import rate, simulated
from dspy_prod.errors import ConfigError
from dspy_prod.experiments.planning import plan, units_needed
from dspy_prod.options.metrics import Metric, guardrails


@pytest.mark.long
def test_the_approximation_comes_true() -> None:
    """Simulated: by the foretold number of units, half and four fifths of the runs have proven it, about."""
    better = simulated(
        [Metric("q")], {"q": rate(0.7, 0.8)}, A_SIDE, runs=250, units=2_500, seed=[3], until="better"
    ).units
    proven = simulated(
        [Metric("q", margin=0.05)], {"q": rate(0.9)}, A_SIDE, runs=250, units=4_000, seed=[4], until="no_worse"
    ).units
    for units, effect, variance, alpha in ((better, 0.1, 0.1875, 0.025), (proven, 0.05, 0.09, 0.05)):
        for power in (0.5, 0.8):
            assert abs(float(np.mean(units <= units_needed(effect, variance, alpha, power))) - power) < 0.12


def test_it_takes_more_units_for_less() -> None:
    """Four times as many for half the effect; more at a lopsided share, a smaller alpha, a larger power."""
    usual = units_needed(0.05, 0.16, 0.025)
    assert units_needed(0.025, 0.16, 0.025) == pytest.approx(4 * usual, rel=0.001)
    assert units_needed(0.05, 0.16, 0.025, share=0.1) == pytest.approx(usual * 0.25 / 0.09, rel=0.001)
    assert units_needed(0.05, 0.16, 0.005) > usual
    assert units_needed(0.05, 0.16, 0.025, power=0.9) > usual
    with pytest.raises(ConfigError, match="effect"):
        units_needed(0.0, 0.16, 0.025)


def test_the_slowest_is_named_and_a_narrow_margin_is_warned_of() -> None:
    """Two points on a metric of 80 % take long where nothing changes: said before the start."""
    metrics = [Metric("resolved", margin=0.02, window="3d"), Metric("liked"), *guardrails()]
    found = plan(metrics, units_per_day=200, baseline={"resolved": 0.80}, effects={"liked": 0.2})
    assert {(need.metric, need.claim) for need in found.needs} == {
        ("resolved", "better"), ("resolved", "no_worse"), ("liked", "better"), ("error_rate", "no_worse"),
        ("fallback_rate", "no_worse"), ("cost", "no_worse"), ("latency", "no_worse"),
    }  # fmt: skip
    assert (found.slowest.metric, found.slowest.claim) == ("resolved", "no_worse")
    assert 15_000 < found.slowest.units < 30_000
    assert found.slowest.days == pytest.approx(found.slowest.units / 200 + 3)
    assert any("a margin of 2 points needs about" in each and "when nothing changes" in each for each in found.warnings)
    assert "slowest: resolved" in str(found)


def test_a_metric_that_is_better_is_not_waited_for_twice() -> None:
    """That a score is better proves that it is no worse."""
    found = plan([Metric("resolved", margin=0.02)], units_per_day=1_000)
    assert found.slowest.claim == "better"


def test_shares_and_candidates_cost_units() -> None:
    """All variants' units count, the rarest candidate is waited for, and alpha is split."""
    one = plan([Metric("q")], units_per_day=100).slowest
    two = plan([Metric("q")], units_per_day=100, shares={"control": 1 / 3, "a": 1 / 3, "b": 1 / 3}).slowest
    rare = plan([Metric("q")], units_per_day=100, shares={"control": 0.9, "a": 0.1}).slowest
    assert two.units > 1.5 * one.units
    assert rare.units > 2.5 * one.units


def test_what_cannot_promote_is_said() -> None:
    """No success metric, or only a judge that nobody trusts."""
    assert any("only rolled back" in each for each in plan(guardrails(), units_per_day=10).warnings)
    judged = plan([Metric("q", judge="untrusted")], units_per_day=10)
    assert any("untrusted judge" in each for each in judged.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units_per_day": 0}, "units_per_day=0"),
        ({"baseline": {"q": 1.0}}, "must lie between the metric's bounds"),
        ({"baseline": {"q": (0.5, 0.0)}}, "standard deviation over 0"),
        ({"baseline": {"p": 0.5}}, "'p' is no metric"),
        ({"effects": {"q": 0.0}}, "by how much it is hoped better"),
        ({"shares": {"a": 1.0}}, "must name 'control'"),
        ({"shares": {"control": 0.9, "a": 0.2}}, "sum to 1 at most"),
        ({"power": 1.0}, "power=1.0"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], message: str) -> None:
    """By name."""
    with pytest.raises(ConfigError, match=message):
        plan([Metric("q")], **{"units_per_day": 10, **options})
