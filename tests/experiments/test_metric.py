"""A metric is checked when it is made; what is impossible is refused with the field and the remedy."""

from __future__ import annotations

import datetime as dt
import pickle
from typing import Any

import pytest

from dspy_prod.errors import ConfigError
from dspy_prod.options.metrics import Metric, cost, error_rate, fallback_rate, guardrails, latency


@pytest.mark.parametrize(
    ("window", "seconds"),
    [(0, 0), (90, 90), ("45s", 45), ("30m", 1_800), ("12h", 43_200), ("3d", 259_200), (" 1.5 d ", 129_600),
     ("2w", 1_209_600), (dt.timedelta(hours=1), 3_600)],
)  # fmt: skip
def test_windows_are_seconds_however_they_are_written(window: Any, seconds: float) -> None:
    """Numbers, timedeltas and short words."""
    assert Metric("resolved", window=window).window == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "direction: must be 'higher' or 'lower'"),
        ({"margin": 0}, "margin"),
        ({"margin": 1.0}, "margin=1 accepts everything: scores differ by 1 at most"),
        ({"margin": True}, "margin"),
        ({"role": "guardrail"}, "margin is missing: a guardrail must say how much worse is acceptable"),
        ({"role": "guard", "margin": 0.1}, "did you mean 'guardrail'"),
        ({"window": "3 days"}, "such as '30m', '12h' or '3d'"),
        ({"window": -1}, "window"),
        ({"bounds": (1, 5)}, "missing=0 is no value that the metric can have.*missing=1, or missing='exclude'"),
        ({"bounds": (1, 1)}, "bounds are the least and the largest score"),
        ({"bounds": (0, float("inf"))}, "bounds are the least"),
        ({"missing": "drop"}, "missing"),
        ({"relative": True, "bounds": (0, 9)}, "bounds are for scores"),
        ({"relative": True, "tail": 0.95, "direction": "lower"}, "exclude each other"),
        ({"relative": True, "margin": 1.0}, "accepts losing everything"),
        ({"cap": 3.0}, "cap bounds amounts; set relative=True"),
        ({"tail": 0.95}, "set direction='lower'"),
        ({"tail": 0.3, "direction": "lower"}, "tail"),
        ({"judge": "yes"}, "judge"),
        ({"guard": 1}, "is no option of Metric"),
    ],
)
def test_what_is_impossible_is_refused(options: dict[str, Any], message: str) -> None:
    """By the name of the field, with what to do instead."""
    with pytest.raises(ConfigError, match=message):
        Metric("resolved", **options)


def test_the_name_is_needed_and_may_be_given_either_way() -> None:
    """First, or by keyword, as when options are read from a file."""
    assert Metric("resolved") == Metric(name="resolved") == Metric.model_validate({"name": "resolved"})
    with pytest.raises(ConfigError, match="name: is missing"):
        Metric()
    with pytest.raises(ConfigError, match="name"):
        Metric("")


def test_metrics_are_frozen_and_survive_json_and_pickle() -> None:
    """A checkpoint holds them; a copy is checked."""
    for metric in (*guardrails(), Metric("stars", bounds=(1, 5), missing="exclude", judge="trusted", window="3d")):
        assert Metric.model_validate(metric.model_dump(mode="json")) == metric
        assert pickle.loads(pickle.dumps(metric)) == metric
        assert hash(metric) == hash(metric.model_copy())
    with pytest.raises(ConfigError, match="does not change"):
        error_rate().margin = 0.1
    assert error_rate().model_copy(update={"margin": 0.05}).margin == 0.05
    with pytest.raises(ConfigError, match="margin is missing"):
        error_rate().model_copy(update={"margin": None})


def test_the_guardrails_of_every_experiment() -> None:
    """Two points of errors, of fallbacks and of slow units; ten per cent of cost."""
    found = {metric.name: metric for metric in guardrails()}
    assert {name: metric.margin for name, metric in found.items()} == {
        "error_rate": 0.02, "fallback_rate": 0.02, "cost": 0.10, "latency": 0.02,
    }  # fmt: skip
    assert all(metric.role == "guardrail" and metric.direction == "lower" for metric in found.values())
    assert found["cost"].relative
    assert found["latency"].tail == 0.95
    assert cost(0.2, cap=1.0).cap == 1.0
    assert latency(tail=0.99).tail == 0.99
    assert fallback_rate(role="success").role == "success"


def test_a_value_is_checked_against_the_metric() -> None:
    """Scores within bounds, amounts from 0 on, numbers only."""
    assert Metric("stars", bounds=(1, 5), missing=1).checked(4) == 4.0
    assert cost().checked(12.5) == 12.5
    for metric, value in ((Metric("q"), 1.2), (Metric("q"), float("nan")), (cost(), -1), (latency(), float("inf"))):
        with pytest.raises(ValueError, match="scale it, or declare it otherwise"):
            metric.checked(value)
