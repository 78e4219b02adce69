"""The sections of `benchmarks.experiments` about sample ratios, and about several candidates at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from benchmarks.experiments_batch import compared
from benchmarks.experiments_measured import Row, Size, within
from dspy_prod.experiments.alphas import alphas
from dspy_prod.experiments.trust import CONCENTRATION, RATIO_ALPHA
from dspy_prod.options.metrics import Metric

AN_ARM: Final = 4_000
"""Units of each variant, where several are compared."""
UNITS_AN_ARM: Final = {1: 915, 4: 1_260}
"""Stated until the better one of so many candidates is promoted, at the median; 15 % more are granted."""


def ratios(size: Size) -> Iterator[Row]:
    """The sample-ratio alarm with a look at every unit, and a chi-square test at 5 % that is looked at as often."""
    cases: list[tuple[str, float, float, float, list[tuple[str, str, float]]]] = [
        ("declared 50/50, is 50/50", 0.5, 0.5, 1.0, [("by 20k", "<=", RATIO_ALPHA)]),
        ("declared 90/10, is 90/10", 0.1, 0.1, 1.0, [("by 20k", "<=", RATIO_ALPHA)]),
        ("declared 50/50, is 53/47", 0.5, 0.53, 0.5, [("by 10k", ">=", 0.99)]),
        ("declared 50/50, is 52/48", 0.5, 0.52, 0.5, [("by 20k", ">=", 0.95)]),
        ("declared 90/10, is 92/8", 0.1, 0.08, 0.5, [("by 20k", ">=", 0.99)]),
    ]
    for place, (name, declared, true, part, bounds) in enumerate(cases):
        runs = size.some(part)
        rng = np.random.default_rng([size.seed, 5, place])
        alarms, peeked = _alarms(rng, declared, true, 20_000, runs, name)
        figures = {f"by {n // 1000}k": float((alarms <= n).mean()) for n in (5_000, 10_000, 20_000)}
        yield Row("ratios", name, {**figures, "chi-square, peeked": peeked}, runs, bounds)


def _alarms(
    rng: np.random.Generator, declared: float, true: float, units: int, runs: int, name: str
) -> tuple[Any, float]:
    """The unit at which the alarm is raised in each run, a unit too many if never; and how often chi-square is."""
    found, before, peeked = np.full(runs, units + 1), np.arange(units), 0
    least = np.sqrt(declared * (1 - declared) * (before + 1)) * 1.959964
    for first in tqdm(range(0, runs, 50), desc=name, leave=False, file=sys.stderr):
        one = rng.random((min(50, runs - first), units)) < true
        after: NDArray[np.int64] = np.cumsum(one, axis=1)
        ones = after - one
        own = np.where(one, ones, before - ones)
        shares = np.where(one, declared, 1 - declared)
        log = np.cumsum(np.log((CONCENTRATION * shares + own) / (CONCENTRATION + before) / shares), axis=1)
        over = log >= -math.log(RATIO_ALPHA)
        found[first : first + len(one)] = np.where(over.any(axis=1), over.argmax(axis=1) + 1, units + 1)
        off = np.abs(after - declared * (before + 1)) > least
        peeked += int(off[:, 99:].any(axis=1).sum())
    return found, peeked / runs


def variants(size: Size) -> Iterator[Row]:
    """One to four candidates and one metric: how often a wrong one wins or loses, and how soon the right one wins."""
    for better in (0.0, 0.05):
        for many in (1, 2, 3, 4):
            name = f"{many} candidate{'s' * (many > 1)}, " + ("all equal" if not better else "the first +5")
            runs = size.some(0.2)
            figures = _several(size, many, better, runs, name)
            bounds = [("any promoted", "<=", 0.02), ("any rolled back", "<=", 0.03)]
            if better:
                bounds = [("another promoted", "<=", 0.02), ("any rolled back", "<=", 0.03)]
                if size.units >= 2 * AN_ARM:
                    bounds += [("first promoted", ">=", within(0.986, runs))]
                    bounds += [("median n an arm", "<=", 1.15 * UNITS_AN_ARM[many])] if many in UNITS_AN_ARM else []
            yield Row("variants", name, figures, runs, bounds)


def _several(size: Size, many: int, better: float, runs: int, name: str) -> dict[str, float]:
    """Every arm has the same share, and each candidate is compared among its own and control's units."""
    rng, metric = np.random.default_rng([size.seed, 6, many, int(100 * better)]), Metric("quality")
    level, units = alphas([metric], many), min(size.units // 2, AN_ARM) * (many + 1)
    comparisons = [compared(metric, runs) for _ in range(many)]
    won, first = np.zeros((many, runs), bool), np.full(runs, np.inf)
    for unit in tqdm(range(units), desc=name, leave=False, file=sys.stderr):
        arm = rng.integers(many + 1, size=runs)
        values = (rng.random(runs) < 0.80 + better * (arm == 1)).astype(float)
        for place, comparison in enumerate(comparisons):
            ours = arm == place + 1
            comparison.unit(ours, np.where(ours | (arm == 0), 0.5, 0.0), values)
            assert comparison.better is not None
            won[place] = comparison.better.peak >= 1 / level.better
        first = np.where(won[0] & np.isinf(first), (unit + 1) / (many + 1), first)
    lost = [comparison.worse.peak >= 1 / level.worse_success for comparison in comparisons]
    return {
        "any promoted": float(won.any(axis=0).mean()), "any rolled back": float(np.any(lost, axis=0).mean()),
        "first promoted": float(won[0].mean()), "another promoted": float(won[1:].any(axis=0).mean()),
        "median n an arm": float(np.median(first)),
    }  # fmt: skip
