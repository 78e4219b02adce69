"""Sums of the ledger: by day, of what was before a day, and since the ledger began.

The last two are kept by triggers within the file, so that no writer can forget them: no process of an earlier release,
and no hand that corrects a day with UPDATE or DELETE. (SQLite tells triggers nothing of the row that INSERT OR REPLACE
puts away.) What a value sums up to since some day is what it does since the ledger began, less what was before the
first of its days from then on: reading it takes no longer for the age of the ledger, nor for the days between. A file
that had days before there was this lacks it for those (to make it takes seconds, in which nobody else could write), so
what begins among them is added up.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

from dspy_prod.privacy.visible import carried
from dspy_prod.records import Totals
from dspy_prod.stores.sqlite.inserting import Inserting
from dspy_prod.stores.sqlite.rows import Row, text_of

TOTALS: Final = ", ".join(Totals._fields)

_COLUMNS: Final = ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in Totals._fields)
_ADDED: Final = ", ".join(f"{name} = {name} + excluded.{name}" for name in Totals._fields)
_SUMMED: Final = ", ".join(f"sum({name})" for name in Totals._fields)

TABLE: Final = f"""
CREATE TABLE IF NOT EXISTS rollups (
    ns INTEGER, day TEXT, dimension TEXT, value TEXT, {_COLUMNS},
    PRIMARY KEY (ns, day, dimension, value)) WITHOUT ROWID
"""
_EVER: Final = f"""
CREATE TABLE rollups_ever (
    id INTEGER PRIMARY KEY, ns INTEGER NOT NULL, dimension TEXT NOT NULL, value TEXT NOT NULL, last_day TEXT NOT NULL,
    {_COLUMNS}, UNIQUE (ns, dimension, value))
"""
_BY_LAST_DAY: Final = "CREATE INDEX rollups_by_last_day ON rollups_ever (ns, dimension, last_day)"
_BY_COST: Final = "CREATE INDEX rollups_by_cost ON rollups_ever (ns, dimension, cost_nano DESC, value)"
_BEFORE: Final = f"""
CREATE TABLE rollups_before (day TEXT, id INTEGER, {_COLUMNS}, PRIMARY KEY (day, id)) WITHOUT ROWID
"""
_LACKING: Final = "rollups_before_lacking"
"""In `meta`: the last day of which `rollups_before` may lack rows, or have wrong ones; "" where there is none."""
_BY_ID: Final = "CREATE INDEX rollups_before_by_id ON rollups_before (id, day)"


def _all(each: str) -> str:
    """An expression for each of the sums, which it calls `{x}`."""
    return ", ".join(each.format(x=name) for name in Totals._fields)


def _of(row: str) -> str:
    return f"ns = {row}.ns AND dimension = {row}.dimension AND value = {row}.value"


def _later_than(row: str) -> str:
    return f"id = (SELECT id FROM rollups_ever WHERE {_of(row)} AND last_day > {row}.day) AND day > {row}.day"


_MOVED: Final = "(OLD.ns, OLD.day, OLD.dimension, OLD.value) IS NOT (NEW.ns, NEW.day, NEW.dimension, NEW.value)"
_PUT: Final = f"""
        INSERT INTO rollups_ever (ns, dimension, value, last_day) VALUES (NEW.ns, NEW.dimension, NEW.value, NEW.day)
        ON CONFLICT (ns, dimension, value) DO UPDATE SET last_day = excluded.last_day
        WHERE last_day < excluded.last_day;
        INSERT INTO rollups_before (id, day, {TOTALS})
        SELECT ever.id, NEW.day, {_all("coalesce(later.{x}, ever.{x})")}
        FROM rollups_ever AS ever LEFT JOIN rollups_before AS later ON later.id = ever.id
        AND later.day = (SELECT min(day) FROM rollups_before WHERE id = ever.id AND day > NEW.day)
        WHERE {_of("NEW")};
        UPDATE rollups_before SET {_all("{x} = {x} + NEW.{x}")} WHERE {_later_than("NEW")};
        UPDATE rollups_ever SET {_all("{x} = {x} + NEW.{x}")} WHERE {_of("NEW")};
"""
_TAKE: Final = f"""
        UPDATE rollups_before SET {_all("{x} = {x} - OLD.{x}")} WHERE {_later_than("OLD")};
        DELETE FROM rollups_before WHERE id = (SELECT id FROM rollups_ever WHERE {_of("OLD")}) AND day = OLD.day;
        UPDATE rollups_ever SET {_all("{x} = {x} - OLD.{x}")} WHERE {_of("OLD")};
        DELETE FROM rollups_ever WHERE {_of("OLD")} AND attempts = 0 AND cached = 0
        AND NOT EXISTS (SELECT 1 FROM rollups_before WHERE id = rollups_ever.id);
"""
_TRIGGERS: Final = {
    "rollups_new": f"AFTER INSERT ON rollups BEGIN {_PUT} END",
    "rollups_changed": f"""AFTER UPDATE ON rollups WHEN NOT ({_MOVED}) BEGIN
        UPDATE rollups_before SET {_all("{x} = {x} + NEW.{x} - OLD.{x}")} WHERE {_later_than("OLD")};
        UPDATE rollups_ever SET {_all("{x} = {x} + NEW.{x} - OLD.{x}")} WHERE {_of("OLD")};
    END""",
    "rollups_moved": f"AFTER UPDATE ON rollups WHEN {_MOVED} BEGIN {_TAKE} {_PUT} END",
    "rollups_gone": f"AFTER DELETE ON rollups BEGIN {_TAKE} END",
}

ADD_SUMS: Final = Inserting(
    "rollups",
    ("ns", "day", "dimension", "value", *Totals._fields),
    f" ON CONFLICT (ns, day, dimension, value) DO UPDATE SET {_ADDED}",
)


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Give a file, be it new or of an earlier release, these tables as they are now. Within a transaction."""
    connection.execute(TABLE)
    lacking = _lacking(connection, "rollups")
    known = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'rollups_*'")}
    whole = not any(_lacking(connection, table) for table in ("rollups", "rollups_ever", "rollups_before"))
    if whole and known >= {"rollups_by_last_day", "rollups_by_cost", "rollups_before_by_id", *_TRIGGERS}:
        return  # also where a later release has made them: it knows more
    for name in _TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    for name in lacking:  # an earlier release goes on to write rows without it
        connection.execute(f"ALTER TABLE rollups ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
    for name in ("rollups_ever", "rollups_before"):
        connection.execute(f"DROP TABLE IF EXISTS {name}")
    for statement in (_EVER, _BY_LAST_DAY, _BY_COST, _BEFORE, _BY_ID):
        connection.execute(statement)
    connection.execute(
        f"INSERT INTO rollups_ever (ns, dimension, value, last_day, {TOTALS}) "
        f"SELECT ns, dimension, value, max(day), {_SUMMED} FROM rollups GROUP BY ns, dimension, value"
    )
    connection.execute(
        "INSERT OR REPLACE INTO meta (key, value) SELECT ?, coalesce(max(last_day), '') FROM rollups_ever", (_LACKING,)
    )
    for name, body in _TRIGGERS.items():
        connection.execute(f"CREATE TRIGGER {name} {body}")


def _lacking(connection: sqlite3.Connection, table: str) -> list[str]:
    """The fields that were added since a table was made."""
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    return [name for name in Totals._fields if name not in known]


def days_of(table: str) -> str:
    """The days that have sums. Stepping from one to the next, no row of another dimension is read."""
    return f"""
        WITH RECURSIVE days (day) AS (
            SELECT min(day) FROM {table} WHERE ns = ?1 AND day >= ?2 AND day <= ?3
            UNION ALL
            SELECT (SELECT min(day) FROM {table} WHERE ns = ?1 AND day > days.day AND day <= ?3)
            FROM days WHERE days.day IS NOT NULL)
    """


_DAYS: Final = days_of("rollups")


_SINCE: Final = f"""
    SELECT value, {_all("ever.{x} - early.{x} AS {x}")} FROM rollups_ever AS ever CROSS JOIN rollups_before AS early
    WHERE ns = :ns AND dimension = :dimension AND last_day >= :day AND early.id = ever.id
    AND early.day = coalesce((SELECT day FROM rollups_before WHERE day = :day AND id = ever.id),
        (SELECT min(day) FROM rollups_before WHERE id = ever.id AND day > :day))
    ORDER BY cost_nano DESC, value LIMIT :most
"""


_ADDED_UP: Final = f"""
    {_DAYS} SELECT value, {_SUMMED} FROM days CROSS JOIN rollups
    WHERE rollups.ns = ?1 AND rollups.day = days.day AND dimension = ?4
    GROUP BY value ORDER BY sum(cost_nano) DESC, value LIMIT ?5
"""


def read_totals(
    connection: sqlite3.Connection,
    ns: int,
    dimension: str,
    since_day: str | None,
    until_day: str | None,
    value: str | None,
) -> list[tuple[str, str, Totals]]:
    """(day, value, sums) of one dimension, or of one value of it."""
    one = () if value is None else (carried(value),)
    rows = connection.execute(
        f"{_DAYS} SELECT rollups.day, value, {TOTALS} FROM days CROSS JOIN rollups "
        f"WHERE rollups.ns = ?1 AND rollups.day = days.day AND dimension = ?4 {'AND value = ?5 ' if one else ''}"
        "ORDER BY rollups.day, value",
        (ns, since_day or "", until_day or "~", carried(dimension), *one),
    ).fetchall()
    sums = _totals([row[2:] for row in rows])
    return [(text_of(row[0]), text_of(row[1]), totals) for row, totals in zip(rows, sums, strict=True)]


def read_sums(
    connection: sqlite3.Connection, ns: int, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    most = -1 if most is None else most
    days: list[tuple[str]] = []
    if since_day is not None and _has_before(connection, ns, since_day):
        some = f"{_DAYS} SELECT day FROM days WHERE day IS NOT NULL LIMIT 2"
        days = connection.execute(some, (ns, since_day, "~")).fetchall()
        if not days:
            return []
    if len(days) < 2:  # nothing to add up, which is most of the work
        table, day = ("rollups", days[0]) if days else ("rollups_ever", ())
        asked = f"FROM {table} WHERE ns = ? {'AND day = ? ' if days else ''}AND dimension = ? "
        rows = connection.execute(
            f"SELECT value, {TOTALS} {asked} ORDER BY cost_nano DESC, value LIMIT ?",
            (ns, *day, carried(dimension), most),
        ).fetchall()
    elif days[0][0] > _lacking_until(connection):
        asked_of = {"ns": ns, "dimension": carried(dimension), "day": days[0][0], "most": most}
        rows = connection.execute(_SINCE, asked_of).fetchall()
    else:
        rows = connection.execute(_ADDED_UP, (ns, since_day, "~", carried(dimension), most)).fetchall()
    return [(text_of(row[0]), totals) for row, totals in zip(rows, _totals([row[1:] for row in rows]), strict=True)]


def _lacking_until(connection: sqlite3.Connection) -> str:
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (_LACKING,)).fetchone()
    return "" if found is None else str(found[0])


def _has_before(connection: sqlite3.Connection, ns: int, day: str) -> bool:
    found = connection.execute("SELECT EXISTS (SELECT 1 FROM rollups WHERE ns = ? AND day < ?)", (ns, day)).fetchone()
    return bool(found[0])


def _totals(rows: Sequence[Row]) -> Iterator[Totals]:
    if not set(map(type, chain.from_iterable(rows))) <= {int}:
        raise sqlite3.DataError("the sums of the ledger hold what is no number; begin a new file")
    return map(Totals._make, rows)
