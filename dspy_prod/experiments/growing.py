"""How many units it takes until a bet has won, computed beforehand from how outcomes are distributed.

The logarithm of each part of the money is a random walk, whose steps are integrated over arms and outcomes, at the
stake that is on it by then: stakes are bounded, and those that go by a running variance begin small. All parts follow
the same outcomes, so they are high or low together, and the whole is as high as their sum. That it may have been high
before, and low again, is the law of first passage of a Brownian motion, corrected for whole steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dspy_prod.experiments.betting import SHARES, THETAS, WEIGHTS, ProofBet

Floats = NDArray[np.float64]
MOST: Final = 1e9
"""More units than these are not looked at."""
BETWEEN_STEPS: Final = 0.583
"""By so many standard deviations of a step a walk is higher than its goal when it is first seen there (Siegmund)."""
_UNITS: Final = np.unique(np.concatenate([np.arange(32.0), np.geomspace(32.0, MOST, 160)]))
_FAR: Final = 40.0
_cdf: Final = np.vectorize(NormalDist().cdf, otypes=[float])


@dataclass(frozen=True)
class Outcomes:
    """Values that a unit of an arm may bring, and how probable each is."""

    values: Floats
    weights: Floats


def rights(share: float, spread: float = 1.0, shift: float = 0.0) -> Outcomes:
    """Wrong or right, 0 and 1, with this share of right ones; both drawn to their mean by `spread`, then shifted."""
    return Outcomes(share + spread * (np.array([0.0, 1.0]) - share) + shift, np.array([1.0 - share, share]))


def normal(sd: float, mean: float = 0.0) -> Outcomes:
    """A normal distribution, in small steps."""
    z = np.linspace(-6.0, 6.0, 121)
    weights = np.exp(-0.5 * z * z)
    return Outcomes(mean + sd * z, weights / weights.sum())


class Arms:
    """Outcomes of both arms, and what `Expected` makes of them.

    Args:
        control, candidate: their outcomes. share: the candidate's, of the units of both.
        mean, variance: of the imagined outcome with which it begins.
    """

    def __init__(self, control: Outcomes, candidate: Outcomes, share: float, mean: float, variance: float) -> None:
        self.share, self._mean, self._variance = share, mean, variance
        self.both = ((False, 1.0 - share, control), (True, share, candidate))
        self._true, self._square = (
            sum(part * float(each.values**power @ each.weights) for _, part, each in self.both) for power in (1, 2)
        )

    def mean(self, units: Floats) -> Floats:
        """Of the outcome after so many."""
        return (units * self._true + self._mean) / (units + 1.0)

    def variance(self, units: Floats) -> Floats:
        """Of the outcomes until then."""
        around = units * self._square + self._mean**2 - (units + 1.0) * self.mean(units) ** 2
        return (np.maximum(around, 0.0) + self._variance) / (units + 1.0)

    def steps(self, step: Callable[[bool, Floats], Floats]) -> tuple[Floats, Floats]:
        """Mean and variance of `step(candidate, values)`, whose last axis is that of the values."""
        mean, square = np.zeros(1), np.zeros(1)
        for candidate, part, each in self.both:
            grown = step(candidate, each.values)
            mean, square = mean + part * (grown @ each.weights), square + part * (grown**2 @ each.weights)
        return mean, np.maximum(square - mean**2, 0.0)


def until_guessed(
    arms: Arms, surprise: Callable[[Floats, Floats], Floats], alpha: float, power: float
) -> float:  # fmt: skip
    """Units until `ArmBet` is worth `1 / alpha` with probability `power`; infinite if over `MOST`.

    Args:
        surprise: (values, units before) to the surprise, units in rows.
    """
    thetas, share = np.array(THETAS)[:, None, None], arms.share

    def step(candidate: bool, values: Floats) -> Floats:
        told = thetas * surprise(values, _UNITS[:, None])
        grown: Floats = (told if candidate else 0.0) - np.log(1.0 - share + share * np.exp(told))
        return grown

    return _passed(*arms.steps(step), WEIGHTS, alpha, power)


def until_staked(
    arms: Arms, gain: Callable[[bool, Floats, Floats], Floats], natural: Floats, alpha: float, power: float
) -> float:
    """Units until `ProofBet` is worth `1 / alpha` with probability `power`; infinite if over `MOST`.

    Args:
        gain: (candidate, values, units before) to what a stake of 1 wins, units in rows.
        natural: the natural stake after each number of units; see `after`.
    """
    ends, units = np.array([0.0, 1.0]), _UNITS[:, None]
    safe = -1.0 / np.minimum(gain(False, ends, units).min(axis=1), gain(True, ends, units).min(axis=1))
    staked = np.minimum(np.array(ProofBet.multiples)[:, None] * natural, SHARES[-1] * safe)
    stakes = np.concatenate([staked, np.array(SHARES)[:, None] * safe])[:, :, None]

    def step(candidate: bool, values: Floats) -> Floats:
        grown: Floats = np.log1p(stakes * gain(candidate, values, units))
        return grown

    return _passed(*arms.steps(step), ProofBet.begin, alpha, power)


def after(told: Callable[[Floats], Floats]) -> Floats:
    """What is told of each number of units that is looked at."""
    return told(_UNITS)


def _passed(growth: Floats, variance: Floats, begin: tuple[float, ...], alpha: float, power: float) -> float:
    """Units until the sum of all parts, which grow by these steps, is `1 / alpha` with probability `power`."""
    units, goal = _UNITS[1:], -math.log(alpha)
    walked, spread = (
        np.cumsum(0.5 * (each[:, 1:] + each[:, :-1]) * np.diff(_UNITS), axis=1) for each in (growth, variance)
    )
    logs, sds = np.log(np.array(begin))[:, None], np.sqrt(spread) + 1e-12
    # How lucky must one be, in standard deviations, that the whole has reached it?
    low, high = np.full(len(units), -_FAR), np.full(len(units), _FAR)
    for _ in range(40):
        luck = 0.5 * (low + high)
        enough = np.logaddexp.reduce(logs + walked + luck * sds, axis=0) >= goal
        low, high = np.where(enough, low, luck), np.where(enough, luck, high)
    parts = logs + walked + high * sds
    parts = np.exp(parts - np.logaddexp.reduce(parts, axis=0))
    sd, drift, step = ((parts * each).sum(axis=0) for each in (sds, walked, np.sqrt(variance[:, 1:])))
    height = drift + high * sd + BETWEEN_STEPS * step
    before = np.exp(np.minimum(2.0 * drift * height / sd**2, 700.0)) * _cdf(-(drift + height) / sd)
    passed = np.where(high >= _FAR - 1e-6, 0.0, np.minimum(_cdf((drift - height) / sd) + before, 1.0))
    passed = np.maximum.accumulate(passed)
    at = int(np.searchsorted(passed, power))
    if at == len(units):
        return math.inf
    if not at:
        return float(units[0])
    part = (power - passed[at - 1]) / (passed[at] - passed[at - 1])
    return float(units[at - 1] * (units[at] / units[at - 1]) ** part)
