"""`python -m tests.fuzz --examples 1000000 --seed 1`: what providers, files and callers say, and what must hold.

Each example that violates a rule is made small and saved; `--replay FILE` makes it again. The exit code is then 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests.fuzz.running import KINDS, Share, Tally, offline, replay, save, shares, work


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="only this one; may be repeated")
    parser.add_argument("--save", type=Path, default=Path("fuzz-violations"), help="folder for what violates a rule")
    parser.add_argument("--replay", type=Path, help="make the example of this file again, and nothing else")
    options = parser.parse_args(arguments)
    offline()
    if options.replay is not None:
        said = replay(options.replay)
        print(said or "It violates no rule any more.")
        return said is not None
    whole = shares(options.examples, options.seed, options.processes, options.kind or [*KINDS])
    began = time.monotonic()
    tallies = _together(whole, options.processes)
    violations = _show(tallies, time.monotonic() - began)
    for tally in tallies.values():
        for path in save(tally, options.save):
            print(f"saved: {path}")
    return violations > 0


def _together(whole: list[Share], processes: int) -> dict[str, Tally]:
    """Do all shares, each in a process of its own: what an answer can kill it kills alone."""
    tallies = {share.kind: Tally(share.kind) for share in whole}
    context = multiprocessing.get_context("spawn")
    with tqdm(total=sum(share.examples for share in whole), unit=" examples", smoothing=0.05) as bar:
        waiting, running = list(whole), {}
        while waiting or running:
            while waiting and len(running) < processes:
                here, there = context.Pipe(duplex=False)
                share = waiting.pop(0)
                process = context.Process(target=work, args=(share, there), daemon=True)
                process.start()
                there.close()
                running[here] = (share, process)
            for ready in connection.wait(list(running)):
                share, process = running[ready]
                try:
                    said = ready.recv()
                except EOFError:
                    process.join()
                    del running[ready]
                    tallies[share.kind].died(share, process.exitcode)
                    continue
                if isinstance(said, Tally):
                    tallies[share.kind].add(said)
                    process.join()
                    del running[ready]
                else:
                    count, tallies[share.kind].reached[share] = said
                    bar.update(count)
    return tallies


def _show(tallies: dict[str, Tally], took: float) -> int:
    table = Table("kind", *[_right(name) for name in ("examples", "answers", "typed errors", "violations")])
    for tally in tallies.values():
        counts = (tally.examples, tally.answers, tally.errors.total(), tally.violations.total())
        table.add_row(tally.kind, *[f"{count:,}" for count in counts])
    console = Console()
    console.print(table)
    examples = sum(tally.examples for tally in tallies.values())
    console.print(f"{examples:,} examples in {took:,.0f} s")
    for tally in tallies.values():
        if tally.errors:
            told = ", ".join(f"{name} {count:,}" for name, count in tally.errors.most_common())
            console.print(f"{tally.kind}: {told}", markup=False, highlight=False)
    for tally in tallies.values():
        for each in tally.reproducers:
            console.print(f"\n{tally.kind}: {each['said'][:1_200]}", markup=False, highlight=False)
    return sum(tally.violations.total() for tally in tallies.values())


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right", no_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
