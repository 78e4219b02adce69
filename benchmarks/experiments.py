"""How often experiments decide wrongly, how many units they need, and how many users a bad candidate hurts.

    python -m benchmarks.experiments --seed N [--runs 2000] [--quick] [--only same,power] [--json FILE]

Every experiment is looked at after every unit. A run ends with an error when a bound is broken: two equal variants are
told apart in 5 % at most, whatever the outcome and the shares; what must be decided is decided.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Final

from rich.table import Table

from benchmarks.asked import told
from benchmarks.experiments_harm import canary, shadow
from benchmarks.experiments_measured import Row, Size, decisions, same
from benchmarks.experiments_plan import planned, power
from benchmarks.experiments_ratios import ratios, variants
from benchmarks.experiments_traps import traps

SECTIONS: Final[dict[str, Callable[[Size], Iterator[Row]]]] = {
    "same": same, "power": power, "decisions": decisions, "canary": canary, "shadow": shadow, "variants": variants,
    "ratios": ratios, "traps": traps, "plan": planned,
}  # fmt: skip
TITLES = {
    "same": "Equal variants called different, at 5 % (2.5 % a side); those worse by a margin called no worse, at 5 %",
    "power": "Units until it is proven, at 2.5 % (no worse: 5 %), and what plan() foretells",
    "decisions": "Decisions within 8,000 units, at 5 % in all",
    "canary": "Users of the candidate until it is rolled back, ramp of 1, 5, 25, 50 %",
    "shadow": "Calls answered unseen until a candidate is found to be worse",
    "variants": "Several candidates, one metric, 4,000 units of each variant",
    "ratios": "Sample-ratio alarm, at 1 %",
    "traps": "What makes equal variants differ: found different as it is usually counted, and as it is counted here",
    "plan": "Units foretold and the median of simulated ones: by how much either is more, at 2.5 % (no worse: 5 %)",
}


def shown(rows: Sequence[Row]) -> list[Table]:
    """The figures as tables."""
    tables = []
    for section, grouped in groupby(rows, key=lambda row: row.section):
        group = list(grouped)
        table = Table(title=TITLES[section], title_justify="left")
        table.add_column("world", no_wrap=True)
        table.add_column("runs", justify="right")
        for name in group[0].figures:
            table.add_column(name, justify="right")
        for row in group:
            cells = [_cell(name, value) for name, value in row.figures.items()]
            table.add_row(row.name, f"{row.runs:,}", *cells)
        tables.append(table)
    return tables


def _cell(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    counted = " n" in name or name.startswith(("n ", "plan")) or name in ("median", "p99", "most")
    return f"{value:,.0f}" if counted else f"{100 * value:.2f} %"


def main() -> int:
    """Measure, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=2_000, help="of each world; those that take longer have a part")
    parser.add_argument("--quick", action="store_true", help="few runs and units: whether it works, in a minute")
    parser.add_argument("--only", default="", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    given = parser.parse_args()
    chosen = [name for name in given.only.split(",") if name] or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    began = time.monotonic()
    size = Size(40, 800, given.seed) if given.quick else Size(given.runs, 10_000, given.seed)
    rows = [row for name in chosen for row in SECTIONS[name](size)]
    figures = {
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "rows": [asdict(row) for row in rows],
        "violations": [broken for row in rows for broken in row.broken()],
    }
    return told(figures, shown(rows), given.json, width=120)


if __name__ == "__main__":
    sys.exit(main())
