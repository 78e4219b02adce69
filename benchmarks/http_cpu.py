"""CPU that one caller's call takes over HTTP, all policies on, beside bare DSPy: a real server in a process of its own.

    python -m benchmarks.http_cpu [--rounds N] [--calls N]

The constant engine of the other figures is the user's own, so its answers are kept in the process. These are answers
that several processes share: each call looks for its answer in the file, says there that it asks, and has it kept.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import dspy
from rich.console import Console
from rich.table import Table

from benchmarks.calls import written
from benchmarks.common import bare, call, guarded, messages
from benchmarks.http import provider


def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of CPU of a call in each round, of this whole process, the writing of what it posted included."""
    with provider(latency=0.0) as url, tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"engine": "lm15", "async_engine": None, "api_base": url, "api_key": "none"}
        subjects: dict[str, dspy.LM] = {
            "dspy.LM": bare(**where),
            "memory": guarded(store="memory://", **where),
            "SQLite": guarded(store=f"sqlite:///{folder}/cached.db", **where),
            "SQLite, cache off": guarded(store=f"sqlite:///{folder}/plain.db", cache=False, **where),
        }
        found: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(rounds + 2):
            for name, lm in subjects.items():
                began = time.process_time()
                for _ in range(calls):
                    call(lm, messages())
                written(lm)
                if number > 1:
                    found[name].append((time.process_time() - began) / calls * 1e6)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=150)
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.calls)
    table = Table("CPU of a call, µs", "median", "more than bare", title="One caller over HTTP, every answer new")
    for name, times in found.items():
        more = statistics.median(mine - theirs for mine, theirs in zip(times, found["dspy.LM"], strict=True))
        table.add_row(name, f"{statistics.median(times):.0f}", f"{more:+.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
