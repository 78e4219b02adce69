"""The ledger's tables: records, and sums per day that make reading O(1) in the ledger's age."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from math import inf
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.records import OTHER, REFUSED, CallRecord, Totals, alike, rollup_keys
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.sqlite.hits import LEAST, PAGE, HitTables, is_hit
from dspy_prod.stores.sqlite.inserting import Inserting
from dspy_prod.stores.sqlite.pages import Page
from dspy_prod.stores.sqlite.rollups import ADD_SUMS
from dspy_prod.stores.sqlite.rows import RECORD_COLUMNS, record_of, record_row

INSERT: Final = Inserting("records", ("ns", *CallRecord._fields))
REPLACE: Final = f"{INSERT.statement(1)} ON CONFLICT (ns, id) DO UPDATE SET " + ", ".join(
    f'"{name}" = excluded."{name}"' for name in CallRecord._fields if name != "id"
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
        self.changed()

    def changed(self) -> None:
        """What others may have written since is not known here."""
        self._last: int | None = None  # `seq` of the newest row of `records`
        self._hits.forget()

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
        kinds = Served.together(served)
        whole = [each for each in kinds if _whole(each)]
        new = [not each.tried for each in whole]
        for each in served:
            each.tried = True
        if len(whole) < len(kinds):
            few = [each for each in kinds if each not in whole]
            appended = [*appended, *chain.from_iterable(map(Served.records, few))]
        if appended:
            hits, rows = self._append(appended)
            self._sum(rows, 1)
            self._sum_hits(hits)
        for record in replaced:
            self.put(record)
        for some, is_new in zip(whole, new, strict=True):
            self._hits.add(Page.of_served(self._newest(), some), is_new=is_new)
            self._sum_alike(day_of(some.times[0]), rollup_keys(some.like), Totals.of_hits(some.saved), 1)
        if self._sums:
            ADD_SUMS.run(self._connection, [(ns, *key, *values) for key, values in self._sums.items()])
            self._sums.clear()
        self._since_trim += len(appended) + sum(map(len, whole))
        if self._max is not None and self._since_trim > 100 + self._max // 100:
            self._trim()

    def _newest(self) -> int:
        """`seq` of the newest row of `records`."""
        if self._last is None:
            self._last = int(self._connection.execute("SELECT coalesce(max(seq), 0) FROM records").fetchone()[0])
        return self._last

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
        if rows:
            self._last = None
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
        self._last = None
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
        """`_sum` of what used nothing, where only how many there are counts, and what they would have cost."""
        if not hits:
            return
        if len({hit.started_at // 86_400 for hit in hits}) > 1:
            return self._sum(hits, 1)
        kinds: dict[tuple[Any, ...], list[CallRecord]] = {}
        for hit in hits:
            kinds.setdefault(alike(hit), []).append(hit)
        for like in kinds.values():
            sums = Totals.of_hits([hit.saved_nano for hit in like])
            self._sum_alike(day_of(hits[0].started_at), rollup_keys(like[0]), sums, 1)

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
        self._since_trim, self._last = 0, None
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
    times = served.times
    return len(times) >= LEAST and min(times) // 86_400 == max(times) // 86_400 and is_hit(served.like)
