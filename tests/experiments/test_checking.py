"""What an experiment may be made of, and told: refused with the field and the remedy where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod import ConfigError, Experiment, Metric
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
