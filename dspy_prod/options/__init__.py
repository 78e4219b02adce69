"""The frozen options of every policy. They validate at construction and refuse unknown or impossible values.

Durations are seconds (float) or a `timedelta`. Prices are USD per million tokens, as on price lists.
Behaviour lives elsewhere (`policies/`, `pipeline/`); nothing here sleeps, counts or does I/O. A new option, or a check
of one, belongs here: of how a call travels in `calls`, of what it may cost in `money`, of experiments in `experiments`,
of what they measure in `metrics`.
"""

from __future__ import annotations

from dspy_prod.options.base import Options
from dspy_prod.options.calls import PRIORITIES, Cache, CircuitBreaker, RateLimit, Retry
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric
from dspy_prod.options.money import Budget, Caps, Price

__all__ = [
    "PRIORITIES", "Budget", "Cache", "Caps", "CircuitBreaker", "Metric", "Options", "Price", "RateLimit", "Retry",
    "Rollout",
]  # fmt: skip

for _kind in (Options, Budget, Cache, Caps, CircuitBreaker, Metric, Price, RateLimit, Retry, Rollout):
    _kind.__module__ = __name__  # by which pickles, also those of other releases, name them
del _kind
