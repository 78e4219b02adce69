"""The tables of programs' calls, and what stands between a `ProgramCall` and its row."""

from __future__ import annotations

from typing import Any, Final

import orjson

from dspy_prod.stores.programs import COMPARED, ProgramCall, ProgramTotals
from dspy_prod.stores.sqlite.inserting import Inserting

_FIELDS: Final = ProgramCall._fields
_TYPES: Final = {
    **dict.fromkeys(("started_at", "latency", "waited"), "REAL"),
    **dict.fromkeys(("cost_nano", "list_nano", "attempts", "cached"), "INTEGER"),
}
_INDEXED: Final = tuple(name for name in COMPARED if name not in ("id", "reason", "stage"))

TABLES: Final = (
    f"""
    CREATE TABLE IF NOT EXISTS program_calls (
        seq INTEGER PRIMARY KEY, ns INTEGER NOT NULL,
        {", ".join(f'"{name}" {_TYPES.get(name, "TEXT")}' for name in _FIELDS)})
    """,
    "CREATE UNIQUE INDEX IF NOT EXISTS program_calls_id ON program_calls (ns, id)",
    "CREATE INDEX IF NOT EXISTS program_calls_started ON program_calls (ns, started_at)",
    *(
        f'CREATE INDEX IF NOT EXISTS program_calls_{name} ON program_calls (ns, "{name}", started_at) '
        f'WHERE "{name}" IS NOT NULL'
        for name in _INDEXED
    ),
    f"""
    CREATE TABLE IF NOT EXISTS program_sums (
        ns INTEGER, day TEXT, dimension TEXT, value TEXT, status TEXT, reason TEXT,
        {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in ProgramTotals._fields)},
        PRIMARY KEY (ns, day, dimension, value, status, reason)) WITHOUT ROWID
    """,
)

COLUMNS: Final = ", ".join(f'"{name}"' for name in _FIELDS)
TOTALS: Final = ", ".join(ProgramTotals._fields)
INSERT: Final = Inserting("program_calls", ("ns", *_FIELDS), " ON CONFLICT (ns, id) DO NOTHING")
ADD_SUMS: Final = Inserting(
    "program_sums",
    ("ns", "day", "dimension", "value", "status", "reason", *ProgramTotals._fields),
    " ON CONFLICT (ns, day, dimension, value, status, reason) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in ProgramTotals._fields),
)

_TAGS: Final = _FIELDS.index("tags")


def call_row(ns: int, call: ProgramCall) -> tuple[Any, ...]:
    """A call as a row of `program_calls`, after the namespace."""
    row: list[Any] = [ns, *call]
    row[1 + _TAGS] = orjson.dumps(dict(call.tags)).decode() if call.tags else None
    return tuple(row)


def call_of(row: tuple[Any, ...]) -> ProgramCall:
    """The call in a row of `COLUMNS`; of a damaged one, what can still be read."""
    values: list[Any] = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in row]
    try:
        tags = orjson.loads(values[_TAGS]) if values[_TAGS] else {}
    except (TypeError, ValueError):
        tags = {}
    values[_TAGS] = tuple((str(name), str(value)) for name, value in tags.items()) if isinstance(tags, dict) else ()
    return ProgramCall(*values)
