"""The sections of `benchmarks.experiments` about units that proofs need, as they are foretold and as simulated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from benchmarks.experiments_measured import A_SIDE, Row, Size, within
from benchmarks.experiments_worlds import Draw, amounts, levels, rate, seconds, simulated, varied
from dspy_prod.experiments.foretelling import units_needed
from dspy_prod.options.metrics import Metric, latency

SHARES: Final = (0.5, 0.25, 0.1)
LONGEST: Final = 20_000
"""What is foretold to take longer is not simulated."""


class Stated(NamedTuple):
    """Units until proof as they were simulated once, 1,000 runs each, before any of this was written.

    Attributes:
        median: of the units. shares: of the runs that are proven by so many units.
        granted: so many times the median may be needed.
    """

    median: float
    shares: Mapping[int, float]
    granted: float = 1.15


class Proof(NamedTuple):
    """A difference that is to be proven; `asked` to `alpha` are what `units_needed` is asked."""

    name: str
    metric: Metric
    draw: Draw
    share: float
    until: str
    asked: Metric
    effect: float
    baseline: float | tuple[float, float]
    stated: Stated
    alpha: float = 0.025


MEANS_TOO: Final = 1.5
"""Of costs: what was stated is the guess from the logarithm alone, which here shares its money with a bet on means,
where rare dear units hide."""


def _stated(median: float, by_4k: float, by_8k: float) -> Stated:
    return Stated(median, {4_000: by_4k, 8_000: by_8k})


def power(size: Size) -> Iterator[Row]:
    """Units until a difference is proven at 2.5 %, or its absence at 5 %; and what `plan` foretells."""
    score, amount = Metric("score"), Metric("amount", direction="lower", relative=True)
    quick, few = Size(size.some(0.25), 2 * size.units, size.seed), Size(size.some(0.15), 4 * size.units, size.seed)
    rising = Metric("amount", relative=True)
    # A score that falls is one that rises if right and wrong are exchanged; two bets share what shows dearer amounts.
    cases = [
        Proof(".80 to .85, 50/50", score, rate(0.80, 0.85), 0.5, "better", score, 0.05, 0.80,
              _stated(1_760, 0.90, 0.998)),
        Proof(".80 to .75, 50/50", score, rate(0.80, 0.75), 0.5, "worse", score, 0.05, 0.20,
              _stated(2_228, 0.82, 0.990)),
        Proof(".80 to .83, 50/50", score, rate(0.80, 0.83), 0.5, "better", score, 0.03, 0.80,
              _stated(5_598, 0.35, 0.71)),
        Proof(".80 to .70, 90/10", score, rate(0.80, 0.70), 0.1, "worse", score, 0.10, 0.20,
              _stated(1_746, 0.92, 0.999)),
        Proof(".98 to .95, 90/10", score, rate(0.98, 0.95), 0.1, "worse", score, 0.03, 0.02,
              _stated(3_119, 0.64, 0.93)),
        Proof("5 levels -.03, 50/50", score, levels(0.03), 0.5, "worse", score, 0.03, (0.3, 0.085**0.5),
              _stated(3_263, 0.61, 0.93)),
        Proof("cost +10 % (sd 1), 50/50", amount, amounts(1.0, 1.1), 0.5, "worse", rising, 0.1, varied(1.0),
              Stated(3_121, {}, MEANS_TOO), 0.0125),
        Proof("cost +20 % (sd 1), 50/50", amount, amounts(1.0, 1.2), 0.5, "worse", rising, 0.2, varied(1.0),
              Stated(919, {8_000: 1.0}, MEANS_TOO), 0.0125),
        Proof("cost +40 % (sd 1.5), 50/50", amount, amounts(1.5, 1.4), 0.5, "worse", rising, 0.4, varied(1.5),
              Stated(643, {8_000: 1.0}, MEANS_TOO), 0.0125),
        # Of ten right answers it takes nine for right, and of ten wrong ones two.
        Proof(".80 to .85 as a judge sees it", score, rate(0.76, 0.795), 0.5, "better", score, 0.035, 0.76,
              Stated(4_696, {})),
    ]  # fmt: skip
    for each in cases:
        told = [
            units_needed(
                each.asked, "better", each.effect, each.alpha, baseline=each.baseline, power=p, share=each.share
            )
            for p in (0.5, 0.8)
        ]
        yield _reached(each.name, each.metric, each.draw, each.share, each.until, told, each.stated, quick)
    shown = {
        0.80: Stated(14_000, {8_000: 0.25, 16_000: 0.57, 32_000: 0.91}),
        0.95: Stated(4_300, {8_000: 0.88}), 0.97: Stated(4_300, {8_000: 0.98}),
    }  # fmt: skip
    for base, stated in shown.items():
        metric = Metric("score", margin=0.02)
        told = [units_needed(metric, "no_worse", 0.02, A_SIDE.no_worse, baseline=base, power=p) for p in (0.5, 0.8)]
        yield _reached(f"no worse by 2 points, {base:.2f}", metric, rate(base), 0.5, "no_worse", told, stated, few)


def _reached(
    name: str, metric: Metric, draw: Draw, share: float, until: str, foretold: Sequence[int], stated: Stated, size: Size
) -> Row:  # fmt: skip
    ended = simulated([metric], {metric.name: draw}, A_SIDE, runs=size.runs, units=size.units, seed=(size.seed, 2),
                      share=share, until=until, name=name)  # fmt: skip
    proven = np.where(ended.verdict == 1, ended.units, np.inf)
    figures = {
        "median n": float(np.median(proven)), "mean n": float(ended.units.mean()),
        "n at 80 %": float(np.quantile(proven, 0.8, method="higher")),
        **{f"by {n // 1000}k": float((proven <= n).mean()) for n in (4_000, 8_000, 16_000, 32_000)},
        "plan 50 %": float(foretold[0]), "plan 80 %": float(foretold[1]),
    }  # fmt: skip
    bounds = []
    if size.units >= 16_000:
        bounds = [("median n", "<=", stated.granted * stated.median)]
        bounds += [(f"by {n // 1000}k", ">=", within(told, size.runs)) for n, told in stated.shares.items()]
    return Row("power", name, figures, size.runs, bounds)


class Cell(NamedTuple):
    """A claim that is foretold and simulated; `size` as `units_needed` has it."""

    name: str
    metric: Metric
    claim: Literal["better", "no_worse"]
    size: float
    baseline: float | None
    draw: Draw


def cells() -> Mapping[str, Sequence[Cell]]:
    """The grid."""
    found: dict[str, list[Cell]] = {name: [] for name in ("dearer", "cheaper", "no worse", "better", "p95")}
    for sd in (0.05, 0.1, 0.15, 0.3, 0.6, 1.0, 1.5):
        for size in (0.05, 0.1, 0.2, 0.5):
            for direction in ("lower", "higher"):
                metric = Metric("amount", direction=direction, relative=True, margin=size)
                name, ratio = f"{direction}, sd {sd:g}, {size:.0%}", 1.0 - size if direction == "lower" else 1.0 + size
                found["dearer"].append(Cell(name, metric, "no_worse", size, varied(sd), amounts(sd)))
                found["cheaper"].append(Cell(name, metric, "better", size, varied(sd), amounts(sd, ratio)))
    for base in (0.2, 0.5, 0.8, 0.95, 0.98):
        for size in (0.01, 0.02, 0.05, 0.1):
            metric, name = Metric("score", margin=size), f"{base:.2f}, {100 * size:g} points"
            found["no worse"].append(Cell(name, metric, "no_worse", size, base, rate(base)))
            if base + size < 1:
                found["better"].append(Cell(name, metric, "better", size, base, rate(base, base + size)))
    for size in (0.01, 0.02, 0.05):
        found["p95"].append(Cell(f"{100 * size:g} points", latency(size), "no_worse", size, None, seconds()))
    return found


TOLD: Final = {
    "dearer": "amounts no worse by 5 to 50 %",
    "cheaper": "amounts better by 5 to 50 %",
    "no worse": "right or wrong, no worse by 1 to 10 points",
    "better": "right or wrong, better by 1 to 10 points",
    "p95": "p95 latency no worse by 1 to 5 points",
}


def off(cell: Cell, share: float, runs: int, seed: Sequence[int], longest: int = LONGEST) -> float | None:
    """By which part more one is than the other, of the foretold median and the simulated one; None if it is long."""
    alpha = A_SIDE.better if cell.claim == "better" else A_SIDE.no_worse
    foretold = units_needed(cell.metric, cell.claim, cell.size, alpha, baseline=cell.baseline, power=0.5, share=share)
    if foretold > longest:
        return None
    ended = simulated(
        [cell.metric], {cell.metric.name: cell.draw}, A_SIDE, runs=runs, units=2 * foretold + 100, seed=seed,
        share=share, until=cell.claim, name=cell.name,
    )  # fmt: skip
    median = float(np.median(ended.units))
    return max(median / foretold, foretold / median) - 1.0


def planned(size: Size) -> Iterator[Row]:
    """A row for each kind of claim and share: how far the plan is off, in most cells and in the worst."""
    runs, short = max(size.some(0.05), 100), size.units < 8_000
    for place, (kind, whole) in enumerate(cells().items()):
        grid, longest = (whole[::5], 2 * size.units) if short else (whole, LONGEST)
        for share in SHARES:
            seeds = [(size.seed, 7, place, number) for number in range(len(grid))]
            offs = [off(cell, share, runs, seed, longest) for cell, seed in zip(grid, seeds, strict=True)]
            found = {cell.name: each for cell, each in zip(grid, offs, strict=True) if each is not None}
            if found:
                worst = max(found, key=lambda name: found[name])
                figures = {"plan cells": float(len(found)), "off": float(np.median(list(found.values())))}
                name = f"{TOLD[kind]}, {100 - 100 * share:g}/{100 * share:g} (worst: {worst})"
                yield Row("plan", name, {**figures, "worst": found[worst]}, runs, [("worst", "<=", 0.5)])
