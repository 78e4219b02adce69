"""Exposures, calls and outcomes as the arguments of one step of each experiment, see `trial_steps`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isfinite
from typing import Final

from dspy_prod.stores.redis.asking import KEPT_FOR, Tables, packed, part_of
from dspy_prod.stores.redis.batch import Value
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.trial_steps import PARTS
from dspy_prod.stores.trial_posts import Call, Exposure, Thing, Underway
from dspy_prod.stores.trial_terms import EARLY, Calls

_log = logging.getLogger("dspy_prod")

MOST_UNITS: Final = 2_000_000
"""Units kept of an experiment: 0.3 GB of the server's memory, 0.5 GB with their calls. Newcomers beyond are served, and
counted as unkept."""
MOST_VALUES: Final = 4_000_000
"""Values of metrics kept of an experiment: 0.9 GB; further ones are counted as unkept too."""
MOST_UNDERWAY: Final = 10_000
"""Units whose calls go on that are waited for longer than others."""
HALF: Final = 10**9
"""Nano-USD are written as so many of these, and the rest."""
CALLS: Final = "*"
"""Stands for the metric of calls, which has no name."""


def metric_part(metric: str | None) -> str:
    """A metric as it stands in fields."""
    return CALLS if metric is None else part_of(metric)


def write_things(tables: Tables, connection: Connection, things: Sequence[Thing], now: float) -> None:
    """Add to the commit what a batch says of its experiments; it is known by the commit's id when tried again."""
    by_trial: dict[str, list[Value]] = {}
    of: dict[str, float | None] = {}
    for thing in things:
        if _fits(thing):
            values = by_trial.get(thing.trial)
            if values is None:
                values = by_trial[thing.trial] = [MOST_UNITS, MOST_VALUES, MOST_UNDERWAY, _exact(now), _exact(EARLY)]
            if thing.made != of.get(thing.trial):
                of[thing.trial] = thing.made
                values += ("m", "" if thing.made is None else _exact(thing.made))
            values += _arguments(thing, now)
        else:
            _log.error("%r cannot be written, and is lost", thing)
    for name, values in by_trial.items():
        tables.batch.call("trial_things", connection.key("trial", name), *values)
        touch(tables, connection, name)


def touch(tables: Tables, connection: Connection, name: str) -> None:
    """All that is kept of an experiment has as long to live as what was written just now."""
    for key in keys_of(connection, name):
        tables.batch.call("EXPIRE", key, KEPT_FOR)
    tables.batch.call("EXPIRE", connection.key("trials"), KEPT_FOR)


def keys_of(connection: Connection, name: str) -> list[str]:
    """The keys of an experiment, its head's first."""
    return [connection.key("trial", name), *(connection.key("trial", name, part) for part in PARTS)]


def _fits(thing: Thing) -> bool:
    """Whether a thing is of the types that it says: one that is not would take its whole batch with it."""
    if not (isinstance(thing.trial, str) and isinstance(thing.unit, str) and _is_finite(thing.at)):
        return False
    if not (thing.made is None or _is_finite(thing.made)):
        return False
    if isinstance(thing, Exposure):
        whole = isinstance(thing.stage, int) and isinstance(thing.full, int)
        return whole and isinstance(thing.arm, str) and _is_finite(thing.propensity)
    if isinstance(thing, Call):
        return isinstance(thing.list_nano, int | None) and (
            thing.latency is None or isinstance(thing.latency, float | int)
        )
    if isinstance(thing, Underway):
        return _is_finite(thing.seconds)
    return (
        isinstance(thing.metric, str)
        and isinstance(thing.value, float | int)
        and (thing.id is None or isinstance(thing.id, str))
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and isfinite(value)


def _arguments(thing: Thing, now: float) -> tuple[Value, ...]:
    unit = packed(thing.unit)
    if isinstance(thing, Exposure):
        stage, full, arm = str(int(thing.stage)), str(int(thing.full)), part_of(thing.arm)
        at, propensity = min(thing.at, now), thing.propensity
        row = f"{_exact(at)} {stage} {full} {_exact(propensity)} {arm} {part_of(thing.unit)}"
        return "e", unit, stage, full, arm, "1" if propensity < 1 else "0", row
    if isinstance(thing, Call):
        _, failed, fell_back, list_nano, timed, latency, unpriced = Calls.of(thing)
        high, low = divmod(int(list_nano), HALF)
        arm = "" if thing.arm is None else part_of(thing.arm)
        sums = failed, fell_back, high, low, timed, _exact(latency), unpriced
        return "c", unit, _exact(thing.at), *sums, arm, int(thing.abandoned)
    if isinstance(thing, Underway):
        return "w", unit, _exact(min(thing.at, now) + thing.seconds)
    value = _exact(thing.value) if isfinite(thing.value) else ""
    return "o", unit, metric_part(thing.metric), _id(thing.id), value, _exact(thing.at)


def _exact(number: float) -> str:
    """A number that reads back as it was, here and in Lua."""
    return repr(float(number))


def _id(id: str | None) -> bytes:
    return b"-" if id is None else b"+" + packed(id)
