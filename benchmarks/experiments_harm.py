"""The sections of `benchmarks.experiments` about who is hurt: users on a ramp, and nobody in a shadow stage."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from benchmarks.experiments_measured import GOOD, Row, Size, measures
from benchmarks.experiments_worlds import Draw, amounts, rate, simulated
from dspy_prod.experiments.alphas import alphas
from dspy_prod.experiments.pairs import ALPHA, Pair, Pairs
from dspy_prod.options.metrics import guardrails

MORE: Final = 1.25
"""So many times the stated number of users may be hurt: that number was found once, with other random numbers."""


class Harm(NamedTuple):
    """A bad candidate.

    Attributes:
        changed: what is bad. p99: users of it until it is rolled back, in all runs but one of a hundred.
        rolled_back: the least share of the runs.
    """

    changed: dict[str, Draw]
    p99: float
    rolled_back: float = 1.0


HARMS: Final = {
    "fails always": Harm({"error_rate": rate(0.03, 1.0)}, 5),
    "errors 3 to 50 %": Harm({"error_rate": rate(0.03, 0.5)}, 29),
    "errors 3 to 20 %": Harm({"error_rate": rate(0.03, 0.2)}, 155),
    "cost x3": Harm({"cost": amounts(0.8, 3.0)}, 25),
    "cost +100 %": Harm({"cost": amounts(0.8, 2.0)}, 68),
    "cost +40 %": Harm({"cost": amounts(0.8, 1.4)}, 485),
    "quality -30": Harm({"quality": rate(0.80, 0.50)}, 73),
    "quality -10": Harm({"quality": rate(0.80, 0.70)}, 778),
    # one in a thousand is promoted before it is found (alpha allows 2 %), or not found within the 20,000 users
    "quality -5": Harm({"quality": rate(0.80, 0.75)}, 3_907, 0.99),
    "slow 5 to 40 %": Harm({"slow": rate(0.05, 0.40)}, 50),
}
"""Their numbers were simulated once, 2,000 runs each, before any of this was written."""


def canary(size: Size) -> Iterator[Row]:
    """Users of a bad candidate until it is rolled back, on a ramp of 1, 5, 25 and 50 %; 20,000 users."""
    metrics, some, long = measures(), size.some(0.15), size.units >= 8_000
    for name in (*HARMS, "A/A", "quality +5"):
        harm = HARMS.get(name)
        changed = {"quality": rate(0.80, 0.85)} if name == "quality +5" else harm.changed if harm else {}
        ended = simulated(metrics, {**GOOD, **changed}, alphas(metrics, 1), runs=some, units=2 * size.units,
                          seed=(size.seed, 4), share=None, name=name)  # fmt: skip
        hurt, bounds = ended.candidates, list[tuple[str, str, float]]()
        figures = {"median": float(np.median(hurt)), "p99": float(np.quantile(hurt, 0.99)), "most": float(hurt.max())}
        figures |= {"promote": ended.share(1), "rollback": ended.share(-1), "beyond": math.nan}
        if harm is not None:
            figures["beyond"] = float((hurt > MORE * harm.p99).mean())
            bounds = [("beyond", "<=", 0.01), ("promote", "<=", 0.02)]  # the share that the 99th percentile leaves
            if name == "fails always":
                bounds.append(("most", "<=", 6))  # what is promised to users, whatever the luck
            if long:
                bounds.append(("rollback", ">=", harm.rolled_back))
        elif name == "A/A":
            bounds = [("promote", "<=", 0.02), ("rollback", "<=", 0.03)]
        else:  # 99.35 and 0.15 % were stated
            bounds = [("rollback", "<=", 0.03), *([("promote", ">=", 0.97)] if long else [])]
        yield Row("canary", name, figures, some, bounds)


class Unseen(NamedTuple):
    """A candidate of a shadow stage.

    Attributes:
        fails, dearer: its share of failures, and cost as a multiple of control's.
        pairs: until it is found, at the median, as stated; infinite if there is nothing to find.
        granted: so many times these may be needed.
    """

    fails: float
    dearer: float
    pairs: float = math.inf
    granted: float = MORE


DOLLARS: Final = 3.5
"""Of costs: what was stated bets on the ratio within each pair, what is built on dollars, capped at ten usual calls: it
is slower, and about the bill."""

SHADOWS: Final = {
    "fails always": Unseen(1.0, 1.0, 12),
    "errors 3 to 50 %": Unseen(0.5, 1.0, 26),
    "errors 3 to 20 %": Unseen(0.2, 1.0, 108),
    "cost x3": Unseen(0.03, 3.0, 20, DOLLARS),
    "cost +40 %": Unseen(0.03, 1.4, 83, DOLLARS),
    "A/A": Unseen(0.03, 1.0),
}


def shadow(size: Size) -> Iterator[Row]:
    """Calls that a candidate answers unseen until it is found to be worse; nobody is hurt meanwhile.

    Both arms' answers to a call cost about as much: most of it is how much the call asks for (sd 0.8), little is luck
    (0.3); 3 % of control's fail.
    """
    runs, most = size.some(0.1), min(size.units // 2, 1_000)
    for name, unseen in SHADOWS.items():
        some = size.some(0.25) if name == "A/A" else runs
        found = _found(np.random.default_rng([size.seed, 9]), unseen, some, most, name)
        figures = {
            "median n": float(np.median(found)), "p99 n": float(np.quantile(found, 0.99, method="higher")),
            "found": float(np.isfinite(found).mean()),
        }  # fmt: skip
        bounds = [("found", ">=", 1.0), ("median n", "<=", unseen.granted * unseen.pairs)]
        if name == "A/A":
            bounds = [("found", "<=", 3 * ALPHA)]  # three metrics, each with that probability
        yield Row("shadow", name, figures, some, bounds)


def _found(rng: np.random.Generator, unseen: Unseen, runs: int, most: int, name: str) -> np.ndarray:
    """Pairs until it is found, of each run; infinite if not by so many."""
    found = np.full(runs, math.inf)
    for run in tqdm(range(runs), desc=f"{name}, unseen", leave=False, file=sys.stderr):
        pairs = Pairs(guardrails(), ["new"])
        for place in range(most):
            control, new = rng.random(2) < (0.03, unseen.fails)
            asked, (ours, theirs) = math.exp(0.8 * rng.standard_normal()), np.exp(0.3 * rng.standard_normal(2))
            usd = (0.001 * asked * float(ours), 0.001 * unseen.dearer * asked * float(theirs))
            pairs.see("new", Pair((bool(control), bool(new)), (False, False), usd))
            if pairs.worse():
                found[run] = place + 1
                break
    return found
