"""The tables of experiments in the SQLite file, and what is read of them. Names are written as parts of a key."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import orjson

from dspy_prod.stores.keys import NOBODY, apart, joined
from dspy_prod.stores.trial_terms import (
    Arm,
    Calls,
    Checkpoint,
    Decision,
    Ended,
    Matured,
    Tally,
    Trial,
    Values,
    Waiting,
    ready_before,
)

TABLES: Final = (
    """
    CREATE TABLE IF NOT EXISTS trials (
        id INTEGER PRIMARY KEY AUTOINCREMENT, ns INTEGER NOT NULL, name TEXT NOT NULL, declaration TEXT NOT NULL,
        windows TEXT NOT NULL, grace REAL NOT NULL, state TEXT NOT NULL, stage INTEGER NOT NULL, since REAL NOT NULL,
        revision INTEGER NOT NULL, created REAL NOT NULL, late INTEGER NOT NULL DEFAULT 0,
        stray INTEGER NOT NULL DEFAULT 0, checkpoint TEXT, checkpoint_revision INTEGER NOT NULL DEFAULT 0,
        checkpoint_at REAL, early INTEGER NOT NULL DEFAULT 0, unpriced INTEGER NOT NULL DEFAULT 0,
        repeated INTEGER NOT NULL DEFAULT 0, UNIQUE (ns, name))
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_units (
        trial INTEGER, number INTEGER, unit TEXT NOT NULL, stage INTEGER NOT NULL, arm TEXT NOT NULL,
        propensity REAL NOT NULL, filled INTEGER NOT NULL, at REAL NOT NULL, mixed INTEGER NOT NULL DEFAULT 0,
        left_out INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (trial, number)) WITHOUT ROWID
    """,
    "CREATE UNIQUE INDEX IF NOT EXISTS trial_units_unit ON trial_units (trial, unit)",
    """
    CREATE TABLE IF NOT EXISTS trial_later (
        trial INTEGER, number INTEGER, stage INTEGER, arm TEXT NOT NULL, filled INTEGER NOT NULL,
        PRIMARY KEY (trial, number, stage)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_calls (
        trial INTEGER, number INTEGER, calls INTEGER NOT NULL, failed INTEGER NOT NULL, fell_back INTEGER NOT NULL,
        list_nano INTEGER NOT NULL, timed INTEGER NOT NULL, latency REAL NOT NULL, first_failed INTEGER NOT NULL,
        first_fell_back INTEGER NOT NULL, first_list_nano INTEGER NOT NULL, first_timed INTEGER NOT NULL,
        first_latency REAL NOT NULL, unpriced INTEGER NOT NULL DEFAULT 0, first_unpriced INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (trial, number)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_underway (
        trial INTEGER, number INTEGER, until REAL NOT NULL, PRIMARY KEY (trial, number)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_values (
        trial INTEGER, metric TEXT, number INTEGER, id TEXT, value REAL NOT NULL, at REAL NOT NULL,
        PRIMARY KEY (trial, metric, number, id)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_arms (
        trial INTEGER, stage INTEGER, arm TEXT, filled INTEGER, units INTEGER NOT NULL, first INTEGER NOT NULL,
        mixed INTEGER NOT NULL, entered INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (trial, stage, arm, filled)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_ended (
        trial INTEGER, arm TEXT, calls INTEGER NOT NULL, failed INTEGER NOT NULL, fell_back INTEGER NOT NULL,
        abandoned INTEGER NOT NULL, PRIMARY KEY (trial, arm)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_read (
        trial INTEGER, metric TEXT, number INTEGER NOT NULL, PRIMARY KEY (trial, metric)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_decisions (
        trial INTEGER, number INTEGER, at REAL NOT NULL, what TEXT NOT NULL, who TEXT NOT NULL, evidence TEXT NOT NULL,
        PRIMARY KEY (trial, number)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_leases (
        ns INTEGER, name TEXT, holder TEXT NOT NULL, process TEXT NOT NULL, until REAL NOT NULL,
        PRIMARY KEY (ns, name)) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS trial_writers (
        owner TEXT PRIMARY KEY, batch INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID
    """,
)

LATER: Final = {
    "trials": ("early", "unpriced", "repeated"),
    "trial_calls": ("unpriced", "first_unpriced"),
    "trial_arms": ("entered",),
}
"""Numbers that files of earlier releases have not, by table."""

PARTS: Final = {
    "trial_later": "trial, number, stage",
    "trial_calls": "trial, number",
    "trial_underway": "trial, number",
    "trial_values": "trial, metric, number, id",
    "trial_arms": "trial, stage, arm, filled",
    "trial_ended": "trial, arm",
    "trial_read": "trial, metric",
    "trial_decisions": "trial, number",
    "trial_units": "trial, number",
}
"""Tables with rows of experiments, and what tells one of these rows from others."""

TRIAL: Final = "id, name, declaration, windows, grace, state, stage, since, revision, created"

_READY: Final = "SELECT number, at FROM trial_units AS u WHERE trial = ? AND number > ? AND number <= ? AND at > ?"
_OVER: Final = "SELECT number FROM trial_units WHERE trial = ? AND number > ? AND at <= ? ORDER BY number DESC LIMIT 1"
_CALLING: Final = "SELECT number FROM trial_underway AS u WHERE trial = ? AND number > ? AND number <= ? AND until > ?"
_NO_CALLS: Final = " AND NOT EXISTS (SELECT 1 FROM trial_calls WHERE trial = u.trial AND number = u.number)"
_NO_VALUES: Final = (
    " AND NOT EXISTS (SELECT 1 FROM trial_values WHERE trial = u.trial AND metric = ? AND number = u.number)"
)
_MATURED: Final = (
    "SELECT u.number, unit, stage, arm, propensity, at, filled, left_out, c.* FROM trial_units AS u {join} "
    "WHERE u.trial = ? AND u.number > ? AND u.number <= ? ORDER BY u.number"
)
_UNITS: Final = _MATURED.replace(", c.*", "").format(join="")
_WITH_CALLS: Final = _MATURED.format(join="LEFT JOIN trial_calls AS c ON c.trial = u.trial AND c.number = u.number")
_VALUES: Final = (
    "SELECT number, value, at FROM trial_values WHERE trial = ? AND metric = ? AND number > ? AND number <= ?"
)


_FIRST: Final = (
    "SELECT at, coalesce((SELECT until FROM trial_underway AS c WHERE c.trial = u.trial AND c.number = u.number), 0) "
    "FROM trial_units AS u WHERE trial = ? AND number > ? ORDER BY number LIMIT 1"
)


def name_of(key: str) -> str:
    """The name that was written as the part of a key."""
    if "%" not in key and key != NOBODY:
        return key
    return apart(key)[0] or ""


def windows_text(windows: dict[str | None, float]) -> str:
    """Windows as JSON."""
    return orjson.dumps({joined(metric): float(seconds) for metric, seconds in windows.items()}).decode()


@lru_cache(maxsize=256)
def _windows(text: str) -> dict[str | None, float]:
    return {apart(metric)[0]: seconds for metric, seconds in orjson.loads(text).items()}


def find(connection: sqlite3.Connection, ns: int, name: str) -> tuple[int, Trial] | None:
    """(number in the file, experiment)."""
    sql = f"SELECT {TRIAL} FROM trials WHERE ns = ? AND name = ?"
    row = connection.execute(sql, (ns, joined(name))).fetchone()
    return None if row is None else trial_of(row)


def trial_of(row: tuple[Any, ...]) -> tuple[int, Trial]:
    """(number in the file, experiment) of a row of `TRIAL`."""
    id, name, declaration, windows, *rest = row
    return id, Trial(name_of(name), declaration, _windows(windows), *rest)


def read_trials(connection: sqlite3.Connection, ns: int) -> list[Trial]:
    """All of them, by name."""
    rows = connection.execute(f"SELECT {TRIAL} FROM trials WHERE ns = ?", (ns,)).fetchall()
    return sorted((trial_of(row)[1] for row in rows), key=lambda trial: trial.name)


def id_of(connection: sqlite3.Connection, ns: int, name: str) -> int:
    """The number of an experiment in the file; -1, which has no rows, where there is none."""
    row = connection.execute("SELECT id FROM trials WHERE ns = ? AND name = ?", (ns, joined(name))).fetchone()
    return -1 if row is None else int(row[0])


def read_arms(connection: sqlite3.Connection, trial: int) -> list[Arm]:
    """Units by stage and arm."""
    sql = "SELECT stage, arm, filled, units, first, mixed, entered FROM trial_arms WHERE trial = ?"
    return sorted(Arm(stage, name_of(arm), *rest) for stage, arm, *rest in connection.execute(sql, (trial,)))


def read_ended(connection: sqlite3.Connection, trial: int) -> list[Ended]:
    """How calls ended, by arm."""
    sql = "SELECT arm, calls, failed, fell_back, abandoned FROM trial_ended WHERE trial = ?"
    return sorted(Ended(name_of(arm), *sums) for arm, *sums in connection.execute(sql, (trial,)))


def read_tally(connection: sqlite3.Connection, trial: int, unkept: int) -> Tally:
    """How many units there are, and what could not be used."""
    sql = "SELECT late, stray, early, unpriced, repeated FROM trials WHERE id = ?"
    row = connection.execute(sql, (trial,)).fetchone()
    if row is None:
        return Tally()
    mixed = connection.execute("SELECT coalesce(sum(mixed), 0) FROM trial_arms WHERE trial = ?", (trial,)).fetchone()[0]
    late, stray, *rest = row
    return Tally(last_number(connection, trial), mixed, late, stray, unkept, *rest)


def last_number(connection: sqlite3.Connection, trial: int) -> int:
    """The order number given last, 0 where there is none."""
    row = connection.execute("SELECT max(number) FROM trial_units WHERE trial = ?", (trial,)).fetchone()
    return int(row[0] or 0)


def read_marks(connection: sqlite3.Connection, trial: int) -> dict[str, int]:
    """Up to which number the units were told, by metric as it is written."""
    return dict(connection.execute("SELECT metric, number FROM trial_read WHERE trial = ?", (trial,)).fetchall())


def read_ready(
    connection: sqlite3.Connection, trial: int, metric: str | None, window: float, grace: float, now: float, most: int
) -> tuple[int, int]:
    """(the mark of a metric, up to which unit it may be moved: those until there need not be waited for)."""
    before = ready_before(now, window, grace)
    key = joined(metric)
    row = connection.execute("SELECT number FROM trial_read WHERE trial = ? AND metric = ?", (trial, key)).fetchone()
    mark = 0 if row is None else int(row[0])
    end = min(last_number(connection, trial), mark + most)
    if end <= mark:
        return mark, mark
    untold = "" if window else _NO_CALLS if metric is None else _NO_VALUES
    more = [key] if window == 0 and metric is not None else []
    sql, values = _READY + untold, [trial, mark, end, before, *more]
    waits = connection.execute(sql + " ORDER BY number LIMIT 1", values).fetchone()
    if waits is not None and waits[1] > now + grace:
        # Stamped by a clock that was wrong: it was exposed before those after it, and is over when one of them is.
        over = connection.execute(_OVER, (trial, mark, before)).fetchone()
        if over is not None:
            sql += " AND (at <= ? OR number > ?)"
            waits = connection.execute(sql + " ORDER BY number LIMIT 1", [*values, now + grace, over[0]]).fetchone()
    ready = end if waits is None else int(waits[0]) - 1
    calling = connection.execute(_CALLING + untold + " ORDER BY number LIMIT 1", [trial, mark, ready, now, *more])
    goes_on = calling.fetchone()
    return mark, ready if goes_on is None else int(goes_on[0]) - 1


def advance(
    connection: sqlite3.Connection, trial: int, metric: str | None, window: float, grace: float, now: float, most: int
) -> None:
    """Move the mark of a metric over the units that need not be waited for."""
    mark, ready = read_ready(connection, trial, metric, window, grace, now, most)
    if ready > mark:
        connection.execute("INSERT OR REPLACE INTO trial_read VALUES (?, ?, ?)", (trial, joined(metric), ready))


def read_matured(
    connection: sqlite3.Connection, trial: int, metric: str | None, after: int, most: int
) -> list[Matured]:
    """Units that the mark of a metric has passed."""
    key = joined(metric)
    row = connection.execute("SELECT number FROM trial_read WHERE trial = ? AND metric = ?", (trial, key)).fetchone()
    span = (after, min(0 if row is None else int(row[0]), after + most))
    if span[1] <= after:
        return []
    if metric is None:
        return [_with_calls(row) for row in connection.execute(_WITH_CALLS, (trial, *span))]
    values: dict[int, list[tuple[float, float]]] = {}
    for number, value, at in connection.execute(_VALUES, (trial, key, *span)):
        values.setdefault(number, []).append((value, at))
    units = map(_unit, connection.execute(_UNITS, (trial, *span)))
    return [unit._replace(values=Values.of(values[unit.number])) if unit.number in values else unit for unit in units]


def read_exposed(connection: sqlite3.Connection, trial: int, after: int, most: int) -> list[Matured]:
    """Units in the order of exposure."""
    return [_unit(row) for row in connection.execute(_UNITS, (trial, after, after + most))]


def read_waiting(
    connection: sqlite3.Connection, trial: int, windows: Mapping[str | None, float], grace: float
) -> dict[str | None, Waiting]:
    """Units that no mark has passed, by metric."""
    marks, last = read_marks(connection, trial), last_number(connection, trial)
    found = {}
    for metric, window in windows.items():
        row = connection.execute(_FIRST, (trial, mark := marks.get(joined(metric), 0))).fetchone()
        until = None if row is None else max(row[0] + window + grace, row[1])
        found[metric] = Waiting(max(0, last - mark), until)
    return found


def _unit(row: tuple[Any, ...]) -> Matured:
    number, unit, stage, arm, propensity, at, filled, left_out = row[:8]
    return Matured(number, name_of(unit), stage, name_of(arm), propensity, at, filled, bool(left_out))


def _with_calls(row: tuple[Any, ...]) -> Matured:
    if row[10] is None:
        return _unit(row)
    sums, first = (*row[10:16], row[21]), (1, *row[16:21], row[22])
    return _unit(row)._replace(calls=Calls(*sums), first_call=Calls(*first))


def read_seen(connection: sqlite3.Connection, trial: int, unit: str) -> str | None:
    """The arm in which a unit was seen last."""
    sql = (
        "SELECT coalesce((SELECT arm FROM trial_later AS l WHERE l.trial = u.trial AND l.number = u.number "
        "ORDER BY l.stage DESC LIMIT 1), arm) FROM trial_units AS u WHERE trial = ? AND unit = ?"
    )
    row = connection.execute(sql, (trial, joined(unit))).fetchone()
    return None if row is None else name_of(row[0])


def read_checkpoint(connection: sqlite3.Connection, trial: int) -> Checkpoint | None:
    """What a controller saved last."""
    sql = "SELECT checkpoint, checkpoint_revision, checkpoint_at FROM trials WHERE id = ? AND checkpoint_revision > 0"
    row = connection.execute(sql, (trial,)).fetchone()
    return None if row is None else Checkpoint(*row)


def read_decisions(connection: sqlite3.Connection, trial: int) -> list[Decision]:
    """The audit, oldest first."""
    sql = "SELECT what, who, evidence, at, number FROM trial_decisions WHERE trial = ? ORDER BY number"
    return [Decision(*row) for row in connection.execute(sql, (trial,))]
