"""What the benchmarks that go through optimizers are asked on the command line, and where their figures go."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from tqdm.auto import tqdm

from benchmarks.bars import exit_code


class Asked(NamedTuple):
    """What is to be measured: names of optimizers, how, with which seed, how large; and the file for the figures."""

    names: list[str]
    kinds: list[str]
    seed: int
    json: str | None
    size: int = 1

    def each(self) -> Iterator[str]:
        """The names one by one, beside a bar of how many are done."""
        for name in (progress := tqdm(self.names, unit="optimizer", file=sys.stderr, leave=False)):
            progress.set_postfix_str(name)
            yield name

    def write(self, rows: Iterable[Any], as_dict: Callable[[Any], dict[str, Any]]) -> None:
        """Write the figures so far, where a file was named."""
        if self.json:
            with open(self.json, "w", encoding="utf-8") as file:
                json.dump([as_dict(row) for row in rows], file, indent=2)


def told(figures: dict[str, Any], tables: Iterable[Any], file: str | None, width: int | None = None) -> int:
    """Show the figures of a benchmark, and what bounds they break; 1 where one is broken, as an exit code.

    Args:
        figures: as JSON has them; "violations" are the bounds. tables: the same to look at.
        file: gets the figures; "-" is standard output, which then has no tables. width: of the tables.
    """
    text = json.dumps(figures, indent=2)
    if file == "-":
        print(text)
    else:
        if file:
            with open(file, "w", encoding="utf-8") as written:
                written.write(text + "\n")
        console = Console(width=width)
        for table in tables:
            console.print(table)
    return exit_code(figures["violations"])


def asked(
    program: str,
    does: str | None,
    names: Sequence[str],
    kinds: tuple[str, Sequence[str]],
    between: str = ",",
    sized: bool = False,
) -> Asked:
    """Read the command line.

    Args:
        program: the module that is run. does: what it does. names: all optimizers.
        kinds: the option that chooses how they are run, and all that it takes. between: separates these.
        sized: it can be made larger.
    """
    option, every = kinds
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=does)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="optimizers, separated by commas")
    parser.add_argument(f"--{option}", default="", dest="kinds", help=f"of {f'{between} '.join(every)}")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    if sized:
        larger = "so many times 40 examples to train with and 60 to select by"
        parser.add_argument("--size", type=int, default=1, help=larger)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    return Asked(
        [name for name in given.only.split(",") if name] or list(names),
        [kind for kind in given.kinds.split(between) if kind] or list(every),
        given.seed, given.json, getattr(given, "size", 1),
    )  # fmt: skip
