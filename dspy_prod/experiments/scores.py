"""Bets on scores: right or wrong, failed or not, ratings. The arm is guessed from the score for "better" and "worse";
means are compared for margins."""

from __future__ import annotations

from typing import Any

from dspy_prod.experiments.betting import ArmBet, LinearBet
from dspy_prod.experiments.comparing import Comparison, guess, stake_on_spread
from dspy_prod.experiments.expecting import Expected
from dspy_prod.options.metrics import Metric


class Scores(Comparison):
    """Of scores between bounds, turned so that 1 is best and 0 worst."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        self._expected = Expected(0.5, 0.25)
        self._low, self._range = metric.bounds[0], metric.bounds[1] - metric.bounds[0]
        self._margin = (metric.margin or 0.0) / self._range

    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        return (ArmBet(),) if self.metric.role == "success" else (LinearBet(),)

    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        good = (value - self._low) / self._range
        good = good if self._sign > 0 else 1.0 - good
        if 0.0 < propensity < 1.0:
            self._wager(candidate, propensity, good, tenant)
        self._expected.see(good, tenant)

    def _wager(self, candidate: bool, propensity: float, good: float, tenant: str | None) -> None:
        expected, variance, margin = self._expected.mean(tenant), self._expected.variance, self._margin
        if self.better is not None:
            guess(self.better, candidate, propensity, good - expected)
            guess(self.worse, candidate, propensity, expected - good)
        else:
            bet = self.worse.bets[0]
            stake_on_spread(bet, candidate, propensity, 1.0 - good, 1.0 - expected, -margin, variance)
        if self.no_worse is not None:
            stake_on_spread(self.no_worse.bets[0], candidate, propensity, good, expected, margin, variance)

    def _seen(self) -> Any:
        return self._expected.state()

    def _restore(self, seen: Any) -> None:
        self._expected.restore(seen)
