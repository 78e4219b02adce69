"""Which comparison a metric asks for."""

from __future__ import annotations

from dspy_prod.experiments.amounts import Ratios, Tails
from dspy_prod.experiments.comparing import Comparison
from dspy_prod.experiments.scores import Scores
from dspy_prod.options.metrics import Metric


def compared(metric: Metric) -> Comparison:
    """The comparison that a metric asks for, before its first unit."""
    kind = Ratios if metric.relative else Tails if metric.tail is not None else Scores
    return kind(metric)
