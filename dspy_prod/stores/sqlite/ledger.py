"""The ledger's tables: records, and sums per day that make reading O(1) in the ledger's age."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from math import inf
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.records import OTHER, REFUSED, CallRecord, Totals, alike, rollup_keys
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.sqlite.hits import LEAST, PAGE, HitTables, is_hit
from dspy_prod.stores.sqlite.inserting import Inserting
from dspy_prod.stores.sqlite.pages import Page
from dspy_prod.stores.sqlite.rows import RECORD_COLUMNS, TERMS, Row, account_of, record_of, record_row, terms_of
from dspy_prod.stores.sqlite.schema import TOTALS
from dspy_prod.stores.sqlite.served import Served

INSERT: Final = Inserting("records", ("ns", *CallRecord._fields))
REPLACE: Final = f"{INSERT.statement(1)} ON CONFLICT (ns, id) DO UPDATE SET " + ", ".join(
    f'"{name}" = excluded."{name}"' for name in CallRecord._fields if name != "id"
)
ADD_SUMS: Final = Inserting(
    "rollups",
    ("ns", "day", "dimension", "value", *Totals._fields),
    " ON CONFLICT (ns, day, dimension, value) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in Totals._fields),
)
FIND: Final = f"SELECT {RECORD_COLUMNS} FROM records WHERE ns = ? AND id = ?"

_DAYS_KNOWN: Final = 3

Key = tuple[str, str, str]


class LedgerTables:
    """Appends and corrects records and keeps their sums, inside the writer's transactions."""

    def __init__(self, max_records: int | None) -> None:
        self._max = max_records
        self._since_trim = 0
        self._connection: sqlite3.Connection  # and the namespace's number, from `attach` on
        self._ns: int
        self._sums: dict[Key, list[int]] = {}
        self._known: dict[str, set[tuple[str, str]]] = {}
        self._hits = HitTables()

    def attach(self, connection: sqlite3.Connection, ns: int) -> None:
        """Use this connection from now on."""
        self._connection = connection
        self._ns = ns
        self._hits.attach(connection, ns)
        self.forget()

    def forget(self) -> None:
        """Drop what a rolled back transaction may have left."""
        self._sums.clear()
        self._known.clear()

    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        row = self._connection.execute(FIND, (self._ns, carried(id))).fetchone()
        return self._hits.find(carried(id)) if row is None else record_of(row)

    def write(
        self, appended: Sequence[CallRecord], replaced: Sequence[CallRecord], served: Sequence[Served] = ()
    ) -> None:
        """Append and replace records, then write the sums they change.

        Raises:
            sqlite3.IntegrityError: an appended record is there already; `put` settles that.
        """
        ns = self._ns
        whole = [each for each in served if _whole(each)]
        if len(whole) < len(served):
            few = [each for each in served if each not in whole]
            appended = [*appended, *chain.from_iterable(map(Served.records, few))]
        if appended:
            hits, rows = self._append(appended)
            self._sum(rows, 1)
            self._sum_hits(hits)
        for record in replaced:
            self.put(record)
        for some in whole:
            self._hits.add(Page.of_served(self._newest(), some))
            self._sum_alike(day_of(some.times[0]), rollup_keys(some.like), Totals(cached=len(some)), 1)
        if self._sums:
            ADD_SUMS.run(self._connection, [(ns, *key, *values) for key, values in self._sums.items()])
            self._sums.clear()
        self._since_trim += len(appended) + sum(map(len, whole))
        if self._max is not None and self._since_trim > 100 + self._max // 100:
            self._trim()

    def _newest(self) -> int:
        """`seq` of the newest row of `records`."""
        found: int = self._connection.execute("SELECT coalesce(max(seq), 0) FROM records").fetchone()[0]
        return found

    def _append(self, records: Sequence[CallRecord]) -> tuple[Sequence[CallRecord], Sequence[CallRecord]]:
        """Write new records: hits together, any other as a row; (the hits, the others)."""
        hits = [record for record in records if is_hit(record)]
        rows: Sequence[CallRecord] = records
        if hits:
            newest = self._newest()
            places = [newest] * len(hits)
            rows = ()
            if len(hits) < len(records):
                rows = [record for record in records if not is_hit(record)]
                before = accumulate(not is_hit(record) for record in records)
                places = [newest + place for place, record in zip(before, records, strict=True) if is_hit(record)]
            self._hits.add(Page.of(places, hits))
        INSERT.run(self._connection, [record_row(self._ns, record) for record in rows])
        return hits, rows

    def put(self, record: CallRecord) -> None:
        """Append a record, or put it in place of the one with its id; its sums are written by the next `write`.

        Raises:
            ValueError, TypeError: it has no day.
        """
        day_of(record.started_at)
        old = self.find(record.id)
        if old is not None and is_hit(old):
            self._hits.take(record.id)
        self._connection.execute(REPLACE, record_row(self._ns, record))
        if old is not None:
            self._sum((old,), -1)
        self._sum((record,), 1)

    def _sum(self, records: Iterable[CallRecord], sign: int) -> None:
        groups: dict[tuple[float, tuple[Any, ...]], list[CallRecord]] = {}
        for record in records:
            groups.setdefault((record.started_at // 86_400, alike(record)), []).append(record)
        for together in groups.values():
            group = [record for record in together if record.outcome != REFUSED]
            if group:
                self._sum_alike(day_of(group[0].started_at), rollup_keys(group[0]), Totals.of(*group), sign)

    def _sum_hits(self, hits: Sequence[CallRecord]) -> None:
        """`_sum` of what used nothing, where only how many there are counts."""
        if not hits:
            return
        if len({hit.started_at // 86_400 for hit in hits}) > 1:
            return self._sum(hits, 1)
        kinds = list(map(alike, hits))
        like = dict(zip(kinds, hits, strict=True))
        for kind, count in Counter(kinds).items():
            self._sum_alike(day_of(hits[0].started_at), rollup_keys(like[kind]), Totals(cached=count), 1)

    def _sum_alike(self, day: str, pairs: Iterable[tuple[str, str]], totals: Totals, sign: int) -> None:
        known = self._known.get(day)
        if known is None:
            known = self._load_day(day)
        for pair in pairs:
            if pair not in known:
                if len(known) >= MAX_VALUES_PER_DAY:
                    pair = (pair[0], OTHER)
                known.add(pair)
            key = (day, *pair)
            sums = self._sums.get(key)
            if sums is None:
                sums = self._sums[key] = [0] * len(Totals._fields)
            for index, value in enumerate(totals):
                sums[index] += sign * value

    def _load_day(self, day: str) -> set[tuple[str, str]]:
        while len(self._known) >= _DAYS_KNOWN:
            del self._known[next(iter(self._known))]
        rows = self._connection.execute(
            "SELECT dimension, value FROM rollups WHERE ns = ? AND day = ?", (self._ns, day)
        ).fetchall()
        known = self._known[day] = set(rows)
        return known

    def _trim(self) -> None:
        assert self._max is not None
        self._since_trim = 0
        before = self._kept_since(self._max)
        if before is not None:
            self._connection.execute("DELETE FROM records WHERE ns = ? AND started_at < ?", (self._ns, before))
            self._hits.trim(before)

    def _kept_since(self, most: int) -> float | None:
        """The moment since which there are about so many records; None when there are not more."""
        pages, until = self._hits.ends(), inf
        step = most // 100 // PAGE + 1
        for start in range(0, len(pages), step):
            begin, hits = pages[start : start + step][-1][0], sum(size for _, size in pages[start : start + step])
            between = "SELECT count(*) FROM records WHERE ns = ? AND started_at >= ? AND started_at < ?"
            rows = self._connection.execute(between, (self._ns, begin, until)).fetchone()[0]
            if rows > most:
                break
            if hits + rows > most:
                return begin
            most, until = most - hits - rows, begin
        return self._row_before(until, most)

    def _row_before(self, until: float, skip: int) -> float | None:
        row = self._connection.execute(
            "SELECT started_at FROM records WHERE ns = ? AND started_at < ? ORDER BY started_at DESC LIMIT 1 OFFSET ?",
            (self._ns, until, skip),
        ).fetchone()
        return None if row is None else row[0]


def _whole(served: Served) -> bool:
    """Whether these are worth a page of their own: enough of them, and of one day."""
    return len(served) >= LEAST and len({at // 86_400 for at in served.times}) == 1 and is_hit(served.like)


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
    rows = connection.execute(
        "SELECT key, spent, held, unconfirmed FROM accounts WHERE ns = ?1 AND key >= ?2 AND key < ?2 || char(1114111) "
        "AND substr(key, -length(?3)) = ?3 ORDER BY spent DESC, key LIMIT ?4",
        (ns, carried(prefix), suffix, most),
    )
    return [(_text(row[0]), _state(row[0], row[1:])) for row in rows]


def read_terms(connection: sqlite3.Connection, ns: int) -> list[Terms]:
    """The terms of every budget."""
    rows = connection.execute(f"SELECT {TERMS} FROM budgets WHERE ns = ? ORDER BY name", (ns,))
    return [terms for row in rows if (terms := terms_of(row)) is not None]


_DAYS: Final = """
    WITH RECURSIVE days (day) AS (
        SELECT min(day) FROM rollups WHERE ns = ?1 AND day >= ?2 AND day <= ?3
        UNION ALL
        SELECT (SELECT min(day) FROM rollups WHERE ns = ?1 AND day > days.day AND day <= ?3)
        FROM days WHERE days.day IS NOT NULL)
"""
"""The days that have sums. Stepping from one to the next, no row of another dimension is read."""


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
    alone = "CAST(coalesce(debit, '') AS TEXT) NOT LIKE '{%'"
    found = connection.execute(f"SELECT count(*) FROM holds WHERE ns = ? AND {alone}", (ns,))
    return int(found.fetchone()[0])


def read_sums(
    connection: sqlite3.Connection, ns: int, dimension: str, since_day: str | None, most: int | None
) -> list[tuple[str, Totals]]:
    """(value, sums over the days) of one dimension, the dearest first."""
    sums = ", ".join(f"sum({name})" for name in Totals._fields)
    rows = connection.execute(
        f"{_DAYS} SELECT value, {sums} FROM days CROSS JOIN rollups WHERE rollups.ns = ?1 AND rollups.day = days.day "
        "AND dimension = ?4 GROUP BY value ORDER BY sum(cost_nano) DESC, value LIMIT ?5",
        (ns, since_day or "", "~", carried(dimension), -1 if most is None else most),
    )
    return [(_text(row[0]), _totals(row[1:])) for row in rows]
