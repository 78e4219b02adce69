"""This tree against an earlier revision of it, in one interleaved run.

    python -m benchmarks.versus REVISION [--rounds N] [--only BLOCK] [--json FILE]

Each side is a process of its own that imports its own `dspy_prod` and its own `benchmarks`; they take turns, block by
block, so that whatever else the machine does hits both alike. A ratio below 1 means that this tree takes less time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCKS = {"call": 300, "miss": 300, "hit": 600, "predict hit": 100, "threads": 1280, "sqlite call": 100, "pairs": 1500}
"""What is compared, and how many calls a turn makes."""


class Side:
    """One revision at work in a process of its own."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--serve", str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip

    def run(self, name: str, count: int) -> float:
        """Seconds that a call of this kind takes (CPU, or wall time where threads wait for one another)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, count, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of one side ended with {self._process.wait()}")
        return float(line)

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def compare(revision: str, rounds: int, only: list[str]) -> dict[str, dict[str, float]]:
    """Median ratio of this tree's time to the revision's, with its quartiles, and both medians in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", revision, "dspy_prod", "benchmarks"], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(folder)
        now, then = Side(ROOT), Side(Path(folder))
        result = {}
        for name, count in BLOCKS.items():
            if only and name not in only:
                continue
            for side in (now, then):
                side.run(name, count)
            turns = [(now.run(name, count), then.run(name, count)) for _ in range(rounds)]
            ratios = [mine / theirs for mine, theirs in turns]
            low, middle, high = statistics.quantiles(ratios, n=4)
            result[name] = {
                "ratio": middle, "low": low, "high": high,
                "now_us": statistics.median(mine for mine, _ in turns) * 1e6,
                "then_us": statistics.median(theirs for _, theirs in turns) * 1e6,
            }  # fmt: skip
        now.end()
        then.end()
    return result


def serve(root: str) -> None:
    """Answer the other end's orders, one a line, until there are no more."""
    import time
    import warnings
    from concurrent.futures import ThreadPoolExecutor

    warnings.simplefilter("ignore")
    sys.path[:] = [root, *[entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]]
    import dspy

    from benchmarks.common import call, guarded, messages
    from benchmarks.ledger import pipelined

    try:
        from dspy_prod.stores.sqlite.store import SqliteStore
    except ImportError:  # before the rooms
        from dspy_prod.stores.sqlite import SqliteStore  # type: ignore[attr-defined,no-redef]

    folder = tempfile.mkdtemp()
    store = SqliteStore(str(Path(folder, "pairs.db")))
    uncached, cached = guarded(cache=False), guarded()
    durable = guarded(cache=False, store=f"sqlite:///{folder}/state.db")
    program, same = dspy.Predict("question -> answer"), messages(fresh=False)
    pool = ThreadPoolExecutor(64)

    def repeat(lm: Any, fresh: bool = True) -> Callable[[int], None]:
        def run(count: int) -> None:
            for _ in range(count):
                call(lm, messages() if fresh else same)

        return run

    def predict(count: int) -> None:
        with dspy.context(lm=cached):
            for _ in range(count):
                program(question="the same")

    def threads(count: int) -> None:
        list(pool.map(lambda _: call(uncached, messages()), range(count)))

    def pairs(count: int) -> None:
        pipelined(store, count)
        store.flush(60)

    kinds: dict[str, tuple[Callable[[int], None], Callable[[], float]]] = {
        "call": (repeat(uncached), time.process_time),
        "miss": (repeat(cached), time.process_time),
        "hit": (repeat(cached, fresh=False), time.process_time),
        "predict hit": (predict, time.process_time),
        "threads": (threads, time.perf_counter),
        "sqlite call": (repeat(durable), time.process_time),
        "pairs": (pairs, time.perf_counter),
    }
    for line in sys.stdin:
        name, _, number = line.rstrip().rpartition(" ")
        run, clock = kinds[name]
        began = clock()
        run(int(number))
        print((clock() - began) / int(number), flush=True)


def main() -> int:
    """Compare, and print a table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=__doc__)
    parser.add_argument("revision", help="a git revision of this repository")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", action="append", default=[], choices=list(BLOCKS), help="this block; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    figures = compare(arguments.revision, arguments.rounds, arguments.only)
    table = Table("per call", "now, µs", f"{arguments.revision}, µs", "ratio", "quartiles")
    for name, row in figures.items():
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(name, f"{row['now_us']:.1f}", f"{row['then_us']:.1f}", f"{row['ratio']:.2f}", quartiles)
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
