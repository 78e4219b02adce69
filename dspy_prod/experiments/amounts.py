"""Bets on amounts, such as cost and latency.

The arm is guessed from the logarithm, which is fast, and works from the first unit on. Then means of capped amounts are
compared, where rare dear units hide, or the shares of units that are slow. Either may show harm; only the mean or the
share can show that there is none.
"""

from __future__ import annotations

import math
from bisect import insort
from typing import Any, Final

from dspy_prod.experiments.betting import ArmBet, LinearBet
from dspy_prod.experiments.comparing import Comparison, guess, stake_on_ratio, stake_on_spread
from dspy_prod.experiments.expecting import Expected
from dspy_prod.options.metrics import Metric

CAPPED_BY: Final = 50
"""So many of control's first units fix the cap of amounts."""
CAP: Final = 10.0
"""It is so many times their mean."""
TAILED_FROM: Final = 20
"""After so many of control's units there is a quantile beyond which a tail begins."""
TAILED_BY: Final = 2_000
"""It follows control's units up to so many, and then stays."""
SLOWER: Final = 1.25
"""A typical amount this many times control's is harm, too, where a tail is compared."""
FARTHEST: Final = 4.0
"""Standard deviations beyond which an amount's logarithm does not surprise more."""
LEAST: Final = 1e-12
"""An amount of nothing has the logarithm of this."""


class _Amounts(Comparison):
    """Of amounts from 0 on, by their logarithms."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        self._logs = Expected(0.0, 1.0)
        self._origin: float | None = None

    def _guess_from_log(
        self, candidate: bool, propensity: float, value: float, tenant: str | None, tolerated: float
    ) -> None:
        """Guess the arm by how large the amount is, after the candidate's was changed to what is tolerated."""
        logarithm = math.log(max(value, LEAST))
        if self._origin is None:
            self._origin = logarithm
        elif 0.0 < propensity < 1.0:
            above = logarithm - self._origin - self._logs.mean(tenant)
            sd = math.sqrt(self._logs.variance)
            if self.better is not None:
                guess(self.better, candidate, propensity, _bounded(self._sign * above / sd))
            shifted = above - (tolerated if candidate else 0.0)
            guess(self.worse, candidate, propensity, _bounded(-self._sign * shifted / sd))
        self._logs.see(logarithm - self._origin, tenant)

    def _seen(self) -> Any:
        return {"origin": self._origin, "logs": self._logs.state()}

    def _restore(self, seen: Any) -> None:
        self._origin = None if seen["origin"] is None else float(seen["origin"])
        self._logs.restore(seen["logs"])


class Ratios(_Amounts):
    """Of amounts by their ratio. Means are compared below a cap that control's first units fix."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        self._ratio = 1.0 + (metric.margin or 0.0) * (1.0 if metric.direction == "lower" else -1.0)
        self._tolerated = math.log(self._ratio) if metric.role == "guardrail" else 0.0
        self._shares = Expected(1.0 / CAP, 1.0 / CAP)
        self._cap = metric.cap
        self._first: list[float] = [0, 0.0]

    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        return (ArmBet(), LinearBet())

    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        self._guess_from_log(candidate, propensity, value, tenant, self._tolerated)
        if self._cap is None:
            if not candidate:
                self._first = [self._first[0] + 1, self._first[1] + value]
                if self._first[0] >= CAPPED_BY and self._first[1] > 0:
                    self._cap = CAP * self._first[1] / self._first[0]
            return
        share = min(value / self._cap, 1.0)
        if 0.0 < propensity < 1.0:
            expected, variance, sign = self._shares.mean(tenant), self._shares.variance, self._sign
            ratio = self._ratio
            stake_on_ratio(self.worse.bets[1], candidate, propensity, share, expected, ratio, variance, -sign)
            if self.no_worse is not None:
                stake_on_ratio(self.no_worse.bets[0], candidate, propensity, share, expected, ratio, variance, sign)
        self._shares.see(share, tenant)

    def _seen(self) -> Any:
        return {**super()._seen(), "shares": self._shares.state(), "cap": self._cap, "first": list(self._first)}

    def _restore(self, seen: Any) -> None:
        super()._restore(seen)
        self._shares.restore(seen["shares"])
        self._cap = None if seen["cap"] is None else float(seen["cap"])
        self._first = list(seen["first"])


class Tails(_Amounts):
    """Of the share of amounts beyond a quantile of control's.

    The quantile is that of control's units so far, so that it comes closer and closer to the true one, and a bet is
    fair against what was known before it. Only amounts beyond it are kept.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        assert metric.tail is not None
        self._quantile, self._margin = metric.tail, metric.margin or 0.0
        self._tolerated = math.log(SLOWER) if metric.role == "guardrail" else 0.0
        self._expected = Expected(metric.tail, metric.tail * (1.0 - metric.tail))
        self._controls, self._largest, self._threshold = 0, list[float](), math.nan

    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        return (ArmBet(), LinearBet())

    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        self._guess_from_log(candidate, propensity, value, tenant, self._tolerated)
        if self._controls >= TAILED_FROM:
            good = 1.0 if value <= self._threshold else 0.0
            if 0.0 < propensity < 1.0:
                expected, variance, margin = self._expected.mean(tenant), self._expected.variance, self._margin
                bet = self.worse.bets[1]
                stake_on_spread(bet, candidate, propensity, 1.0 - good, 1.0 - expected, -margin, variance)
                if self.no_worse is not None:
                    stake_on_spread(self.no_worse.bets[0], candidate, propensity, good, expected, margin, variance)
            self._expected.see(good, tenant)
        if not candidate and self._controls < TAILED_BY:
            self._follow(value)

    def _follow(self, value: float) -> None:
        """Take one of control's amounts into the quantile."""
        self._controls += 1
        insort(self._largest, value)
        if len(self._largest) > beyond(self._quantile, TAILED_BY):
            del self._largest[0]
        self._threshold = self._largest[-beyond(self._quantile, self._controls)]

    def _seen(self) -> Any:
        seen = {"expected": self._expected.state(), "controls": self._controls, "largest": list(self._largest)}
        return {**super()._seen(), **seen}

    def _restore(self, seen: Any) -> None:
        super()._restore(seen)
        self._expected.restore(seen["expected"])
        self._controls, self._largest = int(seen["controls"]), [float(each) for each in seen["largest"]]
        if self._controls:
            self._threshold = self._largest[-beyond(self._quantile, self._controls)]


def beyond(quantile: float, count: int) -> int:
    """Of so many amounts the quantile is the one in this place, counted from the largest, which is 1."""
    return count - math.ceil(quantile * count) + 1


def _bounded(surprise: float) -> float:
    return min(max(surprise, -FARTHEST), FARTHEST)
