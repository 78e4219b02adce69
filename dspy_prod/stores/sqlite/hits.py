"""The records of cached answers: many in one row, for a row of its own would cost more than the answer.

A page is a row of `hits`, and is looked up through `hit_values`, which has a row for each value that a field has in it.
The hits of a small batch stay loose, a page without values that every question reads; once there are enough of them,
they make a page. Reads see hits and rows of `records` as one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import ceil, inf
from typing import Final

from dspy_prod.records import CallRecord
from dspy_prod.stores.sqlite.indices import SELECTIVE
from dspy_prod.stores.sqlite.inserting import Inserting
from dspy_prod.stores.sqlite.pages import Found, Page, looked_up_as, rougher
from dspy_prod.stores.sqlite.rows import Row

PAGE: Final = 256
"""Hits of a page at most."""
LEAST: Final = 64
"""Hits that are worth a page; fewer are loose, for every question has to read those."""

TABLES: Final = (
    """
    CREATE TABLE IF NOT EXISTS hits (
        seq INTEGER PRIMARY KEY, ns INTEGER NOT NULL, loose INTEGER NOT NULL, size INTEGER NOT NULL,
        first_id TEXT NOT NULL, last_id TEXT NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
        body BLOB NOT NULL)
    """,
    "CREATE INDEX IF NOT EXISTS hits_loose ON hits (ns, size, first_id, last_id) WHERE loose",
    "CREATE INDEX IF NOT EXISTS hits_ended ON hits (ns, last_at, first_at, size) WHERE NOT loose",
    """
    CREATE TABLE IF NOT EXISTS hit_values (
        ns INTEGER, field TEXT, value TEXT, last_at REAL, page INTEGER, first_at REAL NOT NULL,
        PRIMARY KEY (ns, field, value, last_at, page)) WITHOUT ROWID
    """,
)

_PUT: Final = "INSERT INTO hits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_VALUES: Final = Inserting("hit_values", ("ns", "field", "value", "last_at", "page", "first_at"))
_LOOSE: Final = "SELECT seq, body FROM hits WHERE ns = ? AND loose ORDER BY seq"
_LOOSE_IDS: Final = "SELECT total(size), min(first_id), max(last_id) FROM hits WHERE ns = ? AND loose"
_OVERLAPPING: Final = (
    "SELECT seq, body FROM hits WHERE seq IN (SELECT page FROM hit_values WHERE ns = ? AND field = 'id' AND value >= ? "
    "AND value <= ?) AND first_id <= ? AND last_id >= ?"
)


def is_hit(record: CallRecord) -> bool:
    """Whether a record may be kept on a page: it used nothing, nobody was charged, so nothing of it is ever settled."""
    return (
        record.cached
        and record.cost_nano == 0
        and record.input_tokens is record.output_tokens is None
        and not (record.accounts or record.estimated)
    )


class HitTables:
    """Writes hits inside the writer's transactions."""

    def attach(self, connection: sqlite3.Connection, ns: int) -> None:
        """Use this connection from now on."""
        self._connection = connection
        self._ns = ns
        self.forget()

    def forget(self) -> None:
        """What was known of the file may not be so any more."""
        self._loose: tuple[int, str, str] | None = None  # how many are loose, their first and their last id

    def add(self, page: Page, *, is_new: bool = False) -> None:
        """Append the hits of a page, each after its place among the rows of `records`.

        Args:
            is_new: nobody can have written them, so that it need not be asked for their ids.

        Raises:
            sqlite3.IntegrityError: one is there already. TypeError: one cannot be kept so.
        """
        connection, ns = self._connection, self._ns
        if self._loose is None:
            self._loose = connection.execute(_LOOSE_IDS, (ns,)).fetchone()
        size, since, until = self._loose
        enough = size + page.size >= LEAST
        near = [] if is_new else self._near(page)
        loose = []
        if size and (enough or (not is_new and since <= max(page.column("id")) and until >= min(page.column("id")))):
            loose = _loaded(connection.execute(_LOOSE, (ns,)))
        if not is_new:
            ids = set(page.column("id"))
            if len(ids) < page.size or any(not ids.isdisjoint(other.column("id")) for other in (*near, *loose)):
                raise sqlite3.IntegrityError("a hit is there already")
        if not enough:
            self._put(page, loose=True)
            return
        if size:
            self._loose = None
            connection.execute("DELETE FROM hits WHERE ns = ? AND loose", (ns,))
            page = Page.joined([*loose, page])
        each = ceil(page.size / ceil(page.size / PAGE))
        values: list[Row] = []
        for start in range(0, page.size, each):
            values += self._put(page.part(start, start + each))
        _PUT_VALUES.run(connection, values)

    def _near(self, page: Page) -> list[Page]:
        """The pages that may have one with an id of this one's."""
        ids = page.column("id")
        rough = rougher(ids)
        between = (self._ns, min(rough), max(rough), max(ids), min(ids))
        return _loaded(self._connection.execute(_OVERLAPPING, between))

    def find(self, id: str) -> CallRecord | None:
        """The hit with this id."""
        held = self._holding(id)
        return None if held is None else held[1].find({"id": id})[0].record

    def take(self, id: str) -> None:
        """Remove a hit, if there is one with this id: it becomes a row of its own."""
        held = self._holding(id)
        if held is not None:
            self._delete([held[0]])
            left = [found for found in held[1].all() if found.record.id != id]
            if left:
                page = Page.of([found.place for found in left], [found.record for found in left])
                _PUT_VALUES.run(self._connection, self._put(page, seq=held[0]))

    def ends(self) -> list[tuple[float, int]]:
        """(when it ended, how many hits it has) of every page, the newest first."""
        ended = "SELECT last_at, size FROM hits WHERE ns = ? AND NOT loose ORDER BY last_at DESC"
        return self._connection.execute(ended, (self._ns,)).fetchall()

    def trim(self, before: float) -> None:
        """Delete the pages that ended before a moment."""
        ended = "SELECT seq FROM hits WHERE ns = ? AND NOT loose AND last_at < ?"
        self._delete([seq for (seq,) in self._connection.execute(ended, (self._ns, before)).fetchall()])

    def _put(self, page: Page, *, loose: bool = False, seq: int | None = None) -> list[Row]:
        """Write a page; the rows of `hit_values` that belong to it."""
        if loose:
            self._loose = None
        ids, times, pairs = page.column("id"), page.column("started_at"), page.pairs()
        first_at, last_at = min(times), max(times)
        row = (seq, self._ns, loose, page.size, min(ids), max(ids), first_at, last_at, page.dump())
        seq = self._connection.execute(_PUT, row).lastrowid
        return [] if loose else [(self._ns, *pair, last_at, seq, first_at) for pair in pairs]

    def _delete(self, pages: Sequence[int]) -> None:
        self._loose = None
        for seq in pages:
            row = self._connection.execute("SELECT last_at, body FROM hits WHERE seq = ?", (seq,)).fetchone()
            self._connection.executemany(
                "DELETE FROM hit_values WHERE ns = ? AND field = ? AND value = ? AND last_at = ? AND page = ?",
                [(self._ns, *pair, row[0], seq) for pair in Page.load(row[1]).pairs()],
            )
            self._connection.execute("DELETE FROM hits WHERE seq = ?", (seq,))

    def _holding(self, id: str) -> tuple[int, Page] | None:
        pages = chain(_loose(self._connection, self._ns), _paged(self._connection, self._ns, None, None, {"id": id}))
        return next(((seq, page) for seq, _, page in pages if id in page.column("id")), None)


def read_hits(
    connection: sqlite3.Connection,
    ns: int,
    since: float | None,
    until: float | None,
    limit: int | None,
    equals: Mapping[str, str],
) -> list[Found]:
    """Matching hits in no order; with a limit at least that many of the newest."""
    found = [each for _, _, page in _loose(connection, ns) for each in page.find(equals, since, until)]
    for _, last_at, page in _paged(connection, ns, since, until, equals):
        if limit is not None and len(found) >= limit:
            found.sort(reverse=True)
            if not limit or found[limit - 1].started_at > last_at:
                break
        found += page.find(equals, since, until)
    return found


def _loaded(rows: sqlite3.Cursor) -> list[Page]:
    return [Page.load(body, seq) for seq, body in rows.fetchall()]


_Pages = Iterator[tuple[int, float, Page]]


def _loose(connection: sqlite3.Connection, ns: int) -> _Pages:
    for seq, body in connection.execute(_LOOSE, (ns,)).fetchall():
        yield seq, inf, Page.load(body, seq)


def _paged(
    connection: sqlite3.Connection, ns: int, since: float | None, until: float | None, equals: Mapping[str, str]
) -> _Pages:
    """The pages that may hold a match, those that ended last first, read as they are asked for."""
    begin, end = -inf if since is None else since, inf if until is None else until
    names = [name for name in SELECTIVE if name in equals]
    values = [(name, looked_up_as(name, str(equals[name]))) for name in names]
    if values:
        also = "AND EXISTS (SELECT 1 FROM hit_values o WHERE o.ns = v.ns AND o.field = ? AND o.value = ? "
        also += "AND o.last_at = v.last_at AND o.page = v.page) "
        sql = (
            "SELECT hits.seq, hits.last_at, body FROM hit_values v CROSS JOIN hits ON hits.seq = v.page WHERE v.ns = ? "
            f"AND v.field = ? AND v.value = ? AND v.last_at >= ? AND v.first_at < ? {also * (len(values) - 1)}"
            "ORDER BY v.last_at DESC, v.page DESC"
        )
        (first, *others) = values
        rows = connection.execute(sql, (ns, *first, begin, end, *chain.from_iterable(others)))
    else:
        sql = (
            "SELECT seq, last_at, body FROM hits WHERE ns = ? AND NOT loose AND last_at >= ? AND first_at < ? "
            "ORDER BY last_at DESC"
        )
        rows = connection.execute(sql, (ns, begin, end))
    for seq, last_at, body in rows:
        yield seq, last_at, Page.load(body, seq)
