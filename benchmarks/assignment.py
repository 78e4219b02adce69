"""What an experiment costs a request, and a look its controller: assigning, exposing, reading.

    python -m benchmarks.assignment [--units N]

Prints the figures as JSON, and ends with an error where one misses its bar.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from benchmarks.bars import exit_code
from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.exposing import Exposing
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.memory_trials import MemoryTrials
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.trials import Call, Exposure, Outcome

LOOK = 1_000
"""Units that are new at a look."""
BARS: Final = {"known unit, us": 5.0, "first exposure, us of its caller": 15.0, "nothing new, ms": 1.0}
"""The most that figures of these names may be, on either store: a call waits for the first two, a look for the last."""


@contextmanager
def stores() -> Iterator[dict[str, Store]]:
    """A memory store that keeps a million units, and a SQLite file."""
    with tempfile.TemporaryDirectory() as directory:
        memory, sqlite = MemoryStore(), SqliteStore(f"{directory}/state.db")
        memory._trials = MemoryTrials(SYSTEM_CLOCK.time, most_units=10**7, most_values=10**7)
        yield {"memory": memory, "sqlite": sqlite}
        memory.close()
        sqlite.close()


def requests(rounds: int = 15, count: int = 2_000) -> dict[str, float]:
    """Microseconds of the request's thread and of the whole process (the writer's part included), medians of rounds."""
    result: dict[str, float] = {}
    design = Design("salt", ("control", "cot", "other"), shares=(0.01, 0.5), holdout=0.05, program="p")
    result["hash alone, us"] = _median(rounds, count, lambda _, n: [design.assign(f"u{i}", 1) for i in range(n)])[0]
    with stores() as kept:
        for name, store in kept.items():
            store.trials.create("e", "{}", {None: 60.0})
            plain = Design("salt", ("control", "cot"))
            exposing = Exposing("e", plain, store.trials)
            known = [f"known{number}" for number in range(count)]
            for unit in known:
                exposing(unit)
            store.flush(30)

            def again(_: int, n: int, exposing: Exposing = exposing, known: list[str] = known) -> None:
                for unit in known[:n]:
                    exposing(unit)

            def fresh(number: int, n: int, exposing: Exposing = exposing) -> None:
                for index in range(n):
                    exposing(f"{number}.{index}")

            result[f"{name}: known unit, us"] = _median(rounds, count, again)[0]
            asked, whole = _median(rounds, count, fresh, lambda store=store: store.flush(30))  # type: ignore[misc]
            result[f"{name}: first exposure, us of its caller"] = asked
            result[f"{name}: first exposure, us of the process"] = whole
    return result


def _median(
    rounds: int, count: int, turn: Callable[[int, int], Any], settle: Callable[[], Any] = lambda: None
) -> tuple[float, float]:
    """CPU of this thread, and of the process, in microseconds a time."""
    mine, all_ = [], []
    for number in range(rounds):
        began, whole = time.thread_time(), time.process_time()
        turn(number, count)
        mine.append(time.thread_time() - began)
        settle()
        all_.append(time.process_time() - whole)
    return tuple(round(statistics.median(each) / count * 1e6, 2) for each in (mine, all_))  # type: ignore[return-value]


def reads(units: int, kind: str) -> dict[str, float]:
    """Milliseconds of CPU (of all threads) that a controller's look takes with so many units there; medians of 7."""
    with stores() as kept:
        store = kept[kind]
        trials = store.trials
        trials.create("e", "{}", {None: 0.0, "resolved": 0.0})
        if isinstance(store, SqliteStore):
            _fill_file(store.url.removeprefix("sqlite:///"), units)
        else:
            _fill(store, 0, units)
        for metric in (None, "resolved"):
            after = 0
            while found := trials.matured("e", metric, after, 20_000):
                after = found[-1].number
        began = time.process_time()
        _fill(store, units, units + 7 * LOOK)
        filled = time.process_time() - began
        times: dict[str, list[float]] = {}

        def timed(name: str, what: Callable[[], Any]) -> Any:
            began = time.process_time()
            found = what()
            times.setdefault(name, []).append(time.process_time() - began)
            return found

        for look in range(7):
            after = units + look * LOOK
            for name, metric in (("calls", None), ("values", "resolved")):
                found = timed(
                    f"{LOOK} new units, {name}, ms",
                    lambda metric=metric, after=after: trials.matured("e", metric, after, LOOK),  # type: ignore[misc]
                )
                assert [each.number for each in found] == list(range(after + 1, after + LOOK + 1))
            timed("nothing new, ms", lambda: trials.matured("e", "resolved", units + 7 * LOOK))
            arms = timed("counts, ms", lambda: trials.counts("e"))
            assert sum(arm.units for arm in arms) == units + 7 * LOOK
            assert timed("tally, ms", lambda: trials.tally("e")).units == units + 7 * LOOK
            timed("the arm of a unit, ms", lambda: trials.seen("e", "u5"))
        found = {name: round(statistics.median(each) * 1e3, 3) for name, each in times.items()}
        return {**found, "written a unit (exposure, call, value), us": round(filled / (7 * LOOK) * 1e6, 1)}


def _fill(store: Store, first: int, last: int) -> None:
    trials = store.trials
    for number in range(first, last):
        unit, at = f"u{number}", trials.now()
        trials.expose(Exposure("e", unit, number % 3, ("control", "cot")[number % 2], 0.5, at))
        trials.call(Call("e", unit, at, latency=1.0, list_nano=1_000))
        trials.outcome(Outcome("e", unit, "resolved", 1.0, at))
    assert store.flush(60)


def _fill_file(path: str, units: int, portion: int = 20_000) -> None:
    """The rows that `_fill` makes, in a minute instead of many; in portions, for the store writes beside it."""
    at, arm = time.time(), "iif(i % 2, 'cot', 'control')"
    tables = {
        "trial_units": f"1, i + 1, 'u' || i, i % 3, {arm}, 0.5, 0, {at}, 0, 0",
        "trial_calls": "1, i + 1, 1, 0, 0, 1000, 1, 1.0, 0, 0, 1000, 1, 1.0, 0, 0",
        "trial_values": f"1, 'resolved', i + 1, 'anonymous', 1.0, {at}",
    }
    arms = "SELECT 1, stage, arm, 0, count(*), count(*), 0 FROM trial_units GROUP BY stage, arm"
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as file:
        for first in range(0, units, portion):
            last = min(first + portion, units) - 1
            numbers = f"WITH RECURSIVE n (i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
            with file:
                for table, row in tables.items():
                    file.execute(f"INSERT INTO {table} {numbers} SELECT {row} FROM n")
        with file:
            file.execute(f"INSERT INTO trial_arms {arms}")


def measure(units: int = 1_000_000) -> dict[str, Any]:
    """Everything."""
    result: dict[str, Any] = {"a request": requests()}
    for kind in ("memory", "sqlite"):
        for number in sorted({min(10_000, units), units}):
            result[f"a look, {kind}, {number:,} units"] = reads(number, kind)
    return result


def missed(figures: dict[str, dict[str, float]]) -> list[str]:
    """The figures that are beyond their bar, in words."""
    return [
        f"{group}, {name}: {value:g}, not <= {bar:g}"
        for group, found in figures.items()
        for name, value in found.items()
        for ending, bar in BARS.items()
        if name.endswith(ending) and not value <= bar
    ]


def main() -> int:
    """Measure, print, and tell whether the bars are met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.assignment", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--units", type=int, default=1_000_000, help="units of the large experiment")
    figures = measure(parser.parse_args().units)
    print(json.dumps(figures, indent=1))
    return exit_code(missed(figures))


if __name__ == "__main__":
    sys.exit(main())
