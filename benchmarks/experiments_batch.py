"""The comparisons of `dspy_prod.experiments` for many runs at once: the same formulas on arrays.

A test holds each against the original, unit by unit. Values are never missing here, and have no tenants.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dspy_prod.experiments.amounts import CAP, CAPPED_BY, FARTHEST, LEAST, SLOWER, TAILED_BY, TAILED_FROM, beyond
from dspy_prod.experiments.betting import LARGEST, SHARES, THETAS, ArmBet, LinearBet, ProofBet
from dspy_prod.options.metrics import Metric

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_THETAS: Final = np.array(THETAS)[:, None]
_SHARES: Final = np.array(SHARES)[:, None]


class Runs:
    """Arrays whose last axis is that of the runs, some of which end early."""

    def keep(self, which: Bools) -> None:
        """Go on with these runs alone."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.ndim:
                setattr(self, name, value[..., which])
            elif isinstance(value, Runs):
                value.keep(which)
            elif isinstance(value, list):
                for each in value:
                    each.keep(which)


class Claim(Runs):
    """Bets side by side; the wealth of each part is a row."""

    def __init__(self, runs: int, *kinds: type[ArmBet | LinearBet]) -> None:
        self.bets = [Bet(runs, kind) for kind in kinds]
        self.peak = np.ones(runs)

    def settle(self) -> None:
        """After the bets on a unit."""
        wealth = self.bets[0].wealth
        for bet in self.bets[1:]:
            wealth = wealth + bet.wealth
        np.maximum(self.peak, wealth / len(self.bets), out=self.peak)


class Bet(Runs):
    """Wealth of each part in each run."""

    def __init__(self, runs: int, kind: type[ArmBet | LinearBet]) -> None:
        self.wealths = np.repeat(np.array(kind.begin)[:, None], runs, axis=1)
        self.multiples = tuple(kind.multiples) if issubclass(kind, LinearBet) else ()

    @property
    def wealth(self) -> Floats:
        """Of the whole."""
        found: Floats = self.wealths.sum(axis=0)
        return found

    def grow(self, factor: Floats) -> None:
        """By what a unit brought."""
        self.wealths *= factor
        np.minimum(self.wealths, LARGEST, out=self.wealths)


def _open(propensity: Floats) -> Bools:
    return (propensity > 0) & (propensity < 1)


def guess(bet: Bet, candidate: Bools, propensity: Floats, surprise: Floats, other: Bet | None = None) -> None:
    """`ArmBet.bet` of all runs; `other` bets on the opposite surprise."""
    odds = np.exp(_THETAS * surprise)
    against = 1.0 - propensity
    bet.grow(np.where(candidate, odds, 1.0) / (against + propensity * odds))
    if other is not None:
        other.grow(np.where(candidate, 1.0, odds) / (against * odds + propensity))


def stake(bet: Bet, gain: Floats, worst: Floats, natural: Floats, betting: Bools) -> None:
    """`LinearBet.bet` of all runs that are `betting`."""
    safe = -1.0 / worst
    gain = np.where(betting, gain, 0.0)
    wealths, many = bet.wealths, len(bet.multiples)
    wealths[:many] *= 1.0 + np.minimum(np.array(bet.multiples)[:, None] * natural, SHARES[-1] * safe) * gain
    wealths[many:] *= 1.0 + _SHARES * (safe * gain)
    np.minimum(wealths, LARGEST, out=wealths)


class Expected(Runs):
    """`expecting.Expected` of all runs."""

    def __init__(self, runs: int, mean: float, variance: float) -> None:
        self._mean, self._variance = mean, variance
        self.count, self.total, self.squares = np.zeros(runs), np.zeros(runs), np.zeros(runs)

    @property
    def mean(self) -> Floats:
        return (self.total + self._mean) / (self.count + 1)

    def variance(self, mean: Floats) -> Floats:
        around = self.squares + self._mean * self._mean - (self.count + 1) * mean * mean
        return (np.maximum(around, 0.0) + self._variance) / (self.count + 1)

    def see(self, outcome: Floats, where: Bools | None = None) -> None:
        if where is None:
            self.count += 1
            self.total += outcome
            self.squares += outcome * outcome
        else:
            self.count += where
            self.total += np.where(where, outcome, 0.0)
            self.squares += np.where(where, outcome * outcome, 0.0)


class Comparison(Runs, ABC):
    """`comparing.Comparison` of all runs."""

    def __init__(self, metric: Metric, runs: int) -> None:
        self.metric, self.sign = metric, 1.0 if metric.direction == "higher" else -1.0
        success, amounts = metric.role == "success", metric.relative or metric.tail is not None
        self.better = Claim(runs, ArmBet) if success else None
        self.worse = Claim(runs, *((ArmBet, LinearBet) if amounts else (ArmBet,) if success else (LinearBet,)))
        self.no_worse = Claim(runs, ProofBet) if metric.margin is not None else None

    def unit(self, candidate: Bools, propensity: Any, value: Floats) -> None:
        """The next unit of each run."""
        self._bet(candidate, np.broadcast_to(np.asarray(propensity, float), value.shape), value)
        for claim in (self.better, self.worse, self.no_worse):
            if claim is not None:
                claim.settle()

    @abstractmethod
    def _bet(self, candidate: Bools, propensity: Floats, value: Floats) -> None:
        """Place the bets on the next unit of each run."""

    def _spread(
        self, candidate: Bools, propensity: Floats, good: Floats, expected: Expected, margin: float, worse: Bet | None,
        betting: Bools,
    ) -> None:  # fmt: skip
        mean = expected.mean
        natural = margin / expected.variance(mean)
        both = propensity * (1.0 - propensity) * margin
        centred = np.where(candidate, 1.0 - propensity, -propensity) * (good - mean)
        if worse is not None:
            worst = np.minimum(-(1.0 - propensity) * (1.0 - mean), -propensity * mean) - both
            stake(worse, -centred - both, worst, natural, betting)
        if self.no_worse is not None:
            worst = np.minimum(-(1.0 - propensity) * mean, -propensity * (1.0 - mean)) + both
            stake(self.no_worse.bets[0], centred + both, worst, natural, betting)


class Scores(Comparison):
    """`scores.Scores` of all runs."""

    def __init__(self, metric: Metric, runs: int) -> None:
        super().__init__(metric, runs)
        self.expected = Expected(runs, 0.5, 0.25)
        self.low, self.range = metric.bounds[0], metric.bounds[1] - metric.bounds[0]

    def _bet(self, candidate: Bools, propensity: Floats, value: Floats) -> None:
        good = (value - self.low) / self.range
        good = good if self.sign > 0 else 1.0 - good
        margin = (self.metric.margin or 0.0) / self.range
        if self.better is not None:
            surprise = good - self.expected.mean
            guess(self.better.bets[0], candidate, propensity, surprise, self.worse.bets[0])
        worse = None if self.better is not None else self.worse.bets[0]
        if worse is not None or self.no_worse is not None:
            self._spread(candidate, propensity, good, self.expected, margin, worse, _open(propensity))
        self.expected.see(good)


class _Amounts(Comparison):
    def __init__(self, metric: Metric, runs: int) -> None:
        super().__init__(metric, runs)
        self.logs = Expected(runs, 0.0, 1.0)
        self.origin = np.full(runs, np.nan)

    def _guess(self, candidate: Bools, propensity: Floats, value: Floats, tolerated: float) -> None:
        logarithm = np.log(np.maximum(value, LEAST))
        first = np.isnan(self.origin)
        self.origin = np.where(first, logarithm, self.origin)
        mean = self.logs.mean
        above, sd = logarithm - self.origin - mean, np.sqrt(self.logs.variance(mean))
        above = np.where(first, 0.0, above)
        if self.better is not None and not tolerated:
            surprise = np.clip(self.sign * above / sd, -FARTHEST, FARTHEST)
            guess(self.better.bets[0], candidate, propensity, surprise, self.worse.bets[0])
        else:
            shifted = np.where(candidate & ~first, above - tolerated, above)
            guess(self.worse.bets[0], candidate, propensity, np.clip(-self.sign * shifted / sd, -FARTHEST, FARTHEST))
        self.logs.see(logarithm - self.origin)


class Ratios(_Amounts):
    """`amounts.Ratios` of all runs."""

    def __init__(self, metric: Metric, runs: int) -> None:
        super().__init__(metric, runs)
        self.ratio = 1.0 + (metric.margin or 0.0) * (1.0 if metric.direction == "lower" else -1.0)
        self.tolerated = math.log(self.ratio) if metric.role == "guardrail" else 0.0
        self.shares = Expected(runs, 1.0 / CAP, 1.0 / CAP)
        self.cap = np.full(runs, np.nan if metric.cap is None else metric.cap)
        self.first, self.sum = np.zeros(runs), np.zeros(runs)

    def _bet(self, candidate: Bools, propensity: Floats, value: Floats) -> None:
        self._guess(candidate, propensity, value, self.tolerated)
        known = ~np.isnan(self.cap)
        share = np.where(known, np.minimum(value / self.cap, 1.0), 0.0)
        mean, ratio, sign = self.shares.mean, self.ratio, self.sign
        rest = propensity * (1.0 - propensity) * mean * (1.0 - ratio)
        weight = np.where(candidate, 1.0 - propensity, -ratio * propensity)
        gain = (share - mean) * weight + rest
        up, down = 1.0 - propensity, -ratio * propensity
        ends = np.stack([-mean * up, (1.0 - mean) * up, -mean * down, (1.0 - mean) * down]) + rest
        natural = mean * abs(ratio - 1.0) / self.shares.variance(mean)
        betting = known & _open(propensity)
        high, low = -ends.max(axis=0), ends.min(axis=0)
        stake(self.worse.bets[1], -sign * gain, low if sign < 0 else high, natural, betting)
        if self.no_worse is not None:
            stake(self.no_worse.bets[0], sign * gain, high if sign < 0 else low, natural, betting)
        self.shares.see(share, known)
        if not known.all():
            control = ~candidate & ~known
            self.first += control
            self.sum += np.where(control, value, 0.0)
            full = control & (self.first >= CAPPED_BY) & (self.sum > 0)
            self.cap = np.where(full, CAP * self.sum / np.maximum(self.first, 1.0), self.cap)


class Tails(_Amounts):
    """`amounts.Tails` of all runs."""

    def __init__(self, metric: Metric, runs: int) -> None:
        super().__init__(metric, runs)
        assert metric.tail is not None
        self.quantile, self.margin = metric.tail, metric.margin or 0.0
        self.tolerated = math.log(SLOWER) if metric.role == "guardrail" else 0.0
        self.expected = Expected(runs, metric.tail, metric.tail * (1.0 - metric.tail))
        kept = beyond(self.quantile, TAILED_BY)
        self.largest, self.controls = np.full((kept, runs), -np.inf), np.zeros(runs, dtype=int)
        self.threshold = np.full(runs, np.nan)

    def _bet(self, candidate: Bools, propensity: Floats, value: Floats) -> None:
        self._guess(candidate, propensity, value, self.tolerated)
        known = self.controls >= TAILED_FROM
        good = np.where(known, value <= self.threshold, 0.0)
        betting = known & _open(propensity)
        self._spread(candidate, propensity, good, self.expected, self.margin, self.worse.bets[1], betting)
        self.expected.see(good, known)
        follow = ~candidate & (self.controls < TAILED_BY)
        self.controls += follow
        # The least of those that are kept, from the least on, makes room for a larger one.
        larger = np.flatnonzero(follow & (value > self.largest[0]))
        if len(larger):
            self.largest[0, larger] = value[larger]
            self.largest[:, larger] = np.sort(self.largest[:, larger], axis=0)
        places = self.controls - np.ceil(self.quantile * self.controls).astype(int) + 1
        found = self.largest[np.maximum(len(self.largest) - places, 0), np.arange(len(value))]
        self.threshold = np.where(follow, found, self.threshold)


def compared(metric: Metric, runs: int) -> Comparison:
    """`kinds.compared` for so many runs."""
    kind = Ratios if metric.relative else Tails if metric.tail is not None else Scores
    return kind(metric, runs)
