"""Finding records: rows and hits as one, by the index of the field that has the fewest for a value."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from math import inf
from typing import Any, Final

import orjson

from dspy_prod.privacy.visible import carried
from dspy_prod.records import CallRecord
from dspy_prod.stores.memory_ledger import check_fields
from dspy_prod.stores.memory_rows import TAG
from dspy_prod.stores.sqlite.hits import read_hits
from dspy_prod.stores.sqlite.indices import SELECTIVE
from dspy_prod.stores.sqlite.pages import Found
from dspy_prod.stores.sqlite.reader import snapshot
from dspy_prod.stores.sqlite.rows import RECORD_COLUMNS, Row, clean, record_of

_MANY: Final = 1_000
"""Records of a value beyond which it does not matter how many there are."""


def read_records(
    connection: sqlite3.Connection,
    ns: int,
    since: float | None,
    until: float | None,
    limit: int | None,
    equals: Mapping[str, str],
) -> list[CallRecord]:
    """Matching records, newest first."""
    check_fields(equals)
    wanted = {carried(name): clean(value) for name, value in equals.items()}  # a tag's name is anybody's, too
    with snapshot(connection):  # a hit that becomes a row meanwhile is one or the other
        rows = _read_rows(connection, ns, since, until, limit, wanted)
        full = limit is not None and len(rows) == limit
        since = rows[-1][-1] if full and rows else since
        hits = read_hits(connection, ns, since, until, limit, wanted)
    if not hits:
        return [record_of(row[:-2]) for row in rows]
    found = [*hits, *(Found(row[-1], row[-2], -1, record_of(row[:-2])) for row in rows)]
    found.sort(reverse=True)
    return [each.record for each in found[:limit]]


def read_unconfirmed(connection: sqlite3.Connection, ns: int, since: float | None) -> list[CallRecord]:
    """Records whose cost is an upper bound, newest first. No hit, whose cost is 0, is one."""
    rows = connection.execute(
        f"SELECT {RECORD_COLUMNS} FROM records WHERE ns = ? AND estimated "
        "AND cost_nano > 0 AND started_at >= ? ORDER BY started_at DESC, seq DESC",
        (ns, -inf if since is None else since),
    )
    return [record_of(row) for row in rows.fetchall()]


def _pair(name: str, value: str) -> str:
    """A tag as it stands in the JSON of all tags: quotes within names and values have a backslash before them there."""
    return f",{orjson.dumps({name: value})[1:-1].decode()}"


def _read_rows(
    connection: sqlite3.Connection,
    ns: int,
    since: float | None,
    until: float | None,
    limit: int | None,
    equals: Mapping[str, Any],
) -> list[Row]:
    bounds: list[tuple[str, object]] = [("started_at >= ?", since), ("started_at < ?", until)]
    where = [("ns = ?", ns), *(bound for bound in bounds if bound[1] is not None)]
    bounded, values = " AND ".join(condition for condition, _ in where), [value for _, value in where]

    def count(name: str) -> int:
        some = f'SELECT 1 FROM records WHERE {bounded} AND "{name}" = ? LIMIT {_MANY}'
        found: int = connection.execute(f"SELECT count(*) FROM ({some})", (*values, equals[name])).fetchone()[0]
        return found

    names = [name for name in SELECTIVE if name in equals]
    best = min(names, key=count) if len(names) > 1 else next(iter(names), None)
    for name, value in equals.items():
        if name.startswith(TAG):
            where.append(("instr(replace(tags, '{\"', ',\"'), ?)", _pair(name.removeprefix(TAG), value)))
            continue
        plus = "+" if name in SELECTIVE and name != best else ""  # keeps SQLite, which cannot know better, off an index
        where.append((f'{plus}"{name}" = ?', value))
    return connection.execute(
        f"SELECT {RECORD_COLUMNS}, seq, started_at FROM records "
        f"WHERE {' AND '.join(condition for condition, _ in where)} ORDER BY started_at DESC, seq DESC LIMIT ?",
        (*(value for _, value in where), -1 if limit is None else limit),
    ).fetchall()
