"""The frozen options of every policy. They validate at construction and refuse unknown or impossible values.

Durations are seconds (float) or a `timedelta`. Prices are USD per million tokens, as on price lists.
Behaviour lives elsewhere (`policies/`, `pipeline/`); nothing here sleeps, counts or does I/O. A new option, or a check
of one, belongs here: of how a call travels in `calls`, of what it may cost in `money`; of experiments in `experiments`
and of what they measure in `metrics`, which are imported by who needs them.
"""

from __future__ import annotations

from dspy_prod.options.base import Options
from dspy_prod.options.calls import PRIORITIES, Cache, CircuitBreaker, RateLimit, Retry
from dspy_prod.options.money import Budget, Caps, Price

__all__ = [
    "PRIORITIES",
    "Budget",
    "Cache",
    "Caps",
    "CircuitBreaker",
    "Options",
    "Price",
    "RateLimit",
    "Retry",
]

for _kind in (Options, Budget, Cache, Caps, CircuitBreaker, Price, RateLimit, Retry):
    _kind.__module__ = __name__  # by which pickles, also those of other releases, name them
del _kind
