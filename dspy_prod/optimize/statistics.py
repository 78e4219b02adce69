"""What scores are worth: what a candidate will score on other examples, and whether one program is the better one.

The best of many noisy scores is too high: it was picked for its luck, too. `expected` takes that back. `paired`
compares two programs on the same examples, best on such as no optimizer has seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

ENUMERATED: Final = 14
"""Up to so many differences all signs are tried (16,384 ways); of more, a sample."""
SAMPLED: Final = 20_000
APART: Final = 0.03
"""How many candidates are of another kind than the rest, beforehand: a breakthrough, or one that is broken."""
NARROW: Final = 1.5
"""How little a spread that is wider than the noise is believed beforehand. Found by simulation."""
GRID: Final = 60
"""How finely the spread of the candidates is looked for."""
_Z: Final = NormalDist().inv_cdf(0.975)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """What a candidate is expected to score on other examples of the same kind.

    Attributes:
        mean: in the metric's unit.
        low, high: between them it lies with a probability of 95 %.
    """

    mean: float
    low: float
    high: float


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


def expected(candidates: Sequence[Mapping[int, float]], n: int) -> list[Expected]:
    """What each candidate is expected to score on other examples, in the order given.

    Empirical Bayes: how much of the spread of the candidates' means is noise is read from how differently they score on
    the same example; the means are drawn together by so much. Where all are alike but for luck, that is nearly all the
    way to their common mean. How far candidates truly lie apart is itself uncertain: every spread counts as far as it
    fits (a hierarchical normal model, Gelman et al., Bayesian Data Analysis, 5.4), and one in thirty may lie apart from
    the rest. The interval covers that, and that the examples are a sample, too. The one great program among few others
    is told too low: 15 points above 15 alike ones on 100 examples, 11 are believed.

    Args:
        candidates: the scores of each, by the example's place in the selection set. Give those that a race dropped,
            too: without them the best one seems to be one of few, and its luck is not taken back. One that was not
            evaluated completely is compared on the examples that it has; one without any counts as one of the others.
        n: size of the selection set.

    Raises:
        ValueError: no candidate has a score, or a place is not in the set.

    Example:
        >>> lucky, other = expected([{0: 1, 1: 1, 2: 1, 3: 0}, {0: 1, 1: 0, 2: 1, 3: 0}], 4)
        >>> 0.5 < other.mean < lucky.mean < 0.75
        True
    """
    scores = np.full((len(candidates), n), np.nan)
    for row, candidate in zip(scores, candidates, strict=True):
        for place, score in candidate.items():
            if not 0 <= place < n:
                raise ValueError(f"place {place} is not in a selection set of n={n} examples")
            row[place] = score
    counts = (~np.isnan(scores)).sum(axis=1)
    if not counts.any():
        raise ValueError("candidates have no scores: evaluate one first")
    means, examples, residuals = _effects(scores)
    asked, some = int(counts.sum()), counts > 0
    many = int(some.sum())
    # One more residual, as large as scores seem to reach: few answers that all agree are not taken for certainty.
    reach = float(max(np.nanmax(scores) - np.nanmin(scores), np.nanmax(np.abs(scores)))) / 2
    free = (asked - many) * (1 - 1 / many) if many > 1 else asked - 1
    noise = ((float(np.nansum(residuals**2)) if many > 1 else asked * float(np.nanvar(scores))) + reach**2) / (free + 1)
    variances = noise / np.maximum(counts, 1)
    centre, width = _drawn_together(means, variances, some)
    # That the examples are a sample moves all candidates alike; the noise in the examples' means is counted already.
    columns = int((~np.isnan(scores)).any(axis=0).sum())
    level = max(float(np.var(examples[(~np.isnan(scores)).any(axis=0)])) - noise / many, 0.0) / columns
    wide = _Z * np.sqrt(width + level)
    # Scores that all lie from 0 to 1 are taken for a share: no other one is expected.
    least, most = (0.0, 1.0) if np.nanmin(scores) >= 0 and np.nanmax(scores) <= 1 else (-np.inf, np.inf)
    lows, highs = np.clip(centre - wide, least, most), np.clip(centre + wide, least, most)
    return [Expected(*map(float, each)) for each in zip(np.clip(centre, least, most), lows, highs, strict=True)]


def _effects(scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Each candidate's mean on the whole set, each example's difference from the level, and what neither explains."""
    told = ~np.isnan(scores)
    filled = np.where(told, scores, 0.0)
    rows, columns = told.sum(axis=1), told.sum(axis=0)
    means = filled.sum(axis=1) / np.maximum(rows, 1)
    level = float(means[rows > 0].mean())
    examples = np.zeros(scores.shape[1])
    for _ in range(1 if told.all() else 50):  # rows and columns in turns, until both fit
        examples = np.where(told, filled - means[:, None], 0.0).sum(axis=0) / np.maximum(columns, 1)
        examples -= examples.mean()
        means = np.where(told, filled - examples[None, :], 0.0).sum(axis=1) / np.maximum(rows, 1)
    means = np.where(rows > 0, means, level)
    residuals = np.where(told, filled - means[:, None] - examples[None, :], np.nan)
    return means, examples, residuals


def _drawn_together(means: Floats, variances: Floats, some: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Posterior mean and variance of each candidate, over all spreads that fit."""
    known, noise = means[some], variances[some]
    middle, typical = float(np.median(known)), math.sqrt(float(np.median(noise)))
    if len(known) < 2 or not typical:
        return np.where(some, means, known.mean()), np.where(some, variances, known.var() + variances)
    far = max(float(np.abs(known - middle).max()), 4 * typical)
    spreads = np.linspace(0.0, 3 * float(np.std(known)) + 3 * typical, GRID + 1)
    fits, centres, widths = _fitted(known, noise, spreads, far, middle)
    fits -= NARROW * np.log1p((spreads / typical) ** 2)
    share = np.exp(fits - fits.max())
    share /= share.sum()
    found = share @ centres
    centre, width = np.full(len(means), found.mean()), np.full(len(means), float(share @ spreads**2) + np.var(known))
    centre[some], width[some] = found, share @ (widths + (centres - found) ** 2)
    return centre, width


def _fitted(known: Floats, noise: Floats, spreads: Floats, far: float, middle: float) -> tuple[Floats, Floats, Floats]:
    """How well each spread fits (logarithm), and each mean's posterior mean and variance given it, a row a spread."""
    near = spreads[:, None] ** 2 + noise
    wide, common = near + far**2, np.full((len(spreads), 1), middle)
    for _ in range(8):  # the common mean and who lies apart from it, in turns
        squares = (known - common) ** 2
        usual = (1 - APART) * np.exp(-0.5 * squares / near) / np.sqrt(near)
        apart = APART * np.exp(-0.5 * squares / wide) / np.sqrt(wide)
        odds = apart / (usual + apart)
        pull = (1 - odds) / near + odds / wide
        total = pull.sum(axis=1, keepdims=True)
        common = (pull * known).sum(axis=1, keepdims=True) / total
    near_kept, wide_kept = 1 - noise / near, 1 - noise / wide
    kept = (1 - odds) * near_kept + odds * wide_kept
    fits = np.log(usual + apart).sum(axis=1) - 0.5 * np.log(total[:, 0])
    between = (1 - odds) * odds * ((wide_kept - near_kept) * (known - common)) ** 2
    return fits, common + kept * (known - common), kept * noise + between + (1 - kept) ** 2 / total


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
