"""The ledger in Redis: records, and sums per day that make reading O(1) in the ledger's age."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from dspy_prod.records import CallRecord, Totals, rollup_keys
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.memory_ledger import day_of
from dspy_prod.stores.redis.batch import STEPS, Batch, Value
from dspy_prod.stores.redis.bodies import body_of, fitting
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.finding import find_record, read_records
from dspy_prod.stores.redis.hits import LEAST, Loose, pages_of, pages_of_served
from dspy_prod.stores.redis.ledger_keys import LedgerKeys
from dspy_prod.stores.redis.summed import read_sums, read_totals
from dspy_prod.stores.redis.summing import Summing
from dspy_prod.stores.sqlite.hits import is_hit

STEP: Final = "ledger"
_LUA: Final = ("ledger.lua", "ledger_sums.lua", "ledger_hits.lua", "ledger_rows.lua")
STEPS[STEP] = "\n".join(
    ["(function()", *(Path(__file__).with_name(name).read_text("utf-8") for name in _LUA), "end)()"]
)

KEEP_DAYS: Final = 90
"""Days after which a record is no longer kept, counted from when it was written."""
KEEP_SUMS_DAYS: Final = 400
"""Days for which the sums of a day are kept after the last change to them."""
MAX_RECORDS: Final = 200_000
"""Records that are kept, unless told otherwise: 0.3 GB of the server's memory, about 1.5 kB each with indices."""

_DAY: Final = 86_400
_AT_LEAST: Final = 16
"""Old records that one commit may drop, beside two for each that it appends."""


class RedisLedger:
    """Appends and replaces records and keeps their sums, by commands of a commit; reads them at any time.

    Args:
        connection: whose namespace it is of.
        max_records: about so many of the newest are kept, None as many as come in `keep_days`; sums are kept for all.
        keep_days: days after which a record is dropped, from when it was written.
    """

    def __init__(
        self, connection: Connection, max_records: int | None = MAX_RECORDS, keep_days: int = KEEP_DAYS
    ) -> None:
        self._connection = connection
        self._keys = LedgerKeys(connection)
        self._most = -1 if max_records is None else max_records
        self._keep = keep_days
        self._ttl = (keep_days + 2) * _DAY  # what is found by an index goes before it

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(
        self,
        batch: Batch,
        appended: Sequence[CallRecord],
        replaced: Sequence[CallRecord],
        served: Sequence[Served] = (),
    ) -> list[CallRecord]:
        """Append and replace records, with the sums they change; those that cannot be written.

        A row that is appended with the id of another takes its place, too; a hit is looked for only where `replaced`
        says so.
        """
        if not (appended or replaced or served):
            return []
        new, lost = _dated(appended)
        again, lost_again = _dated(replaced)
        summing = Summing()
        loose = [record for record in new if _is_loose(record)]
        rows = [record for record in new if not _is_loose(record)] if loose else new
        pages: list[bytes] = []
        for some in Served.together(served):
            if len(some) >= LEAST:
                pages += pages_of_served(some)
                summing.add_served(fitting(some.like), some.times, some.saved)
            else:
                loose += map(fitting, some.records())
        summing.add(chain(rows, loose, again))
        # The sums first: what a replaced record had added is taken from where its value is by then.
        for day, added in summing.arguments():
            self._call(batch, "sums", day, KEEP_SUMS_DAYS * _DAY, *added)
        self._rows(batch, rows, False)
        hits = list(map(Loose.of, loose))
        if len(hits) >= LEAST:
            pages += pages_of(hits)
        elif hits:
            own: list[Value] = []
            for hit in hits:
                own += hit.id, hit.each, hit.template
            self._call(batch, "loose", self._ttl, *own)
        if pages:
            self._call(batch, "pages", self._ttl, *pages)
        self._rows(batch, again, True)
        count = len(new) + len(again) + sum(map(len, served))
        self._call(batch, "trim", self._ttl, self._keep, self._most, _AT_LEAST + 2 * count)
        return lost + lost_again

    def _rows(self, batch: Batch, records: Sequence[CallRecord], look: bool) -> None:
        if records:
            each: list[Value] = []
            for record in records:
                each += record.id, repr(float(record.started_at)), body_of(record)
            self._call(batch, "rows", self._ttl, int(look), *each)

    def _call(self, batch: Batch, operation: str, *arguments: Value) -> None:
        batch.call(STEP, self._keys.base, operation, *arguments)

    # -- reading -----------------------------------------------------------------------------------------------------
    def find(self, id: str) -> CallRecord | None:
        """The record with this id."""
        return find_record(self._connection, self._keys, id)

    def records(
        self, since: float | None, until: float | None, limit: int | None, equals: Mapping[str, str]
    ) -> list[CallRecord]:
        """Matching records, newest first, see `Ledger`."""
        return read_records(self._connection, self._keys, since, until, limit, equals)

    def unconfirmed(self, since: float | None) -> list[CallRecord]:
        """Records whose cost is an upper bound, newest first. Only days that have some are read."""
        first = None if since is None else day_of(since)
        found: list[CallRecord] = []
        for day, _, sums in reversed(self.totals("all", first, None, None)):
            if sums.unconfirmed_nano > 0:
                begin = dt.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
                begin, end = begin if since is None else max(begin, since), begin + _DAY
                records = self.records(begin, end, None, {})
                found += [record for record in records if record.estimated and (record.cost_nano or 0) > 0]
        return found

    def totals(
        self, dimension: str, since_day: str | None, until_day: str | None, value: str | None
    ) -> list[tuple[str, str, Totals]]:
        """(day, value, sums) of one dimension, or of one value of it, see `Ledger`."""
        return read_totals(self._connection, self._keys, dimension, since_day, until_day, value)

    def sums(self, dimension: str, since_day: str | None, most: int | None) -> list[tuple[str, Totals]]:
        """(value, sums since a day) of one dimension, the dearest first, see `Ledger`."""
        return read_sums(self._connection, self._keys, dimension, since_day, most)


def _is_loose(record: CallRecord) -> bool:
    """Whether a record may be kept on a page, where it is found by how its ids begin."""
    return is_hit(record) and f"{record.id}{record.call_id}".isascii()


def _dated(records: Iterable[CallRecord]) -> tuple[list[CallRecord], list[CallRecord]]:
    """(those that can be kept, as they can be; those that have no day, or tags that are none)."""
    kept, lost = [], []
    for record in records:
        fit = fitting(record)
        try:
            day_of(fit.started_at)
            if fit.tags != ():
                rollup_keys(fit)
            kept.append(fit)
        except (ValueError, TypeError, OverflowError, OSError):
            lost.append(record)
    return kept, lost
