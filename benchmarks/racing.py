"""How often a race keeps the winner of full evaluation, and what it costs.

    python -m benchmarks.racing --seed N [--trials 400] [--quick] [--json FILE]

First many seeded trials of each landscape on tables of scores; then DSPy's own optimizers, with and without racing, on
an engine that answers for nothing and counts. A run ends with an error when a bound is broken.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Final

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import numpy as np
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.asked import told
from benchmarks.landscapes import LANDSCAPES, SCENARIOS
from benchmarks.racing_dspy import runs
from dspy_prod.optimize.racing import Contest

IN_FLIGHT: Final = 8
"""Answers on their way when a race is decided: they are paid for."""
CHUNK: Final = 20
DELTA: Final = 0.1


@dataclass(frozen=True)
class Row:
    """A landscape's figures: shares of trials and of calls; points of 100."""

    landscape: str
    candidates: int
    examples: int
    trials: int
    same: float
    calls: float
    within_a_point: float
    loss: float
    own_regret: float


def race(scores: np.ndarray, seed: int, delta: float) -> tuple[int, float]:
    """Race the rows of a table one after the other: (place of the winner, share of the calls that were made)."""
    many, n = scores.shape
    contest, best, winner, asked = Contest(n, delta=delta, seed=seed), -1.0, 0, 0
    for place, row in enumerate(scores.tolist()):
        heat = contest.heat(str(place))
        if heat is not None:
            flying: list[int] = []
            for index in heat.order:
                flying.append(index)
                if len(flying) >= IN_FLIGHT:
                    first = flying.pop(0)
                    heat.tell(first, row[first])
                if heat.dropped:
                    break
            for index in flying:
                heat.tell(index, row[index])
            asked += heat.looked
        else:
            asked += n
        if heat is None or heat.looked == n:
            contest.complete(str(place), row)
            if math.fsum(row) > best:
                best, winner = math.fsum(row), place
    return winner, asked / (many * n)


def trials(scenario: int, first: int, count: int, seed: int, delta: float) -> list[tuple[bool, float, float, float]]:
    """(same winner, share of the calls, true loss, true regret of full evaluation) of each trial."""
    kind, many, n = SCENARIOS[scenario]
    found = []
    for trial in range(first, first + count):
        table = LANDSCAPES[kind](np.random.default_rng([seed, scenario, trial]), many, n)
        winner, calls = race(table.scores, seed * 1_000_003 + trial, delta)
        sums = table.scores.sum(axis=1)
        full = int(sums.argmax())
        same = bool(sums[winner] >= sums[full] - 1e-9)
        loss = 0.0 if same else float(table.true[full] - table.true[winner])
        found.append((same, calls, 100 * loss, 100 * float(table.true.max() - table.true[full])))
    return found


def measure(seed: int, count: int, worlds: int, *, quick: bool = False) -> tuple[list[Row], list[dict[str, Any]]]:
    """Every landscape, and DSPy's optimizers in so many worlds, on two processes."""
    rows = []
    chosen = [
        each for each in range(len(SCENARIOS)) if not quick or SCENARIOS[each][1] * SCENARIOS[each][2] <= 48 * 200
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        real = runs(processes, seed, worlds)
        work = {
            scenario: [
                processes.submit(trials, scenario, first, min(CHUNK, count - first), seed, DELTA)
                for first in range(0, count, CHUNK)
            ]
            for scenario in chosen
        }
        with tqdm(
            total=len(real) + sum(map(len, work.values())), unit="part", leave=False, file=sys.stderr
        ) as progress:
            for part in [*real, *(part for parts in work.values() for part in parts)]:
                part.add_done_callback(lambda _: progress.update())
            for scenario, parts in work.items():
                same, calls, loss, regret = np.array([trial for part in parts for trial in part.result()]).T
                within = (loss <= 1).mean()
                figures = map(float, (same.mean(), calls.mean(), within, loss.mean(), regret.mean()))
                rows.append(Row(*SCENARIOS[scenario], count, *figures))
            return rows, [part.result() for part in real]


def violations(rows: list[Row], real: list[dict[str, Any]]) -> list[str]:
    """Which bounds are broken.

    That the winner is kept holds in every landscape. What is saved is bounded where candidates simply lie apart: how
    many calls a race needs depends on the landscape, since every new best program is evaluated completely, and programs
    that are as good as the best one must not be dropped.
    """
    found = []
    for row in rows:
        name = f"{row.landscape} {row.candidates} x {row.examples}"
        # In few trials (--quick) chance alone breaks the bound: two standard deviations are granted.
        slack = 2 * math.sqrt(DELTA * (1 - DELTA) / row.trials) if row.trials < 100 else 0.0
        if row.same < 1 - DELTA - slack:
            found.append(f"{name}: same winner {row.same:.3f} < {1 - DELTA}")
        bound = {(16, 200): 0.55, (48, 200): 0.40}.get((row.candidates, row.examples))
        if row.landscape == "apart" and bound and row.calls > bound:
            found.append(f"{name}: calls {row.calls:.3f} > {bound}")
    over_all = sum(row.same for row in rows) / len(rows)
    if over_all < 0.97:
        found.append(f"same winner over all {over_all:.3f} < 0.97")
    for name in {run["optimizer"] for run in real}:
        own = [run for run in real if run["optimizer"] == name]
        share = sum(run["with"] for run in own) / sum(run["without"] for run in own)
        if share > 0.65:
            found.append(f"{name}: calls {share:.3f} > 0.65")
        others = sum(not run["same"] for run in own)
        if others > DELTA * len(own):
            found.append(f"{name}: another program in {others} of {len(own)} runs")
    return found


def shown(rows: list[Row], real: list[dict[str, Any]]) -> list[Table]:
    """The figures as tables."""
    first = Table(title=f"Racing at delta {DELTA}, {rows[0].trials} trials each", title_justify="left")
    for name in ("landscape", "size", "same winner", "calls", "loss <= 1", "mean loss", "own regret"):
        left = name in ("landscape", "size")
        first.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        figures = [f"{row.same:.1%}", f"{row.calls:.0%}", f"{row.within_a_point:.1%}", f"{row.loss:.2f}"]
        first.add_row(row.landscape, f"{row.candidates} x {row.examples}", *figures, f"{row.own_regret:.2f}")
    same, calls, within, loss, regret = (
        sum(getattr(row, name) for row in rows) / len(rows)
        for name in ("same", "calls", "within_a_point", "loss", "own_regret")
    )
    first.add_section()
    first.add_row("all", "", f"{same:.1%}", f"{calls:.0%}", f"{within:.1%}", f"{loss:.2f}", f"{regret:.2f}")
    first.caption = (
        "size: programs x examples. Loss: points of true quality, against the winner of full evaluation. "
        "Own regret: what that one loses by chance to the truly best"
    )
    second = Table(title="Through DSPy's own optimizers", title_justify="left")
    for name in ("optimizer", "seed", "calls without", "with", "share", "same program"):
        second.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=name == "optimizer")
    for run in sorted(real, key=lambda run: str(run["optimizer"])):
        calls = [f"{run['without']:,}", f"{run['with']:,}", f"{run['calls']:.0%}"]
        second.add_row(run["optimizer"], str(run["seed"]), *calls, "yes" if run["same"] else "no")
    return [first, second]


def main() -> int:
    """Measure, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="10 trials, and one run of each optimizer")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    arguments = parser.parse_args()
    began = time.monotonic()
    count, worlds = (10, 1) if arguments.quick else (arguments.trials, 10)
    rows, real = measure(arguments.seed, count, worlds, quick=arguments.quick)
    figures = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began, 1),
        "landscapes": [asdict(row) for row in rows],
        "optimizers": real,
        "violations": violations(rows, real),
    }
    return told(figures, shown(rows, real), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
