"""Simulated experiments: what users of either variant experience, and when the evidence decides.

Many runs advance together, a unit at a time, with a look at every unit. A run that is decided ends.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from benchmarks.experiments_batch import Bools, Comparison, Floats, compared
from dspy_prod.experiments.alphas import Alphas
from dspy_prod.options.metrics import Metric

BLOCK: Final = 100
RAMP: Final = ((0.01, 25), (0.05, 100), (0.25, 400), (0.5, None))
"""Shares of the candidate, and after how many of its users each stage ends."""
LEVELS: Final = (0.05, 0.1, 0.2, 0.3, 0.35)
"""How often a rating is 0, 0.25, ... 1: mean 0.7."""

Draw = Callable[[Floats, Floats, Bools, int], Floats]
"""(uniform numbers, normal numbers, who has the candidate, place of the unit) to outcomes."""


def rate(control: float, candidate: float | None = None) -> Draw:
    """Right or wrong."""
    other = control if candidate is None else candidate
    return lambda u, z, arm, place: (u < np.where(arm, other, control)).astype(float)


def drifting(first: float, last: float, units: int) -> Draw:
    """Right or wrong, alike in both arms, while the share of right ones changes."""
    return lambda u, z, arm, place: (u < first + (last - first) * min(place / units, 1.0)).astype(float)


def levels(shift: float = 0.0) -> Draw:
    """Five levels; `shift` of the best ones become worst ones."""

    def draw(u: Floats, z: Floats, arm: Bools, place: int) -> Floats:
        plain = np.searchsorted(np.cumsum(LEVELS)[:-1], u) / 4
        return np.where(arm & (u > 1 - shift), 0.0, plain)

    return draw


def amounts(sd: float, ratio: float = 1.0) -> Draw:
    """Lognormal, `ratio` times as much for the candidate."""
    return lambda u, z, arm, place: np.exp(sd * z) * np.where(arm, ratio, 1.0)


def varied(sd: float) -> float:
    """The standard deviation of such amounts as a share of their mean, which is what plans are told."""
    return math.sqrt(math.expm1(sd * sd))


def seconds(sd: float = 0.6, slow: float = 0.05) -> Draw:
    """Lognormal; of the candidate a share `slow` lies beyond what only 5 % of control's do."""
    extra, threshold = (slow - 0.05) / 0.95, np.exp(sd * NormalDist().inv_cdf(0.95))

    def draw(u: Floats, z: Floats, arm: Bools, place: int) -> Floats:
        plain = np.exp(sd * z)
        return np.where(arm & (u < extra) & (plain <= threshold), threshold * 1.5, plain)

    return draw


def users(draw_calls: Callable[[np.random.Generator, int], NDArray[np.int64]], base: float, sd: float) -> Draw:
    """The mean of a user's calls, each right or wrong; users differ in how often theirs are right."""
    rng = np.random.default_rng(11)

    def draw(u: Floats, z: Floats, arm: Bools, place: int) -> Floats:
        calls = draw_calls(rng, len(u))
        return rng.binomial(calls, np.clip(base + sd * z, 0.0, 1.0)) / calls

    return draw


def heavy(rng: np.random.Generator, size: int) -> NDArray[np.int64]:
    """Nine calls a user on average, most of them of few users."""
    return np.minimum(1 + rng.geometric(np.clip(rng.beta(0.6, 2.0, size), 0.004, 1.0)), 400)


@dataclass(frozen=True)
class Ended:
    """How runs ended, one entry a run.

    Attributes:
        verdict: 1 promoted, -1 rolled back, 0 neither.
        units, candidates: units, and those of the candidate, until then.
    """

    verdict: NDArray[np.int64]
    units: NDArray[np.int64]
    candidates: NDArray[np.int64]

    def share(self, verdict: int) -> float:
        """Of the runs that ended so."""
        return float((self.verdict == verdict).mean())


def simulated(
    metrics: Sequence[Metric],
    draws: Mapping[str, Draw],
    alphas: Alphas,
    *,
    runs: int,
    units: int,
    seed: Sequence[int],
    share: float | None = 0.5,
    until: str = "decided",
    name: str = "",
) -> Ended:
    """Runs of an experiment with a look at every unit.

    Args:
        metrics: what it measures. draws: outcomes of each. alphas: what proof needs.
        runs: how many. units: at most, in each. seed: of the numbers.
        share: of the candidate; None is the ramp.
        until: `"decided"` as an experiment is; `"better"` or `"no_worse"` ends a run once that is proven of the first
            metric, and is not harmed by what else is.
        name: beside the progress bar.
    """
    rng = np.random.default_rng(list(seed))
    comparisons = [compared(metric, runs) for metric in metrics]
    verdict, ended, hurt = np.zeros(runs, int), np.full(runs, units), np.zeros(runs, int)
    alive, seen = np.arange(runs), np.zeros(runs, int)
    shares, after = np.array([each for each, _ in RAMP]), np.array([n for _, n in RAMP if n is not None])
    with tqdm(total=units, unit="unit", desc=name, leave=False, file=sys.stderr) as progress:
        for first in range(0, units, BLOCK):
            size = len(alive)
            chance = rng.random((BLOCK, size))
            u = rng.random((len(metrics), BLOCK, size))
            z = rng.standard_normal((len(metrics), BLOCK, size))
            over = np.zeros(size, bool)
            for step in range(min(BLOCK, units - first)):
                pi = np.full(size, share) if share is not None else shares[np.searchsorted(after, seen, side="right")]
                arm = chance[step] < pi
                seen = seen + arm
                for place, (metric, comparison) in enumerate(zip(metrics, comparisons, strict=True)):
                    values = draws[metric.name](u[place, step], z[place, step], arm, first + step)
                    comparison.unit(arm, pi, values)
                back, up = judged(comparisons, alphas, until)
                new = (back | up) & ~over
                if new.any():
                    which = alive[new]
                    verdict[which] = np.where(back[new], -1, 1)
                    ended[which], hurt[which] = first + step + 1, seen[new]
                    over |= new
            progress.update(BLOCK)
            hurt[alive[~over]] = seen[~over]
            alive, seen = alive[~over], seen[~over]
            for comparison in comparisons:
                comparison.keep(~over)
            if not len(alive):
                break
    return Ended(verdict, ended, hurt)


def judged(comparisons: Sequence[Comparison], alphas: Alphas, until: str = "decided") -> tuple[Bools, Bools]:
    """Which runs are rolled back and which are promoted, by the rule of `decisions`."""
    first = comparisons[0]
    none = np.zeros(first.worse.peak.shape, bool)
    if until != "decided":
        claim = first.better if until == "better" else first.worse if until == "worse" else first.no_worse
        level = {"better": alphas.better, "worse": alphas.worse(first.metric)}.get(until, alphas.no_worse)
        assert claim is not None
        return none, claim.peak >= 1 / level
    back, better, safe = none.copy(), none.copy(), ~none
    for comparison in comparisons:
        metric = comparison.metric
        back |= comparison.worse.peak >= 1 / alphas.worse(metric)
        higher = none
        if comparison.better is not None:
            higher = comparison.better.peak >= 1 / alphas.better
            better = better | higher
        if comparison.no_worse is not None:
            proven = comparison.no_worse.peak >= 1 / alphas.no_worse
            safe &= proven | (higher if not metric.relative and metric.tail is None else none)
    return back, better & safe & ~back
