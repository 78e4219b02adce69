"""Reading the sums of the ledger in Redis: what is asked of a day takes two commands, however many records it had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter

import orjson

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.records import Totals
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.ledger_keys import LedgerKeys
from dspy_prod.stores.redis.summing import DAYS, SUMS, totals_of


def read_totals(
    connection: Connection,
    keys: LedgerKeys,
    dimension: str,
    since_day: str | None,
    until_day: str | None,
    value: str | None,
) -> list[tuple[str, str, Totals]]:
    """(day, value, sums) of one dimension, or of one value of it; oldest day first."""
    days = _days(connection, keys, since_day, until_day)
    if dimension == "all":
        return [(day, "", totals) for day, totals in days if value in (None, "")]
    names, named = [day for day, _ in days], carried(dimension)
    if value is not None:
        return _of_one(connection, keys, named, names, carried(value))
    days_rows = _values(connection, keys, named, names)
    found = [(day, value, Totals._make(totals)) for day, rows in days_rows for value, totals in rows]
    return sorted(found, key=itemgetter(0, 1))


def read_sums(
    connection: Connection, keys: LedgerKeys, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    days = _days(connection, keys, since_day, None)
    if dimension == "all":
        found = [("", _added([totals for _, totals in days]))] if days else []
        return found[:most]
    each = [dict(rows) for _, rows in _values(connection, keys, carried(dimension), [day for day, _ in days])]
    costs: dict[str, int] = {}
    for rows in each:
        for value, totals in rows.items():
            costs[value] = costs.get(value, 0) + totals[0]
    dearest = sorted(costs, key=lambda value: (-costs[value], value))[:most]
    return [(value, _added([rows[value] for rows in each if value in rows])) for value in dearest]


def _added(each: Iterable[Sequence[int]]) -> Totals:
    return Totals(*map(sum, zip(*each, strict=True)))


def _days(
    connection: Connection, keys: LedgerKeys, since_day: str | None, until_day: str | None
) -> list[tuple[str, Totals]]:
    """The days that have sums, oldest first, and what each sums up to as a whole."""
    first, last = since_day or "", until_day or "~"
    ((_, rows),) = _values(connection, keys, DAYS[1], [DAYS[0]])
    return [(day, Totals(*totals)) for day, totals in sorted(rows) if first <= day <= last]


def _values(
    connection: Connection, keys: LedgerKeys, dimension: str, days: Sequence[str]
) -> list[tuple[str, Iterable[tuple[str, tuple[int, ...]]]]]:
    """(value, sums) of every value of a dimension, for each of some days."""
    if not days:
        return []
    names, sums = connection.read([("MGET", *(of(day, dimension) for day in days)) for of in (keys.names, keys.sums)])
    return [(day, _rows(listed, packed)) for day, listed, packed in zip(days, names, sums, strict=True)]


def _rows(listed: bytes | None, packed: bytes | None) -> Iterable[tuple[str, tuple[int, ...]]]:
    try:
        values = orjson.loads(b"[%s]" % (listed or b"")[:-1])
    except ValueError as error:
        raise StoreUnavailableError("the sums of the ledger are damaged; begin a new namespace") from error
    size = len(values) * SUMS.size
    return zip(values, SUMS.iter_unpack((packed or b"")[:size].ljust(size, b"\0")), strict=True)


def _of_one(
    connection: Connection, keys: LedgerKeys, dimension: str, days: list[str], value: str
) -> list[tuple[str, str, Totals]]:
    places = connection.read([("HGET", keys.slots(day, dimension), value) for day in days]) if days else []
    known = [(day, int(place)) for day, place in zip(days, places, strict=True) if place is not None]
    size = SUMS.size
    commands = [("GETRANGE", keys.sums(day, dimension), place * size, (place + 1) * size - 1) for day, place in known]
    packed = connection.read(commands) if commands else []
    return [(day, value, totals_of(some, 0)) for (day, _), some in zip(known, packed, strict=True)]
