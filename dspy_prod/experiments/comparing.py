"""A candidate compared with control on one metric, unit by unit: the claims there are, and how bets on them are placed.

What is bet on which values is in `scores` and `amounts`. Only the units of these two arms count, with the probability
of the candidate among the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dspy_prod.experiments.betting import ArmBet, Claim, LinearBet, ProofBet, ratio_gain, spread_gain
from dspy_prod.experiments.expecting import Expected
from dspy_prod.options.metrics import Metric


class Comparison(ABC):
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
        excluding = metric.missing == "exclude" and not metric.some
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
        self.counted(candidate, propensity, None if value is None else self.metric.checked(value), tenant)

    def counted(self, candidate: bool, propensity: float, checked: float | None, tenant: str | None = None) -> None:
        """The same of a value that was checked, or is missing and left out."""
        if self.more_answers is not None and self.fewer_answers is not None:
            answered = 0.0 if checked is None else 1.0
            if 0.0 < propensity < 1.0:
                surprise = answered - self._answers.mean(tenant)
                for claim, sign in ((self.more_answers, 1.0), (self.fewer_answers, -1.0)):
                    guess(claim, candidate, propensity, sign * surprise)
                    claim.settle()
            self._answers.see(answered, tenant)
        if checked is not None:
            self._bet(candidate, propensity, checked, tenant)
            self.worse.settle()
            if self.better is not None:
                self.better.settle()
            if self.no_worse is not None:
                self.no_worse.settle()

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

    @abstractmethod
    def _worse(self) -> tuple[ArmBet | LinearBet, ...]:
        """The bets on "worse", which share its money evenly."""

    @abstractmethod
    def _bet(self, candidate: bool, propensity: float, value: float, tenant: str | None) -> None:
        """Bet on one unit's value."""

    @abstractmethod
    def _seen(self) -> Any:
        """What the bets go by, as JSON has it."""

    @abstractmethod
    def _restore(self, seen: Any) -> None:
        """Go on from `_seen`."""


def guess(claim: Claim, candidate: bool, propensity: float, surprise: float) -> None:
    """Bet on the arm, with a claim's first bet."""
    bet = claim.bets[0]
    assert isinstance(bet, ArmBet)
    bet.bet(candidate, propensity, surprise)


def stake_on_spread(
    bet: Any, candidate: bool, propensity: float, outcome: float, expected: float, margin: float, variance: float
) -> None:
    """Stake on "the candidate's mean is higher than control's less `margin`", of outcomes from 0 to 1."""
    gain = spread_gain(candidate, propensity, outcome, expected, margin)
    worst = min(
        spread_gain(True, propensity, 0.0, expected, margin), spread_gain(False, propensity, 1.0, expected, margin)
    )
    bet.bet(gain, worst, abs(margin) / variance)


def stake_on_ratio(
    bet: Any, candidate: bool, propensity: float, share: float, expected: float, ratio: float, variance: float,
    sign: float,
) -> None:  # fmt: skip
    """`sign` is 1 where a candidate that is higher wins, or -1 where one that is lower does.

    With `direction="lower"`, harm is higher amounts (sign 1).
    """
    gain = sign * ratio_gain(candidate, propensity, share, expected, ratio)
    worst = min(
        sign * ratio_gain(True, propensity, 0.0, expected, ratio),
        sign * ratio_gain(True, propensity, 1.0, expected, ratio),
        sign * ratio_gain(False, propensity, 0.0, expected, ratio),
        sign * ratio_gain(False, propensity, 1.0, expected, ratio),
    )
    bet.bet(gain, worst, expected * abs(ratio - 1.0) / variance)
