"""Whether one of two programs is the better one, by their scores on the same examples."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Final

import numpy as np

ENUMERATED: Final = 14
"""Up to so many differences all signs are tried (16,384 ways); of more, a sample."""
SAMPLED: Final = 20_000
_Z: Final = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Paired:
    """Two programs, compared on the same examples.

    Attributes:
        n: how many examples.
        given, best: mean score of the given program and of the best one.
        difference: by how much the best one is better.
        low, high: the true difference lies between them with a probability of 95 %.
        p_value: how likely a difference as large as this, up or down, would be if the programs were equally good.
        better, worse: on how many examples the best one scored more, and less; the others are ties.
    """

    n: int
    given: float
    best: float
    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int

    def __str__(self) -> str:
        return (
            f"{self.best:.4g}, given program {self.given:.4g}: {self.difference:+.4g} (95 %: {self.low:+.4g} to "
            f"{self.high:+.4g}), {self.n:,} examples, {self.better:,} better, {self.worse:,} worse, "
            f"p = {self.p_value:.2g}"
        )


def paired(given: Sequence[float], best: Sequence[float]) -> Paired:
    """Compare two programs on the same examples.

    The p-value is that of the sign-flip test, which assumes nothing but that the examples are independent: if the
    programs were equally good, each difference could as well have had the other sign. Where all differences are equally
    large (right or wrong) that is McNemar's exact test. Of up to 14 differences all signs are tried, of more, 20,000
    ways at random, always the same ones. Ties say nothing about which is better and count for the interval alone.

    The interval is Wald's after one more example each way, as large as the largest difference seen (Bonett and Price,
    2012, for right and wrong): it is never empty, and holds for few examples and for differences that are nearly all
    alike, where a t interval is far too narrow.

    Args:
        given: scores of the given program, in any range.
        best: scores of the best one, in the same order of the examples.

    Raises:
        ValueError: there are no scores, not equally many, or one that is no finite number.

    Example:
        >>> result = paired([0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1])
        >>> result.better, result.worse, result.p_value
        (4, 1, 0.375)
    """
    if len(given) != len(best):
        raise ValueError(f"given has {len(given)} scores and best has {len(best)}: both need one for each example")
    if not len(given):
        raise ValueError("given has no scores: compare the programs on at least one example")
    ours, theirs = [float(score) for score in best], [float(score) for score in given]
    if not all(map(math.isfinite, (*ours, *theirs))):
        raise ValueError("given and best must be finite numbers")
    n = len(ours)
    # Differences of decimal fractions that are equal on paper are made equal.
    scale = max(abs(score) for score in (*ours, *theirs)) or 1.0
    differences = [_exact(a - b, scale) for a, b in zip(ours, theirs, strict=True)]
    difference = math.fsum(differences) / n
    low, high = _interval(differences, max(*ours, *theirs) - min(*ours, *theirs))
    return Paired(
        n=n,
        given=math.fsum(theirs) / n,
        best=math.fsum(ours) / n,
        difference=difference,
        low=min(low, difference),
        high=max(high, difference),
        p_value=_p_value([each for each in differences if each]),
        better=sum(each > 0 for each in differences),
        worse=sum(each < 0 for each in differences),
    )


def _exact(difference: float, scale: float) -> float:
    return 0.0 if abs(difference) < 1e-12 * scale else round(difference / scale, 12) * scale


def _interval(differences: Sequence[float], reach: float) -> tuple[float, float]:
    n = len(differences) + 2
    # Without any difference, the spread of the scores tells how large one could be.
    largest = max(abs(each) for each in differences) or reach
    mean = math.fsum(differences) / n
    square = (math.fsum(each * each for each in differences) + 2 * largest * largest) / n
    wide = _Z * math.sqrt(max(square - mean * mean, 0.0) / n)
    return mean - wide, mean + wide


def _p_value(differences: Sequence[float]) -> float:
    """Of the two-sided sign-flip test, on differences without ties."""
    n, sizes = len(differences), [abs(each) for each in differences]
    if not n:
        return 1.0
    if max(sizes) == min(sizes):
        fewer = min(sum(each > 0 for each in differences), sum(each < 0 for each in differences))
        tail = sum(math.comb(n, k) for k in range(fewer + 1))
        return float(min(1.0, 2 * tail / 2**n))
    least = abs(math.fsum(differences)) - 1e-9 * math.fsum(sizes)
    if n <= ENUMERATED:
        sums = np.array(list(product((1.0, -1.0), repeat=n))) @ np.array(sizes)
        return float((np.abs(sums) >= least).mean())
    draw, values, hits = random.Random(n), np.array(sizes), 0
    for _ in range(SAMPLED // 1000):
        bits = np.frombuffer(draw.randbytes(1000 * n), dtype=np.uint8).reshape(1000, n)
        hits += int((np.abs((1.0 - 2.0 * (bits & 1)) @ values) >= least).sum())
    return (hits + 1) / (SAMPLED + 1)
