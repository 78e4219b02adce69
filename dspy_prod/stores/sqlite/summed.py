"""Reading the sums of the ledger, see `rollups`: those of days, and those since a day, the dearest first."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.records import Totals
from dspy_prod.stores.sqlite.reader import snapshot
from dspy_prod.stores.sqlite.rollups import LACKING, SUMMED, TOTALS, days_of, each_of
from dspy_prod.stores.sqlite.rows import Row, text_of

_DAYS: Final = days_of("rollups")


_FIRST_DAY: Final = "FROM rollups_before AS early WHERE early.ns = :ns AND early.dimension = :dimension AND day = :day"
_OF_LATER: Final = f"""
    FROM rollups_ever AS ever CROSS JOIN rollups_before AS early
    WHERE ever.ns = :ns AND ever.dimension = :dimension AND last_day > :day
    AND (SELECT count(*) FROM rollups_ever WHERE ns = :ns AND dimension = :dimension AND last_day >= :day)
        > (SELECT count(*) {_FIRST_DAY})
    AND early.id = ever.id AND day = (SELECT min(day) FROM rollups_before WHERE id = ever.id AND day >= :day)
    AND +day > :day
"""
"""Values that are not there on the first day; on most days of most ledgers none is, and so none is looked for."""


def _each_since(columns: str) -> str:
    first = _FIRST_DAY.replace("WHERE", "CROSS JOIN rollups_ever AS ever WHERE ever.id = early.id AND")
    return f"SELECT {columns} {first} UNION ALL SELECT {columns} {_OF_LATER}"


_DIFFERENCES: Final = each_of("ever.{x} - early.{x} AS {x}")
_SINCE: Final = _each_since(f"value, {_DIFFERENCES}")


def _dearest_of(each: str) -> str:
    """The sums of those that are dearest of `each` (id, the first of its days, cost, name)."""
    return f"""
        WITH {each}, dearest AS (SELECT id, first FROM each ORDER BY +cost DESC, name LIMIT :most)
        SELECT value, {_DIFFERENCES} FROM dearest CROSS JOIN rollups_ever AS ever CROSS JOIN rollups_before AS early
        WHERE ever.id = dearest.id AND early.id = dearest.id AND early.day = first ORDER BY 2 DESC, 1
    """


_DEAREST_SINCE: Final = _dearest_of(
    f"each AS ({_each_since('ever.id AS id, day AS first, ever.cost_nano - early.cost_nano AS cost, value AS name')})"
)
_LIKELY: Final = """
    SELECT id, cost_nano AS ever, value AS name FROM rollups_ever WHERE ns = :ns AND dimension = :dimension
    ORDER BY cost_nano DESC, value LIMIT :likely
"""
_LIKELY_AT_LEAST: Final = 512
_ALL: Final = 2**32
"""More than there are, and not too many for SQLite."""
_MANY: Final = 4
"""Times as many as are likely."""
_BEYOND: Final = f"SELECT ever FROM ({_LIKELY} + 1) LIMIT 1 OFFSET :likely"
"""The cost of the dearest one that is not likely."""
_BELOW: Final = (
    "SELECT 1 FROM rollups INDEXED BY rollups_below WHERE ns = :ns AND dimension = :dimension AND cost_nano < 0 LIMIT 1"
)
_DEAREST_OF_LIKELY: Final = _dearest_of(
    f"""
    likely AS ({_LIKELY}),
    each AS (
        SELECT likely.id AS id, day AS first, ever - cost_nano AS cost, name
        FROM likely CROSS JOIN rollups_before AS early WHERE early.id = likely.id
        AND day = (SELECT min(day) FROM rollups_before WHERE id = likely.id AND day >= :day))
    """
)


_ADDED_UP: Final = f"""
    {_DAYS} SELECT value, {SUMMED} FROM days CROSS JOIN rollups
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
    return [
        (text_of(row[0]), text_of(row[1]), totals)
        for row, totals in zip(rows, _totals(row[2:] for row in rows), strict=True)
    ]


def read_sums(
    connection: sqlite3.Connection, ns: int, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    with snapshot(connection):  # late records and other releases change what the next statement goes by
        rows = _read_sums(connection, ns, carried(dimension), since_day, -1 if most is None else min(most, _ALL))
    sums = list(zip(map(text_of, map(_VALUE, rows)), _totals(map(_SUMS, rows)), strict=True))
    sums.sort(key=_dearest)
    return sums


def _read_sums(connection: sqlite3.Connection, ns: int, dimension: str, since_day: str | None, most: int) -> list[Row]:
    days: list[tuple[str]] = []
    if since_day is not None and _has_before(connection, ns, since_day):
        some = f"{_DAYS} SELECT day FROM days WHERE day IS NOT NULL LIMIT 2"
        days = connection.execute(some, (ns, since_day, "~")).fetchall()
        if not days:
            return []
    if len(days) < 2:  # nothing to add up, which is most of the work
        table, day = ("rollups", days[0]) if days else ("rollups_ever", ())
        asked = f"FROM {table} WHERE ns = ? {'AND day = ? ' if days else ''}AND dimension = ? "
        return connection.execute(
            f"SELECT value, {TOTALS} {asked} {'' if most < 0 else 'ORDER BY cost_nano DESC, value LIMIT ?'}",
            (ns, *day, dimension, *(() if most < 0 else (most,))),
        ).fetchall()
    if days[0][0] > _lacking_until(connection):
        asked_of = {"ns": ns, "dimension": dimension, "day": days[0][0], "most": most}
        return connection.execute(_SINCE, asked_of).fetchall() if most < 0 else _dearest_since(connection, asked_of)
    return connection.execute(_ADDED_UP, (ns, since_day, "~", dimension, most)).fetchall()


_VALUE: Final = itemgetter(0)
_SUMS: Final = itemgetter(slice(1, None))


def _dearest(sums: tuple[str, Totals]) -> tuple[int, str]:
    return -sums[1].cost_nano, sums[0]


def _dearest_since(connection: sqlite3.Connection, asked: Mapping[str, Any]) -> list[Row]:
    """Who spent most since some day is as a rule one of those who spent most ever, whom an index knows. Where somebody
    else may be, all are looked at; and where there are few.
    """
    asked = {**asked, "likely": min(max(_LIKELY_AT_LEAST, 4 * asked["most"]), _ALL)}
    many = connection.execute(_BEYOND, {**asked, "likely": _MANY * asked["likely"]}).fetchone() is not None
    if many and connection.execute(_BELOW, asked).fetchone() is None:
        rows = connection.execute(_DEAREST_OF_LIKELY, asked).fetchall()
        (beyond,) = connection.execute(_BEYOND, asked).fetchone()
        if len(rows) == asked["most"] and (not rows or rows[-1][1] > beyond):
            return rows
    return connection.execute(_DEAREST_SINCE, asked).fetchall()


def _lacking_until(connection: sqlite3.Connection) -> str:
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (LACKING,)).fetchone()
    return "" if found is None else str(found[0])


def _has_before(connection: sqlite3.Connection, ns: int, day: str) -> bool:
    found = connection.execute("SELECT EXISTS (SELECT 1 FROM rollups WHERE ns = ? AND day < ?)", (ns, day)).fetchone()
    return bool(found[0])


def _totals(rows: Iterable[Row]) -> Iterator[Totals]:
    sums = list(rows)
    try:  # one sum of them all: the quickest way to see that each is an integer
        whole = type(sum(chain.from_iterable(sums))) is int
    except TypeError:
        whole = False
    if not whole:
        raise sqlite3.DataError("the sums of the ledger hold what is no number; begin a new file")
    return map(Totals._make, sums)
