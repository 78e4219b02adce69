"""Evidence in running sums: replayed it is the same, it survives a checkpoint, and a look costs the same for ever."""

from __future__ import annotations

import json
import random
import time

import pytest

from dspy_prod.errors import ConfigError
from dspy_prod.experiments import Evidence, Exposure, Outcome
from dspy_prod.options.metrics import Metric, cost, error_rate, latency

METRICS = [
    Metric("resolved", margin=0.02),
    Metric("rating", bounds=(1, 5), missing="exclude"),
    error_rate(),
    cost(),
    latency(missing=0.0),
]
STAGES = [
    ("1 %", {"control": 0.98, "a": 0.01, "b": 0.01}),
    ("full", {"control": 1.0, "a": 0.0, "b": 0.0}),
    ("third", {"control": 0.4, "a": 0.3, "b": 0.3}),
    ("without b", {"control": 0.5, "a": 0.5}),
]


def story(units: int, seed: int = 1) -> tuple[list[Exposure], list[Outcome]]:
    """Exposures through all stages, and their outcomes, each metric in order of exposure."""
    draw, exposures, outcomes = random.Random(seed), [], []
    for place in range(units):
        stage, shares = STAGES[min(place * len(STAGES) // units, len(STAGES) - 1)]
        arm = draw.choices(list(shares), list(shares.values()))[0]
        exposure = Exposure(arm, shares, stage, draw.choice(["acme", "bolt", None]))
        exposures.append(exposure)
        better = 0.1 if arm == "a" else 0.0
        values = {
            "resolved": None if draw.random() < 0.1 else float(draw.random() < 0.7 + better),
            "rating": None if draw.random() < 0.5 else draw.randint(1, 5),
            "error_rate": float(draw.random() < 0.03),
            "cost": draw.lognormvariate(-7, 0.8),
            "latency": draw.lognormvariate(0, 0.5),
        }
        outcomes += [Outcome(name, exposure, value) for name, value in values.items()]
    return exposures, outcomes


def evidence() -> Evidence:
    return Evidence(METRICS, ["a", "b"])


def test_a_replay_gives_the_same_bit_by_bit_however_the_metrics_came() -> None:
    """One that was told as it happened, with a checkpoint in the middle; another is told what the store has."""
    exposures, outcomes = story(1_600)
    live = evidence()
    for place, exposure in enumerate(exposures):
        live.exposed(exposure)
        for outcome in outcomes[5 * place : 5 * place + 5]:
            live.matured(outcome.metric, outcome.exposure, outcome.value)
        if place == 700:
            live = Evidence.from_dict(json.loads(json.dumps(live.to_dict(), allow_nan=False)))
    later = evidence()
    by_metric = sorted(outcomes, key=lambda outcome: outcome.metric)
    later.replay(exposures, by_metric)
    assert live.to_dict() == later.to_dict()
    assert live.look() == later.look()
    assert json.loads(json.dumps(live.look().to_dict(), allow_nan=False))["units"] == 1_600


def test_a_look_is_as_cheap_after_many_units_as_after_few() -> None:
    """It reads running sums: the state does not grow with units, and five metrics of two candidates take a moment."""

    def quickest(found: Evidence) -> float:
        times = []
        for exposure in exposures:
            found.matured("cost", exposure, 0.001)
            began = time.process_time()
            found.look()
            times.append(time.process_time() - began)
        return min(times)

    few, many, exposures = evidence(), evidence(), story(20)[0]
    few.replay(*story(1_000))
    many.replay(*story(6_000))
    assert len(json.dumps(many.to_dict())) < 1.3 * len(json.dumps(few.to_dict()))
    assert quickest(many) < 0.005


def test_a_look_says_what_one_that_knew_nothing_before_says() -> None:
    """What was found about a candidate is kept until something of it comes."""
    found = evidence()
    exposures, outcomes = story(120)
    seen = set()
    for exposure in exposures:
        found.exposed(exposure)
    for outcome in outcomes:
        found.matured(outcome.metric, outcome.exposure, outcome.value)
        anew = Evidence.from_dict(found.to_dict()).look(mixed=2, units=500)
        assert found.look(mixed=2, units=500) == anew
        seen.add(anew.candidates["a"])
    assert len(seen) > 100
    assert found.look().crossed == 0


def test_units_whose_draw_left_no_choice_are_taken_in_stride() -> None:
    """A full stage and a holdout: their outcomes are counted, nothing is bet, and a unit in an impossible arm is not
    believed."""
    found = Evidence([Metric("resolved")], ["a"])
    for place in range(300):
        full = Exposure("control", {"control": 1.0, "a": 0.0}, "full")
        found.exposed(full)
        found.matured("resolved", full, float(place % 2))
    only = Exposure("a", {"a": 1.0}, "all")
    found.exposed(only)
    found.matured("resolved", only, 1.0)
    [metric] = found.look().candidates["a"].metrics
    assert (metric.better, metric.worse) == (1.0, 1.0)
    assert (metric.control_units, metric.candidate_units) == (300, 1)
    forced = Exposure("a", {"control": 1.0, "a": 0.0}, "full")
    found.exposed(forced)
    found.matured("resolved", forced, 1.0)
    assert found.look().crossed == 1
    assert found.units("resolved", "a") == 1


def test_missing_outcomes_count_as_declared() -> None:
    """0 by default, something else where that is said, and nothing with "exclude"."""
    shares = {"control": 0.5, "candidate": 0.5}
    metrics = [Metric("yes"), Metric("stars", bounds=(1, 5), missing=1.0), Metric("said", missing="exclude")]
    found = Evidence(metrics, ["candidate"])
    for place in range(10):
        exposure = Exposure(("control", "candidate")[place % 2], shares)
        for metric in metrics:
            found.matured(metric.name, exposure, None)
    shown = [found.interval(metric.name, "candidate") for metric in metrics]
    assert [None if each is None else each.control for each in shown] == [0.0, 1.0, None]


def test_what_cannot_be_is_refused() -> None:
    """Unknown names, impossible values, names twice."""
    found, shares = evidence(), {"control": 0.5, "a": 0.5}
    with pytest.raises(ValueError, match="'x' is no variant of this experiment, which has control, a, b"):
        found.exposed(Exposure("x", shares))
    with pytest.raises(ValueError, match="no metric of this experiment"):
        found.matured("solved", Exposure("a", shares), 1.0)
    with pytest.raises(ValueError, match="rating=9 is not a score between 1 and 5"):
        found.matured("rating", Exposure("a", shares), 9)
    with pytest.raises(ValueError, match="amount of 0 or more"):
        found.matured("cost", Exposure("a", shares), float("nan"))
    with pytest.raises(ConfigError, match="variants must have names of their own"):
        Evidence(METRICS, ["control"])
    with pytest.raises(ConfigError, match="metrics must have names"):
        Evidence([Metric("q"), Metric("q")], ["a"])
    with pytest.raises(ValueError, match="version"):
        Evidence.from_dict({"version": 0})
