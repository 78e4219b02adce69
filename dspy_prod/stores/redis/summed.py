"""Reading the sums of the ledger in Redis: what is asked of a day takes two commands, however many records it had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter

import numpy as np
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
    each = zip(names, _values(connection, keys, named, names), strict=True)
    found = [(day, name, Totals(*some.at(place))) for day, some in each for place, name in enumerate(some.values)]
    return sorted(found, key=itemgetter(0, 1))


def read_sums(
    connection: Connection, keys: LedgerKeys, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    days = _days(connection, keys, since_day, None)
    if dimension == "all":
        found = [("", _added([totals for _, totals in days]))] if days else []
        return found[:most]
    places: dict[str, int] = {}
    added = np.zeros((0, len(Totals._fields)), np.int64)
    for some in _values(connection, keys, carried(dimension), [day for day, _ in days]):
        rows = [places.setdefault(value, len(places)) for value in some.values]
        added.resize((len(places), added.shape[1]), refcheck=False)
        added[rows] += some.numbers  # no day has a value twice
    costs: list[int] = added[:, 0].tolist()
    dearest = sorted(places, key=lambda value: (-costs[places[value]], value))[:most]
    return [(value, Totals(*added[places[value]].tolist())) for value in dearest]


def _added(each: Iterable[Sequence[int]]) -> Totals:
    return Totals(*map(sum, zip(*each, strict=True)))


def _days(
    connection: Connection, keys: LedgerKeys, since_day: str | None, until_day: str | None
) -> list[tuple[str, Totals]]:
    """The days that have sums, oldest first, and what each sums up to as a whole."""
    first, last = since_day or "", until_day or "~"
    (some,) = _values(connection, keys, DAYS[1], [DAYS[0]])
    return sorted((day, Totals(*some.at(place))) for place, day in enumerate(some.values) if first <= day <= last)


def _values(connection: Connection, keys: LedgerKeys, dimension: str, days: Sequence[str]) -> list[_Values]:
    """The values of a dimension and their sums, of each of some days."""
    if not days:
        return []
    names, sums = connection.read([("MGET", *(of(day, dimension) for day in days)) for of in (keys.names, keys.sums)])
    return [_Values(listed, packed) for listed, packed in zip(names, sums, strict=True)]


class _Values:
    """What one day has of a dimension: there may be thousands, of which few are shown.

    Attributes:
        values: in the order of their places. numbers: the sums of each, a row of the fields of `Totals`.
    """

    def __init__(self, listed: bytes | None, packed: bytes | None) -> None:
        try:
            self.values: list[str] = orjson.loads(b"[%s]" % (listed or b"")[:-1])
        except ValueError as error:
            raise StoreUnavailableError("the sums of the ledger are damaged; begin a new namespace") from error
        size = len(self.values) * SUMS.size
        packed = (packed or b"")[:size].ljust(size, b"\0")
        self.numbers = np.frombuffer(packed, ">i8").reshape(len(self.values), len(Totals._fields))

    def at(self, place: int) -> Sequence[int]:
        """The sums of one."""
        found: list[int] = self.numbers[place].tolist()
        return found


def _of_one(
    connection: Connection, keys: LedgerKeys, dimension: str, days: list[str], value: str
) -> list[tuple[str, str, Totals]]:
    places = connection.read([("HGET", keys.slots(day, dimension), value) for day in days]) if days else []
    known = [(day, int(place)) for day, place in zip(days, places, strict=True) if place is not None]
    size = SUMS.size
    commands = [("GETRANGE", keys.sums(day, dimension), place * size, (place + 1) * size - 1) for day, place in known]
    packed = connection.read(commands) if commands else []
    return [(day, value, totals_of(some, 0)) for (day, _), some in zip(known, packed, strict=True)]
