"""The sections of `benchmarks.experiments`: each yields rows of figures with the bounds that they must keep."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from benchmarks.experiments_batch import compared
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
from dspy_prod.experiments.trust import CONCENTRATION, RATIO_ALPHA
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
        """Bounds that are exceeded by more than two standard errors of the bound itself; of shares that must be high
        only small runs are granted that."""
        found = []
        for figure, sign, bound in self.bounds:
            value, slack = self.figures[figure], 2 * math.sqrt(bound * (1 - bound) / self.runs)
            granted = slack if sign == "<=" or self.runs < 200 else 0.0
            if value > bound + granted if sign == "<=" else value < bound - granted:
                found.append(f"{self.section}, {self.name}: {figure} {value:.4f}, not {sign} {bound}")
        return found


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
    """Two equal variants, a look at every unit: how often either is called better."""
    score, amount = Metric("score"), Metric("amount", direction="lower", relative=True)
    outcomes: dict[str, tuple[Metric, Draw]] = {
        "right .80": (score, rate(0.80)), "right .98": (score, rate(0.98)), "5 levels": (score, levels()),
        "lognormal sd 1": (amount, amounts(1.0)), "lognormal sd 1.5": (amount, amounts(1.5)),
    }  # fmt: skip
    for name, (metric, draw) in outcomes.items():
        for share in (0.5, 0.1, 0.01):
            told = f"{name}, {100 - 100 * share:g}/{100 * share:g}"
            yield Row(
                "same", told, _wrong(_either(metric, draw, size, share, told)), size.runs, [("wrong", "<=", 0.05)]
            )
    several = users(heavy, 0.75, 0.3)
    yield Row("same", "users of several calls, their mean", _wrong(_either(score, several, size, 0.5, "users")),
              size.runs, [("wrong", "<=", 0.05)])  # fmt: skip
    for first, last in ((0.85, 0.75), (0.75, 0.85)):
        name = f"ramp 1-5-25-50 %, drift {first} to {last}"
        draw = drifting(first, last, 4_000)
        yield Row("same", name, _wrong(_either(score, draw, size, None, name)), size.runs, [("wrong", "<=", 0.05)])
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
        yield Row("same", name, _wrong(ended), size.runs, [("wrong", "<=", A_SIDE.no_worse)])


GOOD: Final = {
    "quality": rate(0.80), "cost": amounts(0.8), "error_rate": rate(0.03), "slow": rate(0.05), "latency": seconds(),
}  # fmt: skip


def _measures(slow: float = 0.02, dearer: float = 0.10, tail: bool = False) -> list[Metric]:
    slower = latency(slow) if tail else Metric("slow", direction="lower", role="guardrail", margin=slow)
    return [Metric("quality", margin=0.02), cost(dearer), error_rate(), slower]


def decisions(size: Size) -> Iterator[Row]:
    """What is decided within 8,000 units about a success metric and three guardrails that must be proven."""
    usual, feasible, tail = _measures(), _measures(0.03, 0.20), _measures(tail=True)
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
        ("quality +3", usual, {"quality": rate(0.80, 0.83)}, 0.5, []),
        ("quality -3", usual, {"quality": rate(0.80, 0.77)}, 0.5, []),
        ("quality -5", usual, {"quality": rate(0.80, 0.75)}, 0.5, [("rollback", ">=", 0.98)]),
        ("cost +20 %", usual, {"cost": amounts(0.8, 1.2)}, 0.5, []),
        ("cost +40 %", usual, {"cost": amounts(0.8, 1.4)}, 0.5, [("rollback", ">=", 0.98)]),
        ("quality +5, cost +40 %", usual, {"quality": rate(0.80, 0.85), "cost": amounts(0.8, 1.4)}, 0.5,
         [("rollback", ">=", 0.98)]),
        ("errors 3 to 8 %", usual, {"error_rate": rate(0.03, 0.08)}, 0.5, []),
        ("slow 5 to 12 %", usual, {"slow": rate(0.05, 0.12)}, 0.5, [("rollback", ">=", 0.98)]),
        ("slow 5 to 12 %, p95 latency", tail, {"latency": seconds(slow=0.12)}, 0.5, [("rollback", ">=", 0.98)]),
        ("quality -5, 90/10", usual, {"quality": rate(0.80, 0.75)}, 0.1, []),
        ("cost +40 %, 90/10", usual, {"cost": amounts(0.8, 1.4)}, 0.1, []),
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


def canary(size: Size) -> Iterator[Row]:
    """Users of a bad candidate until it is rolled back, on a ramp of 1, 5, 25 and 50 %; 20,000 users."""
    metrics, some = _measures(), size.some(0.15)
    cases: dict[str, dict[str, Draw]] = {
        "fails always": {"error_rate": rate(0.03, 1.0)},
        "errors 3 to 50 %": {"error_rate": rate(0.03, 0.5)},
        "errors 3 to 20 %": {"error_rate": rate(0.03, 0.2)},
        "cost x3": {"cost": amounts(0.8, 3.0)},
        "cost +100 %": {"cost": amounts(0.8, 2.0)},
        "cost +40 %": {"cost": amounts(0.8, 1.4)},
        "quality -30": {"quality": rate(0.80, 0.50)},
        "quality -10": {"quality": rate(0.80, 0.70)},
        "quality -5": {"quality": rate(0.80, 0.75)},
        "slow 5 to 40 %": {"slow": rate(0.05, 0.40)},
        "A/A": {},
        "quality +5": {"quality": rate(0.80, 0.85)},
    }
    for name, changed in cases.items():
        ended = simulated(metrics, {**GOOD, **changed}, alphas(metrics, 1), runs=some, units=2 * size.units,
                          seed=(size.seed, 4), share=None, name=name)  # fmt: skip
        hurt = ended.candidates
        figures = {"median": float(np.median(hurt)), "p99": float(np.quantile(hurt, 0.99)), "most": float(hurt.max())}
        figures |= {"promote": ended.share(1), "rollback": ended.share(-1)}
        bounds = [("promote", "<=", 0.02), ("rollback", "<=", 0.03)] if name == "A/A" else []
        yield Row("canary", name, figures, some, bounds)


def ratios(size: Size) -> Iterator[Row]:
    """The sample-ratio alarm with a look at every unit, and several variants at once."""
    cases: list[tuple[str, float, float, float, list[tuple[str, str, float]]]] = [
        ("declared 50/50, is 50/50", 0.5, 0.5, 1.0, [("by 20k", "<=", RATIO_ALPHA)]),
        ("declared 90/10, is 90/10", 0.1, 0.1, 1.0, [("by 20k", "<=", RATIO_ALPHA)]),
        ("declared 50/50, is 53/47", 0.5, 0.53, 0.5, [("by 10k", ">=", 0.99)]),
        ("declared 50/50, is 52/48", 0.5, 0.52, 0.5, [("by 20k", ">=", 0.95)]),
        ("declared 90/10, is 92/8", 0.1, 0.08, 0.5, []),
    ]
    for place, (name, declared, true, part, bounds) in enumerate(cases):
        runs = size.some(part)
        alarms = _alarms(np.random.default_rng([size.seed, 5, place]), declared, true, 20_000, runs, name)
        figures = {f"by {n // 1000}k": float((alarms <= n).mean()) for n in (5_000, 10_000, 20_000)}
        yield Row("ratios", name, figures, runs, bounds)
    for better in (0.0, 0.05):
        for many in (1, 2, 4):
            name = f"{many} candidates, " + ("all equal" if not better else "the first +5")
            runs = size.some(0.2)
            figures = _several(size, many, better, runs, name)
            bounds = [] if better else [("any promoted", "<=", 0.02), ("any rolled back", "<=", 0.03)]
            yield Row("variants", name, figures, runs, bounds)


def _alarms(rng: np.random.Generator, declared: float, true: float, units: int, runs: int, name: str) -> Any:
    """The unit at which the alarm is raised in each run; a unit too many if never."""
    found, before = np.full(runs, units + 1), np.arange(units)
    for first in tqdm(range(0, runs, 50), desc=name, leave=False, file=sys.stderr):
        one = rng.random((min(50, runs - first), units)) < true
        ones: NDArray[np.int64] = np.cumsum(one, axis=1) - one
        own = np.where(one, ones, before - ones)
        shares = np.where(one, declared, 1 - declared)
        log = np.cumsum(np.log((CONCENTRATION * shares + own) / (CONCENTRATION + before) / shares), axis=1)
        over = log >= -math.log(RATIO_ALPHA)
        found[first : first + len(one)] = np.where(over.any(axis=1), over.argmax(axis=1) + 1, units + 1)
    return found


def _several(size: Size, many: int, better: float, runs: int, name: str) -> dict[str, float]:
    """One metric; every arm has the same share, and each candidate is compared among its own and control's units."""
    rng, metric = np.random.default_rng([size.seed, 6, many, int(100 * better)]), Metric("quality")
    level, units = alphas([metric], many), min(size.units, 8_000)
    comparisons = [compared(metric, runs) for _ in range(many)]
    won = np.zeros((many, runs), bool)
    lost = np.zeros((many, runs), bool)
    for _ in tqdm(range(units), desc=name, leave=False, file=sys.stderr):
        arm = rng.integers(many + 1, size=runs)
        values = (rng.random(runs) < 0.80 + better * (arm == 1)).astype(float)
        for place, comparison in enumerate(comparisons):
            ours = arm == place + 1
            comparison.unit(ours, np.where(ours | (arm == 0), 0.5, 0.0), values)
    for place, comparison in enumerate(comparisons):
        assert comparison.better is not None
        won[place] = comparison.better.peak >= 1 / level.better
        lost[place] = comparison.worse.peak >= 1 / level.worse_success
    figures = {"any promoted": float(won.any(axis=0).mean()), "any rolled back": float(lost.any(axis=0).mean())}
    return {**figures, "first promoted": float(won[0].mean())}
