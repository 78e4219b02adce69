"""How many units a claim on a metric needs: what its bet is told, from what is said of control beforehand."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, Literal

import numpy as np

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.amounts import CAP, CAPPED_BY, FARTHEST, TAILED_FROM
from dspy_prod.experiments.growing import Arms, Floats, Outcomes, after, normal, rights, until_guessed, until_staked
from dspy_prod.options.metrics import Metric

AMOUNTS_SD: Final = 1.0
"""Standard deviation of amounts as a share of their mean, where nothing else is said."""
RIGHT, WRONG = 0.8, 0.05
"""Means of scores that should be high, and low, where nothing else is said, as shares of their range."""
OVER: Final = 1.05
"""A standard deviation may exceed the largest possible one by so much: it was estimated from a sample."""
Given = float | tuple[float, float] | None


def units_needed(
    metric: Metric, claim: Literal["better", "no_worse"], size: float, alpha: float, *,
    baseline: Given = None, power: float = 0.8, share: float = 0.5,
) -> int:  # fmt: skip
    """Units of control and one candidate together, by which a claim is proven with probability `power`.

    Compared with simulated experiments (`python -m benchmarks.experiments --only plan`), the median is met within a
    factor of 1.5 for amounts with a standard deviation of the logarithm of 0.05 to 1.5, sizes of 5 to 50 % and either
    direction; for right and wrong, with means from 0.2 to 0.98 and sizes of 1 to 10 points; for p95 latency, with
    margins of 1 to 5 points; all at shares of 50/50, 75/25 and 90/10. What takes over 20,000 units was not simulated.

    Args:
        metric: of which something is to be proven.
        claim: that a candidate which is better by `size` is better, or that one which is as good as control is no
            worse by `size`.
        size: in the metric's unit, of amounts as a share, of tails in points of the share.
        alpha: of the claim.
        baseline: control's mean, or mean and standard deviation; see `plan`.
        power: the probability; 0.5 gives the median.
        share: of the candidate among the two.

    Example:
        >>> units_needed(Metric("resolved"), "better", 0.05, 0.02, baseline=0.80, power=0.5) // 100
        18

    Raises:
        ConfigError: a number is impossible, or `size` too small to be ever found.
    """
    if not size > 0:
        raise ConfigError(f"size={size!r} of {metric.name!r} must be over 0: by how much better, or the margin")
    for name, value in (("alpha", alpha), ("power", power), ("share", share)):
        if not 0 < value < 1:
            raise ConfigError(f"{name}={value!r} must lie between 0 and 1")
    tell = _amounts if metric.relative else _tails if metric.tail is not None else _scores
    units = tell(metric, claim == "better", size, baseline, share, alpha, power)
    if units == math.inf:
        if claim == "better":
            size = min(size, most_better(metric, baseline))
        raise ConfigError(
            f"{metric.name!r}: a difference of {size:g} is too small: a thousand million units would not prove that a "
            f"candidate is {'better' if claim == 'better' else 'no worse'} by it; name a larger one"
        )
    return math.ceil(units)


def most_better(metric: Metric, baseline: Given = None) -> float:
    """By how much a candidate can be better at all, in units of `size`."""
    if metric.relative:
        return 1.0 if metric.direction == "lower" else math.inf
    if metric.tail is not None:
        return 1.0 - metric.tail
    return (1.0 - _score(metric, baseline)[0]) * (metric.bounds[1] - metric.bounds[0])


def _scores(metric: Metric, better: bool, size: float, given: Given, share: float, alpha: float, power: float) -> float:
    good, spread = _score(metric, given)
    size /= metric.bounds[1] - metric.bounds[0]
    control = other = rights(good, spread)
    if better:
        other = rights(min(good + size, 1.0)) if spread == 1.0 else rights(good, spread, min(size, 1.0 - good))
    arms = Arms(control, other, share, 0.5, 0.25)
    if better:
        return until_guessed(arms, lambda values, units: values - arms.mean(units), alpha, power)
    return _spread(arms, size, alpha, power)


def _tails(metric: Metric, better: bool, size: float, given: Given, share: float, alpha: float, power: float) -> float:
    assert metric.tail is not None
    tail, quantile = metric.tail, NormalDist().inv_cdf
    if better:
        highest = 1.0 - (1.0 - tail) / 50.0
        return _guessed_from_log(
            _sd(AMOUNTS_SD), quantile(min(tail + size, highest)) - quantile(tail), share, alpha, power
        )
    same = rights(tail)
    return TAILED_FROM / (1.0 - share) + _spread(Arms(same, same, share, tail, tail * (1.0 - tail)), size, alpha, power)


def _spread(arms: Arms, margin: float, alpha: float, power: float) -> float:
    """Of a difference of means."""
    share = arms.share

    def gain(candidate: bool, values: Floats, units: Floats) -> Floats:
        centred: Floats = (1.0 - share if candidate else -share) * (values - arms.mean(units))
        return centred + share * (1.0 - share) * margin

    return until_staked(arms, gain, after(lambda units: margin / arms.variance(units)), alpha, power)


def _amounts(
    metric: Metric, better: bool, size: float, given: Given, share: float, alpha: float, power: float
) -> float:
    mean, cv = given if isinstance(given, tuple) else (None, AMOUNTS_SD if given is None else given)
    if mean is not None:
        cv = cv / mean if mean > 0 else 0.0
    if not cv > 0:
        raise ConfigError(f"baseline[{metric.name!r}]={given!r} must have a mean and a spread over 0")
    lower, sd = metric.direction == "lower", _sd(cv)
    if better:
        if lower and size >= 1.0:
            raise ConfigError(f"effects[{metric.name!r}]={size!r} must be below 1: nothing costs less than nothing")
        return _guessed_from_log(
            sd, (-math.log(1.0 - size) if lower else math.log(1.0 + size)) / sd, share, alpha, power
        )
    logs = normal(sd, -0.5 * sd * sd)
    cap = CAP if metric.cap is None or mean is None else metric.cap / mean
    same = Outcomes(np.minimum(np.exp(logs.values) / cap, 1.0), logs.weights)
    arms = Arms(same, same, share, 1.0 / CAP, 1.0 / CAP)
    sign, ratio = (-1.0, 1.0 + size) if lower else (1.0, 1.0 - size)

    def gain(candidate: bool, values: Floats, units: Floats) -> Floats:
        expected = arms.mean(units)
        centred: Floats = (values - expected) * (1.0 - share if candidate else -ratio * share)
        return sign * (centred + share * (1.0 - share) * expected * (1.0 - ratio))

    natural = after(lambda units: arms.mean(units) * size / arms.variance(units))
    first = CAPPED_BY / (1.0 - share) if metric.cap is None else 0.0
    return first + until_staked(arms, gain, natural, alpha, power)


def _sd(cv: float) -> float:
    """Standard deviation of the logarithm of lognormal amounts."""
    return math.sqrt(math.log1p(cv * cv))


def _guessed_from_log(sd: float, shift: float, share: float, alpha: float, power: float) -> float:
    """Of the logarithms of amounts, larger ones being better; `shift` is in standard deviations."""
    arms = Arms(normal(sd), normal(sd, shift * sd), share, 0.0, 1.0)

    def surprise(values: Floats, units: Floats) -> Floats:
        # The first unit is the origin, of which nothing is guessed.
        told: Floats = (values - arms.mean(units + 1.0)) / np.sqrt(arms.variance(units + 1.0))
        return np.clip(told, -FARTHEST, FARTHEST)

    return 1.0 + until_guessed(arms, surprise, alpha, power)


def _score(metric: Metric, given: Given) -> tuple[float, float]:
    """Mean of control's scores where 1 is best and 0 worst, and their spread as a share of the largest possible one."""
    low, span, higher = metric.bounds[0], metric.bounds[1] - metric.bounds[0], metric.direction == "higher"
    mean = given[0] if isinstance(given, tuple) else given
    found = (RIGHT if higher else WRONG) if mean is None else (mean - low) / span
    if not 0 < found < 1:
        raise ConfigError(f"baseline[{metric.name!r}]={given!r} must lie between the metric's bounds")
    spread = 1.0
    if isinstance(given, tuple):
        if not given[1] > 0:
            raise ConfigError(f"baseline[{metric.name!r}]={given!r} must have a standard deviation over 0")
        largest = span * math.sqrt(found * (1.0 - found))
        if given[1] > OVER * largest:
            raise ConfigError(
                f"baseline[{metric.name!r}]={given!r}: scores between {low:g} and {low + span:g} with that mean have a "
                f"standard deviation of {largest:.3g} at most"
            )
        spread = min(given[1] / largest, 1.0)
    return (found if higher else 1.0 - found), spread
