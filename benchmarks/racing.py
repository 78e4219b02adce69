"""How often a race keeps the winner of full evaluation, and what it costs.

    python -m benchmarks.racing --seed N [--trials 400] [--quick] [--json FILE]

First many seeded trials of each landscape on tables of scores; then DSPy's own optimizers, with and without racing, on
an engine that answers for nothing and counts. A run ends with an error when a bound is broken.
"""

from __future__ import annotations

import argparse
import json
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
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.landscapes import LANDSCAPES, SCENARIOS
from dspy_prod.optimize.racing import Contest

IN_FLIGHT: Final = 8
"""Answers on their way when a race is decided: they are paid for."""
CHUNK: Final = 20


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


def measure(seed: int, count: int, delta: float = 0.1) -> list[Row]:
    """Every landscape, on two processes."""
    rows = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        work = [
            [
                processes.submit(trials, scenario, first, min(CHUNK, count - first), seed, delta)
                for first in range(0, count, CHUNK)
            ]
            for scenario in range(len(SCENARIOS))
        ]
        progress = tqdm(zip(SCENARIOS, work, strict=True), total=len(work), unit="landscape", leave=False)
        for (kind, many, n), parts in progress:
            same, calls, loss, regret = np.array([trial for part in parts for trial in part.result()]).T
            within = float((loss <= 1).mean())
            rows.append(
                Row(kind, many, n, count, *map(float, (same.mean(), calls.mean(), within, loss.mean(), regret.mean())))
            )
    return rows


def violations(rows: list[Row], real: list[dict[str, Any]], delta: float = 0.1) -> list[str]:
    """Which bounds are broken.

    That the winner is kept holds in every landscape. What is saved is bounded where candidates simply lie apart: how
    many calls a race needs depends on the landscape, since every new best program is evaluated completely, and programs
    that are as good as the best one must not be dropped.
    """
    found = []
    for row in rows:
        slack = 2 * math.sqrt(delta * (1 - delta) / row.trials) if row.trials < 100 else 0.0
        if row.same < 1 - delta - slack:
            found.append(f"{row.landscape} {row.candidates} x {row.examples}: same winner {row.same:.3f}")
        bound = {(16, 200): 0.55, (48, 200): 0.40}.get((row.candidates, row.examples))
        if row.landscape == "apart" and bound and row.calls > bound:
            found.append(f"{row.landscape} {row.candidates} x {row.examples}: calls {row.calls:.3f} > {bound}")
    over_all = sum(row.same for row in rows) / len(rows)
    if over_all < 0.97:
        found.append(f"same winner over all {over_all:.3f} < 0.97")
    for run in real:
        if run["calls"] > 0.65:
            found.append(f"{run['optimizer']} seed {run['seed']}: calls {run['calls']:.3f} > 0.65")
        if not run["same"]:
            found.append(f"{run['optimizer']} seed {run['seed']}: another program")
    return found


def shown(rows: list[Row], real: list[dict[str, Any]]) -> list[Table]:
    """The figures as tables."""
    first = Table(title=f"Racing at delta 0.1, {rows[0].trials} trials each", title_justify="left")
    for name in (
        "landscape", "candidates", "examples", "same winner", "calls", "true loss <= 1 point", "mean true loss, points",
        "full evaluation's own regret",
    ):  # fmt: skip
        first.add_column(name, justify="left" if name == "landscape" else "right")
    for row in rows:
        figures = [f"{row.same:.1%}", f"{row.calls:.0%}", f"{row.within_a_point:.1%}", f"{row.loss:.2f}"]
        first.add_row(row.landscape, str(row.candidates), str(row.examples), *figures, f"{row.own_regret:.2f}")
    over = [sum(getattr(row, name) for row in rows) / len(rows) for name in ("same", "calls", "within_a_point", "loss")]
    first.add_section()
    first.add_row("all", "", "", f"{over[0]:.1%}", f"{over[1]:.0%}", f"{over[2]:.1%}", f"{over[3]:.2f}", "")
    second = Table(title="Through DSPy's own optimizers", title_justify="left")
    for name in ("optimizer", "seed", "calls without", "calls with", "share", "same program", "evaluations saved"):
        second.add_column(name, justify="left" if name == "optimizer" else "right")
    for run in real:
        second.add_row(
            run["optimizer"], str(run["seed"]), f"{run['without']:,}", f"{run['with']:,}", f"{run['calls']:.0%}",
            "yes" if run["same"] else "no", f"{run['saved']:,}",
        )  # fmt: skip
    return [first, second]


def main() -> int:
    """Measure, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="20 trials, and one run of each optimizer")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    arguments = parser.parse_args()
    began = time.monotonic()
    rows = measure(arguments.seed, 20 if arguments.quick else arguments.trials)
    from benchmarks.racing_dspy import runs

    real = runs(arguments.seed, 1 if arguments.quick else 3)
    broken = violations(rows, real)
    figures = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began, 1),
        "landscapes": [asdict(row) for row in rows],
        "optimizers": real,
        "violations": broken,
    }
    text = json.dumps(figures, indent=2)
    if arguments.json == "-":
        print(text)
    else:
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        console = Console()
        for table in shown(rows, real):
            console.print(table)
    for each in broken:
        print(f"VIOLATION: {each}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
