"""What an experiment says before it begins: how many users and days it takes, and the slowest by name."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod import ConfigError, Experiment, Metric, Rollout
from tests.experiments.conftest import Triage


def planned(store: str = "memory://plan", **more: Any) -> Experiment:
    options: dict[str, Any] = {
        "metrics": [Metric("resolved", margin=0.02, window="3d")],
        "rollout": Rollout(stages=(0.01, 0.1, 0.5)),
        **more,
    }
    return Experiment("plan", variants={"control": Triage(), "new": Triage("Think.")}, store=store, **options)


@pytest.fixture
def own(request: pytest.FixtureRequest) -> str:
    """A store of its own."""
    return f"memory://{request.node.name}"


def test_a_plan_names_the_slowest(own: str) -> None:
    """A row for each claim, users and days; what takes longest of what a promotion waits for stands out."""
    plan = planned(own).plan(800, baseline={"resolved": 0.80}, effect=0.05)
    claims = [(need.metric, need.claim) for need in plan.needs]
    assert claims == [
        ("resolved", "better"), ("resolved", "no_worse"), ("error_rate", "no_worse"), ("fallback_rate", "no_worse"),
        ("cost", "no_worse"), ("latency", "no_worse"),
    ]  # fmt: skip
    text = str(plan)
    assert "the slowest" in text
    assert "better by 5 points" in text
    assert "<table" in plan._repr_html_()
    assert plan.slowest in plan.needs
    assert all(need.days > need.units / 800 for need in plan.needs[:1])  # its window of three days included


def test_a_smaller_effect_takes_longer_and_a_holdout_too(own: str) -> None:
    """Users go by the square of the effect; who is held out brings nothing."""
    base = planned(own)
    one, other = (base.plan(800, effect=size).needs[0] for size in (0.1, 0.05))
    assert 3.5 <= other.units / one.units <= 4.5
    assert base.plan(800, effect={"resolved": 0.1}).needs[0] == one
    held = planned(f"{own}-held", holdout=0.5).plan(800, effect=0.1).needs[0]
    assert held.units == one.units
    assert held.days - 3 == pytest.approx(2 * (one.days - 3))


def test_the_shares_are_those_of_the_last_stage(own: str) -> None:
    """At 90/10 everything takes longer than at 50/50."""
    even = planned(own).plan(800)
    lopsided = planned(f"{own}-lopsided", rollout=Rollout(stages=(0.01, 0.1))).plan(800)
    assert lopsided.slowest.units > 2 * even.slowest.units


def test_a_margin_that_takes_months_is_told(own: str) -> None:
    """Before the start, not after two months."""
    plan = planned(own).plan(100, baseline={"resolved": 0.80})
    assert any("a margin of 2 points needs" in each for each in plan.warnings)
    assert "Beware: " in str(plan)


def test_what_makes_no_sense_is_refused(own: str) -> None:
    exp = planned(own)
    with pytest.raises(ConfigError, match="users_per_day"):
        exp.plan(0)
    with pytest.raises(ConfigError, match="solved"):
        exp.plan(800, baseline={"solved": 0.8})
