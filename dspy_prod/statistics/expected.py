"""What scores are worth: what a candidate will score on other examples.

The best of many noisy scores is too high: it was picked for its luck, too. `expected` takes that back. Whether one
program is the better one is told by `dspy_prod.statistics.paired`, best on examples that no optimizer has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

DRAWS: Final = 2_000
"""How often the choice of the best is repeated to see how lucky the best ones are."""
ALIKE: Final = 20
"""On so many common examples candidates must have answered, before they are taken for the same one."""
POOLED: Final = 20
"""So many examples' worth of a candidate's noise is that of all candidates."""
UNSURE: Final = 0.1
"""The square of the part of the luck by which it may be another one, where candidates lie in no normal shape."""
_SPREADS: Final = np.concatenate([[0.0], np.logspace(-2, 2.5, 80)])
"""Variances of the candidates' true qualities that are tried, in units of the noise of a complete mean."""
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


def expected(candidates: Sequence[Mapping[int, float]], n: int) -> list[Expected]:
    """What each candidate is expected to score on other examples, in the order given.

    The choice of the best is repeated on made-up scores, to see how lucky the best of such candidates is, the second
    best, and so on; that luck is taken from what they scored (the parametric bootstrap by rank of Forde, Hemani and
    Ferguson, "Review and further developments in statistical corrections for Winner's Curse", 2023). What is made up
    has the noise that is read from how differently candidates score on the same example, and true qualities that lie as
    far apart as is most likely once the noise is taken away (restricted maximum likelihood, Patterson and Thompson,
    1971), in the shape that was seen (Louis, "Estimating a population of parameter values", 1984). So where all are
    alike but for luck, the best is told to be hardly better than the rest, and one great program among others keeps its
    lead. Candidates that answer all alike are one: who is the better of two of the same is no luck.

    Those that were not evaluated completely could not be chosen; they are drawn towards the others by as much as their
    means are noise. The interval covers the luck, how well it is known, and that the examples are a sample.

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
    if np.isnan(scores).all():
        raise ValueError("candidates have no scores: evaluate one first")
    first = _alike(scores)
    single, twin = np.unique(first, return_inverse=True)
    told = scores[single]
    counts, asked = (~np.isnan(told)).sum(axis=1), (~np.isnan(told)).any(axis=0)
    means, examples, residuals = _effects(told)
    noise, own = _noise(told, residuals, counts)
    centre, width = _without_luck(means, noise / np.maximum(counts, 1), own / np.maximum(counts, 1), counts)
    # That the examples are a sample moves all candidates alike; the noise in the examples' means is counted already.
    level = max(float(np.var(examples[asked])) - noise / int((counts > 0).sum()), 0.0) / int(asked.sum())
    wide = _Z * np.sqrt(width + level)
    centre, wide = centre[twin], wide[twin]
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


def _alike(scores: Floats) -> NDArray[np.intp]:
    """Of each candidate the one with most scores among those that answered everything as it did; itself, mostly."""
    told, places = ~np.isnan(scores), np.arange(len(scores))
    order = np.argsort(-told.sum(axis=1), kind="stable")
    first: NDArray[np.intp] = places.copy()
    for at in order:
        if first[at] == at:
            common = (told & told[at]).sum(axis=1)
            same = ~((scores != scores[at]) & told & told[at]).any(axis=1) & (common >= min(ALIKE, scores.shape[1]))
            first[same & (first == places) & (told.sum(axis=1) <= told[at].sum())] = at
    return first


def _noise(scores: Floats, residuals: Floats, counts: NDArray[np.intp]) -> tuple[float, Floats]:
    """Variance of a score around what its candidate and its example lead to expect: of all, and of each candidate."""
    columns = (~np.isnan(scores)).sum(axis=0)
    asked, many, places = int(counts.sum()), int((counts > 0).sum()), int((columns > 0).sum())
    # One more residual, as large as scores seem to reach: few answers that all agree are not taken for certainty.
    reach = float(max(np.nanmax(scores) - np.nanmin(scores), np.nanmax(np.abs(scores)))) / 2
    # What the means of candidates and of examples fit is missing in the residuals: the more, the fewer were asked.
    free = max(asked - many - places + 1, 0) if many > 1 else asked - 1
    noise = ((float(np.nansum(residuals**2)) if many > 1 else asked * float(np.nanvar(scores))) + reach**2) / (free + 1)
    left = np.where(np.isnan(scores), 0.0, 1 - 1 / np.maximum(columns, 1)).sum(axis=1) if many > 1 else counts
    return noise, (np.nansum(residuals**2, axis=1) + POOLED * noise) / (left + POOLED)


def _without_luck(means: Floats, pooled: Floats, own: Floats, counts: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """What is left of each mean without its luck, and how wrong that may be, as a variance.

    Args:
        means: of the candidates. pooled, own: their variances, by the noise of all and by their own.
        counts: of how many examples they are. Only those with most of them could be chosen.
    """
    some, most = counts > 0, counts == counts.max()
    known, noise = means[some], pooled[some]
    if len(known) < 2 or not noise.min() > 0:
        return np.where(some, means, known.mean()), np.where(some, pooled, known.var() + pooled)
    spread, common, sure = _spread(known, noise)
    kept = spread / (spread + pooled)
    centre = np.where(some, common + kept * (means - common), common)
    doubt = 2 / (len(known) - 1) * ((1 - kept) * (means - common)) ** 2
    width = np.where(some, kept * pooled + (1 - kept) ** 2 * sure + doubt, spread + sure + pooled)
    # Those that a race dropped take part as if they had been seen whole: the best one is the luckiest of them, too.
    true = common + np.sqrt(kept) * (means - common)
    half = np.random.default_rng(0).standard_normal((DRAWS // 2, len(known)))
    noises = np.concatenate([half, -half]) * np.sqrt(np.where(most, own, noise.min())[some])
    ranked = np.take_along_axis(noises, np.argsort(-(true[some] + noises), axis=1), axis=1)
    _, rank = np.unique(-means[most], return_inverse=True)
    ranks, chosen = np.sort(rank), ranked[:, : len(rank)]
    luck, chance = (  # equal means share that of their ranks
        (np.bincount(ranks, each) / np.bincount(ranks))[rank] for each in (chosen.mean(axis=0), chosen.var(axis=0))
    )
    centre[most] = means[most] - luck
    width[most] = chance + luck**2 * (0.5 / (len(known) - 1) + UNSURE)
    # Nobody is told to be better than one who scored more.
    order = np.flatnonzero(most)[np.argsort(-means[most], kind="stable")]
    centre[order] = np.minimum.accumulate(centre[order])
    return centre, width


def _spread(means: Floats, noise: Floats) -> tuple[float, float, float]:
    """The likeliest variance of the true qualities; their common mean, and its variance."""
    tried = _SPREADS * noise.min()
    weights = 1 / (noise + tried[:, None])
    total = weights.sum(axis=1)
    common = (weights * means).sum(axis=1) / total
    fits = np.log(weights).sum(axis=1) - np.log(total) - (weights * (means - common[:, None]) ** 2).sum(axis=1)
    at = int(fits.argmax())
    return float(tried[at]), float(common[at]), 1 / float(total[at])
