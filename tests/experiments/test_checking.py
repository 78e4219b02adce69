"""What an experiment may be made of, and told: refused with the field and the remedy where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod import ConfigError, Experiment, Metric, Rollout
from dspy_prod.stores.memory import MemoryStore
from tests.experiments.conftest import Triage


def two(**more: Any) -> Experiment:
    variants = {"control": Triage(), "new": Triage("Think first.")}
    return Experiment("e", **{"variants": variants, "store": MemoryStore(), **more})


RAIL: dict[str, Any] = {"role": "guardrail", "margin": 0.02}


@pytest.mark.parametrize("place", ["metrics", "guardrails"])
@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        (Metric("latency", direction="lower"), "seconds.*direction='lower', role='guardrail'.*tail=0.95"),
        (Metric("latency", relative=True, **RAIL), "lower is better"),
        (Metric("cost"), "dollars.*direction='lower', role='guardrail', margin=0.1, relative=True"),
        (Metric("cost", relative=True), "lower is better"),
        (Metric("cost", direction="lower", tail=0.95, **RAIL), "compared as a ratio"),
        (Metric("error_rate", **RAIL), "a share from 0 to 1, and lower is better"),
        (Metric("fallback_rate", direction="lower", relative=True, **RAIL), "a share from 0 to 1"),
        (Metric("error_rate", direction="lower", bounds=(0, 0.5), **RAIL), "give a metric of your own another name"),
    ],
)
def test_what_calls_tell_is_declared_as_what_it_is(metric: Metric, remedy: str, place: str) -> None:
    """Seconds are no scores from 0 to 1, and dearer is not better."""
    with pytest.raises(ConfigError, match=f"Metric.'{metric.name}'.*{remedy}"):
        two(**{place: [metric]})


@pytest.mark.parametrize(
    "metric",
    [
        Metric("latency", direction="lower", relative=True),
        Metric("latency", direction="lower", tail=0.9, missing="exclude", **RAIL),
        Metric("cost", direction="lower", relative=True),
        Metric("error_rate", direction="lower"),
    ],
)
def test_a_built_in_may_be_what_a_variant_wins_by(metric: Metric) -> None:
    assert two(metrics=[metric]).metrics[0] == metric


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"refresh": "2"}, "refresh='2' is a number of seconds, 0 or more"),
        *(({"refresh": value}, "refresh=.* is a number of seconds") for value in (None, NAN, INF, -1, True, 10**400)),
        ({"assign": "new"}, "assign='new': give a function"),
        ({"variants": None}, "variants= takes what is compared"),
        ({"variants": {}}, "variants= takes what is compared"),
        ({"variants": [Triage(), Triage()]}, "variants= takes what is compared"),
        ({"rollout": {"stages": (0.1,)}}, "rollout=.*give a dspy_prod.Rollout"),
        ({"rollout": (0.1, 0.5)}, "rollout=.*give a dspy_prod.Rollout"),
        ({"overrides": ["u1"]}, "overrides=.*give variants by unit"),
        ({"overrides": {1: "new"}}, "overrides=.*a unit is a text.*'1'"),
        ({"judges": [max]}, "judges=.*each by its metric"),
        *(({"holdout": value}, "holdout=.* must be a share") for value in ("0.1", True, NAN, None, 1)),
        *(({"alpha": value}, "alpha=.* must lie between 0 and 0.5") for value in ("0.05", True, NAN, None, 0)),
        ({"metrics": Metric("ok")}, "metrics= takes a list"),
        ({"metrics": None}, "metrics= takes a list"),
        ({"guardrails": Metric("ok")}, "guardrails= takes a list"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_the_remedy(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        two(**options)


@pytest.mark.parametrize("name", ["self", "unit", "trace", "at", "id"])
def test_a_metric_is_named_so_that_it_can_be_recorded(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Metric.'{name}'. cannot be recorded.*'{name}_score'"):
        two(metrics=[Metric(name)])


@pytest.mark.parametrize(
    ("told", "remedy"),
    [
        ({}, "say what became of it"),
        ({"ok": 10**400}, "ok="),
        ({"ok": 1, "at": 10**400}, "at=.*seconds since the epoch"),
    ],
)
def test_what_cannot_be_recorded_is_refused(told: dict[str, Any], remedy: str) -> None:
    exp = two(metrics=[Metric("ok")])
    with pytest.raises(ConfigError, match=remedy):
        exp.record("u1", **told)


def test_a_unit_and_a_gate_of_another_kind_are_refused() -> None:
    exp: Any = two(rollout=Rollout())
    with pytest.raises(ConfigError, match=r"unit=5 must be text, as str\(5\)"):
        exp.assign(5)
    with pytest.raises(ConfigError, match=r"gate='x': give what evaluate returned"):
        exp.start(gate="x")
    assert exp.state == "created"


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"baseline": 0.8}, "baseline=0.8: give a number for each metric"),
        ({"baseline": {"ok": "0.8"}}, "baseline=.*mean and standard deviation"),
        ({"baseline": {"ok": (0.8,)}}, "baseline=.*mean and standard deviation"),
        ({"power": "x"}, "power='x' must lie between 0 and 1"),
        ({"power": True}, "power=True must lie"),
        ({"effect": "x"}, "effect=.*give a number"),
        ({"effect": {"ok": None}}, "effect=.*give a number"),
        ({"users_per_day": INF}, "users_per_day=inf must be over 0"),
        ({"users_per_day": 10**400}, "users_per_day=1000.* must be over 0"),
        ({"baseline": {"ok": NAN}}, "baseline=.*nan"),
        ({"users_per_day": True}, "users_per_day=True must be over 0"),
    ],
)
def test_a_plan_of_no_numbers_is_refused(given: dict[str, Any], remedy: str) -> None:
    exp = two(metrics=[Metric("ok")])
    with pytest.raises(ConfigError, match=remedy):
        exp.plan(**{"users_per_day": 800, **given})
