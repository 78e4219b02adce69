"""What a new unit of an experiment, and a look at it, cost a SQLite store that has a million of them.

A look finds nothing new (`look`), one unit with its outcome (`one`), or ten (`news`), whose bets it places and saves.

    python -m benchmarks.units [--units N] [--json FILE]

Two files are measured in turns, one of them small: what grows with an experiment shows as a ratio. CPU is the whole
process's, the writer's thread included. A look that takes longer than its bar ends in an error.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from benchmarks.bars import exit_code
from dspy_prod import Metric
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.opened import Opened
from dspy_prod.options.metrics import guardrails
from dspy_prod.stores.keys import joined
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.trials import RUNNING, Call, Exposure, Outcome

SMALL = 1_000
MANY = 1_000_000
DAY = 86_400.0
BARS: Final = {"look": 1_000.0, "one": 1_000.0}
"""Microseconds that a look may take at most, with nothing new and with one new unit."""
_RESOLVED = Metric("resolved", margin=0.02)


class Kept:
    """A store with an experiment that so many units are in, each with a call and an outcome, all of them read.

    Args:
        path: of the file. units: how many, exposed within the day before yesterday.
    """

    def __init__(self, path: Path, units: int) -> None:
        self._draw = random.Random(units)
        self._path = path
        metrics = [each.model_dump(mode="json") for each in (_RESOLVED, *guardrails())]
        said = Declaration("salt", {"control": "A", "new": "B"}, [1.0, 1.0], metrics)
        with closing(SqliteStore(str(path))) as store:
            trial = store.trials.create("e", said.to_json(), {"resolved": 0.0, None: 0.0})
            store.trials.change("e", trial.revision, state=RUNNING)
            self._fill(range(1, SMALL + 1))
            Opened(store, "e").controller.step()  # evidence of the first ones stands for that of all
            read = store.trials.checkpoint("e")
            assert read is not None
            told = {**json.loads(read.state), "read": {"": units, "resolved": units}}
            assert store.trials.save("e", json.dumps(told), read.revision)
        self._fill(range(SMALL + 1, units + 1))
        self.store = SqliteStore(str(path))
        self.opened = Opened(self.store, "e")
        self.look()

    def _fill(self, numbers: range) -> None:
        """Straight into the tables: what is measured is what comes after."""
        began, arms, count = time.time() - 2 * DAY, ("control", "new"), len(numbers)
        with closing(sqlite3.connect(self._path, isolation_level=None)) as file:
            file.execute("BEGIN IMMEDIATE")
            file.executemany(
                "INSERT INTO trial_units VALUES (1, ?, ?, 0, ?, 0.5, 0, ?, 0, 0)",
                ((n, self.name(), arms[n % 2], began + 0.05 * n) for n in numbers),
            )
            file.executemany(
                "INSERT INTO trial_calls VALUES (1, ?, 1, 0, 0, 1000, 1, 0.5, 0, 0, 1000, 1, 0.5, 0, 0)",
                ((n,) for n in numbers),
            )
            file.executemany(
                "INSERT INTO trial_values VALUES (1, 'resolved', ?, ?, ?, ?)",
                ((n, joined(None), float(n % 5 > 0), began) for n in numbers),
            )
            file.executemany(
                "INSERT INTO trial_arms VALUES (1, 0, ?1, 0, ?2, ?2, 0, 0) "
                "ON CONFLICT DO UPDATE SET units = units + ?2, first = first + ?2",
                [(arm, count // 2) for arm in arms],
            )
            file.executemany(
                "INSERT OR REPLACE INTO trial_read VALUES (1, ?, ?)",
                [(joined(name), numbers.stop - 1) for name in ("resolved", None)]
                if count and numbers.start > 1
                else [],
            )
            file.execute("COMMIT")

    def name(self) -> str:
        """A unit's."""
        return f"user-{self._draw.getrandbits(48):012x}"

    def news(self, units: int) -> None:
        """New units come, call, and have an outcome."""
        trials = self.store.trials
        for number in range(units):
            unit, now = self.name(), trials.now()
            trials.expose(Exposure("e", unit, 0, ("control", "new")[number % 2], 0.5, now))
            trials.call(Call("e", unit, now, list_nano=1_000, latency=0.5))
            trials.outcome(Outcome("e", unit, "resolved", 1.0, now))
        assert self.store.flush(60.0)

    def look(self) -> None:
        """A controller's look."""
        assert self.opened.controller.step() is not None


def measure(units: int = MANY, rounds: int = 7, news: int = 2_000, looks: int = 20) -> dict[str, Any]:
    """Microseconds of CPU of a new unit, of a look and of those with one new unit and with ten, medians; and as ratios
    to those of a small file.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = {each: Kept(Path(directory) / f"{each}.db", each) for each in (SMALL, units)}
        spent: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for size, kept in files.items():
                spent.setdefault(("unit", size), []).append(_cpu(lambda kept=kept: kept.news(news)) / news)
                kept.look()
                looked = _cpu(lambda kept=kept: [kept.look() for _ in range(looks)]) / looks
                spent.setdefault(("look", size), []).append(looked)
                for _ in range(3):
                    kept.news(1)
                    spent.setdefault(("one", size), []).append(_cpu(kept.look))
                kept.news(10)
                spent.setdefault(("news", size), []).append(_cpu(kept.look))
        for kept in files.values():
            kept.store.close()
    found: dict[str, Any] = {"units": units}
    for what in ("unit", "look", "one", "news"):
        small, large = (statistics.median(spent[what, size]) for size in files)
        found |= {f"{what}_us": large, f"{what}_small_us": small, f"{what}_ratio": large / small}
    return found


def _cpu(do: Callable[[], Any]) -> float:
    began = time.process_time()
    do()
    return 1e6 * (time.process_time() - began)


def missed(figures: dict[str, Any]) -> list[str]:
    """The figures that are beyond their bar, in words."""
    told = {"look": "a look with nothing new", "one": "a look with one new unit"}
    return [
        f"{told[what]} at {figures['units']:,} units: {figures[f'{what}_us']:,.0f} us, not <= {bar:,.0f}"
        for what, bar in BARS.items()
        if not figures[f"{what}_us"] <= bar
    ]


def main() -> int:
    """Measure, print, and tell whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=MANY, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    given = parser.parse_args()
    figures = measure(given.units)
    text = json.dumps(figures, indent=2)
    if given.json not in (None, "-"):
        Path(given.json).write_text(text + "\n", encoding="utf-8")
    print(text)
    return exit_code(missed(figures))


if __name__ == "__main__":
    sys.exit(main())
