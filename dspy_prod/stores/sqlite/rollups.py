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
from typing import Final

from dspy_prod.records import Totals
from dspy_prod.stores.sqlite.inserting import Inserting

TOTALS: Final = ", ".join(Totals._fields)

_COLUMNS: Final = ", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in Totals._fields)
_ADDED: Final = ", ".join(f"{name} = {name} + excluded.{name}" for name in Totals._fields)
SUMMED: Final = ", ".join(f"sum({name})" for name in Totals._fields)

TABLE: Final = f"""
CREATE TABLE IF NOT EXISTS rollups (
    ns INTEGER, day TEXT, dimension TEXT, value TEXT, {_COLUMNS},
    PRIMARY KEY (ns, day, dimension, value)) WITHOUT ROWID
"""
_BELOW: Final = "CREATE INDEX IF NOT EXISTS rollups_below ON rollups (ns, dimension) WHERE cost_nano < 0"
"""Days that a hand has changed, and a correction then: who has one may have spent more since a day than ever."""
_EVER: Final = f"""
CREATE TABLE rollups_ever (
    id INTEGER PRIMARY KEY, ns INTEGER NOT NULL, dimension TEXT NOT NULL, value TEXT NOT NULL, last_day TEXT NOT NULL,
    {_COLUMNS}, UNIQUE (ns, dimension, value))
"""
_BY_LAST_DAY: Final = "CREATE INDEX rollups_by_last_day ON rollups_ever (ns, dimension, last_day)"
_BY_COST: Final = "CREATE INDEX rollups_by_cost ON rollups_ever (ns, dimension, cost_nano DESC, value)"
_BEFORE: Final = f"""
CREATE TABLE rollups_before (
    ns INTEGER, dimension TEXT, day TEXT, id INTEGER, {_COLUMNS}, PRIMARY KEY (ns, dimension, day, id)) WITHOUT ROWID
"""
LACKING: Final = "rollups_before_lacking"
"""In `meta`: the last day of which `rollups_before` may lack rows, or have wrong ones; "" where there is none."""
_BY_ID: Final = "CREATE INDEX rollups_before_of_id ON rollups_before (id, day)"


def each_of(each: str) -> str:
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
        INSERT INTO rollups_before (ns, dimension, day, id, {TOTALS})
        SELECT NEW.ns, NEW.dimension, NEW.day, ever.id, {each_of("coalesce(later.{x}, ever.{x})")}
        FROM rollups_ever AS ever LEFT JOIN rollups_before AS later ON later.id = ever.id
        AND later.day = (SELECT min(day) FROM rollups_before WHERE id = ever.id AND day > NEW.day)
        WHERE ever.id = (SELECT id FROM rollups_ever WHERE {_of("NEW")});
        UPDATE rollups_before SET {each_of("{x} = {x} + NEW.{x}")} WHERE {_later_than("NEW")};
        UPDATE rollups_ever SET {each_of("{x} = {x} + NEW.{x}")} WHERE {_of("NEW")};
"""
_TAKE: Final = f"""
        UPDATE rollups_before SET {each_of("{x} = {x} - OLD.{x}")} WHERE {_later_than("OLD")};
        DELETE FROM rollups_before WHERE ns = OLD.ns AND dimension = OLD.dimension AND day = OLD.day
        AND id = (SELECT id FROM rollups_ever WHERE {_of("OLD")});
        UPDATE rollups_ever SET {each_of("{x} = {x} - OLD.{x}")} WHERE {_of("OLD")};
        DELETE FROM rollups_ever WHERE {_of("OLD")} AND attempts = 0 AND cached = 0
        AND NOT EXISTS (SELECT 1 FROM rollups_before WHERE id = rollups_ever.id);
"""
_TRIGGERS: Final = {
    "rollups_new": f"AFTER INSERT ON rollups BEGIN {_PUT} END",
    "rollups_changed": f"""AFTER UPDATE ON rollups WHEN NOT ({_MOVED}) BEGIN
        UPDATE rollups_before SET {each_of("{x} = {x} + NEW.{x} - OLD.{x}")} WHERE {_later_than("OLD")};
        UPDATE rollups_ever SET {each_of("{x} = {x} + NEW.{x} - OLD.{x}")} WHERE {_of("OLD")};
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
    if whole and known >= {
        "rollups_below",
        "rollups_by_last_day",
        "rollups_by_cost",
        "rollups_before_of_id",
        *_TRIGGERS,
    }:
        return  # also where a later release has made them: it knows more
    for name in _TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    for name in lacking:  # an earlier release goes on to write rows without it
        connection.execute(f"ALTER TABLE rollups ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0")
    for name in ("rollups_ever", "rollups_before"):
        connection.execute(f"DROP TABLE IF EXISTS {name}")
    for statement in (_BELOW, _EVER, _BY_LAST_DAY, _BY_COST, _BEFORE, _BY_ID):
        connection.execute(statement)
    connection.execute(
        f"INSERT INTO rollups_ever (ns, dimension, value, last_day, {TOTALS}) "
        f"SELECT ns, dimension, value, max(day), {SUMMED} FROM rollups GROUP BY ns, dimension, value"
    )
    connection.execute(
        "INSERT OR REPLACE INTO meta (key, value) SELECT ?, coalesce(max(last_day), '') FROM rollups_ever", (LACKING,)
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
