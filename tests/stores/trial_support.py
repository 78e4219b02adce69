"""What the tests of experiments share: units that get arms, calls and values, and bodies of child processes."""

from __future__ import annotations

import itertools
import time
from typing import Any

from dspy_prod.stores.base import Store
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.trials import Call, Exposure, Matured, Outcome, Trial

WINDOWS: dict[str | None, float] = {None: 100.0, "resolved": 100.0, "at once": 0.0}


def made(store: Store, name: str = "e", windows: dict[str | None, float] = WINDOWS, grace: float = 10.0) -> Trial:
    return store.trials.create(name, '{"v": 1}', windows, grace)


def expose(store: Store, unit: str, arm: str = "control", stage: int = 0, **fields: Any) -> float:
    """The moment of the exposure."""
    at = fields.pop("at", None)
    at = store.trials.now() if at is None else at
    store.trials.expose(
        Exposure(fields.pop("trial", "e"), unit, stage, arm, fields.pop("propensity", 0.5), at, **fields)
    )
    return float(at)


def outcome(store: Store, unit: str, value: float, metric: str = "resolved", id: str | None = None, **f: Any) -> None:
    store.trials.outcome(Outcome(f.pop("trial", "e"), unit, metric, value, f.pop("at", store.trials.now()), id, **f))


def call(store: Store, unit: str, **fields: Any) -> None:
    at = fields.pop("at", store.trials.now())
    store.trials.call(Call(fields.pop("trial", "e"), unit, at, **fields))


def numbers(found: list[Matured]) -> list[int]:
    return [each.number for each in found]


# -- bodies of child processes ---------------------------------------------------------------------------------------
def expose_all(path: str, units: int, barrier: Any, results: Any) -> None:
    """Expose the same units as others do, each in an order of its own, with a call and a value each."""
    store = SqliteStore(path)
    made(store)
    barrier.wait(30)
    step = next(step for step in (7, 11, 13, 17) if units % step)
    for number in range(units):
        unit = f"u{number * step % units}"
        expose(store, unit, "control" if hash_of(unit) else "cot")
        call(store, unit, list_nano=1)
        outcome(store, unit, 1.0, id="the same")
    assert store.flush(30)
    results.put(store.trials.tally("e").units)
    store.close()


def hash_of(unit: str) -> int:
    """0 or 1, the same in every process."""
    return sum(unit.encode()) & 1


def expose_until_killed(path: str, ready: Any) -> None:
    """Expose without end; tell now and then how many are known to be durable."""
    store = SqliteStore(path)
    made(store)
    for number in itertools.count(1):
        expose(store, f"u{number}", f"arm {number % 3}")
        call(store, f"u{number}", list_nano=1)
        outcome(store, f"u{number}", 1.0)
        if number % 500 == 0:
            store.flush(10)
            ready.put(number)


def hold_lease(path: str, seconds: float, ready: Any) -> None:
    """Take a lease, and never give it back."""
    store = SqliteStore(path)
    ready.put(store.trials.lease("controller", "dead", seconds))
    time.sleep(600)


def change_once(path: str, barrier: Any, results: Any) -> None:
    """Try to be the one who starts an experiment, and who saves the first checkpoint."""
    store = SqliteStore(path)
    trial = made(store)
    barrier.wait(30)
    results.put(
        (store.trials.change("e", trial.revision, state="running") is not None, store.trials.save("e", "{}", 0))
    )
    store.close()
