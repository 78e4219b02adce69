"""`python -m tests.chaos.fleet --calls 100000 --seed 1`: fleets of four processes on SQLite and on Valkey that
everything befalls; exit code 1 if money, limits, deadlines or books of any are not as promised."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Column, Table

from tests.chaos.fleet.scenes import Result, Size, dollar, pace, same, storm
from tests.chaos.fleet.stores import STORES

MINUTES: Final = 130.0
"""Seconds for which the limits of a minute are looked at."""
ROUND: Final = 40.0
"""Seconds of a storm."""
STORMS: Final = 2
"""At least so many on each store, however many calls the other scenes made: one with money enough, one without."""


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fleet", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="storms go on until all runs together made so many")
    parser.add_argument("--minutes", type=float, default=120.0, help="no storm begins later")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--callers", type=int, default=64, help="of each process")
    parser.add_argument("--kills", type=int, default=40, help="while a budget is spent")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scene", action="append", choices=["same", "dollar", "kills", "pace", "storm"])
    parser.add_argument("--store", action="append", choices=[*STORES])
    parser.add_argument("--json", type=Path, help="where all results are written, and again after each run")
    options = parser.parse_args(arguments)
    chosen = options.scene or ["same", "dollar", "kills", "pace", "storm"]
    stores = options.store or [*STORES]
    results: list[Result] = []
    console = Console()

    def note(result: Result) -> Result:
        results.append(result)
        told = ", ".join(f"{name} {value}" for name, value in result.figures.items())
        line = f"{result.scene} on {result.store}: {result.calls:,} calls in {result.seconds:.0f} s; {told}"
        console.print(line, markup=False, highlight=False)
        for invariant, how in result.violations:
            console.print(f"  violated: {invariant}: {how}", markup=False, highlight=False)
        if options.json:
            options.json.write_text(json.dumps(_told(results, arguments), indent=1))
        return result

    def run(scene: Callable[[Path, Size], Result], seed: int) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            return note(scene(Path(folder), Size(options.processes, options.callers, seed)))

    def paced(store: str, output: int, kills: bool) -> Callable[[Path, Size], Result]:
        return lambda folder, size: pace(store, folder, size, seconds=MINUTES, output=output, kills=kills)

    seed, began = options.seed, time.monotonic()
    for store in stores:
        if "same" in chosen:
            run(lambda folder, size: same(store, folder, size), seed)  # noqa: B023
        if "dollar" in chosen:
            run(lambda folder, size: dollar(store, folder, size), seed)  # noqa: B023
        if "kills" in chosen:
            run(lambda folder, size: dollar(store, folder, size, kills=options.kills), seed)  # noqa: B023
    if "pace" in chosen:
        with ThreadPoolExecutor(6) as pool:  # all at once: they mostly wait
            how = ((100, False), (200, False), (100, True))
            kinds = [(store, *each) for store in stores for each in how]
            for each in [pool.submit(run, paced(*kind), seed) for kind in kinds]:
                each.result()
    while "storm" in chosen:
        enough = seed >= options.seed + STORMS and sum(each.calls for each in results) >= options.calls
        if enough or time.monotonic() - began > options.minutes * 60:
            break
        for store in stores:
            usd = (1_000.0, 0.2)[seed % 2]
            run(lambda folder, size: storm(store, folder, size, seconds=ROUND, usd=usd), seed)  # noqa: B023
        seed += 1
    _show(console, results, " ".join(arguments if arguments is not None else sys.argv[1:]))
    return int(any(each.violations for each in results))


def _told(results: list[Result], arguments: Sequence[str] | None) -> dict[str, object]:
    runs = [{**vars(each), "checked": sorted(each.checked)} for each in results]
    return {
        "command": f"python -m tests.chaos.fleet {' '.join(arguments if arguments is not None else sys.argv[1:])}",
        "calls": sum(each.calls for each in results),
        "violations": sum(len(each.violations) for each in results),
        "runs": runs,
    }


def _show(console: Console, results: list[Result], arguments: str) -> None:
    by: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for each in results:
        by[each.scene, each.store].append(each)
    right = [Column(name, justify="right", no_wrap=True) for name in ("runs", "calls", "answers", "faults")]
    table = Table("scene", "store", *right, "violations", title=f"python -m tests.chaos.fleet {arguments}".strip())
    for (scene, store), found in by.items():
        counts = (
            len(found), sum(each.calls for each in found), sum(each.ends["answer"] for each in found),
            sum(each.faults.total() for each in found), sum(len(each.violations) for each in found),
        )  # fmt: skip
        table.add_row(scene, store, *[f"{count:,}" for count in counts])
    console.print(table)
    faults: Counter[str] = sum((each.faults for each in results), Counter())
    table = Table("fault", Column("injected", justify="right"))
    for name, count in sorted(faults.items()):
        table.add_row(name, f"{count:,}")
    console.print(table)
    table = Table("invariant", Column("runs", justify="right"), Column("violations", justify="right"))
    for invariant in sorted({*[name for each in results for name in each.checked],
                             *[name for each in results for name, _ in each.violations]}):  # fmt: skip
        violated = sum(1 for each in results for name, _ in each.violations if name == invariant)
        table.add_row(invariant, f"{sum(1 for each in results if invariant in each.checked)}", f"{violated}")
    console.print(table)
    ends: Counter[str] = sum((each.ends for each in results), Counter())
    told = ", ".join(f"{name} {count:,}" for name, count in ends.most_common())
    console.print(f"ends: {told}", markup=False, highlight=False)
    violations = sum(len(each.violations) for each in results)
    console.print(f"{len(results)} runs, {sum(each.calls for each in results):,} calls, {violations} violations")


if __name__ == "__main__":
    sys.exit(main())
