"""`python -m benchmarks.peers [--json FILE] [--quick] [--plots DIR] [--only PART]`: peers beside ours, one run.

What subjects do on the same work takes turns. The long form takes about half an hour, five minutes of it for rpm=60.
Ends with 1 where a bar is missed, and a line for each (`benchmarks.bars` has the bars, and what is granted).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from tqdm.auto import tqdm

from benchmarks.asked import told
from benchmarks.bars import missed_beside_peers
from benchmarks.peers import costs, growth, pace, shown, steps
from benchmarks.peers.subjects import CONFIGURATIONS

PARTS = ("cpu", "hits", "crowds", "http", "growth", "behaviour", "steps")


def measure(only: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Everything, or these parts; each figure under the part's name.

    Args:
        only: of `PARTS`; empty: all. quick: few rounds, small sizes, no whole minutes.
    """
    few: dict[str, int] = {"rounds": 2, "count": 20} if quick else {}
    crowd: dict[str, Any] = {"rounds": 1, "seconds": 0.3, "callers": (1, 64)} if quick else {}
    every = (growth.QUICK, pace.QUICK) if quick else (growth.MEASURES, pace.MEASURES)
    work: dict[str, dict[str, Callable[[], Any]]] = {
        "cpu": {"": lambda: costs.cpu(**few)},
        "hits": {"": lambda: costs.hits(**few)},
        "crowds": {"": lambda: costs.crowds(**crowd)},
        "http": {"": lambda: costs.http_crowds(**crowd)},
        "growth": dict(every[0]),
        "behaviour": dict(every[1]),
        "steps": {"": lambda: steps.measure(**({"seconds": 1.0} if quick else {}))},
    }
    figures: dict[str, Any] = {"machine": shown.machine(), "configurations": CONFIGURATIONS, "quick": quick}
    asked = [(part, name) for part in only or PARTS for name in work[part]]
    for part, name in (progress := tqdm(asked, unit="part", file=sys.stderr, leave=False)):
        progress.set_postfix_str(f"{part} {name}".strip())
        found = work[part][name]()
        if part == "growth":
            figures.setdefault(part, {})[name] = found
        elif part == "behaviour":
            figures.setdefault(part, []).extend(found)
        else:
            figures[part] = found
    return figures


def main() -> int:
    """Measure, print, and write what was asked for; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes, no whole minutes")
    parser.add_argument("--plots", metavar="DIR", help="also draw pictures into DIR (needs matplotlib)")
    parser.add_argument("--only", action="append", default=[], choices=PARTS, help="this part; may be repeated")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    figures = measure(arguments.only, arguments.quick)
    figures["violations"] = missed_beside_peers(figures, arguments.quick)
    code = told(figures, shown.tables(figures), arguments.json)
    if arguments.plots:
        for file in shown.plots(figures, Path(arguments.plots)):
            print(file, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
