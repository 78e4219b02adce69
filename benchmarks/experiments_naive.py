"""What others look at: a z-test at every unit, the same once at the end, and the interval that people are shown."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
from tqdm.auto import tqdm

from benchmarks.experiments_worlds import RAMP, Draw
from dspy_prod.experiments.intervals import SHOWN_FROM, mixture
from dspy_prod.options.metrics import Metric

LOOKS: Final = ("interval", "naive z", "z, one look")
_FROM: Final = 30
"""Units of each arm before anybody trusts a z-test."""
_TWO_SIDED: Final = 1.959964


def peeked(
    metric: Metric, draw: Draw, share: float | None, *, runs: int, units: int, seed: Sequence[int], name: str = ""
) -> dict[str, float]:
    """How often each of `LOOKS` tells two equal variants apart at 5 %.

    On a ramp all units are pooled, as others do. The interval puts stages together by their differences: not simulated.

    Args:
        metric, draw: what is looked at. share: of the candidate; None is the ramp.
        runs, units, seed: how many, how long, and of the numbers. name: beside the progress bar.
    """
    rng = np.random.default_rng(list(seed))
    shares, after = np.array([each for each, _ in RAMP]), np.array([n for _, n in RAMP if n is not None])
    count, total, squares = (np.zeros((2, runs)) for _ in range(3))
    shown, naive, z = np.zeros(runs, bool), np.zeros(runs, bool), np.zeros(runs)
    for place in tqdm(range(units), desc=f"{name}, otherwise", leave=False, file=sys.stderr):
        pi = np.full(runs, share) if share is not None else shares[np.searchsorted(after, count[1], side="right")]
        arm = rng.random(runs) < pi
        value = draw(rng.random(runs), rng.standard_normal(runs), arm, place)
        which = np.stack([~arm, arm])
        count += which
        total += which * value
        squares += which * value * value
        fewest = count.min(axis=0)
        if fewest.max() < _FROM:
            continue
        mean = total / np.maximum(count, 1.0)
        of_mean = np.maximum(squares / np.maximum(count, 1.0) - mean**2, 0.0) / np.maximum(count - 1.0, 1.0)
        sd = np.sqrt(of_mean.sum(axis=0))
        z = np.where(fewest >= _FROM, np.abs(mean[1] - mean[0]) / np.maximum(sd, 1e-12), 0.0)
        naive |= z > _TWO_SIDED
        if metric.relative:
            difference = mean[1] / mean[0] - 1.0
            sd = np.sqrt(of_mean[1] / mean[0] ** 2 + of_mean[0] * mean[1] ** 2 / mean[0] ** 4)
        else:
            difference = mean[1] - mean[0]
        wide = mixture(1.0, place + 1, 0.05)
        shown |= (fewest >= SHOWN_FROM) & (np.abs(difference) > wide * sd)
    found = (float(shown.mean()), float(naive.mean()), float((z > _TWO_SIDED).mean()))
    return dict(zip(LOOKS, found if share is not None else (math.nan, *found[1:]), strict=True))
