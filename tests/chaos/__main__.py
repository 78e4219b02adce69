"""`python -m tests.chaos --calls 100000 --seed 1`: run after run of workers that everything befalls; exit code 1 if the
books, the limits or the errors of any are not as promised."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from tests.chaos.afflictions import AFFLICTIONS, FILES
from tests.chaos.runs import Run, run


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--calls", type=int, default=5_000, help="of all runs together")
    parser.add_argument("--each", type=int, default=600, help="calls of one run")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument("--only", action="append", choices=[*AFFLICTIONS, *FILES], help="this befalls every run")
    options = parser.parse_args(arguments)
    runs: list[Run] = []
    made = 0
    with tqdm(total=options.calls, unit=" calls") as bar:
        while made < options.calls:
            with tempfile.TemporaryDirectory() as folder:
                seed = options.seed + len(runs)
                began = time.monotonic()
                runs.append(run(seed, min(options.each, options.calls - made), Path(folder), options.only))
            step = min(options.each, options.calls - made)
            made += step
            bar.update(step)
            for violation in runs[-1].violations:
                bar.write(f"seed {seed}, {runs[-1].afflictions}, {time.monotonic() - began:.0f} s: {violation}")
    return _show(runs)


def _show(runs: list[Run]) -> int:
    by: dict[str, list[Run]] = defaultdict(list)
    for each in runs:
        for what in each.afflictions or ["(the provider alone)"]:
            by[what].append(each)
    right = [Column(name, justify="right", no_wrap=True) for name in ("runs", "calls", "answers", "violations")]
    table = Table("what befell", *right)
    for what, found in sorted(by.items()):
        counts = (len(found), sum(each.calls for each in found), sum(each.ends["answer"] for each in found),
                  sum(len(each.violations) for each in found))  # fmt: skip
        table.add_row(what, *[f"{count:,}" for count in counts])
    console = Console()
    console.print(table)
    faults: Counter[str] = sum((each.faults for each in runs), Counter())
    ends: Counter[str] = sum((each.ends for each in runs), Counter())
    violations = sum(len(each.violations) for each in runs)
    told = ", ".join(f"{name} {count:,}" for name, count in faults.most_common())
    console.print(f"faults: {told}", markup=False, highlight=False)
    told = ", ".join(f"{name} {count:,}" for name, count in ends.most_common())
    console.print(f"ends: {told}", markup=False, highlight=False)
    console.print(f"{len(runs)} runs, {sum(each.calls for each in runs):,} calls, {violations} violations")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
