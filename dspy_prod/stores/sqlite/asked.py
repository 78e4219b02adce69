"""What is asked of the file beside records: sums, accounts, terms and holds."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.records import Totals
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.keys import BETWEEN
from dspy_prod.stores.sqlite.indices import ACCOUNT_OF
from dspy_prod.stores.sqlite.rows import TERMS, Row, account_of, terms_of
from dspy_prod.stores.sqlite.schema import TOTALS


def read_account(connection: sqlite3.Connection, ns: int, key: str) -> AccountState:
    """What one account holds."""
    find = "SELECT spent, held, unconfirmed FROM accounts WHERE ns = ? AND key = ?"
    row = connection.execute(find, (ns, carried(key))).fetchone()
    return AccountState() if row is None else _state(key, row)


def _state(key: str, row: Row) -> AccountState:
    try:
        return account_of(key, row)
    except ValueError as error:
        raise sqlite3.DataError(str(error)) from error


def read_accounts(
    connection: sqlite3.Connection, ns: int, prefix: str, suffix: str, most: int
) -> list[tuple[str, AccountState]]:
    """The accounts whose keys begin and end so, those that spent most first."""
    if prefix.count(BETWEEN) == suffix.count(BETWEEN) == 1:  # those of a budget in a window, of which there may be many
        begin, end = ACCOUNT_OF
        alike = f"{begin} = ?2 AND {end} = ?3"
    else:
        alike = "key >= ?2 AND key < ?2 || char(1114111) AND substr(key, length(key) - length(?3) + 1) = ?3"
    found = f"SELECT key, spent, held, unconfirmed FROM accounts WHERE ns = ?1 AND {alike}"
    rows = connection.execute(f"{found} ORDER BY spent DESC, key LIMIT ?4", (ns, carried(prefix), suffix, most))
    return [(_text(row[0]), _state(row[0], row[1:])) for row in rows]


def read_terms(connection: sqlite3.Connection, ns: int) -> list[Terms]:
    """The terms of every budget."""
    rows = connection.execute(f"SELECT {TERMS} FROM budgets WHERE ns = ? ORDER BY name", (ns,))
    return [terms for row in rows if (terms := terms_of(row)) is not None]


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
    )
    return [(_text(row[0]), _text(row[1]), _totals(row[2:])) for row in rows]


def _text(value: Any) -> str:
    """A name; one that is damaged can still be shown."""
    if type(value) is str:
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _totals(row: Row) -> Totals:
    if not all(type(number) is int for number in row):
        raise sqlite3.DataError("the sums of the ledger hold what is no number; begin a new file")
    return Totals(*row)


def read_holds(connection: sqlite3.Connection, ns: int) -> int:
    """Reservations not yet settled, without what is drawn ahead for several calls."""
    alone = "substr(CAST(coalesce(debit, '') AS TEXT), 1, 1) <> '{'"
    found = connection.execute(f"SELECT count(*) FROM holds WHERE ns = ? AND {alone}", (ns,))
    return int(found.fetchone()[0])


def read_sums(
    connection: sqlite3.Connection, ns: int, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    since, most = since_day or "", -1 if most is None else most
    days = connection.execute(
        f"{_DAYS} SELECT day FROM days WHERE day IS NOT NULL LIMIT 2", (ns, since, "~")
    ).fetchall()
    if len(days) == 1:  # nothing to add up, which is most of the work
        rows = connection.execute(
            f"SELECT value, {TOTALS} FROM rollups WHERE ns = ? AND day = ? AND dimension = ? "
            "ORDER BY cost_nano DESC, value LIMIT ?",
            (ns, *days[0], carried(dimension), most),
        )
    else:
        sums = ", ".join(f"sum({name})" for name in Totals._fields)
        rows = connection.execute(
            f"{_DAYS} SELECT value, {sums} FROM days CROSS JOIN rollups WHERE rollups.ns = ?1 AND "
            "rollups.day = days.day AND dimension = ?4 GROUP BY value ORDER BY sum(cost_nano) DESC, value LIMIT ?5",
            (ns, since, "~", carried(dimension), most),
        )
    return [(_text(row[0]), _totals(row[1:])) for row in rows]
