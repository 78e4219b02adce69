"""Writes a batch of exposures, calls and outcomes, in few statements whatever its size: see `inserting`."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from dspy_prod.stores.keys import joined
from dspy_prod.stores.sqlite.inserting import Inserting, each_of, portions
from dspy_prod.stores.sqlite.trial_tables import find, last_number, name_of, read_marks
from dspy_prod.stores.trial_posts import Call, Exposure, Outcome, Thing, Underway
from dspy_prod.stores.trial_terms import (
    Calls,
    Trial,
    is_early,
)

_log = logging.getLogger("dspy_prod")

_PUT_UNITS: Final = Inserting(
    "trial_units", ("trial", "number", "unit", "stage", "arm", "propensity", "filled", "at", "mixed", "left_out")
)
_PUT_LATER: Final = Inserting("trial_later", ("trial", "number", "stage", "arm", "filled"))
_PUT_CALLS: Final = Inserting(
    "trial_calls",
    (
        *("trial", "number", "calls", "failed", "fell_back", "list_nano", "timed", "latency"),
        *("first_failed", "first_fell_back", "first_list_nano", "first_timed", "first_latency"),
        *("unpriced", "first_unpriced"),
    ),
    " ON CONFLICT (trial, number) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in Calls._fields),
)
_PUT_VALUES: Final = Inserting(
    "trial_values",
    ("trial", "metric", "number", "id", "value", "at"),
    " ON CONFLICT (trial, metric, number, id) DO UPDATE SET value = excluded.value, at = excluded.at",
)
_PUT_ARMS: Final = Inserting(
    "trial_arms",
    ("trial", "stage", "arm", "filled", "units", "first", "mixed", "entered"),
    " ON CONFLICT (trial, stage, arm, filled) DO UPDATE SET units = units + excluded.units, "
    "first = first + excluded.first, mixed = mixed + excluded.mixed, entered = entered + excluded.entered",
)
_PUT_ENDED: Final = Inserting(
    "trial_ended",
    ("trial", "arm", "calls", "failed", "fell_back", "abandoned"),
    " ON CONFLICT (trial, arm) DO UPDATE SET calls = calls + excluded.calls, failed = failed + excluded.failed, "
    "fell_back = fell_back + excluded.fell_back, abandoned = abandoned + excluded.abandoned",
)
_PUT_UNDERWAY: Final = Inserting(
    "trial_underway",
    ("trial", "number", "until"),
    " ON CONFLICT (trial, number) DO UPDATE SET until = max(until, excluded.until)",
)
_ENDED: Final = "DELETE FROM trial_underway WHERE trial = ? AND until < ?"
_MIX: Final = "UPDATE trial_units SET mixed = 1, left_out = ? WHERE trial = ? AND number = ?"
_LOSE: Final = (
    "UPDATE trials SET late = late + ?, stray = stray + ?, early = early + ?, unpriced = unpriced + ?, "
    "repeated = repeated + ? WHERE id = ?"
)
_KNOWN: Final = "number, unit, stage, arm, filled, at, mixed, propensity"
_DONE: Final = "SELECT batch FROM trial_writers WHERE owner = ?"
_DO: Final = "INSERT OR REPLACE INTO trial_writers VALUES (?, ?, ?)"
_OLD_WRITERS: Final = "DELETE FROM trial_writers WHERE at < ?"
_KEEP_WRITERS: Final = 7 * 86_400.0


def write_batch(
    connection: sqlite3.Connection, ns: int, owner: str, things: Sequence[Thing], batch: int, now: float
) -> None:
    """Write a batch once: tried again after a commit that seemed to fail and did not, it is left alone.

    Args:
        owner: who posted it. batch: its number, larger than that of the owner's batch before.
    """
    row = connection.execute(_DONE, (owner,)).fetchone()
    if row is not None and row[0] >= batch:
        return
    if row is None:
        connection.execute(_OLD_WRITERS, (now - _KEEP_WRITERS,))
    connection.execute(_DO, (owner, batch, now))
    by_trial: dict[str, list[Thing]] = {}
    for thing in things:
        if _fits(thing):
            by_trial.setdefault(thing.trial, []).append(thing)
        else:
            _log.error("%r cannot be written, and is lost", thing)
    for name, some in by_trial.items():
        found = find(connection, ns, name)
        its = [] if found is None else [thing for thing in some if thing.made in (None, found[1].created)]
        if found is not None and its:
            _Batch(connection, *found, now).write(its)


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
        return (thing.list_nano is None or isinstance(thing.list_nano, int)) and (
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


@dataclass(slots=True)
class _Unit:
    number: int
    stage: int
    arm: str
    filled: int
    at: float
    mixed: bool
    propensity: float
    fresh: bool = False
    left_out: bool = False


class _Batch:
    """What a batch says of one experiment; gathered, then written."""

    def __init__(self, connection: sqlite3.Connection, id: int, trial: Trial, now: float) -> None:
        self._connection = connection
        self._id = id
        self._trial = trial
        self._now = now
        self._marks = read_marks(connection, id)
        self._last = last_number(connection, id)
        self._units: dict[str, _Unit] = {}
        self._later: dict[int, dict[int, tuple[str, int]]] = {}  # arm and whether it was full, by unit and stage
        self._new_later: list[tuple[Any, ...]] = []
        self._arms: dict[tuple[int, str, int], list[int]] = {}
        self._calls: dict[int, tuple[Calls, Calls]] = {}
        self._called: set[int] = set()
        self._values: dict[tuple[str, int, str], tuple[float, float]] = {}
        self._valued: dict[tuple[str, int], str] = {}
        self._underway: dict[int, float] = {}
        self._ended: dict[str, list[int]] = {}
        self._late = self._stray = self._early = self._unpriced = self._repeated = 0

    def write(self, things: list[Thing]) -> None:
        self._read(things)
        for thing in things:
            if type(thing) is Exposure:
                self._expose(thing)
            elif type(thing) is Call:
                self._call(thing)
            elif type(thing) is Underway:
                self._goes_on(thing)
            else:
                assert isinstance(thing, Outcome)
                self._outcome(thing)
        self._put()

    # -- what is known -----------------------------------------------------------------------------------------------
    def _read(self, things: list[Thing]) -> None:
        """The units of the batch, and as far as it matters what is there of them."""
        for row in self._each("trial_units", _KNOWN, "unit", {joined(thing.unit) for thing in things}):
            number, unit, stage, arm, filled, at, mixed, propensity = row
            self._units[unit] = _Unit(number, stage, arm, filled, at, bool(mixed), propensity)
        numbers = {name: unit.number for name, unit in self._units.items()}
        moved = {
            unit.number
            for thing in things
            if type(thing) is Exposure and (unit := self._units.get(joined(thing.unit))) and unit.stage != thing.stage
        }
        for number, stage, arm, filled in self._each("trial_later", "number, stage, arm, filled", "number", moved):
            self._later.setdefault(number, {})[stage] = (arm, filled)
        if self._trial.windows.get(None) == 0:
            asked = {numbers.get(joined(thing.unit)) for thing in things if type(thing) is Call}
            self._called = {number for (number,) in self._each("trial_calls", "number", "number", asked - {None})}
        single = {metric for metric, window in self._trial.windows.items() if window == 0 and metric is not None}
        for metric in {thing.metric for thing in things if isinstance(thing, Outcome)} & single:
            key = joined(metric)
            told = {
                numbers.get(joined(one.unit)) for one in things if isinstance(one, Outcome) and one.metric == metric
            }
            rows = self._each("trial_values", "number, id", "number", told - {None}, " AND metric = ?", key)
            self._valued.update({(key, number): id for number, id in rows})

    def _each(
        self, table: str, columns: str, column: str, values: Iterable[Any], more: str = "", *given: Any
    ) -> Iterable[tuple[Any, ...]]:
        for some in portions(list(values)):
            sql = each_of(table, columns, column, len(some), f"trial = ?{more}")
            yield from self._connection.execute(sql, (*some, self._id, *given)).fetchall()

    # -- what is new -------------------------------------------------------------------------------------------------
    def _expose(self, exposure: Exposure) -> None:
        name, arm = joined(exposure.unit), joined(exposure.arm)
        stage, filled = exposure.stage, exposure.full
        unit, chance = self._units.get(name), exposure.propensity < 1
        if unit is None and not chance:
            return
        if unit is None:
            self._last += 1
            at = min(exposure.at, self._now)
            self._units[name] = _Unit(self._last, stage, arm, filled, at, False, exposure.propensity, fresh=True)
            self._count(stage, arm, filled, 1, 1)
            return
        later = self._later.get(unit.number, {})
        known = (unit.arm, unit.filled) if stage == unit.stage else later.get(stage)
        if known is None and chance:
            entered = arm != unit.arm and all(arm != each for each, _ in later.values())  # it was in other arms only
            self._count(stage, arm, filled, units=1, entered=entered)
            self._later.setdefault(unit.number, later)[stage] = (arm, filled)
            self._new_later.append((self._id, unit.number, stage, arm, filled))
        elif known is not None and known[0] != arm and not unit.mixed:
            unit.mixed = True
            unit.left_out = unit.number > max(self._marks.values(), default=0)
            self._count(stage, *known, mixed=1)
            if not unit.fresh:
                self._connection.execute(_MIX, (unit.left_out, self._id, unit.number))

    def _call(self, call: Call) -> None:
        unit, window = self._units.get(joined(call.unit)), self._trial.windows.get(None)
        if unit is None or window is None:
            return
        if call.arm is not None:
            sums = self._ended.setdefault(joined(call.arm), [0, 0, 0, 0])
            for place, count in enumerate((1, call.failed, call.fell_back, call.abandoned)):
                sums[place] += count
        has = unit.number in self._called
        if self._trial.repeats(call, name_of(unit.arm), unit.at, window, has):
            self._repeated += 1
            return
        number, read = unit.number, self._marks.get(joined(None), 0)
        if not self._trial.takes(number, read, unit.at, call.at, window, has):
            self._late += 1
            return
        one = Calls.of(call)
        self._unpriced += one.unpriced
        if window == 0:
            self._called.add(number)
        known = self._calls.get(number)
        self._calls[number] = (one, one) if known is None else (known[0].plus(one), known[1])

    def _goes_on(self, underway: Underway) -> None:
        unit = self._units.get(joined(underway.unit))
        if unit is not None:
            until = min(underway.at, self._now) + underway.seconds
            self._underway[unit.number] = max(until, self._underway.get(unit.number, until))

    def _outcome(self, outcome: Outcome) -> None:
        unit, window = self._units.get(joined(outcome.unit)), self._trial.windows.get(outcome.metric)
        if unit is None or window is None or not isfinite(outcome.value):
            self._stray += 1
            return
        metric, id = joined(outcome.metric), joined(outcome.id)
        known = self._valued.get((metric, unit.number))
        has = known is not None and (outcome.id is None or known != id)
        if not self._trial.takes(unit.number, self._marks.get(metric, 0), unit.at, outcome.at, window, has):
            self._late += 1
            return
        if is_early(outcome.at, unit.at, self._now):
            self._early += 1
            return
        if window == 0:
            self._valued[metric, unit.number] = id
        self._values[metric, unit.number, id] = (float(outcome.value), outcome.at)

    def _count(
        self, stage: int, arm: str, filled: int, units: int = 0, first: int = 0, mixed: int = 0, entered: bool = False
    ) -> None:
        sums = self._arms.setdefault((stage, arm, filled), [0, 0, 0, 0])
        sums[0] += units
        sums[1] += first
        sums[2] += mixed
        sums[3] += entered

    # -- writing -----------------------------------------------------------------------------------------------------
    def _put(self) -> None:
        connection, id = self._connection, self._id
        fresh = [
            (id, unit.number, name, unit.stage, unit.arm, unit.propensity, unit.filled, unit.at, *_flags(unit))
            for name, unit in self._units.items()
            if unit.fresh
        ]
        _PUT_UNITS.run(connection, fresh)
        _PUT_LATER.run(connection, self._new_later)
        calls = [
            (id, number, *sums[:-1], *first[1:-1], sums.unpriced, first.unpriced)
            for number, (sums, first) in self._calls.items()
        ]
        _PUT_CALLS.run(connection, calls)
        values = [(id, *key, *value) for key, value in self._values.items()]
        _PUT_VALUES.run(connection, values)
        _PUT_ARMS.run(connection, [(id, *key, *sums) for key, sums in self._arms.items()])
        _PUT_ENDED.run(connection, [(id, arm, *sums) for arm, sums in self._ended.items()])
        if self._underway:
            connection.execute(_ENDED, (id, self._now))
            _PUT_UNDERWAY.run(connection, [(id, *each) for each in self._underway.items()])
        lost = self._late, self._stray, self._early, self._unpriced, self._repeated
        if any(lost):
            connection.execute(_LOSE, (*lost, id))


def _flags(unit: _Unit) -> tuple[int, int]:
    return int(unit.mixed), int(unit.left_out)
