"""The quantile beyond which a tail begins is control's so far, and little is kept to know it."""

from __future__ import annotations

import json
import math
import random

import pytest

from dspy_prod.experiments.amounts import TAILED_BY, TAILED_FROM, Tails, beyond
from dspy_prod.options.metrics import Metric, latency


@pytest.mark.parametrize("tail", [0.5, 0.9, 0.95, 0.99])
def test_the_quantile_is_that_of_all_of_controls_units(tail: float) -> None:
    """To the last one that moves it; of the candidate's none does; a restart changes nothing."""
    draw, metric = random.Random(4), Metric("took", direction="lower", tail=tail, role="guardrail", margin=0.02)
    comparison, control = Tails(metric), list[float]()
    for unit in range(2 * TAILED_BY + 300):
        value, candidate = draw.lognormvariate(0, 1), unit % 2 == 1
        comparison.unit(candidate, 0.5, value)
        if not candidate:
            control.append(value)
        if unit % 97 == 0:
            whole = sorted(control[:TAILED_BY])
            assert comparison._threshold == whole[math.ceil(tail * len(whole)) - 1]
            again = Tails(metric)
            again.restore(json.loads(json.dumps(comparison.state())))
            assert again.state() == comparison.state()
            comparison = again
    assert len(comparison._largest) == beyond(tail, TAILED_BY)


def test_nothing_is_staked_on_a_quantile_of_a_few() -> None:
    comparison = Tails(latency(missing=0.0))
    for unit in range(2 * TAILED_FROM):
        assert comparison.worse.bets[1].wealth == pytest.approx(1.0)
        comparison.unit(unit % 2 == 1, 0.5, 1.0)
    comparison.unit(True, 0.5, 2.0)
    assert comparison.worse.bets[1].wealth > 1
