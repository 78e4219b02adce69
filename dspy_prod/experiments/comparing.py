"""A candidate compared with control on one metric, unit by unit: what is bet on which of its values.

Scores and shares: the arm is guessed from the score for "better" and "worse", means are compared for margins. Amounts
such as cost: the arm is guessed from the logarithm, which is fast, and means of capped amounts are compared, where rare
dear units hide; either may show harm, only the mean can show that there is none. Tails such as a slow share: a score,
once the quantile is known, and the logarithm from the first unit on.

Only the units of these two arms count, with the probability of the candidate among the two.
"""

from __future__ import annotations

import math
from typing import Any, Final

from dspy_prod.experiments.betting import ArmBet, Claim, LinearBet, ProofBet, ratio_gain, spread_gain
from dspy_prod.experiments.expecting import Expected
from dspy_prod.options.metrics import Metric

CAPPED_BY: Final = 50
"""So many of control's first units fix the cap of amounts."""
CAP: Final = 10.0
"""It is so many times their mean."""
TAILED_BY: Final = 200
"""So many of control's first units fix the quantile beyond which a tail begins."""
SLOWER: Final = 1.25
"""A typical amount this many times control's is harm, too, where a tail is compared."""
FARTHEST: Final = 4.0
"""Standard deviations beyond which an amount's logarithm does not surprise more."""
LEAST: Final = 1e-12
"""An amount of nothing has the logarithm of this."""


class Comparison:
    """One metric of one candidate against control. Made by `compared`; feed each unit once, in order of exposure.

    Args:
        metric: what is compared.

    Attributes:
        better: the claim that the candidate is better at all, of a success metric.
        worse: that it is worse: at all for a success metric, by more than the margin for a guardrail.
        no_worse: that it is not worse by the margin, where the metric has one.
        more_answers, fewer_answers: that units answer more or less often than control's, where missing ones are left
            out.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._sign = 1.0 if metric.direction == "higher" else -1.0
        success, margin = metric.role == "success", metric.margin is not None
        self.better = Claim(*self._better()) if success else None
        self.worse = Claim(*self._worse())
        self.no_worse = Claim(ProofBet()) if margin else None
        excluding = metric.missing == "exclude"
        self.more_answers = Claim(ArmBet()) if excluding else None
        self.fewer_answers = Claim(ArmBet()) if excluding else None
        self._answers = Expected(0.5, 0.25)

    def unit(self, candidate: bool, propensity: float, value: float | None, tenant: str | None = None) -> None:
        """A unit whose window is over.

        Args:
            candidate: whether it had the candidate, not control.
            propensity: how probable that was among the two; at 0 or 1 there is nothing to bet on.
            value: its outcome; None if nothing was recorded.
            tenant: whose unit it is, to expect what is usual there.

        Raises:
            ValueError: the metric cannot have that value, or the propensity rules out the arm.
        """
        if not 0.0 <= propensity <= 1.0 or propensity == (0.0 if candidate else 1.0):
            raise ValueError(f"propensity={propensity} rules out the arm that the unit had")
        missing = self.metric.missing
        if value is None and missing != "exclude":
            value = float(missing)
        checked = None if value is None else self.metric.checked(value)
        if self.more_answers is not None and self.fewer_answers is not None:
            answered = 0.0 if checked is None else 1.0
            if 0.0 < propensity < 1.0:
                surprise = answered - self._answers.mean(tenant)
                for claim, sign in ((self.more_answers, 1.0), (self.fewer_answers, -1.0)):
                    _guess(claim, candidate, propensity, sign * surprise)
                    claim.settle()
            self._answers.see(answered, tenant)
        if checked is not None:
            self._bet(candidate, propensity, checked, tenant)
            for each in (self.better, self.worse, self.no_worse):
                if each is not None:
                    each.settle()

    @property
    def claims(self) -> dict[str, Claim]:
        """Those there are, by name."""
        names = ("better", "worse", "no_worse", "more_answers", "fewer_answers")
        return {name: claim for name in names if (claim := getattr(self, name)) is not None}

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "claims": {name: claim.state() for name, claim in self.claims.items()},
            "answers": self._answers.state(),
            "seen": self._seen(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it is of another metric or release.
        """
        if set(state["claims"]) != set(self.claims):
            raise ValueError(f"the checkpoint of {self.metric.name!r} is of another metric: {sorted(state['claims'])}")
        for name, claim in self.claims.items():
            claim.restore(state["claims"][name])
        self._answers.restore(state["answers"])
        self._restore(state["seen"])

    def _better(self) -> tuple[ArmBet | LinearBet, ...]:
        return (ArmBet(),)

    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        raise NotImplementedError

    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        raise NotImplementedError

    def _seen(self) -> Any:
        raise NotImplementedError

    def _restore(self, seen: Any) -> None:
        raise NotImplementedError


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
            _guess(self.better, candidate, propensity, good - expected)
            _guess(self.worse, candidate, propensity, expected - good)
        else:
            bet = self.worse.bets[0]
            _stake_on_spread(bet, candidate, propensity, 1.0 - good, 1.0 - expected, -margin, variance)
        if self.no_worse is not None:
            _stake_on_spread(self.no_worse.bets[0], candidate, propensity, good, expected, margin, variance)

    def _seen(self) -> Any:
        return self._expected.state()

    def _restore(self, seen: Any) -> None:
        self._expected.restore(seen)


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
                _guess(self.better, candidate, propensity, _bounded(self._sign * above / sd))
            shifted = above - (tolerated if candidate else 0.0)
            _guess(self.worse, candidate, propensity, _bounded(-self._sign * shifted / sd))
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
            _stake_on_ratio(self.worse.bets[1], candidate, propensity, share, expected, ratio, variance, -sign)
            if self.no_worse is not None:
                _stake_on_ratio(self.no_worse.bets[0], candidate, propensity, share, expected, ratio, variance, sign)
        self._shares.see(share, tenant)

    def _seen(self) -> Any:
        return {**super()._seen(), "shares": self._shares.state(), "cap": self._cap, "first": list(self._first)}

    def _restore(self, seen: Any) -> None:
        super()._restore(seen)
        self._shares.restore(seen["shares"])
        self._cap = None if seen["cap"] is None else float(seen["cap"])
        self._first = list(seen["first"])


class Tails(_Amounts):
    """Of the share of amounts beyond a quantile that control's first units fix."""

    def __init__(self, metric: Metric) -> None:
        super().__init__(metric)
        assert metric.tail is not None
        self._quantile, self._margin = metric.tail, metric.margin or 0.0
        self._tolerated = math.log(SLOWER) if metric.role == "guardrail" else 0.0
        self._expected = Expected(metric.tail, metric.tail * (1.0 - metric.tail))
        self._first: list[float] = []
        self._threshold: float | None = None

    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        return (ArmBet(), LinearBet())

    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        self._guess_from_log(candidate, propensity, value, tenant, self._tolerated)
        if self._threshold is None:
            if not candidate:
                self._first.append(value)
                if len(self._first) >= TAILED_BY:
                    self._threshold, self._first = sorted(self._first)[math.ceil(self._quantile * TAILED_BY) - 1], []
            return
        good = 1.0 if value <= self._threshold else 0.0
        if 0.0 < propensity < 1.0:
            expected, variance, margin = self._expected.mean(tenant), self._expected.variance, self._margin
            bet = self.worse.bets[1]
            _stake_on_spread(bet, candidate, propensity, 1.0 - good, 1.0 - expected, -margin, variance)
            if self.no_worse is not None:
                _stake_on_spread(self.no_worse.bets[0], candidate, propensity, good, expected, margin, variance)
        self._expected.see(good, tenant)

    def _seen(self) -> Any:
        seen = {"expected": self._expected.state(), "first": list(self._first), "threshold": self._threshold}
        return {**super()._seen(), **seen}

    def _restore(self, seen: Any) -> None:
        super()._restore(seen)
        self._expected.restore(seen["expected"])
        self._first = [float(each) for each in seen["first"]]
        self._threshold = None if seen["threshold"] is None else float(seen["threshold"])


def compared(metric: Metric) -> Comparison:
    """The comparison that a metric asks for, before its first unit."""
    kind = Ratios if metric.relative else Tails if metric.tail is not None else Scores
    return kind(metric)


def _bounded(surprise: float) -> float:
    return min(max(surprise, -FARTHEST), FARTHEST)


def _guess(claim: Claim, candidate: bool, propensity: float, surprise: float) -> None:
    bet = claim.bets[0]
    assert isinstance(bet, ArmBet)
    bet.bet(candidate, propensity, surprise)


def _stake_on_spread(
    bet: Any, candidate: bool, propensity: float, outcome: float, expected: float, margin: float, variance: float
) -> None:
    gain = spread_gain(candidate, propensity, outcome, expected, margin)
    worst = min(
        spread_gain(True, propensity, 0.0, expected, margin), spread_gain(False, propensity, 1.0, expected, margin)
    )
    bet.bet(gain, worst, abs(margin) / variance)


def _stake_on_ratio(
    bet: Any, candidate: bool, propensity: float, share: float, expected: float, ratio: float, variance: float,
    sign: float,
) -> None:  # fmt: skip
    """`sign` is 1 where a candidate that is higher wins, or -1 where one that is lower does.

    With `direction="lower"`, harm is higher amounts (sign 1).
    """
    gain = sign * ratio_gain(candidate, propensity, share, expected, ratio)
    ends = ((True, 0.0), (True, 1.0), (False, 0.0), (False, 1.0))
    worst = min(sign * ratio_gain(arm, propensity, end, expected, ratio) for arm, end in ends)
    bet.bet(gain, worst, expected * abs(ratio - 1.0) / variance)
