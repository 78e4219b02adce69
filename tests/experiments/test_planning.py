"""What an experiment will need is told before it begins, and comes true."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.experiments_measured import A_SIDE
from benchmarks.experiments_plan import Cell, cells, off
from benchmarks.experiments_worlds import rate, simulated
from dspy_prod.errors import ConfigError
from dspy_prod.experiments.foretelling import units_needed
from dspy_prod.experiments.planning import plan
from dspy_prod.options.metrics import Metric, cost, guardrails, latency

SCORE = Metric("q", margin=0.05)


@pytest.mark.long
def test_the_forecast_comes_true() -> None:
    """Simulated: by the foretold number of units, half and four fifths of the runs have proven it, about."""
    better = simulated([SCORE], {"q": rate(0.7, 0.8)}, A_SIDE, runs=250, units=2_500, seed=[3], until="better").units
    proven = simulated([SCORE], {"q": rate(0.9)}, A_SIDE, runs=250, units=4_000, seed=[4], until="no_worse").units
    for power in (0.5, 0.8):
        by = units_needed(SCORE, "better", 0.1, A_SIDE.better, baseline=0.7, power=power)
        assert abs(float(np.mean(better <= by)) - power) < 0.12
        by = units_needed(SCORE, "no_worse", 0.05, A_SIDE.no_worse, baseline=0.9, power=power)
        assert abs(float(np.mean(proven <= by)) - power) < 0.12


GRID = {kind: {cell.name: cell for cell in grid} for kind, grid in cells().items()}


@pytest.mark.parametrize(
    ("cell", "share"),
    [
        (GRID["dearer"]["lower, sd 0.15, 20%"], 0.5),
        (GRID["dearer"]["lower, sd 0.1, 10%"], 0.5),
        (GRID["dearer"]["higher, sd 0.6, 50%"], 0.25),
        (GRID["cheaper"]["lower, sd 0.6, 50%"], 0.5),
        (GRID["cheaper"]["higher, sd 0.1, 20%"], 0.1),
        (GRID["no worse"]["0.95, 10 points"], 0.25),
        (GRID["better"]["0.80, 10 points"], 0.5),
        (GRID["p95"]["5 points"], 0.5),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else str(value),
)
def test_half_of_simulated_experiments_are_done_by_the_foretold_median(cell: Cell, share: float) -> None:
    """Also where stakes are bounded and no amounts vary: there a spread of nothing does not make proofs instant."""
    found = off(cell, share, 60, [5])
    assert found is not None
    assert found < 0.5


def test_a_bounded_stake_needs_units_however_small_the_spread() -> None:
    """The largest stake wins so much a unit and no more; the first units only fix the cap."""
    alike, nearly = (units_needed(cost(), "no_worse", 0.2, 0.05, baseline=cv) for cv in (0.001, 0.1))
    assert 300 < alike < nearly < 1.2 * alike
    assert units_needed(cost(cap=0.02), "no_worse", 0.2, 0.05, baseline=(0.01, 0.001)) < 0.5 * alike


def test_it_takes_more_units_for_less() -> None:
    """About four times as many for half the effect; more at a lopsided share, a smaller alpha, a larger power."""

    def needed(size: float = 0.05, alpha: float = 0.025, **more: float) -> int:
        return units_needed(SCORE, "better", size, alpha, **more)

    usual = needed()
    assert 3 < needed(0.025) / usual < 5
    assert needed(share=0.1) == pytest.approx(usual * 0.25 / 0.09, rel=0.25)
    assert needed(alpha=0.005) > usual
    assert needed(power=0.9) > usual > needed(power=0.5)


def test_a_spread_below_that_of_right_and_wrong_needs_less() -> None:
    """A rating whose users agree; the other direction is the same with the ends exchanged."""
    rating = Metric("stars", bounds=(1, 5), missing=1.0, margin=0.2)
    wide = units_needed(rating, "no_worse", 0.2, 0.05, baseline=4.2)
    assert units_needed(rating, "no_worse", 0.2, 0.05, baseline=(4.2, 1.6)) == wide
    assert units_needed(rating, "no_worse", 0.2, 0.05, baseline=(4.2, 0.8)) == pytest.approx(wide / 4, rel=0.1)
    lower = Metric("wrong", direction="lower", margin=0.05)
    assert units_needed(lower, "no_worse", 0.05, 0.05, baseline=0.1) == units_needed(
        SCORE, "no_worse", 0.05, 0.05, baseline=0.9
    )


@pytest.mark.parametrize(
    ("metric", "size", "options", "message"),
    [
        (SCORE, 0.0, {}, "size=0.0 of 'q' must be over 0"),
        (SCORE, 1e-5, {}, "'q': a difference of 1e-05 is too small"),
        (SCORE, 0.05, {"baseline": 1 - 1e-10}, "'q': a difference of 1e-10 is too small"),
        (SCORE, 0.05, {"share": 1.0}, "share=1.0 must lie between 0 and 1"),
        (SCORE, 0.05, {"baseline": (0.5, 0.6)}, "standard deviation of 0.5 at most"),
        (Metric("usd", direction="lower", relative=True), 1.0, {}, "must be below 1"),
        (
            Metric("usd", direction="lower", relative=True),
            0.1,
            {"baseline": (0.0, 1.0)},
            "must have a mean and a spread",
        ),
    ],
)
def test_impossible_needs_are_refused(metric: Metric, size: float, options: dict[str, Any], message: str) -> None:
    """By name."""
    with pytest.raises(ConfigError, match=message):
        units_needed(metric, "better", size, 0.02, **options)


def test_what_nothing_can_be_better_by_is_said() -> None:
    """Of 97 % three points are left, of the slowest twentieth all; more is warned of, not foretold in silence."""
    quick = Metric("quick", direction="lower", tail=0.95)
    found = plan([Metric("q"), quick], units_per_day=100, baseline={"q": 0.97}, effects={"quick": 0.06})
    assert "q: nothing can be better by 5 points, only by 3 points" in found.warnings
    assert "quick: nothing can be better by 6 points, only by 5 points" in found.warnings
    assert not plan([quick, latency()], units_per_day=1_000).warnings


def test_the_slowest_is_named_and_a_narrow_margin_is_warned_of() -> None:
    """Two points on a metric of 80 % take long where nothing changes: said before the start."""
    metrics = [Metric("resolved", margin=0.02, window="3d"), Metric("liked"), *guardrails()]
    found = plan(metrics, units_per_day=200, baseline={"resolved": 0.80}, effects={"liked": 0.2})
    assert {(need.metric, need.claim) for need in found.needs} == {
        ("resolved", "better"), ("resolved", "no_worse"), ("liked", "better"), ("error_rate", "no_worse"),
        ("fallback_rate", "no_worse"), ("cost", "no_worse"), ("latency", "no_worse"),
    }  # fmt: skip
    assert (found.slowest.metric, found.slowest.claim) == ("resolved", "no_worse")
    assert 12_000 < found.slowest.units < 16_000
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
