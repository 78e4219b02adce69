"""Every optimizer ended in every way, as a table: `python -m benchmarks.optimizers --seed 1`.

It exits with 1 when a promise is broken: more billed than the cap, less than 90 % of it used where calls are small, a
call after the return, a slow return, a worse program than the best one that was evaluated.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.asked import asked
from benchmarks.compiling import Compiler
from benchmarks.stopping import ONE_OF_EACH, WAYS, Ended, end, natural


def main() -> int:
    """Run the matrix and print it."""
    given = asked("benchmarks.optimizers", __doc__, ONE_OF_EACH, ("ways", WAYS), sized=True)
    ways: list[Any] = given.kinds
    found: list[Ended] = []
    with Compiler() as compiler:
        for name in given.each():
            whole = natural(compiler, name, given.seed, given.size)
            found += [end(compiler, name, how, whole, given.seed, given.size) for how in ways]
            given.write(found, Ended.as_dict)
    Console(width=200).print(table(found))
    return int(any(each.broken for each in found))


def table(found: list[Ended]) -> Table:
    """A row a run."""
    columns = (
        "optimizer", "ended by", "said", "bill $", "of cap", "one bound", "calls after", "returned s", "ended s",
        "given", "best", "returned", "broken",
    )  # fmt: skip
    shown = Table(*columns, title="Every optimizer, ended in every way", title_justify="left")
    for each in found:
        share = f"{each.used / each.cap:.0%}" if each.cap else ""
        bound = f"{each.bound / each.cap:.1%}" if each.cap else ""
        numbers = [_number(value, 2) for value in (each.returned, each.ended)]
        scores = [_number(value, 3) for value in (each.given, each.best, each.score)]
        shown.add_row(
            each.optimizer, each.how, each.stopped_by, f"{each.usd:.6f}", share, bound, str(each.after), *numbers,
            *scores, "; ".join(each.broken),
        )  # fmt: skip
    return shown


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
