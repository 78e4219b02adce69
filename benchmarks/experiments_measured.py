"""The sections of `benchmarks.experiments`: each yields rows of figures with the bounds that they must keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from benchmarks.experiments_naive import LOOKS, peeked
from benchmarks.experiments_worlds import (
    Draw,
    Ended,
    amounts,
    drifting,
    heavy,
    levels,
    rate,
    seconds,
    simulated,
    users,
)  # fmt: skip
from dspy_prod.experiments.alphas import Alphas, alphas
from dspy_prod.options.metrics import Metric, cost, error_rate, latency

A_SIDE: Final = Alphas(0.025, 0.025, 0.025, 0.05)
"""Five per cent in all for "better" and "worse" of one metric, without the accounting of an experiment."""


class Size(NamedTuple):
    """How much is simulated."""

    runs: int
    units: int
    seed: int

    def some(self, share: float) -> int:
        """A share of the runs, at least 40."""
        return max(round(self.runs * share), 40)


@dataclass(frozen=True)
class Row:
    """Figures of one simulated world.

    Attributes:
        section, name: which. figures: by name; shares of runs, units, users.
        bounds: (figure, "<=" or ">=", bound). runs: how many runs stand behind them.
    """

    section: str
    name: str
    figures: Mapping[str, float]
    runs: int
    bounds: Sequence[tuple[str, str, float]] = field(default=())

    def broken(self) -> list[str]:
        """Bounds that are not kept. Of a share, one that is exceeded by two standard errors of the bound itself is
        kept; where it must be high only small runs are granted that. Numbers of users are compared as they are."""
        found = []
        for figure, sign, bound in self.bounds:
            value, share = self.figures[figure], bound <= 1.0
            slack = 2 * math.sqrt(bound * (1 - bound) / self.runs) if share else 0.0
            granted = slack if sign == "<=" or self.runs < 200 else 0.0
            kept = value <= bound + granted if sign == "<=" else value >= bound - granted
            if not kept:
                told = f"{value:.4f}, not {sign} {bound:.4g}" if share else f"{value:,.0f}, not {sign} {bound:,.0f}"
                found.append(f"{self.section}, {self.name}: {figure} {told}")
        return found


def within(stated: float, runs: int) -> float:
    """The least share that chance makes of a stated one in so many runs: two standard errors below."""
    return stated - 2 * math.sqrt(stated * (1 - stated) / runs)


def _wrong(ended: Ended) -> dict[str, float]:
    better, worse = ended.share(1), ended.share(-1)
    return {"wrong": better + worse, "better": better, "worse": worse}


def _either(metric: Metric, draw: Draw, size: Size, share: float | None, name: str) -> Ended:
    """ "better" or "worse" proven of one metric, each at 2.5 %."""
    seed = (size.seed, 1, int(1000 * (share or 0)))
    return simulated(
        [metric], {metric.name: draw}, A_SIDE, runs=size.runs, units=size.units, seed=seed, share=share, name=name
    )


def same(size: Size) -> Iterator[Row]:
    """Two equal variants, a look at every unit: how often either is called better, and by others' ways of looking."""
    score, amount = Metric("score"), Metric("amount", direction="lower", relative=True)
    outcomes: dict[str, tuple[Metric, Draw]] = {
        "right .80": (score, rate(0.80)), "right .98": (score, rate(0.98)), "5 levels": (score, levels()),
        "lognormal sd 1": (amount, amounts(1.0)), "lognormal sd 1.5": (amount, amounts(1.5)),
    }  # fmt: skip
    worlds: list[tuple[str, Metric, Draw, float | None]] = [
        (f"{name}, {100 - 100 * share:g}/{100 * share:g}", metric, draw, share)
        for name, (metric, draw) in outcomes.items()
        for share in (0.5, 0.1, 0.01)
    ]
    worlds.append(("users of several calls, their mean", score, users(heavy, 0.75, 0.3), 0.5))
    for first, last in ((0.85, 0.75), (0.75, 0.85)):
        worlds.append((f"ramp 1-5-25-50 %, drift {first} to {last}", score, drifting(first, last, 4_000), None))
    for name, metric, draw, share in worlds:
        others = peeked(metric, draw, share, runs=size.some(0.25), units=size.units, seed=(size.seed, 8), name=name)
        bounds = [("wrong", "<=", 0.05)]
        if share == 0.5 and size.units >= 8_000:  # else these runs could not tell a wrong test from a right one
            bounds.append(("naive z", ">=", 0.30))
        figures = {**_wrong(_either(metric, draw, size, share, name)), **others}
        yield Row("same", name, figures, size.runs, bounds)
    edges: dict[str, tuple[Metric, Draw]] = {
        "worse by its margin, .80 to .78": (Metric("score", margin=0.02), rate(0.80, 0.78)),
        "worse by its margin, .03 to .05": (error_rate(name="failed"), rate(0.03, 0.05)),
        "worse by its margin, cost +10 %": (cost(name="usd"), amounts(0.8, 1.1)),
        "worse by its margin, slow 5 to 7 %, p95": (latency(name="took"), seconds(slow=0.07)),
    }
    for name, (metric, draw) in edges.items():
        ended = simulated(
            [metric], {metric.name: draw}, A_SIDE, runs=size.runs, units=size.units, seed=(size.seed, 1),
            until="no_worse", name=name,
        )  # fmt: skip
        figures = {**_wrong(ended), **dict.fromkeys(LOOKS, math.nan)}
        yield Row("same", name, figures, size.runs, [("wrong", "<=", A_SIDE.no_worse)])


GOOD: Final = {
    "quality": rate(0.80), "cost": amounts(0.8), "error_rate": rate(0.03), "slow": rate(0.05), "latency": seconds(),
}  # fmt: skip


def measures(slow: float = 0.02, dearer: float = 0.10, tail: bool = False) -> list[Metric]:
    slower = latency(slow) if tail else Metric("slow", direction="lower", role="guardrail", margin=slow)
    return [Metric("quality", margin=0.02), cost(dearer), error_rate(), slower]


def decisions(size: Size) -> Iterator[Row]:
    """What is decided within 8,000 units about a success metric and three guardrails that must be proven."""
    usual, feasible, tail = measures(), measures(0.03, 0.20), measures(tail=True)
    one, some = [Metric("quality")], size.some(0.25)
    cases: list[tuple[str, list[Metric], dict[str, Draw], float, list[tuple[str, str, float]]]] = [
        ("A/A", usual, {}, 0.5, [("promote", "<=", 0.02), ("rollback", "<=", 0.03)]),
        ("A/A, p95 latency", tail, {}, 0.5, [("promote", "<=", 0.02), ("rollback", "<=", 0.03)]),
        ("A/A, 90/10", usual, {}, 0.1, [("promote", "<=", 0.02), ("rollback", "<=", 0.03)]),
        ("quality +5", usual, {"quality": rate(0.80, 0.85)}, 0.5, [("promote", ">=", 0.85)]),
        ("quality +5, p95 latency", tail, {"quality": rate(0.80, 0.85)}, 0.5, [("promote", ">=", 0.85)]),
        ("quality +5, margins 3 points and 20 %", feasible, {"quality": rate(0.80, 0.85)}, 0.5,
         [("promote", ">=", 0.95)]),
        ("quality +5, one metric", one, {"quality": rate(0.80, 0.85)}, 0.5, [("promote", ">=", 0.99)]),
        ("A/A, one metric", one, {}, 0.5, [("promote", "<=", 0.02), ("rollback", "<=", 0.03)]),
        ("quality .80 to .50, one metric", one, {"quality": rate(0.80, 0.50)}, 0.5, [("rollback", ">=", 0.99)]),
        ("quality +3", usual, {"quality": rate(0.80, 0.83)}, 0.5,
         [("promote", ">=", within(0.592, some)), ("rollback", "<=", 0.03)]),
        ("quality -3", usual, {"quality": rate(0.80, 0.77)}, 0.5,
         [("rollback", ">=", within(0.598, some)), ("promote", "<=", 0.02)]),
        ("quality -5", usual, {"quality": rate(0.80, 0.75)}, 0.5, [("rollback", ">=", 0.98)]),
        ("cost +20 %", usual, {"cost": amounts(0.8, 1.2)}, 0.5, [("rollback", ">=", within(0.914, some))]),
        ("cost +40 %", usual, {"cost": amounts(0.8, 1.4)}, 0.5, [("rollback", ">=", 0.98)]),
        ("quality +5, cost +40 %", usual, {"quality": rate(0.80, 0.85), "cost": amounts(0.8, 1.4)}, 0.5,
         [("rollback", ">=", 0.98)]),
        ("errors 3 to 8 %", usual, {"error_rate": rate(0.03, 0.08)}, 0.5,
         [("rollback", ">=", within(0.988, some))]),
        ("slow 5 to 12 %", usual, {"slow": rate(0.05, 0.12)}, 0.5, [("rollback", ">=", 0.98)]),
        ("slow 5 to 12 %, p95 latency", tail, {"latency": seconds(slow=0.12)}, 0.5, [("rollback", ">=", 0.98)]),
        ("quality -5, 90/10", usual, {"quality": rate(0.80, 0.75)}, 0.1,
         [("rollback", ">=", within(0.565, some))]),
        ("cost +40 %, 90/10", usual, {"cost": amounts(0.8, 1.4)}, 0.1, [("rollback", ">=", 0.98)]),
        ("errors 3 to 8 %, 90/10", usual, {"error_rate": rate(0.03, 0.08)}, 0.1,
         [("rollback", ">=", within(0.423, some))]),
        ("slow 5 to 12 %, 90/10", usual, {"slow": rate(0.05, 0.12)}, 0.1,
         [("rollback", ">=", within(0.854, some))]),
    ]  # fmt: skip
    for name, metrics, changed, share, bounds in cases:
        runs = size.some(0.5) if name.startswith("A/A") else some  # of rare errors more runs are needed
        ended = simulated(metrics, {**GOOD, **changed}, alphas(metrics, 1), runs=runs, units=min(size.units, 8_000),
                          seed=(size.seed, 3), share=share, name=name)  # fmt: skip
        yield Row("decisions", name, _verdicts(ended), runs, bounds if size.units >= 8_000 else ())


def _verdicts(ended: Ended) -> dict[str, float]:
    decided = ended.units[ended.verdict != 0]
    figures = {"promote": ended.share(1), "rollback": ended.share(-1), "keep": ended.share(0)}
    return {**figures, "median n": float(np.median(decided)) if len(decided) else math.nan}
