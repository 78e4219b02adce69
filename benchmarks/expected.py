"""How much the score of the best candidate overstates, and whether the expected score is right.

    python -m benchmarks.expected --seed N [--trials 200] [--quick] [--processes 2] [--json FILE]

Many seeded trials of each landscape, whose programs' true quality is known, at several numbers of candidates and of
examples; scores are seen complete, or as a race leaves them. A run ends with an error when the expected score is more
than a point off where the best one overstates by four or more, or when its interval does not hold what it says.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Final

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import numpy as np
from rich.table import Table as Shown
from tqdm.auto import tqdm

from benchmarks.asked import told
from benchmarks.landscapes import LANDSCAPES, Table
from benchmarks.racing import DELTA, IN_FLIGHT
from dspy_prod.optimize.racing import Contest
from dspy_prod.statistics.expected import expected

DRAWN: Final = tuple(kind for kind in LANDSCAPES if kind != "better by one example")
"""Landscapes whose scores are drawn; in the other one the last candidate's are made, and true of nothing."""
CANDIDATES: Final = (3, 8, 16, 48)
EXAMPLES: Final = (50, 100, 200)

OVERSTATED: Final = 4.0
"""Points by which the best score is too high, from which on the expected one is held to its bound."""
BOUND: Final = 1.0
"""Points by which the expected score may be off, on average."""
HELD: Final = (0.92, 0.98)
"""How often the intervals must hold the truth over all; and, of one setting, at least 85 %."""

Setting = tuple[str, int, int]


@dataclass(frozen=True)
class Row:
    """What one setting came to, in points of 100; `error` is the standard error of `off`, `apart` the root mean square
    of how far the expected score and the true one lie apart, `held` the share of intervals that hold the true one."""

    landscape: str
    candidates: int
    examples: int
    raced: bool
    trials: int
    overstated: float
    off: float
    error: float
    apart: float
    held: float


def seen_raced(table: Table, seed: int) -> list[dict[int, float]]:
    """What a race leaves of a table: each candidate's scores by the example's place."""
    n = table.scores.shape[1]
    contest, found = Contest(n, delta=DELTA, seed=seed), []
    for place, row in enumerate(table.scores.tolist()):
        heat = contest.heat(str(place))
        told = dict(enumerate(row))
        if heat is not None:
            for at in range(n):
                if at >= IN_FLIGHT:
                    first = heat.order[at - IN_FLIGHT]
                    heat.tell(first, row[first])
                if heat.dropped:
                    break
            else:
                at = n
            for index in heat.order[max(0, at - IN_FLIGHT) : at]:
                heat.tell(index, row[index])
            told = heat.answered
        found.append(told)
        if len(told) == n:
            contest.complete(str(place), row)
    return found


def trial(kind: str, many: int, n: int, raced: bool, seed: int) -> tuple[float, float, float, bool]:
    """(raw score less the truth, expected less the truth without and with the luck of the examples, held) of the best.

    Which examples the set happens to have moves all candidates alike, and is nought on average. Without it fewer trials
    tell as much.
    """
    table = LANDSCAPES[kind](np.random.default_rng([seed, list(LANDSCAPES).index(kind), many, n]), many, n)
    seen = seen_raced(table, seed) if raced else [dict(enumerate(row)) for row in table.scores.tolist()]
    best = max((place for place in range(many) if len(seen[place]) == n), key=lambda at: math.fsum(seen[at].values()))
    told, true = expected(seen, n)[best], float(table.true[best])
    luck = float(table.scores.mean() - table.true.mean())
    raw = float(table.scores[best].mean()) - true - luck
    return 100 * raw, 100 * (told.mean - true - luck), 100 * (told.mean - true), told.low <= true <= told.high


def measured(kind: str, many: int, n: int, raced: bool, first: int, trials: int) -> Row:
    """One setting."""
    found = np.array([trial(kind, many, n, raced, first + number) for number in range(trials)], dtype=float)
    raw, off, apart, held = found.T
    error = float(off.std(ddof=1)) / math.sqrt(trials)
    return Row(
        kind, many, n, raced, trials, float(raw.mean()), float(off.mean()), error,
        float(np.sqrt((apart**2).mean())), float(held.mean()),
    )  # fmt: skip


def settings(quick: bool) -> Iterator[tuple[str, int, int, bool]]:
    """Every landscape, size and way to see it; of the quick ones two sizes."""
    sizes = [(3, 50), (16, 50)] if quick else [(many, n) for many in CANDIDATES for n in EXAMPLES]
    for kind in DRAWN:
        for many, n in sizes:
            for raced in (False, True):
                yield kind, many, n, raced


def measure(seed: int, trials: int, *, quick: bool = False, processes: int = 2) -> list[Row]:
    """Every setting."""
    work = list(settings(quick))
    # Seeds far apart, so that runs with the next seed share no trial.
    given = [(*each, seed * 1_000_003, trials) for each in work]
    with tqdm(total=len(work), unit="setting", leave=False, file=sys.stderr) as progress:
        if processes == 1:
            rows = []
            for each in given:
                rows.append(measured(*each))
                progress.update()
            return rows
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            parts = [pool.submit(measured, *each) for each in given]
            for part in parts:
                part.add_done_callback(lambda _: progress.update())
            return [part.result() for part in parts]


def violations(rows: list[Row]) -> list[str]:
    """Which bounds are broken beyond what chance explains, in each setting and in each landscape over all its sizes.

    The mean over a few hundred trials is off by chance, too: two standard errors are granted.
    """
    found = []
    for row in rows:
        if row.overstated >= OVERSTATED and abs(row.off) > BOUND + 2 * row.error:
            found.append(f"{_name(row)}: off by {row.off:+.2f} ± {row.error:.2f}, not within {BOUND:g}")
        if row.held < 0.85 - 2 * math.sqrt(0.95 * 0.05 / row.trials):
            found.append(f"{_name(row)}: {row.held:.1%} of the intervals hold the truth")
    for kind in DRAWN:
        for raced in (False, True):
            those = [
                row for row in rows
                if row.landscape == kind and row.raced is raced and row.overstated >= OVERSTATED
            ]  # fmt: skip
            off, error = _mean(those, "off"), math.hypot(*(row.error for row in those)) / max(1, len(those))
            if abs(off) > BOUND + 2 * error:
                seen = "raced" if raced else "complete"
                found.append(f"{kind}, {seen}, over all sizes: off by {off:+.2f} ± {error:.2f}, not within {BOUND:g}")
    held = _mean(rows, "held")
    slack = 2 * math.sqrt(0.95 * 0.05 / sum(row.trials for row in rows))
    if not HELD[0] - slack <= held <= HELD[1] + slack:
        found.append(f"{held:.1%} of all intervals hold the truth")
    return found


def _name(row: Row) -> str:
    return f"{row.landscape} {row.candidates} x {row.examples}{' raced' if row.raced else ''}"


def _mean(rows: list[Row], name: str) -> float:
    return sum(getattr(row, name) for row in rows) / len(rows) if rows else 0.0


def shown(rows: list[Row]) -> Shown:
    """The table that is printed."""
    table = Shown(title="The best score and the expected one, against the truth", title_justify="left")
    for name in ("landscape", "size", "seen", "overstates", "expected is off", "±", "apart", "held"):
        left = name in ("landscape", "seen")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        table.add_row(
            row.landscape, f"{row.candidates} x {row.examples}", "raced" if row.raced else "complete",
            f"{row.overstated:.2f}", f"{row.off:+.2f}", f"{row.error:.2f}", f"{row.apart:.2f}", f"{row.held:.1%}",
        )  # fmt: skip
    bound = [row for row in rows if row.overstated >= OVERSTATED]
    table.add_section()
    for name, those in (("all", rows), (f"overstated by {OVERSTATED:g} and more", bound)):
        size = sum(abs(row.off) for row in those) / max(1, len(those))
        table.add_row(
            name, str(len(those)), "", f"{_mean(those, 'overstated'):.2f}", f"{size:.2f}", "",
            f"{_mean(those, 'apart'):.2f}", f"{_mean(those, 'held'):.1%}",
        )  # fmt: skip
    table.caption = (
        "size: programs x examples; points of 100. Off: mean of expected less true, its size in the last lines. Apart: "
        "root mean square of the same, the luck of the examples included. Held: intervals that hold the truth"
    )
    return table


def main() -> int:
    """Measure, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="40 trials of two sizes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    arguments = parser.parse_args()
    began = time.monotonic()
    trials = 40 if arguments.quick else arguments.trials
    rows = measure(arguments.seed, trials, quick=arguments.quick, processes=arguments.processes)
    figures = {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began, 1),
        "settings": [asdict(row) for row in rows],
        "violations": violations(rows),
    }
    return told(figures, [shown(rows)], arguments.json, width=110)


if __name__ == "__main__":
    sys.exit(main())
