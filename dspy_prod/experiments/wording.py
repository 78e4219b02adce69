"""How the numbers of a metric are written: shares in percent, money by the thousand calls, signs of differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspy_prod.options.metrics import Metric

THOUSAND = 1_000.0
NOTHING = "–"


@dataclass(frozen=True)
class Wording:
    """The numbers of one metric as people read them.

    Attributes:
        metric: whose.
    """

    metric: Metric

    @property
    def unit(self) -> str:
        """What its values are, where the numbers do not say it themselves."""
        if self.metric.name == "cost":
            return "USD per 1,000 calls"
        if self.metric.name == "latency":
            return "mean of calls"
        return ""

    @property
    def margin(self) -> float | None:
        """Where the acceptable ends, on the scale of the difference; None where the two are not comparable.

        Of a tail the interval is that of the means, the margin one of the share beyond a quantile.
        """
        margin = self.metric.margin
        if margin is None or self.metric.tail is not None:
            return None
        return margin if self.metric.direction == "lower" else -margin

    @property
    def good(self) -> float:
        """1 where a positive difference is better, -1 where it is worse."""
        return 1.0 if self.metric.direction == "higher" else -1.0

    def value(self, number: float | None) -> str:
        """A mean."""
        return self._said(number, "{:.4g}", "{:.1f} %")

    def difference(self, number: float | None) -> str:
        """A difference, with its sign."""
        if self.metric.relative and number is not None:
            return f"{_rounded(100 * number):+.1f} %"
        return self._said(number, "{:+.3g}", "{:+.1f} points")

    def range(self, low: float | None, high: float | None) -> str:
        """An interval of differences, in the unit of `difference`; nothing where there is none."""
        if low is None or high is None:
            return ""
        return " to ".join(self.difference(each).partition(" ")[0] for each in (low, high))

    def accepted(self) -> str:
        """The margin in words; nothing where there is none."""
        margin = self.metric.margin
        if margin is None:
            return ""
        if self.metric.tail is not None:
            return f"{100 * margin:g} points more beyond control's {100 * self.metric.tail:g}th percentile"
        if self.metric.relative:
            return f"{100 * margin:g} %"
        return f"{100 * margin:g} points" if self._is_share else f"{margin:g}"

    @property
    def _is_share(self) -> bool:
        return self.metric.bounds == (0.0, 1.0) and not self.metric.relative and self.metric.tail is None

    def _said(self, number: float | None, plain: str, share: str) -> str:
        if number is None or not math.isfinite(number):
            return NOTHING
        if self._is_share:
            return share.format(_rounded(100 * number))
        if self.metric.name == "latency":
            plain += " s"
        return plain.format(number * THOUSAND if self.metric.name == "cost" else number)


def way(e_value: float, needed: float) -> float:
    """How far an e-value is on its way to what proves the claim, 0 to 1, on a logarithmic scale.

    Evidence multiplies: from 1 to 10 takes as many units as from 10 to 100.

    Example:
        >>> way(10.0, 100.0)
        0.5
    """
    if e_value >= needed:
        return 1.0
    return max(0.0, math.log(max(e_value, 1.0)) / math.log(needed))


def progress(e_value: float, needed: float) -> str:
    """An e-value beside what is needed: `"617 of 267: proven"`, `"3.1 of 267: 20 %"`."""
    told = f"{_short(e_value)} of {_short(needed)}"
    return f"{told}: proven" if e_value >= needed else f"{told}: {math.floor(100 * way(e_value, needed))} %"


def _rounded(number: float) -> float:
    """To one digit; nothing is no negative number."""
    return round(number, 1) + 0.0


def _short(number: float) -> str:
    if number >= 1e6:
        return f"{number:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.1f}"
