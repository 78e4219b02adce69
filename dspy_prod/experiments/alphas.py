"""How the probability of a wrong decision is shared out, so that all looks at all metrics keep to one bound.

Of `alpha` (0.05), two fifths may go to a false "better", split over success metrics; three fifths to a false rollback,
half of it on success metrics, half on guardrails. To be promoted a candidate must be proven no worse on every metric
with a margin: there each proof has all of `alpha`, since a single one that is right prevents the promotion
(intersection-union; Schultzberg, Ankargren and Franberg, "Risk-aware product decisions in A/B tests with multiple
metrics", 2024). All of it is split over candidates (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspy_prod.errors import ConfigError
from dspy_prod.options.metrics import Metric

MOST_CANDIDATES: Final = 8
PROMOTING: Final = 0.4
"""Of alpha, on candidates that are not better."""
ROLLING_BACK: Final = 0.6
"""Of alpha, on candidates that are not worse."""


@dataclass(frozen=True)
class Alphas:
    """What each claim about a candidate needs: `1 / alpha` is the wealth at which it is proven.

    Attributes:
        better: for each success metric.
        worse_success, worse_guardrail: for each metric of that role.
        no_worse: for each metric with a margin.
    """

    better: float
    worse_success: float
    worse_guardrail: float
    no_worse: float

    def worse(self, metric: Metric) -> float:
        """Of the claim that the candidate is worse on it."""
        return self.worse_success if metric.role == "success" else self.worse_guardrail


def alphas(metrics: Sequence[Metric], candidates: int, alpha: float = 0.05) -> Alphas:
    """Share out `alpha`.

    Raises:
        ConfigError: it is no probability below a half, there is no metric or candidate, or more than 8 candidates.
    """
    if not 0 < alpha < 0.5:
        raise ConfigError(f"alpha={alpha!r} must lie between 0 and 0.5, such as 0.05")
    if not metrics:
        raise ConfigError("metrics is empty: an experiment needs at least one, e.g. Metric('resolved')")
    if not 1 <= candidates <= MOST_CANDIDATES:
        raise ConfigError(
            f"{candidates} candidates: an experiment compares 1 to {MOST_CANDIDATES} with control; with more, each "
            "would need so many units that a comparison on examples should choose among them first"
        )
    success = sum(metric.role == "success" for metric in metrics)
    guardrails = len(metrics) - success
    back, each = ROLLING_BACK * alpha / candidates, PROMOTING * alpha / candidates
    both = 2 if success and guardrails else 1
    return Alphas(
        better=each / max(success, 1),
        worse_success=back / both / max(success, 1),
        worse_guardrail=back / both / max(guardrails, 1),
        no_worse=alpha / candidates,
    )
