"""The interval that people look at: how much better a candidate is, within bounds that hold at every look at once.

A normal mixture on the difference of two means (Robbins 1970; Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024,
"Time-uniform central limit theory", equation 9), with the variance of units and, for a ratio, the delta method. It is
what GrowthBook shows. It holds for many units only, and not for rare outcomes at lopsided shares: so it is shown from
`SHOWN_FROM` units an arm on, and decides nothing.

Stages are put together by their differences, not by their units: where everybody's outcomes drift during a ramp, the
plain means of the arms would differ for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

SHOWN_FROM: Final = 100
"""Units of each arm."""
LEAST: Final = 1e-60
"""A mean of amounts below this is nothing that another one could be a share of."""
TUNED_FOR: Final = 5_000
"""The interval is narrowest at about so many units."""


@dataclass(frozen=True)
class Interval:
    """A difference between a candidate and control, seen so far.

    Attributes:
        control, candidate: mean of each, as in stages of equal shares.
        difference: the candidate's less control's; of amounts as a share of control's.
        low, high: the true one lies between them with 95 %, at all looks together; None below `SHOWN_FROM` units.
        p_value: always valid, of no difference; None likewise.
    """

    control: float
    candidate: float
    difference: float
    low: float | None
    high: float | None
    p_value: float | None


class Sums:
    """Count, sum and sum of squares of an arm's outcomes."""

    __slots__ = ("count", "origin", "squares", "total")

    def __init__(self) -> None:
        self.count, self.origin, self.total, self.squares = 0, 0.0, 0.0, 0.0

    def see(self, outcome: float) -> None:
        """One more outcome."""
        if not self.count:
            self.origin = outcome  # sums are of distances from it, so that squares keep their digits
        self.count += 1
        self.total += outcome - self.origin
        self.squares += (outcome - self.origin) ** 2

    @property
    def mean(self) -> float:
        """Of the outcomes."""
        return self.origin + self.total / self.count

    @property
    def variance(self) -> float:
        """Of one outcome."""
        return max(self.squares - self.total * self.total / self.count, 0.0) / (self.count - 1)

    def state(self) -> list[Any]:
        """As JSON has it."""
        return [self.count, self.origin, self.total, self.squares]

    @classmethod
    def restored(cls, state: Sequence[Any]) -> Sums:
        """From `state`."""
        sums = cls()
        sums.count, sums.origin, sums.total, sums.squares = int(state[0]), *(float(each) for each in state[1:])
        return sums


def mixture(variance: float, units: int, alpha: float) -> float:
    """Half the width of the interval of a mean.

    Args:
        variance: of the estimate, as of now.
        units: behind it.
        alpha: how likely it misses the truth at any look.

    Example:
        >>> round(mixture(0.0004, 2_000, 0.05), 4)
        0.0625
    """
    rho2 = _rho2(alpha)
    grown = units * rho2 + 1.0
    return math.sqrt(variance * units) * math.sqrt(2.0 * grown * math.log(math.sqrt(grown) / alpha) / rho2) / units


def mixture_p(estimate: float, variance: float, units: int, alpha: float) -> float:
    """The always valid p-value that belongs to the interval."""
    if variance <= 0.0:
        return 1.0
    grown = units * _rho2(alpha) + 1.0
    exponent = _rho2(alpha) * estimate * estimate * units / variance / (2.0 * grown)
    return min(1.0, math.exp(min(0.5 * math.log(grown) - exponent, 0.0)))


def interval(stages: Iterable[tuple[Sums, Sums]], *, relative: bool = False, alpha: float = 0.05) -> Interval | None:
    """The difference over all stages; None while no stage has two units of each arm.

    Args:
        stages: control's and the candidate's sums of each.
        relative: as a share of control's mean.
        alpha: how likely the interval misses the truth at any look.
    """
    kept = [(control, candidate) for control, candidate in stages if control.count > 1 and candidate.count > 1]
    if not kept:
        return None
    weights = [a.count * b.count / (a.count + b.count) for a, b in kept]
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    control = sum(share * a.mean for share, (a, _) in zip(shares, kept, strict=True))
    candidate = sum(share * b.mean for share, (_, b) in zip(shares, kept, strict=True))
    of_control = sum(share**2 * a.variance / a.count for share, (a, _) in zip(shares, kept, strict=True))
    of_candidate = sum(share**2 * b.variance / b.count for share, (_, b) in zip(shares, kept, strict=True))
    if relative:
        if control < LEAST:
            return None
        difference = candidate / control - 1.0
        variance = of_candidate / control**2 + of_control * candidate**2 / control**4
    else:
        difference, variance = candidate - control, of_control + of_candidate
    units = [sum(each.count for each in arm) for arm in zip(*kept, strict=True)]
    if min(units) < SHOWN_FROM:
        return Interval(control, candidate, difference, None, None, None)
    half = mixture(variance, sum(units), alpha)
    p_value = mixture_p(difference, variance, sum(units), alpha)
    return Interval(control, candidate, difference, difference - half, difference + half, p_value)


def _rho2(alpha: float) -> float:
    wide = -2.0 * math.log(alpha)
    return (wide + math.log(wide + 1.0)) / TUNED_FOR
